"""Widths that are multiples of a number, as tensor cores and vector units like them."""

from __future__ import annotations

import heapq
import math

import numpy as np

from allocator.graph.channel_graph import ChannelGraph
from allocator.planning.problem import Problem
from allocator.planning.unmet import unmet
from allocator.settings import DEFAULTS


def to_multiples(problem: Problem, kept: np.ndarray, scope: str = DEFAULTS.scope) -> np.ndarray:
    """Round every layer's width to a multiple, down to the budgets and up again where they allow.

    A layer that keeps all its channels may keep them, whatever their number.

    Args:
        problem: what there is to choose from.
        kept: (neurons,) bool, a choice that meets its budgets.
        scope: as the caller named it, for messages.

    Raises:
        BudgetError: the budgets cannot be met by such widths.
    """
    if problem.widths.multiple == 1 and not problem.graph.facts.multiples:
        return kept
    asked = asked_multiples(problem.graph, problem.widths.multiple)
    layers = [_Layer(problem, units, asked[number]) for number, units in _layers(problem.graph).items()]
    kept = kept.copy()
    for layer in layers:
        layer.take(kept, layer.at_or_below(int(kept[layer.order].sum())))
    kept = _narrowed(problem, layers, kept, scope)  # a layer with no multiple below was rounded up
    return _widened(problem, layers, kept) if problem.fill else kept


def _layers(graph: ChannelGraph) -> dict[int, np.ndarray]:
    """Neurons by the layer that writes them."""
    branch = graph.branch_of
    return {int(number): np.flatnonzero(branch == number) for number in np.unique(branch[branch >= 0])}


def asked_multiples(graph: ChannelGraph, multiple: int) -> dict[int, int]:
    """By layer what its width is a multiple of: what the caller asks for, and what its readers need."""
    asked = dict.fromkeys(_layers(graph), multiple)
    for label, _, of in graph.facts.multiples:
        units, times = np.unique(graph.units(label), return_counts=True)
        for number in np.unique(graph.branch_of[units]).tolist():
            # A layer whose halves are multiplied has two channels for each that is read.
            of_layer = np.isin(graph.unit_of_slot[graph.facts.written[number].label], units[:1]).sum()
            asked[number] = math.lcm(asked[number], of * max(int(of_layer) // int(times[0]), 1))
    return asked


class _Layer:
    """One layer's neurons, best first, and how many of them make a width that is allowed.

    Attributes:
        order: the neurons, those that must stay first, then by score.
        stops: how many of these may be kept, in ascending order.
    """

    def __init__(self, problem: Problem, units: np.ndarray, multiple: int) -> None:
        graph = problem.graph
        values = np.where(problem.forced[units], np.inf, np.nan_to_num(problem.scores.values[units]))
        values = np.where(problem.open[units], values, -np.inf)
        self.order = units[np.argsort(-values, kind="stable")]
        slots = graph.unit_of_slot[graph.facts.written[int(graph.branch_of[units[0]])].label]
        held = np.bincount(slots[slots >= 0], minlength=graph.size)[self.order]
        widths = int((slots < 0).sum()) + np.append(0, np.cumsum(held))
        least = int(problem.forced[units].sum())
        allowed = widths % multiple == 0
        allowed[-1] = True
        most = int(problem.open[units].sum())
        self.stops = np.flatnonzero(allowed & (np.arange(len(widths)) >= least) & (np.arange(len(widths)) <= most))
        if not len(self.stops):  # no multiple lies between what has to stay and what may
            self.stops = np.array([least])

    def at_or_below(self, count: int) -> int:
        """The largest number that is allowed and not above `count`, else the smallest there is."""
        lower = self.stops[self.stops <= count]
        return int(lower[-1] if len(lower) else self.stops[0])

    def take(self, kept: np.ndarray, count: int) -> None:
        """Keep the best `count`."""
        kept[self.order] = False
        kept[self.order[:count]] = True

    def preceding(self, kept: np.ndarray) -> np.ndarray:
        """The neurons that the next smaller width would drop."""
        count = int(kept[self.order].sum())
        lower = self.stops[self.stops < count]
        return self.order[lower[-1] : count] if len(lower) else self.order[:0]

    def following(self, kept: np.ndarray) -> np.ndarray:
        """The neurons that the next larger width would add."""
        count = int(kept[self.order].sum())
        higher = self.stops[self.stops > count]
        return self.order[count : higher[0]] if len(higher) else self.order[:0]


def _narrowed(problem: Problem, layers: list[_Layer], kept: np.ndarray, scope: str) -> np.ndarray:
    """Narrow one layer after another, the one that is worth least per cost first, until the budgets hold.

    Raises:
        BudgetError: they do not where every layer is as narrow as it may be.
    """
    queue = [(_price(problem, layer.preceding(kept), kept), i) for i, layer in enumerate(layers)]
    heapq.heapify(queue)
    while not problem.budgets.met(kept):
        if not queue:
            exceeded = problem.budgets.unmet(kept)
            raise unmet(
                problem.graph, exceeded, scope, problem.widths, [budget.metric.value(kept) for budget in exceeded]
            )
        _, i = heapq.heappop(queue)
        units = layers[i].preceding(kept)
        if not len(units):
            continue
        price = _price(problem, units, kept)
        # What a layer costs falls while others narrow, so that what is worth more than another still is.
        if queue and price > queue[0][0]:
            heapq.heappush(queue, (price, i))
            continue
        kept[units] = False
        heapq.heappush(queue, (_price(problem, layers[i].preceding(kept), kept), i))
    return kept


def _price(problem: Problem, units: np.ndarray, kept: np.ndarray) -> float:
    """Scores of neurons that are kept, per share of the budgets that goes without them."""
    less = kept.copy()
    less[units] = False
    share = max(budget.metric.added(less, units) / budget.limit for budget in problem.budgets.each)
    return float(np.nansum(problem.scores.values[units])) / max(share, 1e-12)


def _widened(problem: Problem, layers: list[_Layer], kept: np.ndarray) -> np.ndarray:
    """Widen one layer after another, the one that is worth most per cost first, while the budgets allow.

    Nothing gets cheaper while others widen: what was worth less than another before still is.
    """
    queue = [(-_worth(problem, layer.following(kept), kept), i) for i, layer in enumerate(layers)]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        units = layers[i].following(kept)
        worth = _worth(problem, units, kept)
        if worth == -np.inf:
            continue
        if queue and -worth > queue[0][0]:
            heapq.heappush(queue, (-worth, i))
            continue
        kept[units] = True
        heapq.heappush(queue, (-_worth(problem, layers[i].following(kept), kept), i))
    return kept


def _worth(problem: Problem, units: np.ndarray, kept: np.ndarray) -> float:
    """Scores per share of the budgets; minus infinity for nothing, and for what does not fit."""
    if not len(units):
        return -np.inf
    share = 0.0
    for budget in problem.budgets.each:
        cost = budget.metric.added(kept, units)
        if cost > budget.left(kept):
            return -np.inf
        share = max(share, cost / budget.limit)
    return float(np.nansum(problem.scores.values[units])) / max(share, 1e-12)
