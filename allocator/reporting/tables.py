"""A summary as CSV and as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from allocator.errors import plural
from allocator.reporting.facts import BlockFacts, BranchFacts, Budget, Summary
from allocator.reporting.rows import LIMIT, condensed, select
from allocator.reporting.words import change, percent, printable, share_of, short, size, spread, timed

COLUMNS = (
    "block",
    "kind",
    "branch",
    "scale",
    "stride",
    "kernel",
    "dilation",
    "receptive_field",
    "channels",
    "kept",
    "inner",
    "inner_kept",
    "flops",
    "own_flops",
    "own_flops_kept",
    "share",
    "gamma_mean",
    "gamma_min",
    "gamma_max",
    "before",
)
LATENCY_COLUMNS = ("seconds", "seconds_kept")
# A spreadsheet runs a cell that begins with one of these.
_FORMULA = ("=", "+", "-", "@")
_MOST_MODULES = 3


def to_csv(summary: Summary) -> str:
    """One line per branch, then one for what is in no block; `own_flops` adds up to the network's FLOPs.

    Where the latency was measured, there are two columns more, and a last line for it.
    """
    columns = COLUMNS if summary.latency is None else (*COLUMNS, *LATENCY_COLUMNS)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for block in summary.blocks:
        for branch in block.branches:
            writer.writerow(_csv_row(block, branch))
    writer.writerow(
        {
            "kind": "outside blocks",
            "flops": summary.outside,
            "own_flops": summary.outside,
            "own_flops_kept": summary.outside_kept,
            "share": summary.outside_share,
        }
    )
    if summary.latency is not None:
        latency: dict[str, Any] = {"kind": "latency", "seconds": summary.latency.seconds}
        if summary.latency_kept is not None:
            latency["seconds_kept"] = summary.latency_kept.seconds
        writer.writerow(latency)
    return text.getvalue()


def _csv_row(block: BlockFacts, branch: BranchFacts) -> dict[str, Any]:
    """What is None stays empty; numbers are written with all of their digits."""
    mean, low, high = branch.gamma or (None, None, None)
    return {
        "block": csv_cell(block.name),
        "kind": block.kind,
        "branch": csv_cell(branch.name),
        "scale": f"{branch.scale:g}",
        "stride": f"{branch.stride:g}",
        "kernel": size(branch.kernel),
        "dilation": branch.dilation,
        "receptive_field": size(branch.receptive_field),
        "channels": branch.channels,
        "kept": branch.kept,
        "inner": branch.inner,
        "inner_kept": branch.inner_kept,
        "flops": branch.flops,
        "own_flops": branch.own_flops,
        "own_flops_kept": branch.own_flops_kept,
        "share": branch.share,
        "gamma_mean": mean,
        "gamma_min": low,
        "gamma_max": high,
        "before": branch.before,
    }


def csv_cell(text: str) -> str:
    """A name, so that no spreadsheet takes it for a formula."""
    text = printable(text)
    return f"'{text}" if text.startswith(_FORMULA) else text


def to_markdown(summary: Summary, limit: int | None = LIMIT) -> str:
    """Headings, totals and one table of blocks and branches."""
    inputs = ", ".join(size(shape) for shape in summary.inputs)
    lines = [f"# {escaped(summary.model)}", "", f"{escaped(summary.kind)}, input {inputs}.", ""]
    lines += _totals(summary)
    lines += ["", "One FLOP is one multiply-add, as fvcore counts. FLOPs are not latency.", ""]
    if summary.latency is not None:
        lines += [f"Latency {timed(summary.latency, summary.latency_kept)}.", ""]
    if summary.budget is not None:
        lines += [_budget(summary.budget), ""]
    lines += ["## Blocks", "", *_blocks(summary, limit), ""]
    lines += _what_must_stay(summary)
    lines += _notes(summary)
    return "\n".join(lines)


def _totals(summary: Summary) -> list[str]:
    titles, rows = ["", "now", ""], []
    if summary.budget is not None:
        titles += ["kept", ""]
    for cost in summary.costs():
        cells = [cost.name, f"{cost.before:,}", short(cost.before)]
        if cost.after is not None:
            cells += [f"{cost.after:,}", percent(share_of(cost.after, cost.before))]
        rows.append(cells)
    return markdown_table(titles, rows, right=(1, 2, 3, 4))


def _budget(budget: Budget) -> str:
    line = (
        f"Budget of {budget.asked:,.0f} FLOPs: policy {budget.policy}, criterion {budget.criterion}, scope "
        f"{budget.scope}."
    )
    if budget.certificate:
        line += f" Certificate: {budget.certificate}."
    return line


def _blocks(summary: Summary, limit: int | None) -> list[str]:
    selection = select(summary, limit)
    rows = []
    for block in selection.blocks:
        heading = f"**{escaped(block.name)}** ({block.kind})"
        rows.append([heading, "", "", change(block.channels, block.kept), percent(block.share), ""])
        for row in condensed(block):
            cells = [f"{row.scale:g}", size(row.kernel), change(row.channels, row.kept), percent(row.share)]
            rows.append([escaped(row.name), *cells, spread(row.gamma)])
    if selection.hidden:
        hidden = f"{plural(selection.hidden, 'lighter block')}, not shown"
        rows.append([hidden, "", "", "", percent(selection.share), ""])
    rows.append(["outside blocks", "", "", "", percent(summary.outside_share), ""])
    titles = ["block / branch", "scale", "kernel", "channels", "share of FLOPs", "γ from–to"]
    return markdown_table(titles, rows, right=(1, 3, 4, 5))


def _what_must_stay(summary: Summary) -> list[str]:
    if not summary.fixed and not summary.unsupported:
        return []
    lines = ["## What must stay", ""]
    for fixed in summary.fixed:
        line = f"- {plural(fixed.channels, 'channel')}: {escaped(fixed.reason)}"
        if fixed.modules:
            line += f", at {escaped(', '.join(fixed.modules[:_MOST_MODULES]))}"
        lines.append(line)
    for operator, modules in summary.unsupported.items():
        lines.append(f"- not followed: {escaped(operator)} in {escaped(', '.join(modules))}")
    return [*lines, ""]


def _notes(summary: Summary) -> list[str]:
    remarks = [*(f"assumed: {assumption}" for assumption in summary.assumptions), *summary.notes]
    if not remarks:
        return []
    return ["## Notes", "", *(f"- {escaped(remark)}" for remark in remarks), ""]


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of a table; the columns in `right` are aligned to the right."""
    rules = ["---:" if i in right else "---" for i in range(len(titles))]
    return [f"| {' | '.join(cells)} |" for cells in (titles, rules, *rows)]


def escaped(text: str) -> str:
    """A name, so that Markdown takes none of it for its own."""
    text = printable(text)
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|" else c for c in text)
