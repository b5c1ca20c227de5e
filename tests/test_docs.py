"""The documentation: every code block runs, and the site is built without a warning."""

from __future__ import annotations

import argparse
import ast
import html
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from docs_blocks import PAGES, ROOT, Page

import allocator
import allocator.public  # what is declared by loading the package is no page's own
from allocator import adapters
from allocator.cli import make_parser
from allocator.planning.policies.registry import POLICIES
from allocator.scoring.registry import CRITERIA
from allocator.tracing.operators import DECLARATIONS, operator_of

LOADED_BY_USE = ("allocator.", "torch.nn.", "timm.", "torchvision.", "transformers.", "ultralytics.")
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
SLOW = [name for name, path in zip(NAMES, PAGES) if re.search(r"<!--.*\bquick\b", path.read_text(encoding="utf-8"))]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages write files where they are run, and are as wide as they are shown."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def _registries() -> Iterator[None]:
    """What a page registers is forgotten after it."""
    known: tuple[dict[str, Any], ...] = (DECLARATIONS, CRITERIA, POLICIES, adapters._ADAPTERS)
    before = [dict(registry) for registry in known]
    yield
    for registry, old in zip(known, before):
        for name in registry.keys() - old.keys():
            if not name.startswith(LOADED_BY_USE):  # loaded by use
                del registry[name]
    operator_of.cache_clear()


@pytest.mark.usefixtures("_registries")
@pytest.mark.parametrize("name", NAMES)
def test_every_block_of_a_page_runs(name: str) -> None:
    page = Page(ROOT / name, quick=True)
    page.run()


@pytest.mark.sweep
@pytest.mark.parametrize("name", SLOW)
def test_every_block_of_a_page_runs_in_full(name: str) -> None:
    Page(ROOT / name, quick=False).run()


def test_the_notebook_runs_and_shows_what_it_showed() -> None:
    """Cell by cell, as a kernel does: the last line's value is shown; figures rest on training and are left out."""
    shown: list[str] = []
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) and not _prints(tree.body[-1]) else None
        exec(compile(tree, "cell", "exec"), namespace)
        before = [
            output["data"]["text/html"] for output in cell["outputs"] if output["output_type"] == "execute_result"
        ]
        assert len(before) == (last is not None)
        if isinstance(last, ast.Expr):
            html = eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)._repr_html_()
            assert _words(html) == _words("".join(before[0]))
            shown.append(html)
    assert len(shown) == 4


def _prints(statement: ast.Expr) -> bool:
    return isinstance(statement.value, ast.Call) and ast.unparse(statement.value.func) == "print"


def _words(page: str) -> set[str]:
    """What it begins with, in three lines: their words, without figures; notes at the end depend on what was found."""
    lines = html.unescape(re.sub(r"<[^>]+>", "", page)).strip().splitlines()[:3]
    return set(re.findall(r"[a-z_]{4,}", " ".join(lines)))


# ------------------------------------------------------------------------------------------ the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site, built as `make docs` does, in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def _text(page: Path) -> str:
    """What a page says, without markup, blanks made one."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8"))).split())


def test_the_site_asks_no_other_server(site: Path) -> None:
    asked = re.compile(r"""<(?:script|img|link|source|iframe)\b[^>]*?(?:src|href|srcset)=["']?(https?:)?//""")
    for page in site.rglob("*.html"):
        assert not asked.search(page.read_text(encoding="utf-8")), page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style.read_text(encoding="utf-8")), style.name


def test_search_works_in_pages_opened_from_the_disk(site: Path, browser: Any) -> None:
    browser.get((site / "api" / "allocation.html").as_uri())
    field = browser.find_element("css selector", "input.md-search__input")
    browser.execute_script("arguments[0].focus()", field)
    field.send_keys("peak_activations")
    titles = "return [...document.querySelectorAll('.md-search-result__item h1')].map(e => e.textContent)"
    for _ in range(100):
        if browser.execute_script(titles):
            break
        time.sleep(0.2)
    assert "Which option do I need?" in browser.execute_script(titles)
    assert browser.get_log("browser") == []


def test_pages_fit_a_phone_and_signatures_wrap(site: Path, browser: Any) -> None:
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for page in ("index.html", "options.html", "api/allocation.html"):
            browser.get((site / page).as_uri())
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 390, page
            clipped = "[...document.querySelectorAll('pre > code')].filter(e => e.scrollWidth > e.clientWidth + 1)"
            assert browser.execute_script(f"return {clipped}.length") == 0, page
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_every_public_name_has_its_reference(site: Path) -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    documented = {name for name in allocator.__all__ if f'id="allocator.{name}"' in pages}
    documented |= {name for name in allocator.__all__ if f'id="allocator.errors.{name}"' in pages}
    assert documented == set(allocator.__all__) - {"__version__"}


def test_every_command_and_option_has_its_reference(site: Path) -> None:
    said = _text(site / "cli.html")
    for action in make_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                assert f" {command.description} " in said
                for option in command._actions[1:]:  # all but --help
                    for written in option.option_strings or [str(option.metavar)]:
                        assert written in said, f"{name} {written}"


def test_the_comparison_shows_what_was_measured(site: Path) -> None:
    said = _text(site / "comparison.html")
    results = json.loads((ROOT / "benchmarks" / "results" / "speed.json").read_text(encoding="utf-8"))["compare"]
    for row in results["rows"]:
        name = row["model"].partition(":")[2]
        ours = f"{round(1000 * row['ours']['core']):,}"
        assert f" {name} {ours} " in said
        if "bisected" in row:
            assert f" {round(1000 * row['bisected']['wall']):,} " in said
    assert "published, not reproduced" in said
    assert "<!-- table" not in (site / "comparison.html").read_text(encoding="utf-8")


def test_links_between_files_of_the_repository_are_links_between_pages(site: Path) -> None:
    home = (site / "index.html").read_text(encoding="utf-8")
    for page in ("tutorial.html", "benchmarks/budgets.html", "contributing.html"):
        assert f'href="{page}"' in home or f"href={page}" in home
        assert (site / page).exists()
    assert 'src="img/shares.svg"' in home
    assert (site / "img" / "shares.svg").exists()
