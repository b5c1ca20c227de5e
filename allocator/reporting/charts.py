"""The charts, as Vega-Lite specifications: a page shows them, and `pictures` writes them to files.

Sizes, titles and data are here; colours of text and background come from whoever draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from allocator.errors import InputError
from allocator.reporting.facts import SHARED, BranchFacts, Summary
from allocator.reporting.words import printable, share_of, size

Spec = dict[str, Any]
Parts = Mapping[str, Mapping[str, int]]
"""Neurons per block and part (a scale, a kernel, a layer)."""

COLOURS = ("#1b7f9e", "#d9691e", "#3f8f5b", "#b8477f", "#7a68d8", "#8c8424", "#d14a4a", "#6f7f8f")
"""Each stands out by at least 3 to 1 from a white and from a nearly black page."""

BEFORE, AFTER = "now", "kept"
MOST_BARS = 120
"""More blocks than this share bars."""

_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"


def parts_of(summary: Summary, *, kept: bool) -> Parts:
    """Neurons per block and scale; per kernel where all branches are of one scale.

    Blocks whose branches add up come first: concatenations, splits and groups. In a network without them, the
    layers inside the branches of its sums stand for the branches.

    Args:
        summary: the network.
        kept: what a budget leaves, not what there is.
    """
    blocks = [block for block in summary.blocks if block.kind not in SHARED]
    inside = not blocks
    if inside:
        blocks = [block for block in summary.blocks if any(branch.inner for branch in block.branches)]
    scales = {branch.scale for block in blocks for branch in block.branches}
    table: dict[str, dict[str, int]] = {}
    for block in blocks:
        row = table.setdefault(printable(block.name), {})
        for branch in block.branches:
            part = _part(branch, by_scale=len(scales) > 1)
            row[part] = row.get(part, 0) + _neurons(branch, inside=inside, kept=kept)
    return _few_parts(_without_empty(table))


def _part(branch: BranchFacts, *, by_scale: bool) -> str:
    """A branch by its scale, or by the largest of its kernels."""
    if by_scale:
        return f"scale {branch.scale:g}"
    return size(branch.kernel) or "no kernel"


def _without_empty(table: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Without parts that have neurons in no block, such as shortcuts that only hand on."""
    some = {part for row in table.values() for part, count in row.items() if count}
    return {block: {part: count for part, count in row.items() if part in some} for block, row in table.items()}


def _neurons(branch: BranchFacts, *, inside: bool, kept: bool) -> int:
    """Of a branch, or of the layers inside it: how many there are, or are left where a budget was given."""
    before, after = (branch.inner, branch.inner_kept) if inside else (branch.channels, branch.kept)
    if kept and after is not None:
        return after
    return before


def _few_parts(table: dict[str, dict[str, int]]) -> Parts:
    """As many parts as there are colours: the smallest of them together."""
    total: dict[str, int] = {}
    for row in table.values():
        for part, count in row.items():
            total[part] = total.get(part, 0) + count
    if len(total) <= len(COLOURS):
        return table
    largest = sorted(total, key=lambda part: -total[part])[: len(COLOURS) - 1]
    merged: dict[str, dict[str, int]] = {}
    for block, row in table.items():
        merged[block] = {part: count for part, count in row.items() if part in largest}
        merged[block]["others"] = sum(row.values()) - sum(merged[block].values())
    return merged


def part_names(tables: Sequence[Parts]) -> list[str]:
    """All parts: scales from fine to coarse, others in the order that they first come up."""
    names: dict[str, None] = {}
    for parts in tables:
        for row in parts.values():
            names |= dict.fromkeys(row)
    if all(name.startswith("scale ") for name in names):
        return sorted(names, key=lambda name: float(name.removeprefix("scale ")))
    return list(names)


def bins(names: Sequence[str], most: int = MOST_BARS) -> list[tuple[str, list[str]]]:
    """Names in bars of equal numbers of neighbours, no more than `most` of them: (label, its names)."""
    width = math.ceil(len(names) / most) or 1
    bars = []
    for start in range(0, len(names), width):
        members = list(names[start : start + width])
        label = members[0] if len(members) == 1 else f"{members[0]} … {members[-1]}"
        bars.append((label, members))
    return bars


def share_rows(parts: Parts, seed: Parts | None = None) -> list[dict[str, Any]]:
    """One row per bar and part: neurons, and their share of what the bar's blocks have in the seed."""
    whole = seed or parts
    names = part_names([parts])
    rows = []
    for order, (label, blocks) in enumerate(bins(list(parts))):
        all_neurons = max(1, sum(sum(whole[block].values()) for block in blocks))
        for rank, part in enumerate(names):
            neurons = sum(parts[block].get(part, 0) for block in blocks)
            row = {"order": order, "block": label, "part": part, "rank": rank}
            rows.append({**row, "neurons": neurons, "share": neurons / all_neurons})
    return rows


