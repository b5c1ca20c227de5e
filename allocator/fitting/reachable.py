"""The smallest cost that was seen to work, for the error of a budget that cannot be met."""

from __future__ import annotations

import math
from collections.abc import Callable

from allocator.errors import BudgetError, NothingToAllocateError


def smallest_reachable(
    error: BudgetError | NothingToAllocateError, run: Callable[[float], int], budget: float, own: int
) -> int | None:
    """The smallest FLOPs that a run was seen to land on; None where there are none.

    A plan may turn out to need neurons that it meant to drop, and more of them at one budget than at another.
    Where that happens, the figure is sought by bisection, to 1 % of the model's own.

    Args:
        error: what the run at the budget raised.
        run: the FLOPs that a run at some budget lands on; raises like it.
        budget: that cannot be met.
        own: the model's FLOPs.
    """
    planned = error.reachable if isinstance(error, BudgetError) else None
    high = _landing(run, own - 1 if planned is None else planned, own)
    if high is None and planned is None:
        return None
    high = own if high is None else high
    low = budget
    while high != planned and high - low > max(own / 100, 1):
        middle = (low + high) // 2
        landed = _landing(run, middle, high - 1)
        low, high = (middle, high) if landed is None else (low, landed)
    return high


def _landing(run: Callable[[float], int], figure: float, most: float) -> int | None:
    """The FLOPs at which a run lands where it aims, from a figure on, or None where that is above `most`."""
    tried: set[float] = set()
    while figure <= most and figure not in tried:
        tried.add(figure)
        try:
            landed = run(figure)
        except BudgetError as error:
            figure = math.inf if error.reachable is None else error.reachable
        except NothingToAllocateError:
            return None
        else:
            if landed == figure:
                return landed
            figure = landed
    return int(figure) if figure in tried else None
