"""How a value looks where people meet it: printed as text, in a notebook as HTML, with rich in colour."""

from __future__ import annotations

import functools
import io
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

_TEXT_WIDTH = 120
_CELL = (
    '<pre style="white-space:pre;overflow-x:auto;line-height:normal;'
    "font-family:Menlo,'DejaVu Sans Mono',Consolas,monospace\">{code}</pre>"
)


@functools.singledispatch
def form(value: Any) -> RenderableType:
    """What is shown of a value: its `repr`, where no room above has registered more for its class."""
    return Text(repr(value))


class Shown:
    """A value with a form: `repr` says it in a line, `print`, rich and notebooks show it whole."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield form(self)

    def __str__(self) -> str:
        return as_plain_text(self).rstrip()

    def _repr_html_(self) -> str:
        return as_html(self)


def as_plain_text(renderable: RenderableType) -> str:
    """What is printed where there is no terminal: 120 columns, no colour."""
    text = io.StringIO()
    Console(file=text, width=_TEXT_WIDTH, no_color=True, force_terminal=False).print(renderable)
    return text.getvalue()


def as_html(renderable: RenderableType) -> str:
    """The same for a notebook: one element of preformatted text, in the notebook's own colours where none is given."""
    console = Console(file=io.StringIO(), width=_TEXT_WIDTH, record=True, force_jupyter=False, highlight=False)
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format=_CELL).rstrip()
