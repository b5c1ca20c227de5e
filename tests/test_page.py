"""The HTML report in headless Chromium: no errors, nothing fetched, charts, keyboard, colours, accessibility, size."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_subjects import deep, summary

import allocator
from allocator.errors import InputError, MissingPackageError
from allocator.reporting import Summary, as_text, summarise
from allocator.reporting.charts import COLOURS, bins, part_names, parts_of, share_rows
from allocator.reporting.page import page_data
from allocator.reporting.pictures import Panel, draw_shares

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">名前"


def wait(browser: Any, seconds: float) -> Any:
    """Something to call `until` on."""
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, seconds)


def visit(browser: Any, path: Path, of: Summary, charts: int = 4) -> None:
    """Open a report and wait for its charts."""

    path.write_text(as_text(of, "html"), encoding="utf-8")
    browser.get(path.as_uri())
    counted = "return document.querySelectorAll('#charts svg').length"
    wait(browser, 30).until(lambda b: b.execute_script(counted) == charts)


def test_the_page_works_and_is_quiet(browser: Any, tmp_path: Path) -> None:
    visit(browser, tmp_path / "report.html", summary("60%", True))
    run = browser.execute_script
    assert run("return [...document.querySelectorAll('#charts h2')].map(e => e.textContent)") == [
        "FLOPs per block",
        "Neurons per scale",
        "What the budget leaves",
        "Budget against importance",
    ]
    # the stacked bars: two parts in the concatenation, one scale of the groups
    assert run("return document.querySelectorAll('#chart-shares .mark-rect path').length") >= 3
    assert run("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == []


def test_the_keyboard_opens_blocks_and_tables(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    visit(browser, tmp_path / "report.html", summary("60%", True))
    run = browser.execute_script
    seen = []
    for _ in range(40):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        seen.append(run("return document.activeElement.closest('details')?.id || document.activeElement.id"))
        if seen[-1] == "block-0":
            break
    assert seen[-1] == "block-0"
    assert seen.index("theme") < seen.index("find") < seen.index("close")
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    lanes = "return [...document.querySelectorAll('#block-0 .lane > .name')].map(e => e.textContent)"
    wait(browser, 10).until(lambda _: run(lanes) == ["fine.0", "coarse.0"])
    run("document.getElementById('block-2').open = true")
    inner = "return document.querySelector('#block-2 #block-1') !== null"  # the groups lie within the sum
    wait(browser, 10).until(lambda _: run(inner))
    run("document.querySelector('#chart-flops details').open = true")
    rows = "return [...document.querySelectorAll('#chart-flops tbody tr')].map(e => e.textContent)"

    wait(browser, 10).until(lambda _: run(rows))
    assert "modelnow247,296" in run(rows)


def test_blocks_show_histograms_with_the_cut(browser: Any, tmp_path: Path) -> None:

    visit(browser, tmp_path / "report.html", summary("60%", True))
    run = browser.execute_script
    run("document.getElementById('block-0').open = true")
    drawn = "return document.querySelectorAll('#block-0 .layer_1_marks line').length"
    wait(browser, 20).until(lambda _: run(drawn) == 1)
    scores = summary("60%").blocks[0].scores
    assert scores is not None
    assert f"all above {scores.cut:.5g} are kept" in run(
        "return document.querySelector('#block-0 figcaption').textContent"
    )


def test_a_phone_shows_all_of_it(browser: Any, tmp_path: Path) -> None:
    """At 390 pixels nothing is wider than the screen, blocks opened; at 1200 bars of few blocks are not stretched."""
    of = summary("60%", True)
    visit(browser, tmp_path / "report.html", of)
    run = browser.execute_script
    wide = run("return document.querySelector('#chart-flops .chart').clientWidth")
    assert wide <= 16 * (9 + 5 * (len(of.blocks) + 1))
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        visit(browser, tmp_path / "report.html", of)
        run("for (const e of document.querySelectorAll('details')) e.open = true")
        drawn = "return document.querySelectorAll('#network figure svg').length > 0"
        wait(browser, 20).until(lambda _: run(drawn))
        assert run("return document.documentElement.scrollWidth") <= 390
        ends = "[...document.querySelectorAll('summary, #charts svg')].map(e => e.getBoundingClientRect().right)"
        assert run(f"return Math.max(...{ends})") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_closed_rows_say_what_changes(browser: Any, tmp_path: Path) -> None:
    of = summary("60%", True)
    visit(browser, tmp_path / "report.html", of)
    said = browser.execute_script("return document.querySelector('#block-0 > summary').textContent")
    block = of.blocks[0]
    assert f"{block.channels} → {block.kept} channels" in said
    assert re.search(r"[\d.]+ k → [\d.]+ k FLOPs", said)
    assert browser.get_log("browser") == []


def test_both_colour_schemes(browser: Any, tmp_path: Path) -> None:
    visit(browser, tmp_path / "report.html", summary("60%", True))
    from selenium.webdriver.support.select import Select

    seen: dict[str, str] = {}
    for name in ("light", "dark"):
        Select(browser.find_element("id", "theme")).select_by_value(name)
        ink = "return document.querySelector('#chart-flops svg text').getAttribute('fill')"

        wait(browser, 20).until(lambda b, ink=ink: b.execute_script(ink) not in seen.values())
        seen[name] = browser.execute_script(ink)
        page = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert page == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 27)"}[name]
    assert seen == {"light": "#1b2127", "dark": "#e7ecf1"}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(browser: Any, tmp_path: Path, theme: str) -> None:
    axe = pytest.importorskip("axe_core_python", reason="axe-core checks accessibility")
    visit(browser, tmp_path / "report.html", summary("60%", True))
    run = browser.execute_script
    run(
        "const e = document.getElementById('theme'); e.value = arguments[0]; e.dispatchEvent(new Event('change'))",
        theme,
    )
    run("for (const e of document.querySelectorAll('details')) e.open = true")
    run((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    ask = "const done = arguments[0]; setTimeout(() => axe.run(document).then(done), 1500)"
    found = browser.execute_async_script(ask)
    said = [(each["id"], [node["html"][:160] for node in each["nodes"]][:3]) for each in found["violations"]]
    assert said == []
    assert len(found["passes"]) > 15


def test_names_are_text_and_nothing_else(browser: Any, tmp_path: Path) -> None:
    of = summary("60%", True)
    of = replace(of, model=HOSTILE, blocks=(replace(of.blocks[0], name=HOSTILE), *of.blocks[1:]), notes=(HOSTILE,))
    visit(browser, tmp_path / "報告.html", of)
    run = browser.execute_script
    assert run("return document.title") == f"{HOSTILE} – neuron allocation"
    assert run("return document.querySelector('h1').textContent") == HOSTILE
    assert run("return document.querySelector('#block-0 .name').textContent") == HOSTILE
    assert run("return document.querySelectorAll('img').length") == 0
    assert browser.get_log("browser") == []


def test_five_thousand_blocks_stay_usable(browser: Any, tmp_path: Path) -> None:
    visit(browser, tmp_path / "deep.html", deep(5000))
    assert (tmp_path / "deep.html").stat().st_size < 10e6
    run = browser.execute_script
    assert run("return document.querySelectorAll('*').length") < 8000
    took = run("return performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert took < 20_000  # a loaded machine of two cores; about one second on a quiet one
    run("const e = document.getElementById('find'); e.value = 'stage4999.'; e.dispatchEvent(new Event('input'))")
    assert run("return document.getElementById('found').textContent") == "1 found"
    run("const e = document.getElementById('find'); e.value = ''; e.dispatchEvent(new Event('input'))")
    run("document.getElementById('more').click()")
    assert run("return document.getElementById('network').childElementCount") == 200
    assert run("return document.activeElement.tagName") == "SUMMARY"


# ------------------------------------------------------------------------------------------ without a browser


def test_bars_of_one_colour_are_left_out_and_charts_name_the_network() -> None:
    graph = allocator.trace(allocator.build("recipe:resnet-small"))
    data = page_data(summarise(graph, "a network"))
    assert list(data["charts"]) == ["flops"]
    assert data["charts"]["flops"]["encoding"]["color"]["legend"] is None  # without a budget there is one series
    assert data["charts"]["flops"]["title"]["text"] == "a network"
    both = page_data(summary("60%", True))
    assert list(both["charts"]) == ["flops", "shares", "kept", "curve"]
    assert both["cut"]


def test_a_branch_tells_the_kernels_of_all_its_layers() -> None:
    graph = allocator.trace(allocator.build("torchvision:resnet50", num_classes=10))
    first = page_data(summarise(graph, "resnet50"))["blocks"][0]
    assert first[7][0][0] == "conv3"
    assert first[7][0][6] == "1x1, 3x3, 1x1"


def test_policies_are_told_apart_in_words() -> None:
    said = page_data(summary("60%", True))["policies"]
    assert re.fullmatch(r"At this budget's FLOPs: (\w+ [\d.]+%, ){3}\w+ [\d.]+%\.", said)
    shares = [float(share) for share in re.findall(r"([\d.]+)%", said)]
    assert shares == sorted(shares, reverse=True)


def test_the_gap_and_a_recovery_are_shown() -> None:
    of = summary("60%", True)
    assert of.budget is not None
    budget = replace(of.budget, importance=0.8, bound=0.9, gap=0.111, recovery="batch norm on 8 inputs")
    page = as_text(replace(of, budget=budget), "html")
    assert "no plan keeps more than 90.00%, so the gap is 11.10%" in page
    assert "Recovered: batch norm on 8 inputs" in page


def test_the_page_refers_to_nothing_outside() -> None:
    page = as_text(summary("60%", True), "html")
    assert len(page.encode()) < 2e6
    assert "default-src 'none'" in page
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert re.findall(r"(?:src|href)=[\"'](?!#)", own) == []
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [block[0] for block in data["blocks"]] == ["model", "grouped.0", "model#2"]


def test_without_the_drawing_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from allocator.reporting import page

    page._library.cache_clear()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(MissingPackageError, match=r"neuron-allocator\[report\]"):
        as_text(summary(), "html")


def test_bars_hold_every_block_once() -> None:
    names = [str(i) for i in range(5000)]
    groups = bins(names)
    assert len(groups) <= 120
    assert [name for _, group in groups for name in group] == names
    parts = parts_of(summary("60%"), kept=False)
    rows = share_rows(parts)
    for block in parts:
        assert sum(row["share"] for row in rows if row["block"] == block) == pytest.approx(1)
        assert sum(row["neurons"] for row in rows if row["block"] == block) == sum(parts[block].values())


def test_more_parts_than_colours_are_put_together() -> None:
    of = summary("60%")
    concat = of.blocks[0]
    branches = tuple(replace(concat.branches[0], scale=float(i), channels=i, kept=i // 2) for i in range(1, 13))
    of = replace(of, blocks=(replace(concat, branches=branches),))
    before, after = parts_of(of, kept=False)[concat.name], parts_of(of, kept=True)[concat.name]
    assert list(before) == [*(f"scale {i}" for i in range(6, 13)), "others"]
    assert (before["scale 12"], after["scale 12"]) == (12, 6)
    assert sum(before.values()) == sum(range(13))
    assert before["others"] == 1 + 2 + 3 + 4 + 5
    assert part_names([{"block": before}]) == list(before)


def test_what_cannot_be_drawn_is_named(tmp_path: Path) -> None:
    panel = Panel("one", {"block": {"scale 1": 3}}, seed={"another": {"scale 1": 4}})
    with pytest.raises(InputError, match="the seed of panel 'one' has other blocks"):
        draw_shares([panel], tmp_path / "p.png")
    with pytest.raises(InputError, match="nothing to draw"):
        draw_shares([], tmp_path / "p.png")


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("page", ["#ffffff", "#f5f7f9", "#12161b", "#1b2128"])
def test_colours_stand_out_from_both_pages(page: str) -> None:
    for colour in COLOURS:
        light, dark = sorted((luminance(colour), luminance(page)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3
