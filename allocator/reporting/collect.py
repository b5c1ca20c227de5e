"""From a traced model, and what a budget keeps of it, to what a report says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from allocator.cost.latency import Latency
from allocator.flow.labels import FROZEN
from allocator.graph.blocks import Block, Branch
from allocator.graph.channel_graph import ChannelGraph
from allocator.graph.neurons import components
from allocator.planning.problem import least
from allocator.reporting.facts import SHARED, BlockFacts, BranchFacts, Budget, Fixed, Histogram, Point, Summary, Totals
from allocator.reporting.lanes import lanes, places
from allocator.rewriting.allocation import Allocation
from allocator.scoring.scores import Scores

BINS = 24


def summarise(
    graph: ChannelGraph,
    name: str,
    *,
    scores: Scores | None = None,
    allocation: Allocation | None = None,
    kept: np.ndarray | None = None,
    certificate: str | None = None,
    curve: Sequence[Point] = (),
    uncounted: dict[str, int] | None = None,
    notes: Sequence[str] = (),
    latency: Latency | None = None,
    latency_kept: Latency | None = None,
) -> Summary:
    """Collect what a report says of a model.

    Args:
        graph: from `trace`.
        name: what to call the model.
        scores: from `score`; None where nothing can be ranked.
        allocation: what a budget keeps, with `kept`, (neurons,) bool, its choice among the graph's neurons.
        certificate: verdict on the rewritten model.
        curve: from `pareto`.
        uncounted: operators that fvcore does not count.
        notes: further remarks.
        latency, latency_kept: of the model and of what the budget leaves of it, where they were measured.
    """
    everything = np.ones(graph.size, dtype=bool)
    collector = _Blocks(graph, scores, kept)
    written, fixed = _fixed(graph)
    budget = None
    if allocation is not None and kept is not None:
        budget = replace(_budget(graph, allocation, kept, scores), certificate=certificate, latency=latency_kept)
    return Summary(
        model=name,
        kind=type(graph.model).__name__,
        inputs=tuple(tuple(t.shape) for t in graph.inputs.tensors()),
        totals=_totals(graph, everything),
        neurons=graph.size,
        written=written,
        free=written - sum(each.channels for each in fixed),
        fixed=fixed,
        criterion=None if scores is None else scores.criterion,
        reachable={} if scores is None or not graph.size else least(graph, scores, "flops"),
        blocks=collector.blocks(),
        outside=collector.outside(everything),
        outside_kept=None if kept is None else collector.outside(kept),
        budget=budget,
        curve=tuple(curve),
        unsupported={operator: list(modules) for operator, modules in graph.unsupported.items()},
        uncounted=dict(uncounted or {}),
        assumptions=tuple(graph.assumptions),
        notes=tuple(notes),
        latency=latency,
        lanes=lanes(graph, collector.owner, collector.parents, everything if kept is None else kept),
    )


def _budget(graph: ChannelGraph, allocation: Allocation, kept: np.ndarray, scores: Scores | None) -> Budget:
    """What an allocation leaves of a model, before it was proven or timed."""
    return Budget(
        asked=allocation.flops_asked,
        totals=_totals(graph, kept),
        policy=allocation.policy,
        criterion=allocation.criterion,
        scope=allocation.scope,
        neurons=int(kept.sum()),
        importance=importance(scores, kept),
        certificate=None,
    )


def _totals(graph: ChannelGraph, kept: np.ndarray) -> Totals:
    """What the network costs when the neurons with `kept` true stay."""
    flops, parameters, activations = (graph.metric(name).value(kept) for name in ("flops", "params", "activations"))
    return Totals(flops, parameters, activations)


def importance(scores: Scores | None, kept: np.ndarray) -> float | None:
    """Share of the sum of all scores that the kept neurons have; None where there is nothing to share."""
    if scores is None:
        return None
    values = np.nan_to_num(scores.values)
    whole = float(values.sum())
    return float(values[kept].sum()) / whole if whole > 0 else None


def with_origin(summary: Summary, allocation: Allocation) -> Summary:
    """Of a network that an allocation gave: how many channels each branch had before."""
    before = {(b["name"], row["name"]): row["before"] for b in allocation.blocks for row in b["branches"]}
    blocks = tuple(
        replace(
            block,
            branches=tuple(replace(branch, before=before.get((block.name, branch.name))) for branch in block.branches),
        )
        for block in summary.blocks
    )
    share = allocation.flops_after / allocation.flops_before if allocation.flops_before else 1.0
    note = (
        f"allocated from {allocation.flops_before:,} FLOPs to {allocation.flops_after:,} ({share:.1%}), policy "
        f"{allocation.policy}, criterion {allocation.criterion}"
    )
    gone = [
        f"{b['name']}.{row['name']}"
        for b in allocation.blocks
        for row in b["branches"]
        if row["before"] and not row["after"] and b["kind"] != "groups"
    ]
    notes = (*summary.notes, note)
    if gone:
        notes += (f"branches without neurons, left out: {', '.join(gone[:8])}{' ...' if len(gone) > 8 else ''}",)
    return replace(summary, blocks=blocks, notes=notes)


class _Blocks:
    """The blocks of one graph; holds what all of them need."""

    def __init__(self, graph: ChannelGraph, scores: Scores | None, kept: np.ndarray | None) -> None:
        self.graph, self.scores, self.kept = graph, scores, kept
        self.owner, self.parents = places(graph.blocks)
        self.whole = max(graph.flops, 1)
        self.before = self._per_place(np.ones(graph.size, dtype=bool))
        self.after = None if kept is None else self._per_place(kept)
        self.stays = None if kept is None else graph.stays(kept)

    def _per_place(self, kept: np.ndarray) -> dict[tuple[int, int] | None, int]:
        """FLOPs per innermost branch; None stands for calls in no block."""
        sums: dict[tuple[int, int] | None, int] = {}
        metric = self.graph.metric("flops")
        for term, flops in zip(metric.terms, metric.per_term(kept).tolist(), strict=True):
            place = self.owner.get(term.op)
            sums[place] = sums.get(place, 0) + flops
        return sums

    def outside(self, kept: np.ndarray) -> int:
        """FLOPs of calls in no block."""
        return self._per_place(kept).get(None, 0)

    def blocks(self) -> tuple[BlockFacts, ...]:
        return tuple(self._block(i, block) for i, block in enumerate(self.graph.blocks))

    def _block(self, i: int, block: Block) -> BlockFacts:
        branches = tuple(self._branch(i, j, block, branch) for j, branch in enumerate(block.branches))
        own = sum(branch.own_flops for branch in branches)
        after = [branch.own_flops_kept for branch in branches]
        kept = [branch.kept for branch in branches]
        return BlockFacts(
            name=block.name,
            kind=block.kind,
            channels=block.channels,
            kept=None if self.kept is None else (kept[0] if block.kind in SHARED else sum(n or 0 for n in kept)),
            entry=block.entry,
            flops=own,
            flops_kept=None if self.kept is None else sum(n or 0 for n in after),
            share=own / self.whole,
            parent=self.parents[i],
            branches=branches,
            scores=self._scores(block),
        )

    def _branch(self, i: int, j: int, block: Block, branch: Branch) -> BranchFacts:
        stays = self.stays
        kept = None if stays is None else int(stays[branch.label].sum())
        own, after = self.before.get((i, j), 0), (self.after or {}).get((i, j), 0)
        if block.kind == "groups":  # one call, shared by what each group writes
            own = self.before.get((i, 0), 0) // len(block.branches)
            left = 0 if stays is None else sum(int(stays[each.label].sum()) for each in block.branches)
            after = (self.after or {}).get((i, 0), 0) * (kept or 0) // max(left, 1)
        return BranchFacts(
            name=branch.name,
            channels=branch.channels,
            kept=kept,
            inner=branch.inner,
            inner_kept=None if stays is None else sum(int(stays[label].sum()) for label in branch.inner_labels),
            scale=branch.scale,
            stride=branch.stride,
            kernel=branch.kernel,
            kernels=branch.kernels,
            dilation=branch.dilation,
            receptive_field=branch.receptive_field,
            flops=branch.flops,
            own_flops=own,
            own_flops_kept=None if stays is None else after,
            share=own / self.whole,
            gamma=branch.gamma,
        )

    def _scores(self, block: Block) -> Histogram | None:
        if self.scores is None:
            return None
        labels = [label for branch in block.branches for label in (branch.label, *branch.inner_labels)]
        units = np.unique(np.concatenate([self.graph.units(label) for label in labels]))
        units = units[~np.isnan(self.scores.values[units])]
        if not len(units):
            return None
        values = self.scores.values[units]
        stays = np.ones(len(units), dtype=bool) if self.kept is None else self.kept[units]
        low, high = min(0.0, float(values.min())), float(values.max())
        high = high if high > low else low + 1.0
        kept, dropped = (np.histogram(values[which], BINS, (low, high))[0].tolist() for which in (stays, ~stays))
        cut = float(values[~stays].max()) if not stays.all() else None
        return Histogram(low, high, tuple(kept), tuple(dropped), cut)


def _fixed(graph: ChannelGraph) -> tuple[int, tuple[Fixed, ...]]:
    """How many channels are written, and why some of them must stay: each counts for the first reason found."""
    written = np.unique(np.concatenate([np.zeros(0, int), *(label for label, _ in graph.facts.written)]))
    stuck = written[graph.unit_of_slot[written] < 0]
    component = components(graph.slots.total, [(tie.a, tie.b) for tie in graph.facts.ties])
    why: dict[int, tuple[str, str]] = {}
    for label, module, reason in graph.facts.frozen:
        for each in np.unique(component[label]).tolist():
            why.setdefault(each, (reason, module))
    why.pop(int(component[FROZEN]), None)
    count: dict[str, int] = {}
    modules: dict[str, dict[str, None]] = {}
    for each in component[stuck].tolist():
        reason, module = why.get(each, ("they go together with channels that are not followed", ""))
        count[reason] = count.get(reason, 0) + 1
        modules.setdefault(reason, {})[module] = None
    ordered = sorted(count, key=lambda reason: -count[reason])
    return len(written), tuple(Fixed(r, count[r], tuple(m for m in modules[r] if m)) for r in ordered)
