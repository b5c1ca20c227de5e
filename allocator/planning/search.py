"""Which neurons to keep under a FLOPs budget: an order to keep them in, cut where the budget ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from allocator.errors import BudgetError, NothingToAllocateError, UnknownNameError
from allocator.graph.channel_graph import SCOPES, ChannelGraph
from allocator.scoring.criteria import Scores

CLOSE = 0.995
"""A plan that uses less of its budget than this is too coarse, and a wider scope is tried."""

POLICIES = ("per_block", "global", "uniform")


@dataclass(frozen=True)
class Plan:
    """A choice of neurons.

    Attributes:
        kept: (neurons,) bool.
        asked: the budget in FLOPs.
        flops: FLOPs of the choice.
        scope: the scope it was made in.
        policy: the order it was made by.
        criterion: what ranked the neurons.
        next_cost: FLOPs of the cheapest further neuron, or None if all are kept.
    """

    kept: np.ndarray
    asked: float
    flops: int
    scope: str
    policy: str
    criterion: str
    next_cost: int | None


def parse_budget(flops: float | str, own: int) -> float:
    """Read a budget: a number of FLOPs, or a share of the model's own such as "60%".

    Raises:
        BudgetError: zero, negative, NaN, infinite or not a number.
    """
    value: float
    try:
        if isinstance(flops, str):
            text = flops.strip()
            value = own * float(text[:-1]) / 100 if text.endswith("%") else float(text)
        else:
            value = float(flops)
    except (TypeError, ValueError, OverflowError):
        raise BudgetError(
            f"flops={flops!r} is not a number: pass FLOPs such as 4.2e9, or a share such as '60%'"
        ) from None
    if not math.isfinite(value) or value <= 0:
        raise BudgetError(f"flops={flops!r} must be positive and finite; the model's own FLOPs are {own:,}")
    return value


def make_plan(
    graph: ChannelGraph,
    scores: Scores,
    budget: float,
    *,
    policy: str = "per_block",
    scope: str = "auto",
    fill: bool = True,
) -> Plan:
    """Choose the neurons to keep.

    Args:
        graph: the model's neurons and their cost.
        scores: their importance.
        budget: FLOPs at most.
        policy: "per_block" (one width multiplier, top-k in each block), "global" (one ranking) or
            "uniform" (every branch the same share).
        scope: "branches", "inner", "all", or "auto" for the narrowest of them that can meet the budget and come
            within 0.5 % of it (where none comes so close, the narrowest that can meet it).
        fill: spend what is left on the next best neurons that fit.

    Raises:
        BudgetError: the budget cannot be met; says the smallest FLOPs that can.
        NothingToAllocateError: no neuron can be removed.
        UnknownNameError: no such policy or scope.
    """
    if policy not in POLICIES:
        raise UnknownNameError(f"no policy {policy!r} (there are {', '.join(POLICIES)})")
    if scope not in (*SCOPES, "auto"):
        raise UnknownNameError(f"no scope {scope!r} (there are auto, {', '.join(SCOPES)})")
    least: list[int] = []
    coarse: list[Plan] = []
    for name in SCOPES if scope == "auto" else (scope,):
        free = _free(graph, scores, name)
        if not free.any():
            continue
        forced = _forced(graph, scores, free)
        least.append(graph.metric("flops").value(forced))
        if least[-1] > budget:
            continue
        kept = _cut(graph, _thresholds(graph, scores, forced, policy), forced, budget, fill)
        cost = graph.metric("flops").value(kept)
        plan = Plan(kept, budget, cost, name, policy, scores.criterion, _next_cost(graph, kept))
        if cost >= CLOSE * budget or not fill:
            return plan
        coarse.append(plan)
    if coarse:
        return coarse[0]
    if not least:
        raise _nothing(graph, scores, scope)
    raise unmet(budget, scope, min(least), graph.flops)


def unmet(budget: float, scope: str, reachable: int, own: int) -> BudgetError:
    """The error for a budget that cannot be met, with the smallest FLOPs that can."""
    return BudgetError(
        f"{budget:,.0f} FLOPs cannot be met with scope={scope!r}: the smallest that can be reached is "
        f"{reachable:,} FLOPs, {100 * reachable / own:.1f}% of the model's {own:,}",
        asked=budget,
        reachable=reachable,
    )


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


def _free(graph: ChannelGraph, scores: Scores, scope: str) -> np.ndarray:
    return (graph.scope_of <= SCOPES[scope]) & ~np.isnan(scores.values)


def _forced(graph: ChannelGraph, scores: Scores, free: np.ndarray) -> np.ndarray:
    """(neurons,) bool: those that stay whatever the budget."""
    return ~free | _floors(graph, scores, free)


def least_flops(graph: ChannelGraph, scores: Scores) -> dict[str, int]:
    """Per scope the FLOPs below which no plan goes; a rewritten forward that does not fit may need more."""
    return {scope: graph.metric("flops").value(_forced(graph, scores, _free(graph, scores, scope))) for scope in SCOPES}


def _nothing(graph: ChannelGraph, scores: Scores, scope: str) -> NothingToAllocateError:
    reasons = [f"{reason} ({count} channels)" for reason, count in graph.reasons()]
    unscored = int(np.isnan(scores.values).sum())
    if unscored:
        reasons.insert(0, f"{unscored} neurons have no score under criterion {scores.criterion!r}")
    if graph.size and scope not in ("auto", "all"):
        reasons.insert(0, f"{graph.size} neurons can only be removed in a wider scope than {scope!r}")
    listed = "; ".join(reasons[:5]) or "the model has no convolution or linear layer whose outputs stay inside it"
    return NothingToAllocateError(f"no neuron of the model can be removed: {listed}", reasons=reasons)


def _floors(graph: ChannelGraph, scores: Scores, free: np.ndarray) -> np.ndarray:
    """The best neurons of every layer, part and attention that would otherwise be left with too few."""
    forced = np.zeros(graph.size, dtype=bool)
    # Those of one neuron first: most layers have such a floor, and what it forces counts for the larger ones.
    for label, module, minimum in sorted(graph.facts.at_least, key=lambda floor: floor.minimum):
        if module in graph.optional:
            continue
        units = graph.unit_of_slot[label]
        free_here = (units >= 0) & free[units] & ~forced[units]
        loose = np.unique(units[free_here])
        missing = minimum - int((~free_here).sum())
        if missing > 0:
            forced[loose[np.argsort(-scores.values[loose], kind="stable")[:missing]]] = True
    return forced


def _thresholds(graph: ChannelGraph, scores: Scores, forced: np.ndarray, policy: str) -> np.ndarray:
    """Per neuron, the width multiplier from which on it is kept; 0 where it is kept in any case."""
    free = np.flatnonzero(~forced)
    spread = _rank_within(graph.branch_of, scores.values)
    values = np.nan_to_num(scores.values)
    everything = np.arange(graph.size)
    if policy == "global":
        order = np.lexsort((everything, spread, -values))
        rank = np.empty(graph.size)
        rank[order] = np.arange(graph.size)
        threshold = (rank + 0.5) / max(graph.size, 1)
    elif policy == "uniform":
        threshold = spread
    else:
        threshold = _rank_within(graph.pool_of, values, spread)
    result = np.zeros(graph.size)
    result[free] = threshold[free]
    return result


def _rank_within(group: np.ndarray, values: np.ndarray, tie: np.ndarray | None = None) -> np.ndarray:
    """(rank + 1/2) / size of each element in its group, best value first; ties by `tie`, then by index."""
    n = len(group)
    second = np.arange(n) if tie is None else tie
    order = np.lexsort((np.arange(n), second, -np.nan_to_num(values), group))
    _, start, size = np.unique(group[order], return_index=True, return_counts=True)
    rank = np.empty(n)
    rank[order] = (np.arange(n) - np.repeat(start, size) + 0.5) / np.repeat(size, size)
    return rank


def _cut(graph: ChannelGraph, threshold: np.ndarray, forced: np.ndarray, budget: float, fill: bool) -> np.ndarray:
    """Keep neurons by ascending threshold while the budget lasts."""
    order = np.argsort(np.where(forced, -1.0, threshold), kind="stable")
    first = int(forced.sum())
    low, high = first, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        fits = graph.metric("flops").value(_prefix(order, middle)) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    if fill:
        return _fill(graph, order, _prefix(order, low), budget)
    while first < low < len(order) and threshold[order[low]] == threshold[order[low - 1]]:
        low -= 1
    return _prefix(order, low)


def _prefix(order: np.ndarray, count: int) -> np.ndarray:
    kept = np.zeros(len(order), dtype=bool)
    kept[order[:count]] = True
    return kept


def _fill(graph: ChannelGraph, order: np.ndarray, kept: np.ndarray, budget: float) -> np.ndarray:
    """Add the next neurons in order that still fit, one at a time.

    A neuron never gets cheaper while others are added, so one pass over the order is enough.
    """
    left = budget - graph.metric("flops").value(kept)
    tried = kept.copy()
    while True:
        cheap = graph.metric("flops").added_each(kept) <= left
        candidates = order[(cheap & ~tried)[order]]
        if not len(candidates):
            return kept
        unit = int(candidates[0])
        tried[unit] = True
        cost = graph.metric("flops").added(kept, unit)
        if cost <= left:
            kept[unit] = True
            left -= cost


def _next_cost(graph: ChannelGraph, kept: np.ndarray) -> int | None:
    dropped = np.flatnonzero(~kept)
    if not len(dropped):
        return None
    cheapest = int(dropped[np.argmin(graph.metric("flops").added_each(kept)[dropped])])
    return graph.metric("flops").added(kept, cheapest)
