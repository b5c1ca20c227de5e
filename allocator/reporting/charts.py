"""The charts, as Vega-Lite specifications: a page shows them, and `pictures` writes them to files.

Sizes, titles and data are here; colours of text and background come from whoever draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from allocator.errors import InputError
from allocator.reporting.facts import SHARED, BlockFacts, BranchFacts, Summary
from allocator.reporting.words import printable, size

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
    adding = [block for block in summary.blocks if block.kind not in SHARED]
    use = adding or [block for block in summary.blocks if any(branch.inner for branch in block.branches)]
    scales = {branch.scale for block in use for branch in block.branches}

    def name(branch: BranchFacts) -> str:
        if len(scales) > 1:
            return f"scale {branch.scale:g}"
        return size(branch.kernel) if branch.kernel else "no kernel"

    def neurons(branch: BranchFacts) -> int:
        before, after = (branch.channels, branch.kept) if adding else (branch.inner, branch.inner_kept)
        return before if after is None or not kept else after

    table: dict[str, dict[str, int]] = {}
    for block in use:
        row = table.setdefault(printable(block.name), {})
        for branch in block.branches:
            row[name(branch)] = row.get(name(branch), 0) + neurons(branch)
    return _few_parts(table)


def _few_parts(table: dict[str, dict[str, int]]) -> Parts:
    """As many parts as there are colours: the smallest of them together."""
    total: dict[str, int] = {}
    for row in table.values():
        for part, count in row.items():
            total[part] = total.get(part, 0) + count
    if len(total) <= len(COLOURS):
        return table
    main = set(sorted(total, key=lambda part: -total[part])[: len(COLOURS) - 1])
    merged: dict[str, dict[str, int]] = {}
    for block, row in table.items():
        merged[block] = {part: count for part, count in row.items() if part in main}
        merged[block]["others"] = sum(count for part, count in row.items() if part not in main)
    return merged


def part_names(tables: Sequence[Parts]) -> list[str]:
    """All parts: scales from fine to coarse, others in the order that they first come up."""
    names = list(dict.fromkeys(name for parts in tables for row in parts.values() for name in row))
    if all(name.startswith("scale ") for name in names):
        return sorted(names, key=lambda name: float(name.removeprefix("scale ")))
    return names


def bins(names: Sequence[str], most: int = MOST_BARS) -> list[tuple[str, list[str]]]:
    """Names in bars of equal numbers of neighbours, no more than `most` of them: (label, its names)."""
    width = -(-len(names) // most) or 1
    groups = [list(names[i : i + width]) for i in range(0, len(names), width)]
    return [(group[0] if len(group) == 1 else f"{group[0]} … {group[-1]}", group) for group in groups]


def share_rows(parts: Parts, seed: Parts | None = None) -> list[dict[str, Any]]:
    """One row per bar and part: neurons, and their share of what the bar's blocks have in the seed."""
    whole = seed or parts
    names = part_names([parts])
    rows = []
    for i, (label, blocks) in enumerate(bins(list(parts))):
        all_of_it = max(1, sum(sum(whole[block].values()) for block in blocks))
        for j, part in enumerate(names):
            count = sum(parts[block].get(part, 0) for block in blocks)
            rows.append(
                {"order": i, "block": label, "part": part, "rank": j, "neurons": count, "share": count / all_of_it}
            )
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
    by_number = [*summary.blocks, None]
    numbers = [str(i) for i in range(len(by_number))]
    rows = []
    for order, (_, members) in enumerate(bins(numbers)):
        blocks = [by_number[int(i)] for i in members]
        label = _label(blocks)
        before = sum(summary.outside if block is None else block.flops for block in blocks)
        row = {"order": order, "block": label}
        rows.append({**row, "when": BEFORE, "flops": before})
        if summary.budget is not None:
            after = sum((summary.outside_kept if block is None else block.flops_kept) or 0 for block in blocks)
            rows.append({**row, "when": AFTER, "flops": after})
    return rows


def _label(blocks: Sequence[BlockFacts | None]) -> str:
    names = ["outside blocks" if block is None else printable(block.name) for block in blocks]
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def flops(rows: list[dict[str, Any]], *, title: str) -> Spec:
    """FLOPs per block: a light bar before, a strong one in front of it after."""
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
                "scale": {"domain": [BEFORE, AFTER], "range": [COLOURS[7], COLOURS[0]]},
                "legend": {"title": None, "orient": "top"},
            },
            "tooltip": [{"field": "block"}, {"field": "when", "title": " "}, {"field": "flops", "format": ","}],
        },
    }


def curve(summary: Summary, *, title: str) -> Spec:
    """Budget against importance kept, a line per policy; a diamond marks the budget at hand."""
    policies = list(dict.fromkeys(point.policy for point in summary.curve))
    rows = [{"policy": p.policy, "flops": p.flops, "importance": p.importance} for p in summary.curve]
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
    colour = {
        "field": "policy",
        "type": "nominal",
        "scale": {"domain": policies, "range": list(COLOURS[: len(policies)])},
        "legend": {"title": None, "orient": "top"},
    }
    dash = {
        "field": "policy",
        "legend": {"title": None, "orient": "top"},
        "scale": {"domain": policies, "range": [[1, 0], [6, 3], [2, 3]]},
    }
    line = {
        "mark": {"type": "line", "point": {"size": 36}},
        "encoding": {**encoding, "color": colour, "strokeDash": dash},
    }
    layers: list[Spec] = [{"data": {"values": rows}, **line}]
    budget = summary.budget
    if budget is not None and budget.importance is not None:
        point = {
            "policy": f"this budget ({budget.policy})",
            "flops": budget.totals.flops / max(summary.totals.flops, 1),
            "importance": budget.importance,
        }
        mark = {"type": "point", "shape": "diamond", "size": 220, "filled": True, "color": COLOURS[6]}
        layers.append({"data": {"values": [point]}, "mark": mark, "encoding": encoding})
    return {"title": {"text": title, "anchor": "start"}, "layer": layers}


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
