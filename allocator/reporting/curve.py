"""The curve of budget against importance kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from allocator.cost.budget import Budget, Budgets
from allocator.errors import BudgetError, NothingToAllocateError
from allocator.graph.channel_graph import ChannelGraph
from allocator.planning.plan import Plan, make_plan
from allocator.reporting.collect import importance
from allocator.reporting.facts import Point
from allocator.scoring.scores import Scores

STEPS = 12


def pareto(
    graph: ChannelGraph,
    scores: Scores,
    *,
    policies: Sequence[str] = ("priced", "global", "per_block", "uniform"),
    scope: str = "all",
    progress: Callable[[str], None] | None = None,
) -> tuple[Point, ...]:
    """Plans at budgets from the smallest that can be reached to the whole network.

    A plan is what a policy chooses; a rewritten forward that does not fit may need more neurons.

    Args:
        graph: the model's neurons.
        scores: their importance.
        policies: the curves.
        scope: which neurons may go; "all", so that every curve reaches as far down as it can.
        progress: called with the name of each policy.

    Returns:
        Points in order of policy and budget: shares of the network's FLOPs and of the sum of its scores. None
        where all scores are zero, or nothing can be removed.
    """
    points: list[Point] = []
    for policy in policies:
        if progress is not None:
            progress(f"curve of {policy}")
        points += _curve(graph, scores, policy, scope)
    return tuple(points)


def _curve(graph: ChannelGraph, scores: Scores, policy: str, scope: str) -> Iterator[Point]:
    whole = graph.flops
    if not whole or importance(scores, np.ones(graph.size, dtype=bool)) is None:
        return

    def plan_at(limit: float) -> Plan:
        budgets = Budgets([Budget(graph.metric("flops"), limit)])
        return make_plan(graph, scores, budgets, policy=policy, scope=scope)

    smallest = _smallest(plan_at, whole)
    if smallest is None:
        return
    for limit in np.linspace(smallest, whole, STEPS):
        kept = plan_at(float(limit)).kept
        share = importance(scores, kept)
        if share is not None:
            yield Point(policy, graph.metric("flops").value(kept) / whole, share)


def _smallest(plan_at: Callable[[float], Plan], whole: int) -> int | None:
    """The smallest budget that can be met; None where nothing can go."""
    try:
        plan_at(1.0)  # a budget of one FLOP is met by no network worth a curve, and the error says what is
    except BudgetError as error:
        return error.reachable or whole
    except NothingToAllocateError:
        return None
    return None
