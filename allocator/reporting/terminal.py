"""What everything printed with rich shares: tables without lines, bars, and how they become plain text."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from allocator.reporting.words import printable

_BAR = 12
_TEXT_WIDTH = 120


def table_without_lines(*, header: bool = True) -> Table:
    """An empty table whose columns are told apart by space alone."""
    return Table(box=None, pad_edge=False, show_header=header, header_style="bold", padding=(0, 1))


def heading(name: str, kind: str) -> Text:
    """A block's name, and its kind as it is written behind it."""
    return Text.assemble((printable(name), "bold"), kind)


def bar(after: int, before: int) -> Text:
    """How much of something stays, drawn."""
    share = after / before if before else 0.0
    filled = round(share * _BAR)
    return Text.assemble(("━" * filled, "cyan"), ("─" * (_BAR - filled), "dim"))


def as_plain_text(renderable: RenderableType) -> str:
    """What is printed where there is no terminal: 120 columns, no colour."""
    text = io.StringIO()
    Console(file=text, width=_TEXT_WIDTH, no_color=True, force_terminal=False).print(renderable)
    return text.getvalue()
