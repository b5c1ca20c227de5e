"""The policy that keeps a neuron where it is worth more than it costs."""

from __future__ import annotations

import numpy as np

from allocator.planning.policies.registry import policy
from allocator.planning.problem import Problem
from allocator.planning.search import fill

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
    are worth most per cost. Of several budgets, each counts the more, the nearer it is to its limit.
    """
    weights = np.ones(len(problem.budgets.each))
    best, most = problem.forced, -np.inf
    for _ in range(BALANCINGS if len(weights) > 1 else 1):
        kept = _at_weights(problem, weights)
        worth = importance(problem, kept)
        if worth > most:
            best, most = kept, worth
        used = np.array([budget.metric.value(kept) / budget.limit for budget in problem.budgets.each])
        weights = weights * used**4
        weights = weights / weights.sum()
    return improve(problem, best) if problem.fill else best


def importance(problem: Problem, kept: np.ndarray) -> float:
    """The sum of the scores of the neurons that are kept, of those that have one."""
    return float(np.nansum(problem.scores.values[kept]))


def prices(problem: Problem, kept: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(neurons,) what each costs beside those that are kept, as a share of the budgets."""
    total = np.zeros(len(kept))
    for budget, weight in zip(problem.budgets.each, weights, strict=True):
        total += weight * budget.metric.added_each(kept) / budget.limit
    return total


def _at_weights(problem: Problem, weights: np.ndarray) -> np.ndarray:
    """The choice at the lowest price level that meets the budgets."""
    values = np.nan_to_num(problem.scores.values)
    everything = np.ones(len(values), dtype=bool)
    cost = prices(problem, everything, weights)
    ratio = np.divide(values, cost, out=np.full(len(values), np.inf), where=cost > 0)
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


def improve(problem: Problem, kept: np.ndarray) -> np.ndarray:
    """Spend what is left on the neurons worth most per cost, as long as any fits."""
    weights = np.ones(len(problem.budgets.each))
    cost = prices(problem, kept, weights)
    values = np.nan_to_num(problem.scores.values)
    worth = np.divide(values, cost, out=np.full(len(values), np.inf), where=cost > 0)
    return fill(problem, np.argsort(-worth, kind="stable"), kept.copy())
