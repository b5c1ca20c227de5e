"""Which rows a table of blocks has: groups of one convolution together, and not more blocks than can be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from allocator.reporting.facts import BlockFacts, BranchFacts, Summary

LIMIT = 64
"""Blocks in a table for people; files for machines hold all."""


@dataclass(frozen=True)
class Selection:
    """The blocks shown.

    Attributes:
        blocks: in network order.
        hidden: how many are not shown.
        share: of the network's FLOPs, that those have.
    """

    blocks: tuple[BlockFacts, ...]
    hidden: int
    share: float


def select(summary: Summary, limit: int | None = LIMIT) -> Selection:
    """The `limit` blocks with most FLOPs in network order; None for all of them."""
    blocks = summary.blocks
    if limit is None or len(blocks) <= limit:
        return Selection(blocks, 0, 0.0)
    heaviest = sorted(range(len(blocks)), key=lambda i: (-blocks[i].flops, i))
    shown, rest = sorted(heaviest[:limit]), heaviest[limit:]
    return Selection(tuple(blocks[i] for i in shown), len(rest), sum(blocks[i].share for i in rest))


def condensed(block: BlockFacts) -> Sequence[BranchFacts]:
    """The branches; groups of a convolution, which differ in γ alone, as one."""
    rows = block.branches
    if block.kind != "groups":
        return rows
    kept = None if block.kept is None else sum(row.kept or 0 for row in rows)
    gammas = [row.gamma for row in rows if row.gamma is not None]
    gamma = None
    if gammas:
        means, lows, highs = zip(*gammas, strict=True)
        gamma = (sum(means) / len(means), min(lows), max(highs))
    left = None if block.kept is None else sum(1 for row in rows if row.kept)
    named = f"{len(rows)} groups" if left in (None, len(rows)) else f"{left} of {len(rows)} groups"
    together = replace(
        rows[0],
        name=f"{named} of {rows[0].channels}",
        channels=block.channels,
        kept=kept,
        flops=block.flops,
        own_flops=block.flops,
        own_flops_kept=block.flops_kept,
        share=block.share,
        gamma=gamma,
        before=None,
    )
    return (together,)
