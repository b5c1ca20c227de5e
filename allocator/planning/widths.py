"""How many neurons each layer of a wider network has: evenly more of all, or so many of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from allocator.cost.metric import Metric
from allocator.errors import BudgetError
from allocator.graph.channel_graph import ALL, SCOPES, ChannelGraph


@dataclass(frozen=True)
class Layers:
    """The neurons that can be added to, by the layer that writes them.

    A neuron is added to by another one like it, which is exact where weights read it: they can be zero, or shared.

    Attributes:
        graph: the model's neurons.
        units: per layer its neurons that can be added to, in order.
        numbers: per layer, which of `graph.facts.written` it is.
    """

    graph: ChannelGraph
    units: list[np.ndarray] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, graph: ChannelGraph, scope: str) -> Layers:
        """Those of a scope."""
        grows = (graph.scope_of <= SCOPES.get(scope, ALL)) & ~_unread(graph)
        layers = cls(graph)
        for number in np.unique(graph.branch_of[grows]).tolist():
            layers.units.append(np.flatnonzero(grows & (graph.branch_of == number)))
            layers.numbers.append(number)
        return layers

    def without(self, held: np.ndarray) -> Layers:
        """These layers without some neurons."""
        layers = Layers(self.graph)
        for units, number in zip(self.units, self.numbers, strict=True):
            others = np.setdiff1d(units, held)
            if len(others):
                layers.units.append(others)
                layers.numbers.append(number)
        return layers

    def __iter__(self) -> Iterator[tuple[str, int, int, np.ndarray]]:
        """(name of a layer's weight, dim that it writes, channels, neurons that can be added to)."""
        slots = self.graph.slots
        for units, number in zip(self.units, self.numbers, strict=True):
            label = self.graph.facts.written[number].label
            _, name, dim = slots.names[int(np.searchsorted(slots.starts, label[0], side="right")) - 1]
            yield name, dim, len(label), units

    @property
    def widths(self) -> np.ndarray:
        """(layers,) neurons of each."""
        return np.array([len(units) for units in self.units], dtype=np.int64)

    def times(self, more: np.ndarray) -> np.ndarray:
        """(neurons,) how many there are of each, when (layers,) `more` are added to the layers, spread evenly."""
        times = np.ones(self.graph.size, dtype=np.int64)
        for units, added in zip(self.units, more.tolist(), strict=True):
            times[units] += np.diff(np.arange(len(units) + 1) * added // len(units))
        return times

    def evenly(self, factor: float) -> np.ndarray:
        """(layers,) what is to be added for every layer to be so many times as wide, rounded."""
        return np.floor(self.widths * (factor - 1) + 0.5).astype(np.int64)


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


def widest_within(layers: Layers, metric: Metric, limit: float) -> np.ndarray:
    """(layers,) what to add for the largest even factor that a budget allows; what is left goes to single layers.

    Those that are furthest below the factor come first, until no layer's next neuron fits.

    Args:
        layers: what can be added to.
        metric: what is limited.
        limit: the most of it; the model's own or more.

    Raises:
        BudgetError: the limit is so large that nobody can mean it.
    """
    if metric.value(layers.times(layers.evenly(WIDEST))) <= limit:
        raise BudgetError(
            f"{metric.show(limit)} would make every layer more than {WIDEST:.0f} times as wide: ask for less",
            asked=limit,
            reachable=metric.whole,
        )
    factor = _largest(lambda f: metric.value(layers.times(layers.evenly(f))) <= limit)
    more = layers.evenly(factor)
    # What runs in train mode only costs nothing here, and could be added without end.
    waiting = {layer for layer, cost in enumerate(next_costs(layers, metric, more)) if cost > 0}
    while waiting:
        layer = max(waiting, key=lambda i: factor - 1 - more[i] / layers.widths[i])
        wider = _with_one(more, layer)
        if metric.value(layers.times(wider)) <= limit:
            more = wider
        else:
            waiting.remove(layer)  # no neuron gets cheaper while others are added
    return more


def next_costs(layers: Layers, metric: Metric, more: np.ndarray) -> list[int]:
    """What one further neuron of each layer costs."""
    now = metric.value(layers.times(more))
    return [metric.value(layers.times(_with_one(more, layer))) - now for layer in range(len(more))]


def cheapest_next(layers: Layers, metric: Metric, more: np.ndarray) -> int | None:
    """What the cheapest further neuron costs; None where none costs anything."""
    return min((cost for cost in next_costs(layers, metric, more) if cost > 0), default=None)


def _with_one(more: np.ndarray, layer: int) -> np.ndarray:
    wider = more.copy()
    wider[layer] += 1
    return wider


WIDEST = 1024.0
"""No layer is made more often as wide than this."""


def _largest(fits: Callable[[float], bool]) -> float:
    """The largest factor that fits, to a millionth; 1 does."""
    low, high = 1.0, 2.0
    while high < WIDEST and fits(high):
        low, high = high, high * 2
    while high - low > 1e-6 * low:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
