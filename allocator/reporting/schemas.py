"""The JSON Schemas of what the command line prints for machines."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from allocator.errors import UnknownNameError, unknown

SCHEMAS = ("report", "compare", "allocate")


def schema(of: str = "report") -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what `allocator-cli report`, `compare` or `allocate` gives with ``--json``.

    Raises:
        UnknownNameError: another command; names a near one.
    """
    if of not in SCHEMAS:
        raise UnknownNameError(unknown("schema", of, SCHEMAS))
    text = resources.files(__package__).joinpath(f"{of}.schema.json").read_text(encoding="utf-8")
    return json.loads(text)
