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
    heaviest_first = sorted(range(len(blocks)), key=lambda i: (-blocks[i].flops, i))
    shown, hidden = sorted(heaviest_first[:limit]), heaviest_first[limit:]
    return Selection(tuple(blocks[i] for i in shown), len(hidden), sum(blocks[i].share for i in hidden))


def condensed(block: BlockFacts) -> Sequence[BranchFacts]:
    """The branches; groups of a convolution, which differ in γ alone, as one."""
    groups = block.branches
    if block.kind != "groups":
        return groups
    count = f"{len(groups)} groups"
    if block.kept is not None:
        left = sum(1 for group in groups if group.kept)
        if left < len(groups):
            count = f"{left} of {count}"
    together = replace(
        groups[0],
        name=f"{count} of {groups[0].channels}",
        channels=block.channels,
        kept=block.kept,
        flops=block.flops,
        own_flops=block.flops,
        own_flops_kept=block.flops_kept,
        share=block.share,
        gamma=_gamma_over(groups),
        before=None,
    )
    return (together,)


def _gamma_over(groups: Sequence[BranchFacts]) -> tuple[float, float, float] | None:
    """(mean, min, max) over groups of one size, by those that have any."""
    gammas = [group.gamma for group in groups if group.gamma is not None]
    if not gammas:
        return None
    means, lows, highs = zip(*gammas, strict=True)
    return sum(means) / len(means), min(lows), max(highs)
