"""What a neuron's going costs once the layers that read it are refitted: one after the other is taken out, on paper.

To second order the loss bends, along the weights of a layer, like the Kronecker product of the covariance of what it
reads and that of the gradients of what it gives (Martens & Grosse, ICML 2015; of convolutions, Grosse & Martens, ICML
2016). So it is known what a layer loses with some of its inputs when the weights of the others make up for it (optimal
brain surgeon: Hassibi & Stork, NIPS 1993; of whole structures, ZipLM: Kurtic et al., NeurIPS 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from allocator.graph.channel_graph import ChannelGraph
from allocator.scoring.calibration import COVARIANCES, CURVATURE, GRADIENTS, Statistics
from allocator.scoring.registry import Weights, criterion
from allocator.scoring.scores import SlotScores

RIDGE = 1e-3
"""Of the mean diagonal, added to a covariance that is inverted."""
STEPS = 100
"""In how many steps all neurons are taken out, about."""
ALIKE = 0.25
"""Squared partial correlation from which on two inputs of a layer do not go in one step: either may stand in."""
MOST = 1 << 26
"""Numbers in the matrices of all layers' inputs by inputs, up to which recovered networks are scored so by default."""


@dataclass
class Reading:
    """A layer that reads neurons.

    Attributes:
        units: (inputs,) which neuron each belongs to; -1 for one that stays.
        precision: (inputs, inputs) inverse covariance of what is left of them.
        worth: (inputs, inputs) what the loss bends along its weights of these.
    """

    units: np.ndarray
    precision: np.ndarray
    worth: np.ndarray

    def costs(self, size: int) -> np.ndarray:
        """(neurons,) what the loss gains where each goes and the weights of all others make up for it."""
        each = self.worth.diagonal() / self.precision.diagonal() / 2
        free = self.units >= 0
        total = np.bincount(self.units[free], weights=each[free], minlength=size)
        count = np.bincount(self.units[free], minlength=size)
        for unit in np.flatnonzero(count > 1):  # its inputs can't make up for one another
            own = np.flatnonzero(self.units == unit)
            block = np.ix_(own, own)
            total[unit] = np.trace(np.linalg.solve(self.precision[block], self.worth[block])) / 2
        return total

    def drop(self, gone: np.ndarray) -> None:
        """Take out (inputs,) bool, and let the others make up for them."""
        stay = ~gone
        ways = np.linalg.solve(self.precision[np.ix_(gone, gone)], self.precision[np.ix_(gone, stay)])
        lost = self.worth[np.ix_(stay, gone)] @ ways
        among = ways.T @ self.worth[np.ix_(gone, gone)] @ ways
        self.precision = self.precision[np.ix_(stay, stay)] - self.precision[np.ix_(stay, gone)] @ ways
        self.worth = self.worth[np.ix_(stay, stay)] - lost - lost.T + among
        self.units = self.units[stay]

    def postponed(self, rank: np.ndarray) -> np.ndarray:
        """Of neurons that are to go, those that come after one that they may stand for.

        Args:
            rank: (neurons,) in what order they are to go; -1 for the others.
        """
        places = np.flatnonzero((self.units >= 0) & (rank[self.units] >= 0))
        places = places[np.argsort(rank[self.units[places]], kind="stable")]
        own = self.precision[np.ix_(places, places)]
        alike = own**2 > ALIKE * np.outer(own.diagonal(), own.diagonal())
        alike &= self.units[places][:, None] != self.units[places]
        return self.units[places][np.triu(alike, 1).any(0)]


@criterion("surgeon", needs=[COVARIANCES, CURVATURE, GRADIENTS], additive=True)
def surgeon(graph: ChannelGraph, weights: Weights, statistics: Statistics) -> SlotScores:
    """What the loss gains where a neuron goes and its readers are refitted, those that went before it being gone.

    The next to go is the one that costs least for its FLOPs. One that no layer reads whose weights could make up for it
    costs what `fisher` says.
    """
    readings = [_reading(graph, weights, statistics, dim) for dim in statistics.curvatures if dim in statistics.moments]
    per_sample = statistics.samples / max(len(statistics.read), 1)
    values = 0.5 * per_sample * np.square(statistics.read).mean(0)
    found = in_turn(graph, readings)
    values = np.where(np.isnan(found), values, found)
    scored = np.flatnonzero(graph.unit_of_slot >= 0)
    units, first = np.unique(graph.unit_of_slot[scored], return_index=True)
    return SlotScores(scored[first], values[units], "sum")


def affordable(graph: ChannelGraph) -> bool:
    """Whether its matrices are few and small enough."""
    return sum(len(label) ** 2 for label in graph.facts.read) <= MOST


def in_turn(graph: ChannelGraph, readings: list[Reading]) -> np.ndarray:
    """(neurons,) what each costs when its turn comes, and per FLOP no less than those before it; NaN for the unread."""
    values = np.full(graph.size, np.nan)
    left = np.zeros(graph.size, dtype=bool)
    for reading in readings:
        left[reading.units[reading.units >= 0]] = True
    kept, metric = np.ones(graph.size, dtype=bool), graph.metric("flops")
    most, level = -(-int(left.sum()) // STEPS), 0.0
    costs = [reading.costs(graph.size) for reading in readings]
    while left.any():
        price = np.maximum(metric.added_each(kept), 1)
        ratio = np.where(left, np.sum(costs, 0) / price, np.inf)
        going = _together(np.argsort(ratio, kind="stable")[: min(most, int(left.sum()))], readings, graph.size)
        levels = np.maximum.accumulate(np.maximum(ratio[going], level))
        values[going], level = levels * price[going], levels[-1]
        left[going] = kept[going] = False
        for place, reading in enumerate(readings):
            gone = (reading.units >= 0) & ~kept[reading.units]
            if gone.any():
                reading.drop(gone)
                costs[place] = reading.costs(graph.size)
    return values


def _together(order: np.ndarray, readings: list[Reading], size: int) -> np.ndarray:
    """Those of some neurons in order that can go in one step."""
    rank = np.full(size, -1)
    rank[order] = np.arange(len(order))
    for reading in readings:
        rank[reading.postponed(rank)] = -1
    return order[rank[order] >= 0]


def _reading(graph: ChannelGraph, weights: Weights, statistics: Statistics, dim: tuple[str, int]) -> Reading:
    """A layer as the data have it."""
    name, read = dim
    moments = statistics.moments[dim]
    mean = moments.total / moments.count
    covariance = moments.squares / moments.count - np.outer(mean, mean)
    ridge = RIDGE * max(float(np.trace(covariance)) / len(covariance), 1e-12)
    weight = weights(name).detach().to("cpu", torch.float32)
    wide = weight.movedim(read, 0).flatten(2) if weight.dim() > 2 else weight.movedim(read, 0)[:, :, None]
    curvature = torch.from_numpy(statistics.curvatures[dim]).float()
    bent = torch.einsum("op,cpk->cok", curvature, wide)
    worth = (wide.flatten(1) @ bent.flatten(1).T).double().numpy()
    return Reading(
        graph.unit_of_slot[graph.slots.labels(name)[read]],
        np.linalg.inv(covariance + ridge * np.eye(len(covariance))),
        worth,
    )
