"""Two networks or allocations side by side: channels per block and branch, and the difference."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
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
class Comparison:
    """Two sides, with a row per branch of either, in the order of the first and then of the second."""

    a: Side
    b: Side
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        sides = {
            key: {
                "name": side.name,
                "flops": side.flops,
                "latency": None if side.latency is None else plain(asdict(side.latency)),
            }
            for key, side in (("a", self.a), ("b", self.b))
        }
        rows = [{**asdict(row), "difference": row.difference} for row in self.rows]
        return {**sides, "flops_difference": self.b.flops - self.a.flops, "branches": rows}


def side_of_allocation(name: str, allocation: Allocation, latency: Latency | None = None) -> Side:
    """What an allocation keeps, and the time that it was found to take."""
    channels, kinds = {}, {}
    for block in allocation.blocks:
        kinds[block["name"]] = block["kind"]
        after = ((branch["name"], branch["after"]) for branch in block["branches"])
        channels[block["name"]] = _channels(block["kind"], after)
    return Side(name, allocation.flops_after, channels, kinds, latency)


def side_of_summary(summary: Summary) -> Side:
    """What a network has."""
    kinds = {block.name: block.kind for block in summary.blocks}
    channels = {
        block.name: _channels(block.kind, ((branch.name, branch.channels) for branch in block.branches))
        for block in summary.blocks
    }
    return Side(summary.model, summary.totals.flops, channels, kinds, summary.latency)


def _channels(kind: str, branches: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Channels by branch; those of one name are added up, and the groups of a convolution are one branch."""
    row: dict[str, int] = {}
    for name, channels in branches:
        key = "groups" if kind == "groups" else name
        row[key] = row.get(key, 0) + channels
    return row


def compare(a: Side, b: Side) -> Comparison:
    """Pair the branches of two sides by the names of blocks and branches."""
    rows = []
    for block in dict.fromkeys([*a.channels, *b.channels]):
        one, other = a.channels.get(block, {}), b.channels.get(block, {})
        kind = a.kinds.get(block) or b.kinds[block]
        rows += [Row(block, kind, name, one.get(name), other.get(name)) for name in dict.fromkeys([*one, *other])]
    return Comparison(a, b, tuple(rows))
