"""A summary as one HTML page that opens offline: charts by Vega-Lite, the network as blocks that open."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from allocator.reporting import charts
from allocator.reporting.facts import SHARED, BlockFacts, BranchFacts, Budget, Fixed, Histogram, Layer, Summary
from allocator.reporting.html_parts import asset, filled, text
from allocator.reporting.lanes import TOP, Place
from allocator.reporting.pictures import library
from allocator.reporting.rows import condensed
from allocator.reporting.words import percent, printable, share_of, short, size, timed

_MOST_MODULES = 3
_MOST_KERNELS = 6


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
        for title, said in _findings(budget).items():
            head += f"</p><p>{title}: {text(said)}."
    return f"{head}</p>"


def _findings(budget: Budget) -> dict[str, str]:
    """How good a choice is, whether it was proven, and what was done after it."""
    found: dict[str, str] = {}
    if budget.importance is not None:
        bound = "no bound is known for other plans"
        if budget.bound is not None and budget.gap is not None:
            bound = f"no plan keeps more than {budget.bound:.2%}, so the gap is {budget.gap:.2%}"
        found["Importance kept"] = f"{budget.importance:.2%} of all scores; {bound}"
    if budget.certificate:
        found["Certificate"] = budget.certificate
    if budget.recovery:
        found["Recovered"] = budget.recovery
    return found


def _totals(summary: Summary) -> str:
    table = "<div class=scroll tabindex=0 role=region aria-label='What it costs'><table class='totals'>"
    table += "<caption>What it costs</caption><thead><tr><td></td><th scope=col>now</th>"
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
    return f"{table}</tbody></table></div>"


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
        "model": printable(summary.model),
        "cut": "" if summary.budget is None else _CUTS.get(summary.budget.policy, ""),
        "policies": _policies(summary),
        "parts": "scale" if _by_scale(summary) else "largest kernel",
        "charts": _charts(summary),
        "histogram": charts.histogram(),
        "top": _lane(summary, TOP),
        "blocks": [_block(summary, i, block) for i, block in enumerate(summary.blocks)],
    }


_CUTS = {
    "global": "all neurons stand in one ranking, so the line is at one score in every block, but where floors hold",
    "isomorphic": "layers that are alike share a ranking, so blocks of one kind share a line",
    "per_block": "the branches of this block compete with one another, so every block has a line of its own",
    "priced": "a score is weighed against what the neuron costs: below the line cheap ones stay, and dear ones go",
    "uniform": "every branch keeps the same share of its own best; the line is the highest score that went",
}
"""What the line in a block's histogram means, by policy."""


def _by_scale(summary: Summary) -> bool:
    return any(part.startswith("scale ") for row in charts.parts_of(summary, kept=False).values() for part in row)


def _policies(summary: Summary) -> str:
    """What the policies on the curve keep at the budget at hand, in words."""
    kept = [f"{policy} {percent(importance)}" for policy, importance in charts.policies_at(summary)]
    return f"At this budget's FLOPs: {', '.join(kept)}." if kept else ""


def _charts(summary: Summary) -> dict[str, Any]:
    axis = "share of the block's neurons"
    specs: dict[str, Any] = {"flops": charts.flops(charts.flops_rows(summary), title="FLOPs per block")}
    now = charts.parts_of(summary, kept=False)
    names = charts.part_names([now])
    if len(names) > 1:  # bars of one colour say nothing that the FLOPs do not
        specs["shares"] = charts.shares(charts.share_rows(now), names, title="neurons, as it is", axis=axis)
        if summary.budget is not None:
            rows = charts.share_rows(charts.parts_of(summary, kept=True), now)
            specs["kept"] = charts.shares(rows, names, title="neurons that stay", axis=axis)
    if summary.curve:
        specs["curve"] = charts.curve(summary, title="budget against importance")
    for spec in specs.values():
        # A chart that is taken out of the page still says whose it is.
        named = {"text": printable(summary.model), "subtitle": spec["title"]["text"], "fontSize": 12, "limit": 280}
        spec["title"] = {**spec["title"], **named}
        spec |= {"width": "container", "height": 280}
    return specs


def _block(summary: Summary, number: int, block: BlockFacts) -> list[Any]:
    """Name, kind, channels, kept, FLOPs, share, whether its branches add up, branches, scores, FLOPs kept, inside."""
    branches = []
    for j, row in enumerate(condensed(block)):
        facts = [printable(row.name), row.channels, row.kept, row.inner, row.inner_kept, row.scale, _kernels(row)]
        lane = _lane(summary, (number, j))
        branches.append([*facts, row.own_flops, _gamma(row.gamma), lane, row.own_flops_kept])
    name, share, adds_up = printable(block.name), round(block.share, 6), block.kind not in SHARED
    inner = sum(branch.inner for branch in block.branches)
    inner_kept = sum(branch.inner_kept or 0 for branch in block.branches) if block.kept is not None else None
    facts = [name, block.kind, block.channels, block.kept, block.flops, share, adds_up, branches, _scores(block.scores)]
    return [*facts, block.flops_kept, inner, inner_kept]


def _kernels(branch: BranchFacts) -> str:
    """Of all its convolutions, in order, such as "1x1, 3x3, 1x1": the largest alone may not be the named layer's."""
    sizes = [size(kernel) for kernel in branch.kernels]
    return ", ".join(sizes[:_MOST_KERNELS]) + (
        f" and {len(sizes) - _MOST_KERNELS} more" if len(sizes) > _MOST_KERNELS else ""
    )


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
    """Layers as [what, name, before, after, FLOPs, FLOPs kept], blocks as their number."""
    lane: list[Any] = []
    for item in summary.lanes.get(place, []):
        if isinstance(item, Layer):
            lane.append([item.what, printable(item.name), item.channels, item.kept, item.flops, item.flops_kept])
        else:
            lane.append(item)
    return lane
