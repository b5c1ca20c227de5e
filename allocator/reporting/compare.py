"""Two networks or allocations side by side: channels per block and branch, and the difference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from allocator.cost.latency import Latency
from allocator.reporting.facts import Summary, plain
from allocator.rewriting.allocation import Allocation

Channels = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        name: what it is called.
        flops: as fvcore counts them.
        channels: per block and branch; the groups of a convolution are one branch.
        kinds: of the blocks.
        latency: where it was measured.
    """

    name: str
    flops: int
    channels: Channels
    kinds: dict[str, str]
    latency: Latency | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form of its figures; the channels stand in the comparison's rows."""
        latency = None if self.latency is None else plain(asdict(self.latency))
        return {"name": self.name, "flops": self.flops, "latency": latency}


@dataclass(frozen=True)
class Row:
    """One branch on both sides; None where a side has no such branch."""

    block: str
    kind: str
    branch: str
    a: int | None
    b: int | None

    @property
    def difference(self) -> int:
        """Channels that the second has more; a branch that is not there has none."""
        return (self.b or 0) - (self.a or 0)


@dataclass(frozen=True)
class BlockRows:
    """The branches of one block on both sides."""

    name: str
    kind: str
    rows: tuple[Row, ...]

    @property
    def differs(self) -> bool:
        """Whether any branch has other channels on one side, or is not there."""
        return any(row.a != row.b for row in self.rows)


@dataclass(frozen=True)
class Comparison:
    """Two sides, with a row per branch of either, in the order of the first and then of the second."""

    a: Side
    b: Side
    rows: tuple[Row, ...]

    def blocks(self) -> list[BlockRows]:
        """The rows, block by block."""
        blocks = []
        for name, group in groupby(self.rows, lambda row: row.block):
            rows = tuple(group)
            blocks.append(BlockRows(name, rows[0].kind, rows))
        return blocks

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, that `allocator/reporting/compare.schema.json` describes."""
        return {
            "a": self.a.to_dict(),
            "b": self.b.to_dict(),
            "flops_difference": self.b.flops - self.a.flops,
            "branches": [{**asdict(row), "difference": row.difference} for row in self.rows],
        }


def side_of_allocation(name: str, allocation: Allocation, latency: Latency | None = None) -> Side:
    """What an allocation keeps, and the time that it was found to take."""
    kinds, channels = {}, {}
    for block in allocation.blocks:
        kinds[block["name"]] = block["kind"]
        branches = [(branch["name"], branch["after"]) for branch in block["branches"]]
        channels[block["name"]] = _by_branch(block["kind"], branches)
    return Side(name, allocation.flops_after, channels, kinds, latency)


def side_of_summary(summary: Summary) -> Side:
    """What a network has."""
    kinds, channels = {}, {}
    for block in summary.blocks:
        kinds[block.name] = block.kind
        branches = [(branch.name, branch.channels) for branch in block.branches]
        channels[block.name] = _by_branch(block.kind, branches)
    return Side(summary.model, summary.totals.flops, channels, kinds, summary.latency)


def _by_branch(kind: str, branches: Sequence[tuple[str, int]]) -> dict[str, int]:
    """Channels by branch; those of one name are added up, and the groups of a convolution are one branch."""
    row: dict[str, int] = {}
    for name, channels in branches:
        key = "groups" if kind == "groups" else name
        row[key] = row.get(key, 0) + channels
    return row


def compare(a: Side, b: Side) -> Comparison:
    """Pair the branches of two sides by the names of blocks and branches."""
    rows = []
    for block in _in_order(a.channels, b.channels):
        channels_a, channels_b = a.channels.get(block, {}), b.channels.get(block, {})
        kind = a.kinds.get(block) or b.kinds[block]
        for branch in _in_order(channels_a, channels_b):
            rows.append(Row(block, kind, branch, channels_a.get(branch), channels_b.get(branch)))
    return Comparison(a, b, tuple(rows))


def _in_order(first: Iterable[str], second: Iterable[str]) -> list[str]:
    """Names of either, each once: those of the first, then what the second has besides."""
    return list(dict.fromkeys([*first, *second]))
