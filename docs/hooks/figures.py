"""Diagrams put into the page itself, so that they take its colours."""

from __future__ import annotations

import html
import re
from pathlib import Path

_DIAGRAM = re.compile(r"^!\[([^\]]*)\]\((img/diagram-[\w-]+\.svg)\)$", re.MULTILINE)


def diagram(markdown: str, docs: Path, folder: str) -> str:
    """Replace images of `img/diagram-*.svg` that stand alone by their content.

    Args:
        markdown: the page's text.
        docs: the folder of the documentation.
        folder: the page's own, relative to it.
    """

    def inline(found: re.Match[str]) -> str:
        svg = (docs / folder / found[2]).read_text(encoding="utf-8")
        body = "\n".join(line for line in svg[svg.index("<svg") :].splitlines() if line.strip())
        label = html.escape(found[1], quote=True)
        return f'<figure class="diagram" role="img" aria-label="{label}">\n{body}\n</figure>'

    return _DIAGRAM.sub(inline, markdown)
