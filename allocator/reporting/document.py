"""A summary as JSON-ready data, in the form that `report.schema.json` describes."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import resources
from typing import Any

from allocator.errors import UnknownNameError
from allocator.io.models import unknown
from allocator.reporting.facts import FORMAT, BlockFacts, Summary

SCHEMAS = ("report", "compare", "allocate")


def document(summary: Summary) -> dict[str, Any]:
    """The JSON form of a summary: FLOPs are fvcore's, shares are of the network's FLOPs, γ is (mean, min, max)."""
    facts = asdict(summary)
    del facts["lanes"], facts["outside"], facts["outside_kept"], facts["totals"]
    facts["blocks"] = [_block(summary, block) for block in summary.blocks]
    facts |= asdict(summary.totals)
    whole = max(summary.totals.flops, 1)
    facts["outside_blocks"] = {
        "flops": summary.outside,
        "flops_kept": summary.outside_kept,
        "share": summary.outside / whole,
    }
    return plain({"format": FORMAT, **facts})


def schema(of: str = "report") -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what `allocator-cli report`, `compare` or `allocate` gives with ``--json``.

    Raises:
        UnknownNameError: another command; names a near one.
    """
    if of not in SCHEMAS:
        raise UnknownNameError(unknown("schema", of, SCHEMAS))
    text = resources.files(__package__).joinpath(f"{of}.schema.json").read_text(encoding="utf-8")
    return json.loads(text)


def _block(summary: Summary, block: BlockFacts) -> dict[str, Any]:
    facts = asdict(block)
    if block.parent is not None:
        outer = summary.blocks[block.parent[0]]
        facts["parent"] = {"block": outer.name, "branch": outer.branches[block.parent[1]].name}
    return facts


def plain(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value
