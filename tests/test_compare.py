"""Two allocations or networks side by side: figures written down by hand."""

from __future__ import annotations

import csv
import io
import json
import re

import jsonschema
import pytest
from report_subjects import IMAGE, mixed, summary

import allocator
from allocator.errors import UnknownNameError
from allocator.reporting import schema
from allocator.reporting.compare import Side, compare, side_of_allocation, side_of_summary
from allocator.reporting.compare_render import COMPARISONS

A = Side("a", 1000, {"one": {"x": 4, "y": 3}, "two": {"p": 8, "q": 8}}, {"one": "concat", "two": "sum"})
B = Side("b", 800, {"one": {"x": 4, "z": 5}, "two": {"p": 8, "q": 8}}, {"one": "concat", "two": "sum"})
WIDER = Side("b", 800, {"one": {"x": 4, "y": 9}, "two": {"p": 9, "q": 9}}, {"one": "concat", "two": "sum"})


def test_the_groups_of_a_convolution_are_one_branch_on_either_side() -> None:
    allocation = allocator.plan(allocator.trace(mixed(), IMAGE), flops="60%")
    (block,) = [block for block in allocation.blocks if block["kind"] == "groups"]
    left = sum(branch["after"] for branch in block["branches"])
    comparison = compare(side_of_summary(summary()), side_of_allocation("small", allocation))
    rows = [(row.branch, row.a, row.b, row.difference) for row in comparison.rows if row.block == block["name"]]
    assert rows == [("groups", 8, left, left - 8)]
    assert 0 < left < 8


def test_branches_of_one_name_are_added_up() -> None:
    branches = [{"name": "conv", "before": 8, "after": after} for after in (3, 4)]
    allocation = allocator.Allocation(blocks=[{"name": "block", "kind": "concat", "branches": branches}])
    assert side_of_allocation("a", allocation).channels == {"block": {"conv": 7}}


def test_a_branch_that_one_side_lacks_is_no_branch_of_zero_channels() -> None:
    comparison = compare(A, B)
    cells = list(csv.reader(io.StringIO(COMPARISONS["csv"](comparison))))[1:4]
    assert cells == [
        ["one", "concat", "x", "4", "4", "0"],
        ["one", "concat", "y", "3", "", "-3"],
        ["one", "concat", "z", "", "5", "5"],
    ]
    assert "| one | z | - | 5 | +5 |" in COMPARISONS["md"](comparison)
    assert "A has 1,000 FLOPs, B 800 (-200)." in COMPARISONS["md"](comparison)


def test_channels_of_a_block_are_added_up_where_its_branches_do_not_share_them() -> None:
    lines = [line.split() for line in COMPARISONS["rich"](compare(A, WIDER)).splitlines()]
    assert ["one", "(concat)", "7", "13", "+6"] in lines
    assert ["two", "(sum)"] in lines
    assert ["p", "8", "9", "+1"] in lines
    assert ["x", "4", "4"] in lines


def test_blocks_that_are_alike_are_counted_and_not_shown() -> None:
    said = COMPARISONS["rich"](compare(A, B))
    assert "two" not in said
    assert "1 block alike, not shown" in said
    assert "B has -200 FLOPs, 80.0% of A's" in said


HOSTILE = "</title><script>document.title='owned'</script>名前"


def test_the_page_holds_every_branch_and_fetches_nothing() -> None:
    page = COMPARISONS["html"](compare(A, WIDER))
    for said in ("<th scope=row>y</th><td>3</td>", "<td>9</td>", "<td>+6</td>", "B has -200 FLOPs, 80.0% of A&#x27;s"):
        assert said in page
    assert "width:33.3%" in page
    assert not re.search(r"(src|href)=", page)
    alike = COMPARISONS["html"](compare(A, B)).split("<details>")[1]
    assert "1 block<" in alike
    assert "<th scope=row>q</th>" in alike


def test_names_on_the_page_are_text() -> None:
    hostile = Side(HOSTILE, 10, {HOSTILE: {HOSTILE: 3}}, {HOSTILE: "concat"})
    page = COMPARISONS["html"](compare(hostile, A))
    assert "<script>document.title='owned'" not in page
    assert "名前" in page


def test_the_page_of_nothing() -> None:
    nothing = Side("a", 0, {}, {})
    assert "<p>none</p>" in COMPARISONS["html"](compare(nothing, nothing))


def test_its_json_is_as_its_schema_says() -> None:
    for a, b in ((A, B), (side_of_summary(summary()), A)):
        jsonschema.validate(json.loads(COMPARISONS["json"](compare(a, b))), schema("compare"))
    facts = compare(A, B).to_dict()
    for key in facts:
        with pytest.raises(jsonschema.ValidationError, match=key):
            jsonschema.validate({k: v for k, v in facts.items() if k != key}, schema("compare"))
    with pytest.raises(UnknownNameError, match="did you mean compare"):
        schema("compere")
