"""A comparison in several formats: the one place that knows them all."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from allocator.reporting.compare import Comparison, Row
from allocator.reporting.compare_page import to_html
from allocator.reporting.facts import SHARED
from allocator.reporting.tables import csv_cell, escaped, markdown_table
from allocator.reporting.words import plural, printable, short, timed


class ComparisonText:
    """Print it with rich: the blocks that differ, or all of them."""

    def __init__(self, comparison: Comparison, *, everything: bool = False) -> None:
        self.comparison, self.everything = comparison, everything

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        a, b = self.comparison.a, self.comparison.b
        for letter, side in (("A", a), ("B", b)):
            yield Text.assemble(
                (letter, "bold"), f" {printable(side.name)}: {side.flops:,} FLOPs ({short(side.flops)})"
            )
        share = f", {b.flops / a.flops:.1%} of A's" if a.flops else ""
        yield Text(f"B has {b.flops - a.flops:+,} FLOPs{share}")
        yield from map(Text, _latencies(self.comparison))
        shown, hidden = _shown(self.comparison, self.everything)
        if shown:
            yield _table(shown)
        if hidden:
            yield Text(f"{plural(hidden, 'block')} alike, not shown (--all shows them)", style="dim")


def _latencies(comparison: Comparison) -> list[str]:
    """A line per side whose time was measured, and one for both."""
    a, b = comparison.a.latency, comparison.b.latency
    lines = [f"{letter} takes {timed(time)}" for letter, time in (("A", a), ("B", b)) if time is not None]
    if a is not None and b is not None:
        lines.append(f"B takes {b.seconds / a.seconds:.1%} of A's time")
    return lines


def _shown(comparison: Comparison, everything: bool) -> tuple[list[Row], int]:
    """Rows of the blocks that differ, and how many blocks do not."""
    differing = {row.block for row in comparison.rows if row.a != row.b}
    blocks = {row.block for row in comparison.rows}
    if everything:
        return list(comparison.rows), 0
    return [row for row in comparison.rows if row.block in differing], len(blocks - differing)


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column("block / branch", overflow="fold")
    for title in ("A", "B", "B - A"):
        table.add_column(title, justify="right", no_wrap=True)
    last = None
    for row in rows:
        if row.block != last:
            cells = _sums([each for each in rows if each.block == row.block])
            table.add_row(Text.assemble((printable(row.block), "bold"), f" ({row.kind})"), *cells)
        last = row.block
        table.add_row(Text(f"  {printable(row.branch)}"), *_cells(row))
    return table


def _sums(rows: list[Row]) -> tuple[str, str, str]:
    if rows[0].kind in SHARED:
        return "", "", ""
    a, b = (sum(getattr(row, side) or 0 for row in rows) for side in ("a", "b"))
    return str(a), str(b), f"{b - a:+}" if a != b else ""


def _cells(row: Row) -> tuple[str, str, str]:
    known = ["-" if n is None else str(n) for n in (row.a, row.b)]
    return known[0], known[1], f"{row.difference:+}" if row.difference else ""


def comparison_csv(comparison: Comparison) -> str:
    """One line per branch, and a last one for the latency where it was measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["block", "kind", "branch", "a", "b", "difference"])
    for row in comparison.rows:
        known = ["" if n is None else n for n in (row.a, row.b)]
        writer.writerow([csv_cell(row.block), row.kind, csv_cell(row.branch), *known, row.difference])
    a, b = comparison.a.latency, comparison.b.latency
    if a is not None and b is not None:
        writer.writerow(["", "latency (seconds)", "", a.seconds, b.seconds, b.seconds - a.seconds])
    return text.getvalue()


def comparison_markdown(comparison: Comparison) -> str:
    """A table of the blocks that differ."""
    a, b = comparison.a, comparison.b
    lines = [f"# {escaped(a.name)} and {escaped(b.name)}", ""]
    lines += [f"A has {a.flops:,} FLOPs, B {b.flops:,} ({b.flops - a.flops:+,}).", ""]
    lines += [part for line in _latencies(comparison) for part in (f"{line}.", "")]
    shown, hidden = _shown(comparison, False)
    rows = [[escaped(row.block), escaped(row.branch), *_cells(row)] for row in shown]
    lines += markdown_table(["block", "branch", "A", "B", "B - A"], rows, right=(2, 3, 4))
    return "\n".join([*lines, "", f"{plural(hidden, 'block')} alike, not shown.", ""])


def comparison_json(comparison: Comparison) -> str:
    """`Comparison.to_dict` as text."""
    return json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False) + "\n"


def _rich(comparison: Comparison) -> str:
    console = Console(file=io.StringIO(), width=120, no_color=True, force_terminal=False)
    console.print(ComparisonText(comparison))
    return console.file.getvalue()  # type: ignore[attr-defined]


def _html(comparison: Comparison) -> str:
    return to_html(comparison, _latencies(comparison))


COMPARISONS: dict[str, Callable[[Comparison], str]] = {
    "rich": _rich,
    "json": comparison_json,
    "csv": comparison_csv,
    "html": _html,
    "md": comparison_markdown,
}
