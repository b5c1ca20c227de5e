"""Searching for a choice of neurons that meets all budgets."""

from __future__ import annotations

import numpy as np

from allocator.planning.problem import Problem


def keep_in_order(problem: Problem, threshold: np.ndarray) -> np.ndarray:
    """(neurons,) bool: neurons by ascending threshold, as many as the budgets allow.

    Without `fill`, neurons of one threshold are kept together or not at all.
    """
    order = np.argsort(np.where(problem.forced, -np.inf, threshold), kind="stable")
    order = order[problem.open[order]]
    first = int(problem.forced.sum())
    low, high = first, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        if problem.budgets.met(_prefix(problem, order, middle)):
            low = middle
        else:
            high = middle - 1
    if problem.fill:
        return fill(problem, order, _prefix(problem, order, low))
    while first < low < len(order) and threshold[order[low]] == threshold[order[low - 1]]:
        low -= 1
    return _prefix(problem, order, low)


def _prefix(problem: Problem, order: np.ndarray, count: int) -> np.ndarray:
    kept = np.zeros(len(problem.forced), dtype=bool)
    kept[order[:count]] = True
    return kept


def fill(problem: Problem, order: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Add the next neurons in order that still fit, one at a time.

    A neuron never gets cheaper while others are added, so one pass over the order is enough. For the same reason, of
    several that fit together each fits in turn: they are added at once, twice as many each time, half as many again
    where they do not fit.
    """
    tried = kept | ~problem.open
    stride = 1
    while True:
        cheap = ~tried
        for budget in problem.budgets.each:
            cheap &= budget.metric.added_each(kept) <= budget.left(kept)
        candidates = order[cheap[order]]
        if not len(candidates):
            return kept
        stride = min(stride, len(candidates))
        more = _with(kept, candidates[:stride])
        while stride > 1 and not problem.budgets.met(more):
            stride //= 2
            more = _with(kept, candidates[:stride])
        tried[candidates[:stride]] = True
        if problem.budgets.met(more):
            kept = more
            stride *= 2


def _with(kept: np.ndarray, units: np.ndarray) -> np.ndarray:
    more = kept.copy()
    more[units] = True
    return more


def next_costs(problem: Problem, kept: np.ndarray) -> dict[str, int]:
    """By metric of the budgets, what the cheapest further neuron costs; nothing where none may be added."""
    dropped = np.flatnonzero(~kept & problem.open)
    costs = {}
    for budget in problem.budgets.each if len(dropped) else ():
        cheapest = int(dropped[np.argmin(budget.metric.added_each(kept)[dropped])])
        costs[budget.metric.name] = budget.metric.added(kept, cheapest)
    return costs
