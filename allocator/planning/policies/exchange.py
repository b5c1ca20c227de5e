"""Exchanges: a choice of neurons made better by giving up some that are worth little for others that are worth more."""

from __future__ import annotations

import numpy as np

from allocator.planning.policies.prices import importance, improve, prices, worth_per_cost
from allocator.planning.problem import Problem

FIRST, LEAST = 0.2, 1e-4
"""How much of the budgets is exchanged in one step, at first and at the end; prices hold near what is kept alone."""
STEPS = 60


def exchange(problem: Problem, kept: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Exchange neurons at the present prices while that keeps more importance.

    A step that helps makes the next one longer; one that does not is undone, and a shorter one is tried.

    Args:
        problem: with its budgets.
        kept: (neurons,) bool, a choice that meets them.
        weights: (budgets,) how much each counts in a price.
    """
    best, most, length = kept, importance(problem, kept), FIRST
    for _ in range(STEPS):
        changed = _step(problem, best, weights, length)
        if changed is not None and (worth := importance(problem, changed)) > most:
            best, most, length = changed, worth, min(2 * length, FIRST)
        else:
            length /= 4
        if length < LEAST:
            break
    return best


def _step(problem: Problem, kept: np.ndarray, weights: np.ndarray, length: float) -> np.ndarray | None:
    """The best exchange of at most `length` of the budgets; None where there is nothing to gain."""
    cost = prices(problem, kept, weights)
    worth = worth_per_cost(problem, cost)
    dropped, loose = np.flatnonzero(problem.open & ~kept), np.flatnonzero(kept & ~problem.forced)
    gained = dropped[np.argsort(-worth[dropped], kind="stable")]
    lost = loose[np.argsort(worth[loose], kind="stable")]
    if not len(gained) or not len(lost):
        return None
    spent, freed = np.cumsum(cost[gained]), np.cumsum(cost[lost])
    # How many go for the first, the first two, ... that come; it ends where what comes is worth no more than what goes.
    going = np.minimum(np.searchsorted(freed, spent), len(lost) - 1)
    pays = (worth[gained] > worth[lost[going]]) & (spent <= length)
    count = len(pays) if pays.all() else int(np.argmin(pays))
    if not count:
        return None
    changed = kept.copy()
    changed[gained[:count]] = True
    number = _enough(problem, changed, lost, int(going[count - 1]) + 1)
    if number is None:
        return None
    changed[lost[:number]] = False
    return improve(problem, changed, weights) if problem.fill else changed


def _enough(problem: Problem, kept: np.ndarray, lost: np.ndarray, guess: int) -> int | None:
    """How many of `lost` must go, in their order, for the budgets to hold; None where all are not enough."""

    def met(count: int) -> bool:
        rest = kept.copy()
        rest[lost[:count]] = False
        return problem.budgets.met(rest)

    low, high = 0, guess
    while not met(high):
        if high == len(lost):
            return None
        low, high = high, min(2 * high, len(lost))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if met(middle) else (middle, high)
    return high