def shares(rows: list[dict[str, Any]], names: Sequence[str], *, title: str, axis: str) -> Spec:
    """Stacked bars, one per block: the share of its neurons that each part has."""
    if len(names) > len(COLOURS):
        raise InputError(f"{len(names)} parts are more than the {len(COLOURS)} that can be told apart")
    return {
        "title": {"text": title, "anchor": "start"},
        "data": {"values": rows},
        "mark": {"type": "bar", "stroke": "white", "strokeWidth": 0.5, "cursor": "default"},
        "encoding": {
            "x": _block_axis("block, from input to output"),
            "y": {
                "field": "share",
                "type": "quantitative",
                "stack": "zero",
                "scale": {"domain": [0, 1]},
                "axis": {"format": "%", "title": axis},
            },
            "order": {"field": "rank"},
            "color": {
                "field": "part",
                "type": "nominal",
                "scale": {"domain": list(names), "range": list(COLOURS[: len(names)])},
                "legend": {"title": None, "orient": "top"},
            },
            "tooltip": [
                {"field": "block"},
                {"field": "part", "title": "part"},
                {"field": "neurons", "format": ","},
                {"field": "share", "format": ".1%"},
            ],
        },
    }


def _block_axis(title: str) -> Spec:
    return {
        "field": "block",
        "type": "ordinal",
        "sort": {"field": "order"},
        "axis": {"title": title, "labelAngle": -60, "labelLimit": 110, "labelFontSize": 10, "labelOverlap": "parity"},
    }


def flops_rows(summary: Summary) -> list[dict[str, Any]]:
    """FLOPs of each bar's blocks, as they are and as a budget leaves them; the last bar is what is in no block."""
    names = [printable(block.name) for block in summary.blocks]
    before = [block.flops for block in summary.blocks]
    after = [block.flops_kept or 0 for block in summary.blocks]
    names.append("outside blocks")
    before.append(summary.outside)
    after.append(summary.outside_kept or 0)
    rows: list[dict[str, Any]] = []
    start = 0
    for order, (label, members) in enumerate(bins(names)):
        end = start + len(members)
        row = {"order": order, "block": label}
        rows.append({**row, "when": BEFORE, "flops": sum(before[start:end])})
        if summary.budget is not None:
            rows.append({**row, "when": AFTER, "flops": sum(after[start:end])})
        start = end
    return rows


def flops(rows: list[dict[str, Any]], *, title: str) -> Spec:
    """FLOPs per block: a light bar before, a strong one in front of it after, where there is a budget."""
    colours = {BEFORE: COLOURS[7], AFTER: COLOURS[0]}
    shown = [when for when in colours if any(row["when"] == when for row in rows)]
    return {
        "title": {"text": title, "anchor": "start"},
        "data": {"values": rows},
        "mark": {"type": "bar", "cursor": "default"},
        "encoding": {
            "x": _block_axis("block, from input to output"),
            "xOffset": {"field": "when", "sort": [BEFORE, AFTER]},
            "y": {"field": "flops", "type": "quantitative", "axis": {"format": "~s", "title": "FLOPs (multiply-adds)"}},
            "color": {
                "field": "when",
                "type": "nominal",
                "scale": {"domain": shown, "range": [colours[when] for when in shown]},
                "legend": {"title": None, "orient": "top"} if len(shown) > 1 else None,
            },
            "tooltip": [{"field": "block"}, {"field": "when", "title": " "}, {"field": "flops", "format": ","}],
        },
    }


