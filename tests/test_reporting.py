"""What a report says, held against fvcore, the rewritten model and arithmetic; and how it is shown."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from report_subjects import IMAGE, Mixed, deep, mixed, summary
from rich.console import Console
from subjects import randomised_norms
from torch import nn

import allocator
from allocator.errors import UnknownNameError
from allocator.reporting import Summary, as_text, format_of, pareto, schema, summarise
from allocator.reporting.facts import SHARED
from allocator.reporting.rows import condensed, select
from allocator.reporting.text import SummaryText, sparkline
from allocator.reporting.words import milliseconds, printable, short
from allocator.rewriting.kept import kept_by

NETWORKS = ("torchvision:shufflenet_v2_x0_5", "recipe:scalenet-small-seed", "recipe:resnext-small-seed")


def shown(of: Summary, width: int, limit: int | None = 64) -> str:
    """As printed without colour at a width."""
    console = Console(file=io.StringIO(), width=width, no_color=True, force_terminal=False)
    console.print(SummaryText(of, limit))
    return console.file.getvalue()  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------ the figures


def check_sums(of: Summary) -> None:
    """Shares are of the whole, and every call is in one place."""
    assert sum(block.flops for block in of.blocks) + of.outside == of.totals.flops
    assert sum(block.share for block in of.blocks) + of.outside / of.totals.flops == pytest.approx(1, abs=1e-12)
    for block in of.blocks:
        assert sum(branch.own_flops for branch in block.branches) == block.flops
        if block.kind not in SHARED:
            assert sum(branch.channels for branch in block.branches) == block.channels
    assert of.written - of.free == sum(each.channels for each in of.fixed)
    if of.budget is not None:
        left = sum(block.flops_kept or 0 for block in of.blocks) + (of.outside_kept or 0)
        assert left == of.budget.totals.flops


@pytest.mark.parametrize("name", ["mixed", *NETWORKS])
def test_totals_are_those_of_fvcore_and_of_the_rewritten_model(name: str) -> None:
    model = mixed() if name == "mixed" else randomised_norms(allocator.build(name))
    result = allocator.allocate(model, "60%", example_inputs=IMAGE if name == "mixed" else None, certify=False)
    kept = kept_by(result.graph, result.allocation)
    of = summarise(result.graph, name, allocation=result.allocation, kept=kept)
    assert of.budget is not None
    (image,) = result.graph.inputs.tensors()
    for totals, network in ((of.totals, model), (of.budget.totals, result.model.eval())):
        flops = FlopCountAnalysis(network, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        written = ActivationCountAnalysis(network, image).unsupported_ops_warnings(False)
        assert totals.flops == flops.total()
        assert totals.activations == written.uncalled_modules_warnings(False).total()
        assert totals.parameters == sum(parameter.numel() for parameter in network.parameters())
    check_sums(of)


def test_blocks_lie_where_they_run() -> None:
    of = summary("60%")
    assert [(block.name, block.kind, block.parent) for block in of.blocks] == [
        ("model", "concat", None),
        ("grouped.0", "groups", (2, 1)),
        ("model#2", "sum", None),
    ]
    concat, groups, total = of.blocks
    # 16x16 positions: 9*8*12 + 2*12 in the fine branch; 8x8: 9*8*4 + 2*4 and one per enlarged element, coarse
    assert [branch.own_flops for branch in concat.branches] == [256 * 888, 64 * (288 + 8) + 256 * 4]
    assert groups.flops == 256 * 9 * 2 * 8
    # of the sum: 1x1 of 16*8, norm 2*8 of the groups too, 1x1 of 8*16 and norms
    assert total.branches[1].own_flops == 256 * (128 + 16 + 16 + 128 + 32)
    assert total.branches[1].flops == total.branches[1].own_flops + groups.flops
    names = [item if isinstance(item, int) else item.name for item in of.lanes[-1, -1]]
    assert names == ["stem.0", "", 0, 2, "head"] or names == ["stem.0", 0, 2, "head"]
    assert [item if isinstance(item, int) else item.name for item in of.lanes[2, 1]] == ["reduce.0", 1, "expand.0"]


def test_histograms_hold_every_neuron_and_the_cut_divides_them() -> None:
    of = summary("60%")
    graph = allocator.trace(mixed(), IMAGE)
    for block in of.blocks:
        assert block.scores is not None
        assert len(block.scores.kept) == len(block.scores.dropped) == 24
        assert (block.scores.cut is None) == (sum(block.scores.dropped) == 0)
        if block.scores.cut is not None:
            width = (block.scores.high - block.scores.low) / 24
            above = int((block.scores.cut - block.scores.low) / width) + 1
            assert not any(block.scores.dropped[above:])
    concat = of.blocks[0].scores
    assert concat is not None
    assert sum(concat.kept) + sum(concat.dropped) == 16
    assert sum(concat.kept) == of.blocks[0].kept
    assert graph.size == of.neurons


def test_the_curve_rises_from_the_least_to_everything() -> None:
    points = summary("60%", True).curve
    assert {point.policy for point in points} == {"priced", "per_block", "global", "uniform"}
    for policy in ("priced", "per_block", "global", "uniform"):
        flops = [point.flops for point in points if point.policy == policy]
        assert flops == sorted(flops)
        assert flops[-1] == 1
        last = [point for point in points if point.policy == policy][-1]
        assert last.importance == pytest.approx(1)
        assert all(0 < point.importance <= 1 + 1e-12 for point in points)
        assert flops[0] == pytest.approx(summary().reachable["all"] / summary().totals.flops)


def test_the_curve_of_a_network_without_neurons_is_empty() -> None:
    graph = allocator.trace(nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), IMAGE)
    assert pareto(graph, allocator.score(graph, "random")) == ()


def test_the_curve_of_a_scope_without_neurons_is_empty() -> None:
    graph = allocator.trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)).eval(), IMAGE)
    scores = allocator.score(graph, "random")
    assert pareto(graph, scores, scope="branches") == ()
    assert pareto(graph, scores) != ()


def test_reasons_name_what_froze_them() -> None:
    (fixed,) = summary().fixed
    assert (fixed.reason, fixed.channels) == ("an output of the model", 5)


def test_unrankable_networks_have_a_report_too() -> None:
    graph = allocator.trace(Mixed().eval(), IMAGE)
    of = summarise(graph, "plain")
    assert of.criterion is None
    assert of.reachable == {}
    assert all(block.scores is None for block in of.blocks)
    check_sums(of)
    assert "can go down" not in shown(of, 80)


# ------------------------------------------------------------------------------------------ on a terminal

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    ("file", "width", "flops"),
    [
        ("report_80.txt", 80, None),
        ("report_80_60.txt", 80, "60%"),
        ("report_160_60.txt", 160, "60%"),
        ("report_20_60.txt", 20, "60%"),
    ],
)
def test_what_a_terminal_shows(file: str, width: int, flops: str | None) -> None:
    assert shown(summary(flops), width) == (GOLDEN / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [1, 5, 20, 40, 60, 80, 100, 120, 160, 240])
@pytest.mark.parametrize("flops", [None, "60%"])
def test_no_line_is_wider_than_the_terminal(width: int, flops: str | None) -> None:
    for line in shown(summary(flops), width).splitlines():
        assert len(line) <= width


def test_wider_terminals_show_more() -> None:
    titles = [shown(summary("60%"), width).count("field") for width in (80, 160)]
    assert titles == [0, 1]
    assert "FLOPs      share" not in shown(summary("60%"), 80)


def test_a_narrow_terminal_gets_a_list() -> None:
    said = shown(summary("60%"), 20)
    assert "grouped.0 groups" in said
    assert "total: 100.0%" in said


def test_shown_shares_add_up_whatever_is_left_out() -> None:
    of = deep(5000)
    for limit in (1, 10, 64):
        selection = select(of, limit)
        assert len(selection.blocks) == limit
        assert selection.hidden == 5000 - limit
        total = sum(block.share for block in selection.blocks) + selection.share + of.outside / of.totals.flops
        assert total == pytest.approx(1)
    said = shown(of, 80)
    assert "4,936 lighter blocks, not shown" in said
    assert len(said.splitlines()) < 400


def test_groups_of_a_convolution_are_one_row() -> None:
    groups = summary("60%").blocks[1]
    (row,) = condensed(groups)
    assert row.name in ("4 groups of 2", f"{sum(1 for g in groups.branches if g.kept)} of 4 groups of 2")
    assert row.channels == 8
    assert row.kept == groups.kept
    assert row.own_flops_kept == groups.flops_kept == groups.flops * (groups.kept or 0) // 8


HOSTILE = "[red]\x1b[2J\u202e|<b>名前\n=1+1"


def test_names_command_neither_terminal_nor_markup() -> None:
    of = summary()
    first = replace(of.blocks[0], name=HOSTILE)
    of = replace(of, blocks=(first, *of.blocks[1:]), model=HOSTILE)
    said = shown(of, 160)
    assert "[red]\\x1b[2J" in said
    assert "\x1b" not in said
    assert "名前" in said
    assert "\\|" in as_text(of, "md")
    assert "\x1b" not in as_text(of, "csv")
    rows = list(csv.DictReader(io.StringIO(as_text(replace(of, blocks=(replace(first, name="=1+1"),)), "csv"))))
    assert rows[0]["block"] == "'=1+1"


def test_numbers_are_short_and_true() -> None:
    cases = {0: "0", 999: "999", 1000: "1.00 k", 1513: "1.51 k", 999_950: "1.00 M", 3.84e9: "3.84 G", 1e13: "10.0 T"}
    assert {number: short(number) for number in cases} == cases
    assert sparkline(None) == ""
    assert [milliseconds(seconds) for seconds in (0.01234, 0.9994, 1.234)] == ["12.3 ms", "999 ms", "1,234 ms"]
    assert printable("a\tb") == "a\\tb"


# ------------------------------------------------------------------------------------------ other formats


def test_the_schema_describes_every_report() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    check = jsonschema.Draft202012Validator(schema())
    for of in (summary(), summary("60%", True), deep(20)):
        check.validate(json.loads(as_text(of, "json")))
        assert of.to_dict() == json.loads(as_text(of, "json"))


@pytest.mark.parametrize(
    "damage",
    [
        {"format": 2},
        {"flops": -1},
        {"flops": "many"},
        {"blocks": [{"name": "x"}]},
        {"more": 1},
        {"reachable": {"x": 1}},
    ],
)
def test_the_schema_refuses_what_is_none(damage: dict[str, object]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(summary().to_dict() | damage, schema())


def test_csv_adds_up_to_the_network() -> None:
    of = summary("60%")
    rows = list(csv.DictReader(io.StringIO(as_text(of, "csv"))))
    assert len(rows) == sum(len(block.branches) for block in of.blocks) + 1
    assert sum(int(row["own_flops"]) for row in rows) == of.totals.flops
    assert of.budget is not None
    assert sum(int(row["own_flops_kept"]) for row in rows) == of.budget.totals.flops
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1)


def test_markdown_is_a_table_of_equal_rows() -> None:
    text = as_text(summary("60%"), "md")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in lines} == {6, 7}
    assert text == (GOLDEN / "report.md").read_text(encoding="utf-8")


def test_unknown_formats_name_near_ones() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'html'"):
        as_text(summary(), "htm")
    with pytest.raises(UnknownNameError, match="did you mean 'md'"):
        as_text(summary(), "markdwn")
    with pytest.raises(UnknownNameError, match=r"did you mean \.csv"):
        format_of("a/report.cvs")
    assert format_of("REPORT.MD") == "md"
