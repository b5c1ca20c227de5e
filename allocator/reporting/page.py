"""A summary as one HTML page that opens offline: charts by Vega-Lite, the network as blocks that open."""

from __future__ import annotations

import functools
import html
import json
import re
from importlib import resources
from typing import Any

from allocator.reporting import charts
from allocator.reporting.facts import SHARED, BlockFacts, Histogram, Layer, Summary
from allocator.reporting.pictures import library
from allocator.reporting.rows import condensed
from allocator.reporting.words import percent, printable, short, size, timed


def to_html(summary: Summary) -> str:
    """The page; it holds everything that it shows, and its policy forbids it to fetch anything.

    Raises:
        MissingPackageError: the package that draws is not installed.
    """
    parts = {
        "title": html.escape(printable(summary.model)),
        "style": asset("page.css"),
        "head": _head(summary),
        "remarks": _remarks(summary),
        "data": json.dumps(page_data(summary), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
        "library": _library(),
        "script": asset("page.js"),
    }
    return filled("page.html", parts)


def filled(template: str, parts: dict[str, str]) -> str:
    """A page with its parts, which stand between ``%%`` in the template, put in."""
    pieces = asset(template).split("%%")
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


@functools.cache
def _library() -> str:
    """Vega, Vega-Lite and vega-embed in one script."""
    return re.sub("</(?=script)", r"<\\/", str(library().javascript_bundle()), flags=re.IGNORECASE)


def asset(name: str) -> str:
    """A file that lies beside this one."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _head(summary: Summary) -> str:
    inputs = ", ".join(size(shape) for shape in summary.inputs)
    lines = [f"<p>{html.escape(printable(summary.kind))}, input {inputs}. "]
    budget = summary.budget
    if budget is not None:
        lines.append(
            f"Under a budget of {budget.asked:,.0f} FLOPs: policy {html.escape(budget.policy)}, criterion "
            f"{html.escape(budget.criterion)}, scope {html.escape(budget.scope)}."
        )
        if budget.certificate:
            lines.append(f"</p><p>Certificate: {html.escape(budget.certificate)}.")
    lines.append("</p><table class='totals'><caption>What it costs</caption><thead><tr><td></td><th scope=col>now</th>")
    lines.append(
        "<th scope=col>kept</th><th scope=col>share kept</th></tr></thead><tbody>" if budget else "</tr></thead>"
    )
    for what, key in (("FLOPs (multiply-adds)", "flops"), ("parameters", "parameters"), ("activations", "activations")):
        before = getattr(summary.totals, key)
        lines.append(f"<tr><th scope=row>{what}</th><td>{before:,} <small>({short(before)})</small></td>")
        if budget is not None:
            after = getattr(budget.totals, key)
            lines.append(f"<td>{after:,}</td><td>{percent(after / max(before, 1))}</td>")
        lines.append("</tr>")
    if summary.latency is None:
        lines.append("</tbody></table><p>FLOPs are not latency: measure that on your device.</p>")
    else:
        said = timed(summary.latency, budget.latency if budget else None)
        lines.append(f"</tbody></table><p>Latency {html.escape(said)}.</p>")
    return "".join(lines)


def _remarks(summary: Summary) -> str:
    items = []
    for each in summary.fixed:
        where = f" (at {', '.join(each.modules[:3])}{' …' if len(each.modules) > 3 else ''})" if each.modules else ""
        items.append(f"{each.channels:,} channels must stay: {each.reason}{where}")
    items += [f"not followed: {name} in {', '.join(modules)}" for name, modules in summary.unsupported.items()]
    if summary.uncounted:
        items.append("not counted by fvcore: " + ", ".join(f"{k} ({n})" for k, n in summary.uncounted.items()))
    items += [f"assumed: {each}" for each in summary.assumptions]
    items += list(summary.notes)
    listed = "".join(f"<li>{html.escape(printable(item))}</li>" for item in items)
    return f"<p>{summary.free:,} of {summary.written:,} written channels can go.</p><ul>{listed}</ul>"


def page_data(summary: Summary) -> dict[str, Any]:
    """What the page's script reads: charts as specifications, blocks and lanes as short lists."""
    return {
        "planned": summary.budget is not None,
        "criterion": summary.criterion or "",
        "charts": _charts(summary),
        "histogram": charts.histogram(),
        "top": _lane(summary, (-1, -1)),
        "blocks": [_block(summary, i, block) for i, block in enumerate(summary.blocks)],
    }


def _charts(summary: Summary) -> dict[str, Any]:
    planned = summary.budget is not None
    now = charts.parts_of(summary, kept=False)
    drawn: dict[str, Any] = {"flops": charts.flops(charts.flops_rows(summary), title="")}
    if now:
        names = charts.part_names([now])
        rows = charts.share_rows(now)
        drawn["shares"] = charts.shares(rows, names, title="", axis="share of the block's neurons")
        if planned:
            rows = charts.share_rows(charts.parts_of(summary, kept=True), now)
            drawn["kept"] = charts.shares(rows, names, title="", axis="share of the block's neurons")
    if summary.curve:
        drawn["curve"] = charts.curve(summary, title="")
    for spec in drawn.values():
        del spec["title"]
        spec |= {"width": "container", "height": 280}
    return drawn


def _block(summary: Summary, number: int, block: BlockFacts) -> list[Any]:
    """Name, kind, channels, kept, FLOPs, share, branches, scores."""
    branches = []
    for j, row in enumerate(condensed(block)):
        facts = [printable(row.name), row.channels, row.kept, row.inner, row.inner_kept, row.scale, size(row.kernel)]
        gamma = None if row.gamma is None else [float(f"{n:.3g}") for n in row.gamma]
        branches.append([*facts, row.own_flops, gamma, _lane(summary, (number, j))])
    adds = block.kind not in SHARED
    scores = _scores(block.scores)
    named = printable(block.name)
    return [named, block.kind, block.channels, block.kept, block.flops, round(block.share, 6), adds, branches, scores]


def _scores(histogram: Histogram | None) -> list[Any] | None:
    if histogram is None:
        return None
    ends = [float(f"{n:.5g}") for n in (histogram.low, histogram.high)]
    cut = None if histogram.cut is None else float(f"{histogram.cut:.5g}")
    return [*ends, cut, list(histogram.kept), list(histogram.dropped)]


def _lane(summary: Summary, place: tuple[int, int]) -> list[Any]:
    """Layers as [what, name, before, after], blocks as their number."""
    lane = summary.lanes.get(place, [])
    return [_layer(item) if isinstance(item, Layer) else item for item in lane]


def _layer(layer: Layer) -> list[Any]:
    return [layer.what, printable(layer.name), layer.channels, layer.kept]
