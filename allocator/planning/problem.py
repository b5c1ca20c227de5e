"""What there is to choose from: neurons with their scores, those that must stay, and the budgets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from allocator.cost.budget import Budgets
from allocator.graph.channel_graph import SCOPES, ChannelGraph
from allocator.scoring.scores import Scores


@dataclass(frozen=True)
class Problem:
    """One question to a policy: which neurons to keep.

    Attributes:
        graph: the model's neurons and their cost.
        scores: their importance.
        forced: (neurons,) bool, those that stay whatever the budget.
        budgets: what may be kept at most.
        fill: whether the rest of the budgets is spent on the next best neurons that fit.
    """

    graph: ChannelGraph
    scores: Scores
    forced: np.ndarray
    budgets: Budgets
    fill: bool = True


def free_neurons(graph: ChannelGraph, scores: Scores, scope: str) -> np.ndarray:
    """(neurons,) bool: those that a scope lets go and that have a score."""
    return (graph.scope_of <= SCOPES[scope]) & ~np.isnan(scores.values)


def forced_neurons(graph: ChannelGraph, scores: Scores, free: np.ndarray) -> np.ndarray:
    """(neurons,) bool: those that stay whatever the budget.

    Beside all that are not free, the best of every layer, part and attention that would be left with too few.
    """
    forced = ~free
    # Small minima first: most layers have one of a single neuron, and what that forces counts for the larger ones.
    for label, module, minimum in sorted(graph.facts.at_least, key=lambda floor: floor.minimum):
        if module in graph.optional:
            continue
        units = graph.unit_of_slot[label]
        goes = (units >= 0) & ~forced[units]
        loose, slots = np.unique(units[goes], return_counts=True)
        missing = minimum - int((~goes).sum())
        if missing > 0:
            best = np.argsort(-scores.values[loose], kind="stable")
            # A neuron that holds several of the slots counts as often.
            enough = int(np.searchsorted(np.cumsum(slots[best]), missing)) + 1
            forced[loose[best[:enough]]] = True
    return forced


def least(graph: ChannelGraph, scores: Scores, metric: str) -> dict[str, int]:
    """Per scope what no plan goes below; a rewritten forward that does not fit may need more."""
    costs = {}
    for scope in SCOPES:
        forced = forced_neurons(graph, scores, free_neurons(graph, scores, scope))
        costs[scope] = graph.metric(metric).value(forced)
    return costs
