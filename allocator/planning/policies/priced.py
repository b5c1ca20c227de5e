"""The policy that keeps a neuron where it is worth more than it costs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from allocator.planning.policies.exchange import exchange
from allocator.planning.policies.ordered import all_together, isomorphic, per_block, uniform
from allocator.planning.policies.prices import importance, improve, prices, worth_per_cost
from allocator.planning.policies.registry import policy
from allocator.planning.problem import Problem
from allocator.planning.search import fill, keep_in_order

ROUNDS = 12
"""Prices change with what is kept; after so many rounds they have settled, or go in a circle."""
STEPS = 40
"""Of the bisection for the price level."""
BALANCINGS = 8
"""Attempts to weigh several budgets against one another."""


@policy("priced")
def priced(problem: Problem) -> np.ndarray:
    """Keep a neuron whose score is above a price level times what it costs at the present widths.

    What a neuron costs depends on how many others are kept on the other side of its layers, so prices are taken anew
    until nothing changes. The level is bisected until the budgets hold, and the rest of them goes to the neurons that
    are worth most per cost. What comes out, and what the policies without prices choose, is then made better by
    exchanges; the best of these is kept. Of several budgets, each counts the more, the nearer it is to its limit.
    """
    best, most = problem.forced, -np.inf
    for kept, weights in _starts(problem):
        kept = exchange(problem, kept, weights)
        worth = importance(problem, kept)
        if worth > most:
            best, most = kept, worth
    return best


def _starts(problem: Problem) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Choices to set out from, with the weights of the budgets."""
    weights = np.full(len(problem.budgets.each), 1 / len(problem.budgets.each))
    for _ in range(BALANCINGS if len(weights) > 1 else 1):
        kept = _at_weights(problem, weights)
        used = np.array([budget.metric.value(kept) / budget.limit for budget in problem.budgets.each])
        yield improve(problem, kept, weights) if problem.fill else kept, weights
        weights = weights * used**4
        weights = weights / weights.sum()
    if problem.gone is not None:  # a part of an earlier choice, which set out from all of them
        return
    for thresholds in (all_together, per_block, isomorphic, uniform):
        yield keep_in_order(problem, thresholds(problem)), weights


def _at_weights(problem: Problem, weights: np.ndarray) -> np.ndarray:
    """The choice at the lowest price level that meets the budgets."""
    values = np.nan_to_num(problem.scores.values)
    everything = np.ones(len(values), dtype=bool)
    ratio = worth_per_cost(problem, prices(problem, everything, weights))
    finite = ratio[np.isfinite(ratio) & (ratio > 0)]
    if not len(finite):
        return fill(problem, np.argsort(-ratio, kind="stable"), problem.forced.copy())
    low, high = np.log(finite.min()) - 12.0, np.log(finite.max()) + 12.0
    best = problem.forced
    kept = everything
    for _ in range(STEPS):
        level = (low + high) / 2
        kept = _settled(problem, values, weights, float(np.exp(level)), kept)
        if problem.budgets.met(kept):
            best, high = kept, level
        else:
            low = level
        if high - low < 1e-9:
            break
    return best


def _settled(problem: Problem, values: np.ndarray, weights: np.ndarray, level: float, kept: np.ndarray) -> np.ndarray:
    """Neurons that are worth their price, beside those that are."""
    for _ in range(ROUNDS):
        chosen = problem.forced | (problem.open & (values > level * prices(problem, kept, weights)))
        if np.array_equal(chosen, kept):
            break
        kept = chosen
    return kept
