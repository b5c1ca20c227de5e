"""Neurons of which a wider network has equally many each, as averages are taken over them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from allocator.graph.channel_graph import ChannelGraph
from allocator.graph.neurons import components


@dataclass(frozen=True)
class EvenNeurons:
    """What a norm over channels asks of a wider network.

    Attributes:
        number: (neurons,) which set of neurons each is of, -1 for none; of a set there are equally many each.
        fixed: (neurons,) bool, those of sets that hold something which stays.
    """

    number: np.ndarray
    fixed: np.ndarray

    @classmethod
    def of(cls, graph: ChannelGraph) -> EvenNeurons:
        """Those of a graph whose norms are "even"."""
        stays = graph.size  # stands for all that is no neuron
        ties = []
        for even in graph.facts.even:
            units = np.unique(np.where(graph.unit_of_slot[even.label] < 0, stays, graph.unit_of_slot[even.label]))
            ties.append((units, np.full(len(units), units[0])))
        number = components(graph.size + 1, ties)
        members = np.unique(np.concatenate([np.zeros(0, int), *(units for units, _ in ties)]))
        alone = np.ones(graph.size, dtype=bool)
        alone[members[members < stays]] = False
        fixed = (number[:stays] == number[stays]) & ~alone
        return cls(np.where(alone, -1, number[:stays]), fixed)

    @property
    def grows(self) -> np.ndarray:
        """(neurons,) bool, those that can be added to, all of their set alike."""
        return (self.number >= 0) & ~self.fixed

    def slots(self, graph: ChannelGraph) -> dict[str, list[np.ndarray]]:
        """Per tensor and dim, (n,) bool, which indices are of neurons that averages are taken over."""
        which = np.append(self.grows, False)[graph.unit_of_slot]
        return {name: [which[label] for label in graph.slots.labels(name)] for name in graph.slots.shapes}

    def keeps_averages(self, times: np.ndarray) -> bool:
        """Whether (neurons,) `times` of each leave every average as it is."""
        for number in np.unique(self.number[self.number >= 0]):
            of_set = self.number == number
            if len(np.unique(times[of_set])) > 1 or (self.fixed[of_set].any() and (times[of_set] != 1).any()):
                return False
        return True
