"""A summary as CSV and as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from allocator.reporting.facts import Summary
from allocator.reporting.rows import LIMIT, condensed, select
from allocator.reporting.words import change, percent, plural, printable, short, size, spread, timed

COLUMNS = (
    "block", "kind", "branch", "scale", "stride", "kernel", "dilation", "receptive_field", "channels", "kept",
    "inner", "inner_kept", "flops", "own_flops", "own_flops_kept", "share", "gamma_mean", "gamma_min", "gamma_max",
    "before",
)  # fmt: skip
_FORMULA = ("=", "+", "-", "@")


def to_csv(summary: Summary) -> str:
    """One line per branch, then one for what is in no block; `own_flops` adds up to the network's FLOPs.

    Where the latency was measured, there are two columns more, and a last line for it.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = COLUMNS if summary.latency is None else (*COLUMNS, "seconds", "seconds_kept")
    writer.writerow(columns)
    for block in summary.blocks:
        for row in block.branches:
            writer.writerow(
                [
                    csv_cell(block.name), block.kind, csv_cell(row.name), f"{row.scale:g}", f"{row.stride:g}",
                    size(row.kernel), row.dilation, size(row.receptive_field), row.channels, _known(row.kept),
                    row.inner, _known(row.inner_kept), row.flops, row.own_flops, _known(row.own_flops_kept),
                    repr(row.share), *(repr(n) for n in row.gamma or ()), *[""] * (0 if row.gamma else 3),
                    _known(row.before), *[""] * (len(columns) - len(COLUMNS)),
                ]
            )  # fmt: skip
    outside = {
        "kind": "outside blocks",
        "flops": summary.outside,
        "own_flops": summary.outside,
        "own_flops_kept": _known(summary.outside_kept),
        "share": repr(summary.outside / max(summary.totals.flops, 1)),
    }
    writer.writerow([outside.get(column, "") for column in columns])
    if summary.latency is not None:
        kept = summary.budget.latency if summary.budget else None
        times = {"kind": "latency", "seconds": summary.latency.seconds, "seconds_kept": kept.seconds if kept else ""}
        writer.writerow([times.get(column, "") for column in columns])
    return text.getvalue()


def csv_cell(text: str) -> str:
    """A name, so that no spreadsheet takes it for a formula."""
    text = printable(text)
    return f"'{text}" if text.startswith(_FORMULA) else text


def _known(number: int | None) -> str:
    return "" if number is None else str(number)


def to_markdown(summary: Summary, limit: int | None = LIMIT) -> str:
    """Headings, totals and one table of blocks and branches."""
    budget = summary.budget
    inputs = ", ".join(size(shape) for shape in summary.inputs)
    lines = [f"# {escaped(summary.model)}", "", f"{escaped(summary.kind)}, input {inputs}.", ""]
    kept = budget.totals if budget else None
    rows = []
    for what in ("flops", "parameters", "activations"):
        before = getattr(summary.totals, what)
        after = [] if kept is None else [f"{getattr(kept, what):,}", percent(getattr(kept, what) / max(before, 1))]
        rows.append(["FLOPs" if what == "flops" else what, f"{before:,}", short(before), *after])
    lines += markdown_table(["", "now", "", *(["kept", ""] if kept else [])], rows, right=(1, 2, 3, 4))
    lines += ["", "One FLOP is one multiply-add, as fvcore counts. FLOPs are not latency.", ""]
    if summary.latency is not None:
        lines += [f"Latency {timed(summary.latency, budget.latency if budget else None)}.", ""]
    if budget is not None:
        lines += [
            f"Budget of {budget.asked:,.0f} FLOPs: policy {budget.policy}, criterion {budget.criterion}, scope "
            f"{budget.scope}.{f' Certificate: {budget.certificate}.' if budget.certificate else ''}",
            "",
        ]
    lines += ["## Blocks", "", *_blocks(summary, limit), ""]
    if summary.fixed or summary.unsupported:
        lines += ["## What must stay", ""]
        for each in summary.fixed:
            where = f", at {escaped(', '.join(each.modules[:3]))}" if each.modules else ""
            lines.append(f"- {plural(each.channels, 'channel')}: {escaped(each.reason)}{where}")
        lines += [
            f"- not followed: {escaped(operator)} in {escaped(', '.join(modules))}"
            for operator, modules in summary.unsupported.items()
        ]
        lines.append("")
    remarks = [f"assumed: {each}" for each in summary.assumptions] + list(summary.notes)
    if remarks:
        lines += ["## Notes", "", *(f"- {escaped(each)}" for each in remarks), ""]
    return "\n".join(lines)


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
        what = f"{plural(selection.hidden, 'lighter block')}, not shown"
        rows.append([what, "", "", "", percent(selection.share), ""])
    rows.append(["outside blocks", "", "", "", percent(summary.outside / max(summary.totals.flops, 1)), ""])
    titles = ["block / branch", "scale", "kernel", "channels", "share of FLOPs", "γ from–to"]
    return markdown_table(titles, rows, right=(1, 3, 4, 5))


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of a table; the columns in `right` are aligned to the right."""
    rules = ["---:" if i in right else "---" for i in range(len(titles))]
    return [f"| {' | '.join(cells)} |" for cells in (titles, rules, *rows)]


def escaped(text: str) -> str:
    """A name, so that Markdown takes none of it for its own."""
    text = printable(text)
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|" else c for c in text)
