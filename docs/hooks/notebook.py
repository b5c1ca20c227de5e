"""A notebook as a page: its cells, and what they gave when it was last run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def notebook_page(path: Path) -> str:
    """Markdown with code blocks, printed text as text and shown values as HTML; and the file, to be taken along."""
    parts: list[str] = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts += [source] if cell["cell_type"] == "markdown" else [f"```python\n{source}\n```", *_outputs(cell)]
    parts.append(f"The notebook itself: [{path.name}]({path.name}).")
    return "\n\n".join(parts) + "\n"


def _outputs(cell: dict[str, Any]) -> Iterator[str]:
    printed = "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")
    if printed.strip():
        yield f"```text\n{printed.strip()}\n```"
    for output in cell["outputs"]:
        if output["output_type"] == "execute_result":
            html = "".join(output["data"]["text/html"])
            yield f'<div class="cell">{html}</div>'
