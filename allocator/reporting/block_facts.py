"""From the blocks of a traced model to what a report says of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from allocator.graph.blocks import Block, Branch
from allocator.graph.channel_graph import ChannelGraph
from allocator.reporting.facts import SHARED, BlockFacts, BranchFacts, Histogram
from allocator.reporting.lanes import Place, places
from allocator.reporting.words import share_of
from allocator.scoring.scores import Scores

BINS = 24


class BlockCollector:
    """Gathers what is said of the blocks of one graph.

    Args:
        graph: from `trace`.
        scores: of its neurons; None where nothing can be ranked.
        kept: (neurons,) bool that a budget leaves; None without a budget.

    Attributes:
        owner: the innermost branch that each call lies in.
        parents: the innermost branch that each block lies in.
    """

    def __init__(self, graph: ChannelGraph, scores: Scores | None, kept: np.ndarray | None) -> None:
        self.graph, self.scores, self.kept = graph, scores, kept
        self.owner, self.parents = places(graph.blocks)
        self._flops = self._flops_by_place(np.ones(graph.size, dtype=bool))

    def outside(self) -> int:
        """FLOPs of calls in no block."""
        return self._flops.get(None, 0)

    def outside_kept(self) -> int | None:
        """What the budget leaves of them; None without a budget."""
        if self.kept is None:
            return None
        return self._flops_by_place(self.kept).get(None, 0)

    def blocks(self) -> tuple[BlockFacts, ...]:
        """In the order of their aggregation."""
        blocks = [self._block(number, block) for number, block in enumerate(self.graph.blocks)]
        if self.kept is not None:
            stays, flops = self.graph.stays(self.kept), self._flops_by_place(self.kept)
            for number, block in enumerate(self.graph.blocks):
                blocks[number] = _with_kept(blocks[number], number, block, stays, flops)
        return tuple(blocks)

    def _flops_by_place(self, kept: np.ndarray) -> dict[Place | None, int]:
        """FLOPs per innermost branch when the neurons with `kept` true stay; None stands for calls in no block."""
        sums: dict[Place | None, int] = {}
        metric = self.graph.metric("flops")
        for term, flops in zip(metric.terms, metric.per_term(kept).tolist(), strict=True):
            place = self.owner.get(term.op)
            sums[place] = sums.get(place, 0) + flops
        return sums

    def _block(self, number: int, block: Block) -> BlockFacts:
        """What there is, whatever a budget leaves of it."""
        flops = _own_flops(number, block, [branch.channels for branch in block.branches], self._flops)
        return BlockFacts(
            name=block.name,
            kind=block.kind,
            channels=block.channels,
            kept=None,
            entry=block.entry,
            flops=sum(flops),
            flops_kept=None,
            share=share_of(sum(flops), self.graph.flops),
            parent=self.parents[number],
            branches=tuple(self._branch(*pair) for pair in zip(block.branches, flops, strict=True)),
            scores=self._histogram(block),
        )

    def _branch(self, branch: Branch, own_flops: int) -> BranchFacts:
        return BranchFacts(
            name=branch.name,
            channels=branch.channels,
            kept=None,
            inner=branch.inner,
            inner_kept=None,
            scale=branch.scale,
            stride=branch.stride,
            kernel=branch.kernel,
            kernels=branch.kernels,
            dilation=branch.dilation,
            receptive_field=branch.receptive_field,
            flops=branch.flops,
            own_flops=own_flops,
            own_flops_kept=None,
            share=share_of(own_flops, self.graph.flops),
            gamma=branch.gamma,
        )

    def _histogram(self, block: Block) -> Histogram | None:
        """Scores of the neurons that write its branches; None where none has one."""
        if self.scores is None:
            return None
        labels: list[np.ndarray] = []
        for branch in block.branches:
            labels += [branch.label, *branch.inner_labels]
        units = np.unique(np.concatenate([self.graph.units(label) for label in labels]))
        units = units[~np.isnan(self.scores.values[units])]
        if not len(units):
            return None
        values = self.scores.values[units]
        stays = np.ones(len(units), dtype=bool) if self.kept is None else self.kept[units]
        low, high = min(0.0, float(values.min())), float(values.max())
        if high <= low:  # all scores are zero: bins need a width
            high = low + 1.0
        kept, _ = np.histogram(values[stays], BINS, (low, high))
        dropped, _ = np.histogram(values[~stays], BINS, (low, high))
        cut = None
        if not stays.all():
            cut = float(values[~stays].max())
        return Histogram(low, high, tuple(kept.tolist()), tuple(dropped.tolist()), cut)


def _own_flops(number: int, block: Block, channels: Sequence[int], flops: dict[Place | None, int]) -> list[int]:
    """FLOPs of each branch's calls that are in no block within it.

    Args:
        number: of the block.
        block: the block.
        channels: of its branches.
        flops: per innermost branch.
    """
    if block.kind != "groups":
        return [flops.get((number, j), 0) for j in range(len(block.branches))]
    # The groups of a convolution are one call, which belongs to the first: it is shared out by what each writes.
    call, written = flops.get((number, 0), 0), max(sum(channels), 1)
    return [call * count // written for count in channels]


def _with_kept(
    facts: BlockFacts, number: int, block: Block, stays: np.ndarray, flops: dict[Place | None, int]
) -> BlockFacts:
    """What a budget leaves of a block, added to what there is.

    Args:
        facts: without a budget.
        number: of the block.
        block: the block.
        stays: (slots,) bool.
        flops: per innermost branch, of what stays.
    """
    kept = [int(stays[branch.label].sum()) for branch in block.branches]
    own_flops = _own_flops(number, block, kept, flops)
    branches = []
    for j, branch in enumerate(block.branches):
        inner_kept = sum(int(stays[label].sum()) for label in branch.inner_labels)
        branches.append(replace(facts.branches[j], kept=kept[j], inner_kept=inner_kept, own_flops_kept=own_flops[j]))
    aggregated = kept[0] if block.kind in SHARED else sum(kept)
    return replace(facts, kept=aggregated, flops_kept=sum(own_flops), branches=tuple(branches))
