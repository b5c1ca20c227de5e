"""A comparison for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from allocator.errors import plural
from allocator.reporting.compare import BlockRows, Comparison
from allocator.reporting.compare_words import cell, difference_cell, flops_difference, latencies
from allocator.reporting.facts import SHARED
from allocator.reporting.terminal import heading, table_without_lines
from allocator.reporting.words import printable, short


class ComparisonText:
    """Print it with rich: the blocks that differ, or all of them."""

    def __init__(self, comparison: Comparison, *, everything: bool = False) -> None:
        self.comparison, self.everything = comparison, everything

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        comparison = self.comparison
        for letter, side in (("A", comparison.a), ("B", comparison.b)):
            figures = f" {printable(side.name)}: {side.flops:,} FLOPs ({short(side.flops)})"
            yield Text.assemble((letter, "bold"), figures)
        yield Text(flops_difference(comparison))
        for sentence in latencies(comparison):
            yield Text(sentence)
        blocks = comparison.blocks()
        shown = [block for block in blocks if self.everything or block.differs]
        if shown:
            yield _table(shown)
        if len(shown) < len(blocks):
            hidden = plural(len(blocks) - len(shown), "block")
            yield Text(f"{hidden} alike, not shown (--all shows them)", style="dim")


def _table(blocks: Iterable[BlockRows]) -> Table:
    table = table_without_lines()
    table.add_column("block / branch", overflow="fold")
    for title in ("A", "B", "B - A"):
        table.add_column(title, justify="right", no_wrap=True)
    for block in blocks:
        table.add_row(heading(block.name, f" ({block.kind})"), *_sums(block))
        for row in block.rows:
            name = Text(f"  {printable(row.branch)}")
            table.add_row(name, cell(row.a), cell(row.b), difference_cell(row.difference))
    return table


def _sums(block: BlockRows) -> tuple[str, str, str]:
    """Channels of both sides; none where the branches share them, and have them in their own rows."""
    if block.kind in SHARED:
        return "", "", ""
    a, b = sum(row.a or 0 for row in block.rows), sum(row.b or 0 for row in block.rows)
    return str(a), str(b), difference_cell(b - a)
