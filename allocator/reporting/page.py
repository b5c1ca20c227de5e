"""A summary as one HTML page that opens offline: charts by Vega-Lite, the network as blocks that open."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from allocator.reporting import charts
from allocator.reporting.facts import SHARED, BlockFacts, Fixed, Histogram, Layer, Summary
from allocator.reporting.html_parts import asset, filled, text
from allocator.reporting.lanes import TOP, Place
from allocator.reporting.pictures import library
from allocator.reporting.rows import condensed
from allocator.reporting.words import percent, printable, share_of, short, size, timed

_MOST_MODULES = 3


def to_html(summary: Summary) -> str:
    """The page; it holds everything that it shows, and its policy forbids it to fetch anything.

    Raises:
        MissingPackageError: the package that draws is not installed.
    """
    parts = {
        "title": text(summary.model),
        "style": asset("page.css"),
        "head": _head(summary) + _totals(summary) + _latency(summary),
        "remarks": _remarks(summary),
        "data": _inside_script(page_data(summary)),
        "library": _library(),
        "script": asset("page.js"),
    }
    return filled("page.html", parts)


@functools.cache
def _library() -> str:
    """Vega, Vega-Lite and vega-embed in one script."""
    # An end tag of a script in one of the library's strings would end the element that holds the library.
    return re.sub("</(?=script)", r"<\\/", str(library().javascript_bundle()), flags=re.IGNORECASE)


def _inside_script(data: dict[str, Any]) -> str:
    """JSON that holds no "<", which could end the element that it stands in."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _head(summary: Summary) -> str:
    budget = summary.budget
    inputs = ", ".join(size(shape) for shape in summary.inputs)
    head = f"<p>{text(summary.kind)}, input {inputs}. "
    if budget is not None:
        head += (
            f"Under a budget of {budget.asked:,.0f} FLOPs: policy {text(budget.policy)}, criterion "
            f"{text(budget.criterion)}, scope {text(budget.scope)}."
        )
        if budget.certificate:
            head += f"</p><p>Certificate: {text(budget.certificate)}."
    return f"{head}</p>"


def _totals(summary: Summary) -> str:
    table = "<table class='totals'><caption>What it costs</caption><thead><tr><td></td><th scope=col>now</th>"
    if summary.budget is None:
        table += "</tr></thead>"
    else:
        table += "<th scope=col>kept</th><th scope=col>share kept</th></tr></thead><tbody>"
    for cost in summary.costs():
        name = "FLOPs (multiply-adds)" if cost.name == "FLOPs" else cost.name
        table += f"<tr><th scope=row>{name}</th><td>{cost.before:,} <small>({short(cost.before)})</small></td>"
        if cost.after is not None:
            table += f"<td>{cost.after:,}</td><td>{percent(share_of(cost.after, cost.before))}</td>"
        table += "</tr>"
    return f"{table}</tbody></table>"


def _latency(summary: Summary) -> str:
    if summary.latency is None:
        return "<p>FLOPs are not latency: measure that on your device.</p>"
    return f"<p>Latency {text(timed(summary.latency, summary.latency_kept))}.</p>"


def _remarks(summary: Summary) -> str:
    remarks = [f"{fixed.channels:,} channels must stay: {fixed.reason}{_where(fixed)}" for fixed in summary.fixed]
    for operator, modules in summary.unsupported.items():
        remarks.append(f"not followed: {operator} in {', '.join(modules)}")
    if summary.uncounted:
        calls = ", ".join(f"{operator} ({count})" for operator, count in summary.uncounted.items())
        remarks.append(f"not counted by fvcore: {calls}")
    remarks += [f"assumed: {assumption}" for assumption in summary.assumptions]
    remarks += summary.notes
    items = "".join(f"<li>{text(remark)}</li>" for remark in remarks)
    return f"<p>{summary.free:,} of {summary.written:,} written channels can go.</p><ul>{items}</ul>"


def _where(fixed: Fixed) -> str:
    """The modules that channels are fixed at, such as " (at conv1, conv2, conv3 …)"."""
    if not fixed.modules:
        return ""
    more = " …" if len(fixed.modules) > _MOST_MODULES else ""
    return f" (at {', '.join(fixed.modules[:_MOST_MODULES])}{more})"


def page_data(summary: Summary) -> dict[str, Any]:
    """What the page's script reads: charts as specifications, blocks and lanes as short lists."""
    return {
        "planned": summary.budget is not None,
        "criterion": summary.criterion or "",
        "charts": _charts(summary),
        "histogram": charts.histogram(),
        "top": _lane(summary, TOP),
        "blocks": [_block(summary, i, block) for i, block in enumerate(summary.blocks)],
    }


def _charts(summary: Summary) -> dict[str, Any]:
    axis = "share of the block's neurons"
    specs: dict[str, Any] = {"flops": charts.flops(charts.flops_rows(summary), title="")}
    now = charts.parts_of(summary, kept=False)
    if now:
        names = charts.part_names([now])
        specs["shares"] = charts.shares(charts.share_rows(now), names, title="", axis=axis)
        if summary.budget is not None:
            rows = charts.share_rows(charts.parts_of(summary, kept=True), now)
            specs["kept"] = charts.shares(rows, names, title="", axis=axis)
    if summary.curve:
        specs["curve"] = charts.curve(summary, title="")
    for spec in specs.values():
        del spec["title"]  # the page has headings of its own
        spec |= {"width": "container", "height": 280}
    return specs


def _block(summary: Summary, number: int, block: BlockFacts) -> list[Any]:
    """Name, kind, channels, kept, FLOPs, share, whether its branches add up, branches, scores."""
    branches = []
    for j, row in enumerate(condensed(block)):
        facts = [printable(row.name), row.channels, row.kept, row.inner, row.inner_kept, row.scale, size(row.kernel)]
        branches.append([*facts, row.own_flops, _gamma(row.gamma), _lane(summary, (number, j))])
    name, share, adds_up = printable(block.name), round(block.share, 6), block.kind not in SHARED
    scores = _scores(block.scores)
    return [name, block.kind, block.channels, block.kept, block.flops, share, adds_up, branches, scores]


def _gamma(gamma: tuple[float, float, float] | None) -> list[float] | None:
    if gamma is None:
        return None
    return [_rounded(number, 3) for number in gamma]


def _scores(histogram: Histogram | None) -> list[Any] | None:
    """Ends of the bins, the cut, neurons per bin that are kept and dropped."""
    if histogram is None:
        return None
    cut = None if histogram.cut is None else _rounded(histogram.cut, 5)
    ends = [_rounded(histogram.low, 5), _rounded(histogram.high, 5)]
    return [*ends, cut, list(histogram.kept), list(histogram.dropped)]


def _rounded(number: float, digits: int) -> float:
    return float(f"{number:.{digits}g}")


def _lane(summary: Summary, place: Place) -> list[Any]:
    """Layers as [what, name, before, after], blocks as their number."""
    lane: list[Any] = []
    for item in summary.lanes.get(place, []):
        if isinstance(item, Layer):
            lane.append([item.what, printable(item.name), item.channels, item.kept])
        else:
            lane.append(item)
    return lane
