"""What everything printed with rich shares: tables without lines, and bars."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from allocator.reporting.words import printable

_BAR = 12


def table_without_lines(*, header: bool = True) -> Table:
    """An empty table whose columns are told apart by space alone."""
    return Table(box=None, pad_edge=False, show_header=header, header_style="bold", padding=(0, 1))


def heading(name: str, kind: str) -> Text:
    """A block's name, and its kind as it is written behind it."""
    return Text.assemble((printable(name), "bold"), kind)


def bar(after: float, before: float) -> Text:
    """How much of something stays, drawn."""
    share = after / before if before else 0.0
    filled = round(share * _BAR)
    return Text.assemble(("━" * filled, "cyan"), ("─" * (_BAR - filled), "dim"))
