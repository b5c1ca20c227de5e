"""What neurons cost beside those that are kept, and what they are worth for it."""

from __future__ import annotations

import numpy as np

from allocator.planning.problem import Problem
from allocator.planning.search import fill


def importance(problem: Problem, kept: np.ndarray) -> float:
    """The sum of the scores of the neurons that are kept, of those that have one."""
    return float(np.nansum(problem.scores.values[kept]))


def prices(problem: Problem, kept: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(neurons,) what each costs beside those that are kept, as a share of the budgets."""
    total = np.zeros(len(kept))
    for budget, weight in zip(problem.budgets.each, weights, strict=True):
        total += weight * budget.metric.added_each(kept) / budget.limit
    return total


def worth_per_cost(problem: Problem, cost: np.ndarray) -> np.ndarray:
    """(neurons,) score by cost; infinite where there is no cost."""
    values = np.nan_to_num(problem.scores.values)
    return np.divide(values, cost, out=np.full(len(values), np.inf), where=cost > 0)


def improve(problem: Problem, kept: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Spend what is left on the neurons worth most per cost, as long as any fits."""
    worth = worth_per_cost(problem, prices(problem, kept, weights))
    return fill(problem, np.argsort(-worth, kind="stable"), kept.copy())
