"""From a traced model, and what a budget keeps of it, to what a report says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from torch import nn

from allocator.cost.latency import Latency
from allocator.flow.labels import FROZEN
from allocator.graph.channel_graph import ChannelGraph
from allocator.graph.neurons import components
from allocator.modules import count_parameters
from allocator.planning.optimality import Optimality
from allocator.planning.plan import Plan
from allocator.planning.problem import least
from allocator.recovering.record import Recovery
from allocator.reporting.block_facts import BlockCollector
from allocator.reporting.facts import (
    BlockChange,
    BlockFacts,
    BranchChange,
    Budget,
    Fixed,
    Limited,
    Outcome,
    Point,
    Summary,
    Totals,
)
from allocator.reporting.lanes import lanes
from allocator.reporting.layers import layers_of
from allocator.rewriting.allocation import Allocation
from allocator.scoring.scores import Scores
from allocator.verifying.certificate import Certificate

_MOST_ABSENT = 8
_NOT_FOLLOWED = "they go together with channels that are not followed"


def summarise(
    graph: ChannelGraph,
    name: str,
    *,
    scores: Scores | None = None,
    allocation: Allocation | None = None,
    kept: np.ndarray | None = None,
    optimality: Optimality | None = None,
    certificate: str | None = None,
    recovery: str | None = None,
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
        optimality: what the choice keeps of the scores, and what no other exceeds.
        certificate: verdict on the rewritten model.
        recovery: what was done to make it accurate again.
        curve: from `pareto`.
        uncounted: operators that fvcore does not count.
        notes: further remarks.
        latency, latency_kept: of the model and of what the budget leaves of it, where they were measured.
    """
    everything = np.ones(graph.size, dtype=bool)
    collector = BlockCollector(graph, scores, kept)
    written, fixed = _fixed(graph)
    budget = None
    if allocation is not None and kept is not None:
        budget = _budget(graph, allocation, kept, scores, optimality)
        budget = replace(budget, certificate=certificate, recovery=recovery, latency=latency_kept)
    layers = list(layers_of(graph, everything if kept is None else kept))
    return Summary(
        model=name,
        kind=type(graph.model).__name__,
        inputs=tuple(tuple(tensor.shape) for tensor in graph.inputs.tensors()),
        totals=_totals(graph, everything),
        neurons=graph.size,
        written=written,
        free=written - sum(reason.channels for reason in fixed),
        fixed=fixed,
        criterion=None if scores is None else scores.criterion,
        reachable=_reachable(graph, scores),
        blocks=collector.blocks(),
        outside=collector.outside(),
        outside_kept=collector.outside_kept(),
        budget=budget,
        curve=tuple(curve),
        unsupported={operator: list(modules) for operator, modules in graph.unsupported.items()},
        uncounted=dict(uncounted or {}),
        assumptions=tuple(graph.assumptions),
        notes=tuple(notes),
        latency=latency,
        layers=tuple(layer for _, layer in layers),
        lanes=lanes(layers, graph.blocks, collector.owner, collector.parents),
    )


def _budget(
    graph: ChannelGraph,
    allocation: Allocation,
    kept: np.ndarray,
    scores: Scores | None,
    optimality: Optimality | None,
) -> Budget:
    """What an allocation leaves of a model, before it was proven or timed."""
    return Budget(
        asked=allocation.flops_asked,
        totals=_totals(graph, kept),
        policy=allocation.policy,
        criterion=allocation.criterion,
        scope=allocation.scope,
        neurons=int(kept.sum()),
        importance=importance(scores, kept),
        bound=None if optimality is None else optimality.bound,
        gap=None if optimality is None else optimality.gap,
    )


def _totals(graph: ChannelGraph, kept: np.ndarray) -> Totals:
    """What the network costs when the neurons with `kept` true stay."""
    return Totals(
        flops=graph.metric("flops").value(kept),
        parameters=graph.metric("params").value(kept),
        activations=graph.metric("activations").value(kept),
    )


def _reachable(graph: ChannelGraph, scores: Scores | None) -> dict[str, int]:
    """Per scope the smallest FLOPs that a plan can have."""
    if scores is None or not graph.size:
        return {}
    return least(graph, scores, "flops")


def importance(scores: Scores | None, kept: np.ndarray) -> float | None:
    """Share of the sum of all scores that the kept neurons have; None where there is nothing to share."""
    if scores is None:
        return None
    values = np.nan_to_num(scores.values)
    whole = float(values.sum())
    if whole <= 0:
        return None
    return float(values[kept].sum()) / whole