def curve(summary: Summary, *, title: str) -> Spec:
    """Budget against importance kept, a line per policy; a diamond marks the budget at hand."""
    policies = list(dict.fromkeys(point.policy for point in summary.curve))
    rows = [{"policy": p.policy, "flops": p.flops, "importance": p.importance} for p in summary.curve]
    legend = {"title": None, "orient": "top", "columns": 2, "symbolType": "stroke", "symbolStrokeWidth": 3}
    colours = {"domain": policies, "range": list(COLOURS[: len(policies)])}
    # So that the lines are told apart without colour too, and where one lies upon another.
    dashes = {"domain": policies, "range": [[1, 0], [6, 3], [2, 3], [8, 3, 2, 3]]}
    widths = {"domain": policies, "range": [7, 5, 3.5, 2]}
    encoding: Spec = {
        "x": {"field": "flops", "type": "quantitative", "axis": {"format": "%", "title": "share of FLOPs kept"}},
        "y": {
            "field": "importance",
            "type": "quantitative",
            "axis": {"format": "%", "title": f"share of importance kept ({summary.criterion})"},
        },
        "tooltip": [
            {"field": "policy"},
            {"field": "flops", "format": ".1%", "title": "FLOPs"},
            {"field": "importance", "format": ".1%"},
        ],
    }
    lines = {
        "data": {"values": rows},
        "mark": {"type": "line", "point": {"size": 36}},
        "encoding": {
            **encoding,
            "color": {"field": "policy", "type": "nominal", "scale": colours, "legend": legend},
            "strokeDash": {"field": "policy", "legend": legend, "scale": dashes},
            "strokeWidth": {"field": "policy", "type": "ordinal", "sort": policies, "legend": legend, "scale": widths},
        },
    }
    layers: list[Spec] = [lines]
    budget = summary.budget
    if budget is not None and budget.importance is not None:
        point = {
            "policy": f"this budget ({budget.policy})",
            "flops": share_of(budget.totals.flops, summary.totals.flops),
            "importance": budget.importance,
        }
        mark = {"type": "point", "shape": "diamond", "size": 220, "filled": True, "color": COLOURS[6]}
        layers.append({"data": {"values": [point]}, "mark": mark, "encoding": encoding})
    return {"title": {"text": title, "anchor": "start"}, "layer": layers}


def policies_at(summary: Summary) -> list[tuple[str, float]]:
    """At the budget's share of FLOPs, the importance that each policy on the curve keeps, the most first."""
    if summary.budget is None:
        return []
    share = share_of(summary.budget.totals.flops, summary.totals.flops)
    found = []
    for policy in dict.fromkeys(point.policy for point in summary.curve):
        points = sorted((point.flops, point.importance) for point in summary.curve if point.policy == policy)
        flops, importance = zip(*points, strict=True)
        found.append((policy, float(np.interp(share, flops, importance))))
    return sorted(found, key=lambda pair: -pair[1])


def lines(rows: list[dict[str, Any]], *, title: str, x: str, y: str) -> Spec:
    """Lines through points, one per `name` of the rows, each in a chart of its own scale.

    Args:
        rows: with "name", "x" (a share) and "y".
        title: what is written above.
        x, y: titles of the axes.
    """
    return {
        "data": {"values": rows},
        "title": {"text": title, "anchor": "start"},
        "facet": {"row": {"field": "name", "type": "nominal", "title": None}},
        "resolve": {"scale": {"y": "independent"}},
        "spec": {
            "width": 420,
            "height": 220,
            "mark": {"type": "line", "point": {"size": 36}, "color": COLOURS[0]},
            "encoding": {
                "x": {"field": "x", "type": "quantitative", "axis": {"format": "%", "title": x}},
                "y": {"field": "y", "type": "quantitative", "scale": {"zero": False}, "axis": {"title": y}},
            },
        },
    }


def histogram(*, kept: str = "kept", dropped: str = "dropped") -> Spec:
    """Scores of a block's neurons in stacked bars with the cut as a line; the page fills in data and cut."""
    bars = {
        "data": {"values": []},
        "mark": {"type": "bar", "cursor": "default", "binSpacing": 1},
        "encoding": {
            "x": {"field": "from", "type": "quantitative", "bin": {"binned": True}, "axis": {"title": "score"}},
            "x2": {"field": "to"},
            "y": {"field": "neurons", "type": "quantitative", "stack": "zero", "axis": {"tickMinStep": 1}},
            "color": {
                "field": "state",
                "type": "nominal",
                "scale": {"domain": [kept, dropped], "range": [COLOURS[0], COLOURS[7]]},
                "legend": {"title": None, "orient": "top"},
            },
            "tooltip": [
                {"field": "state", "title": " "},
                {"field": "from", "format": ".3f"},
                {"field": "to", "format": ".3f"},
                {"field": "neurons"},
            ],
        },
    }
    rule = {
        "data": {"values": []},
        "mark": {"type": "rule", "strokeWidth": 2, "strokeDash": [5, 3], "color": COLOURS[6]},
        "encoding": {
            "x": {"field": "cut", "type": "quantitative"},
            "tooltip": [{"field": "cut", "title": "all above are kept", "format": ".3f"}],
        },
    }
    return {"layer": [bars, rule]}


def side_by_side(panels: Sequence[Spec]) -> Spec:
    """Panels in one row, with axes of their own for the blocks."""
    return {"$schema": _SCHEMA, "hconcat": list(panels), "spacing": 28}
