"""How many neurons each layer of a wider network has: evenly more of all, or so many of each."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from allocator.cost.budget import Budgets
from allocator.cost.metric import Metric
from allocator.errors import BudgetError
from allocator.graph.channel_graph import ALL, SCOPES, ChannelGraph
from allocator.graph.even import EvenNeurons
from allocator.planning.multiples import asked_multiples

WIDEST = 1024.0
"""No layer is made more often as wide than this."""


@dataclass(frozen=True)
class Layer:
    """Neurons that one layer writes and that can be added to, and how many may be.

    Attributes:
        units: the neurons, in order.
        number: which of `graph.facts.written` it is.
        together: there are equally many of each, as averages are taken over them.
        first, step: what may be added: nothing, `first`, or so many times `step` more.
    """

    units: np.ndarray
    number: int
    together: bool = False
    first: int = 1
    step: int = 1

    def at_most(self, count: float) -> int:
        """The most that may be added of a number."""
        return 0 if count < self.first else self.first + int((count - self.first) // self.step) * self.step

    def following(self, added: int) -> int:
        """The next larger number that may be added."""
        return self.first if added < self.first else added + self.step

    def nearest(self, count: float) -> int:
        """The number that may be added nearest to another; never above it where all neurons are repeated."""
        below = self.at_most(count)
        above = self.following(below)
        return above if not self.together and above - count <= count - below else below

    @property
    def least_factor(self) -> float:
        """The least by which it has to be widened for anything to be added."""
        return 1 + self.first / (len(self.units) * (1 if self.together else 2))


@dataclass(frozen=True)
class Layers:
    """The neurons that can be added to, by the layer that writes them.

    A neuron is added to by another one like it, which is exact where weights read it: they can be zero, or shared.

    Attributes:
        graph: the model's neurons.
        each: the layers.
        stuck: what no number of neurons added makes a multiple of what is asked for, as (weight, channels).
    """

    graph: ChannelGraph
    each: list[Layer] = field(default_factory=list)
    stuck: list[tuple[str, int]] = field(default_factory=list)

    @classmethod
    def of(cls, graph: ChannelGraph, scope: str, held: np.ndarray, multiple: int = 1) -> Layers:
        """Those of a scope.

        Args:
            graph: the model's neurons.
            scope: "branches", "inner" or "all".
            held: neurons that stay as they are.
            multiple: of what the widths of layers are multiples, where they change at all.
        """
        grows = (graph.scope_of <= SCOPES.get(scope, ALL)) & ~_unread(graph)
        grows[held] = False
        even = EvenNeurons.of(graph)
        grows &= (even.number < 0) | (even.grows & ~np.isin(even.number, even.number[~grows]))
        layers, asked = cls(graph), asked_multiples(graph, multiple)
        for number in np.unique(graph.branch_of[grows & (even.number < 0)]).tolist():
            layers._add(np.flatnonzero(grows & (even.number < 0) & (graph.branch_of == number)), asked)
        for of_set in np.unique(even.number[grows & (even.number >= 0)]).tolist():
            layers._add(np.flatnonzero(even.number == of_set), asked, together=True)
        layers.each.sort(key=lambda layer: layer.number)
        return layers

    def _add(self, units: np.ndarray, asked: Mapping[int, int], *, together: bool = False) -> None:
        """Add a layer, with how many neurons may be added to it."""
        branches, size = self.graph.branch_of[units], self.graph.size
        first = step = 1
        period = int(np.lcm.reduce([asked[number] for number in branches.tolist()]))
        if together or period > 1:
            rounds = np.arange(1, min(2 * period, int(WIDEST) * len(units)) + 1)
            fits, at_once = np.ones(len(rounds), dtype=bool), len(units)
            for number in np.unique(branches).tolist():
                label = self.graph.facts.written[number].label
                held = np.bincount(self.graph.units(label), minlength=size)[units]
                if not together and (held == held[0]).all():  # else all are repeated, as it counts which are
                    at_once = 1
                fits &= (len(label) + rounds * int(held.sum()) * at_once // len(units)) % asked[number] == 0
            if not fits.any():
                self.stuck.append((self._name(int(branches[0]))[0], len(units)))
                return
            first, *others = (rounds[fits][:2] * at_once).tolist()
            step = others[0] - first if others else period * at_once
        self.each.append(Layer(units, int(branches[0]), together, first, step))

    def _name(self, number: int) -> tuple[str, int]:
        """Name and dim of the weight that writes a layer."""
        slots = self.graph.slots
        _, name, dim = slots.names[
            int(np.searchsorted(slots.starts, self.graph.facts.written[number].label[0], side="right")) - 1
        ]
        return name, dim

    def __iter__(self) -> Iterator[tuple[str, int, int, Layer]]:
        """(name of a layer's weight, dim that it writes, channels, the layer)."""
        for layer in self.each:
            name, dim = self._name(layer.number)
            yield name, dim, len(self.graph.facts.written[layer.number].label), layer

    @cached_property
    def widths(self) -> np.ndarray:
        """(layers,) neurons of each."""
        return np.array([len(layer.units) for layer in self.each], dtype=np.int64)

    def times(self, more: np.ndarray) -> np.ndarray:
        """(neurons,) how many there are of each, when (layers,) `more` are added to the layers, spread evenly."""
        units, layers, places = self._entries
        added, width = more[layers], self.widths[layers]
        times = np.ones(self.graph.size, dtype=np.int64)
        times[units] += (places + 1) * added // width - places * added // width
        return times

    @cached_property
    def _entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All neurons of all layers, which layer each is of, and its place there."""
        units = np.concatenate([np.zeros(0, dtype=np.int64), *(layer.units for layer in self.each)])
        places = np.concatenate([np.zeros(0, dtype=np.int64), *map(np.arange, self.widths.tolist())])
        return units, np.repeat(np.arange(len(self.each)), self.widths), places

    def with_next(self, times: np.ndarray, more: np.ndarray, layer: int) -> tuple[int, np.ndarray]:
        """How many are added to a layer once the next that may be is, and (neurons,) how many there are of each then.

        Args:
            times: `times` of `more`.
            more: (layers,) what is added.
            layer: an index into `each`.
        """
        own = self.each[layer]
        added, width = own.following(int(more[layer])), len(own.units)
        wider = times.copy()
        wider[own.units] = 1 + np.diff(np.arange(width + 1) * added // width)
        return added, wider

    def evenly(self, factor: float) -> np.ndarray:
        """(layers,) what is to be added for every layer to be so many times as wide, as nearly as may be."""
        wanted = zip(self.each, (self.widths * (factor - 1)).tolist(), strict=True)
        return np.array([layer.nearest(count) for layer, count in wanted], dtype=np.int64)


def _unread(graph: ChannelGraph) -> np.ndarray:
    """(neurons,) bool: those that two activations are contracted along, so that no weight can leave them out."""
    unread = np.zeros(graph.size, dtype=bool)
    for label in graph.facts.multiplied:
        unread[graph.units(label)] = True
    return unread


def tied(graph: ChannelGraph) -> np.ndarray:
    """(neurons,) bool: those that one weight both writes and reads (an embedding that is the output layer too).

    Copies of these cannot share what reads the first: that would change what is written.
    """
    both = np.zeros(graph.slots.total, dtype=bool)
    for written in graph.facts.written:
        both[written.label] = True
    units = graph.unit_of_slot[both & graph.reads]
    found = np.zeros(graph.size, dtype=bool)
    found[units[units >= 0]] = True
    return found


def widest_within(layers: Layers, budgets: Budgets) -> np.ndarray:
    """(layers,) what to add for the largest even factor that budgets allow; what is left goes to single layers.

    Those that are furthest below the factor come first, until no layer's next neuron fits.

    Args:
        layers: what can be added to.
        budgets: what is limited; each allows the model's own at least.

    Raises:
        BudgetError: the limits are so large that nobody can mean them.
    """
    most = layers.evenly(WIDEST)
    if most.any() and budgets.met(layers.times(most)):
        first = budgets.first
        raise BudgetError(
            f"{first.metric.show(first.limit)} would make every layer more than {WIDEST:.0f} times as wide: ask for "
            "less",
            asked=first.limit,
            reachable=first.metric.whole,
        )
    factor = _largest(lambda f: budgets.met(layers.times(layers.evenly(f))))
    more = layers.evenly(factor)
    # What runs in train mode only costs nothing here, and could be added without end.
    costs = [next_costs(layers, budget.metric, more) for budget in budgets.each]
    waiting = [(more[i] / layers.widths[i], i) for i, each in enumerate(zip(*costs, strict=True)) if max(each) > 0]
    heapq.heapify(waiting)
    times = layers.times(more)
    while waiting:
        _, layer = heapq.heappop(waiting)
        added, wider = layers.with_next(times, more, layer)
        if budgets.met(wider):  # else it waits no longer: no neuron gets cheaper while others are added
            more[layer], times = added, wider
            heapq.heappush(waiting, (added / layers.widths[layer], layer))
    return more


def next_costs(layers: Layers, metric: Metric, more: np.ndarray) -> list[int]:
    """What the next that may be added to each layer costs."""
    times = layers.times(more)
    now = metric.value(times)
    return [metric.value(layers.with_next(times, more, layer)[1]) - now for layer in range(len(more))]


def cheapest_next(layers: Layers, metric: Metric, more: np.ndarray) -> int | None:
    """What the cheapest further neuron costs; None where none costs anything."""
    return min((cost for cost in next_costs(layers, metric, more) if cost > 0), default=None)


def _largest(fits: Callable[[float], bool]) -> float:
    """The largest factor that fits, to a millionth; 1 does."""
    low, high = 1.0, 2.0
    while high < WIDEST and fits(high):
        low, high = high, high * 2
    while high - low > 1e-6 * low:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
