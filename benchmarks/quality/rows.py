"""Rows of measurements in a file, one a line: written as soon as they are there, so that a run can be stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_known(path: Path, **key: Any) -> bool:
    """Whether there is a row with these values."""
    return any(all(row.get(name) == value for name, value in key.items()) for row in read_rows(path))


def add_row(path: Path, found: Mapping[str, Any], **key: Any) -> None:
    """Write what was found for these values, and say so."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**key, **found}) + "\n")
    print(key, found.get("failed", "measured"), flush=True)
