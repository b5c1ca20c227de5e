"""What the HTML pages share: templates and other files that lie beside this one, and names as text."""

from __future__ import annotations

import html
from importlib import resources

from allocator.reporting.words import printable


def asset(name: str) -> str:
    """A file that lies beside this one."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def filled(template: str, parts: dict[str, str]) -> str:
    """A page with its parts, which stand between ``%%`` in the template, put in."""
    filled = []
    for i, piece in enumerate(asset(template).split("%%")):
        filled.append(parts[piece] if i % 2 else piece)
    return "".join(filled)


def text(words: str) -> str:
    """Words that are nothing but words to a browser."""
    return html.escape(printable(words))