def _fixed(graph: ChannelGraph) -> tuple[int, tuple[Fixed, ...]]:
    """How many channels are written, and why some of them must stay: each counts for the first reason found."""
    labels = [label for label, _ in graph.facts.written]
    written = np.unique(np.concatenate([np.zeros(0, int), *labels]))
    stuck = written[graph.unit_of_slot[written] < 0]
    component = components(graph.slots.total, [(tie.a, tie.b) for tie in graph.facts.ties])
    reasons: dict[int, tuple[str, str]] = {}
    for label, module, reason in graph.facts.frozen:
        for number in np.unique(component[label]).tolist():
            reasons.setdefault(number, (reason, module))
    # All that is not followed is tied to this one slot, for whatever reasons: none of them holds for all of it.
    reasons.pop(int(component[FROZEN]), None)
    channels: dict[str, int] = {}
    modules: dict[str, list[str]] = {}
    for number in component[stuck].tolist():
        reason, module = reasons.get(number, (_NOT_FOLLOWED, ""))
        channels[reason] = channels.get(reason, 0) + 1
        named = modules.setdefault(reason, [])
        if module and module not in named:
            named.append(module)
    most_first = sorted(channels, key=lambda reason: -channels[reason])
    return len(written), tuple(Fixed(reason, channels[reason], tuple(modules[reason])) for reason in most_first)


# Of an allocation ----------------------------------------------------------------------------------


class Allocated(Protocol):
    """What reports need of `allocator.Result`."""

    model: nn.Module
    allocation: Allocation
    certificate: Certificate
    recovery: Recovery | None
    graph: ChannelGraph
    plan: Plan
    flops_before: int
    flops_after: int
    next_cost: int | None
    uncounted: dict[str, int]
    notes: list[str]
    timings: dict[str, float]

    @property
    def optimality(self) -> Optimality | None: ...


def outcome_of(result: Allocated) -> Outcome:
    """Collect what is said of an allocation."""
    allocation = result.allocation
    return Outcome(
        model=type(result.graph.model).__name__,
        budgets=_limited(allocation, result.plan.next_costs),
        flops_before=result.flops_before,
        flops_after=result.flops_after,
        next_cost=result.next_cost,
        parameters_before=count_parameters(result.graph.model),
        parameters_after=count_parameters(result.model),
        policy=allocation.policy,
        criterion=allocation.criterion,
        scope=allocation.scope,
        optimality=result.optimality,
        blocks=_changes(allocation),
        certificate=result.certificate,
        recovery=None if result.recovery is None else str(result.recovery),
        uncounted=result.uncounted,
        unsupported=result.graph.unsupported,
        free_share=result.graph.share(),
        notes=tuple(result.notes),
        seconds=result.timings,
    )


def _limited(allocation: Allocation, next_costs: Mapping[str, int]) -> tuple[Limited, ...]:
    budgets = []
    for name, cost in allocation.costs.items():
        if cost["asked"] is not None:
            budgets.append(Limited(name, cost["asked"], cost["before"], cost["after"], next_costs.get(name)))
    return tuple(budgets)


def _changes(allocation: Allocation) -> tuple[BlockChange, ...]:
    """The blocks of an allocation that was just made; what is read from a file may say less of a branch."""
    blocks = []
    for block in allocation.blocks:
        branches = []
        for row in block["branches"]:
            branches.append(BranchChange(**{**row, "kernel": tuple(row["kernel"])}))
        blocks.append(BlockChange(block["name"], block["kind"], tuple(branches)))
    return tuple(blocks)


def with_origin(summary: Summary, allocation: Allocation) -> Summary:
    """Of a network that an allocation gave: how many channels each branch had before."""
    before: dict[tuple[str, str], int] = {}
    absent: list[str] = []
    for block in allocation.blocks:
        for row in block["branches"]:
            before[block["name"], row["name"]] = row["before"]
            if row["before"] and not row["after"] and block["kind"] != "groups":
                absent.append(f"{block['name']}.{row['name']}")
    notes = [*summary.notes, _origin(allocation)]
    if absent:
        more = " ..." if len(absent) > _MOST_ABSENT else ""
        notes.append(f"branches without neurons, left out: {', '.join(absent[:_MOST_ABSENT])}{more}")
    blocks = tuple(_block_with_origin(block, before) for block in summary.blocks)
    return replace(summary, blocks=blocks, notes=tuple(notes))


def _origin(allocation: Allocation) -> str:
    share = allocation.flops_after / allocation.flops_before if allocation.flops_before else 1.0
    return (
        f"allocated from {allocation.flops_before:,} FLOPs to {allocation.flops_after:,} ({share:.1%}), policy "
        f"{allocation.policy}, criterion {allocation.criterion}"
    )


def _block_with_origin(block: BlockFacts, before: dict[tuple[str, str], int]) -> BlockFacts:
    branches = [replace(branch, before=before.get((block.name, branch.name))) for branch in block.branches]
    return replace(block, branches=tuple(branches))
