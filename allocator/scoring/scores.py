"""Scores: how much each neuron matters, known by parameter index so that they outlast a change of what a neuron is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from allocator.errors import CriterionError, text_of
from allocator.graph.channel_graph import ChannelGraph

Combine = Literal["mean", "sum", "mean_square"]


@dataclass(frozen=True)
class SlotScores:
    """Importance by slot, before it is known which slots make up a neuron.

    A repair may freeze neurons, or make two of them one. Scores of slots are projected again after each, and no
    criterion has to be run, and no data looked at, a second time.

    Attributes:
        slots: (entries,) which slot each entry belongs to; a slot may have any number of them.
        values: (entries,) float64; (samples, entries) for "mean_square". A neuron with a NaN among its entries stays.
        combine: how the entries that fall on a neuron make its score: their "mean", their "sum", or, over the samples,
            the mean of the square of their sum ("mean_square").
    """

    slots: np.ndarray
    values: np.ndarray
    combine: Combine = "mean"

    @classmethod
    def of(cls, rows: Iterable[tuple[np.ndarray, np.ndarray]], combine: Combine = "mean") -> SlotScores:
        """Of (slots, values) rows."""
        slots, values = [np.zeros(0, int)], [np.zeros(0)]
        for label, numbers in rows:
            slots.append(label)
            values.append(numbers)
        return cls(np.concatenate(slots), np.concatenate(values), combine)

    def on(self, graph: ChannelGraph) -> np.ndarray:
        """(neurons,) the score of each neuron of a graph of the same model; NaN where no entry falls on one."""
        units = graph.unit_of_slot[self.slots]
        free = units >= 0
        count = np.bincount(units[free], minlength=graph.size)
        if self.combine == "mean_square":
            total: np.ndarray = np.zeros(graph.size)
            for sample in self.values:
                total += np.bincount(units[free], weights=sample[free], minlength=graph.size) ** 2
            divisor = np.full(graph.size, float(max(len(self.values), 1)))
        else:
            total = np.bincount(units[free], weights=self.values[free], minlength=graph.size)
            divisor = count.astype(np.float64) if self.combine == "mean" else np.ones(graph.size)
        return np.divide(total, divisor, out=np.full(graph.size, np.nan), where=count > 0)


@dataclass(frozen=True, repr=False)
class Scores:
    """Importance of every neuron of a graph.

    Attributes:
        criterion: the name it was ranked by.
        values: (neurons,) float64, the higher the more it matters; NaN where the criterion has nothing to say, and
            the neuron stays.
        slots: the same by parameter index; None for values that the caller made. Neurons that turn out to go
            together then have the mean of their values.
    """

    criterion: str
    values: np.ndarray
    slots: SlotScores | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return f"Scores({self.criterion}: {len(self.values):,} neurons, {self._range()})"

    def __post_init__(self) -> None:
        values = as_array(self.values, f"the scores of {self.criterion!r}")
        if np.isinf(values).any():
            count = int(np.isinf(values).sum())
            raise CriterionError(
                f"the scores of {self.criterion!r} are infinite in {count} of {values.size} places: "
                "pass finite numbers, and NaN for what must stay"
            )
        object.__setattr__(self, "values", values)

    def _range(self) -> str:
        ranked = self.values[~np.isnan(self.values)]
        return f"{ranked.min():.4g} to {ranked.max():.4g}" if ranked.size else "none with a score"

    def on(self, graph: ChannelGraph, other: ChannelGraph) -> Scores:
        """The scores of another graph of the same model.

        Args:
            graph: that they were made for.
            other: a graph in which fewer neurons may go, or some go together.
        """
        if other is graph:
            return self
        slots = self.by_slot(graph)
        return Scores(self.criterion, slots.on(other), slots)

    def by_slot(self, graph: ChannelGraph) -> SlotScores:
        """The scores by parameter index.

        Args:
            graph: that they were made for.

        Raises:
            CriterionError: there is not one value per neuron.
        """
        if self.values.shape != (graph.size,):
            raise CriterionError(
                f"the scores of {self.criterion!r} have shape {self.values.shape}, expected ({graph.size},): one "
                "number per neuron, in the order of graph.neurons"
            )
        # Values that the caller wrote over those of a criterion are the caller's own.
        if self.slots is not None and np.array_equal(self.slots.on(graph), self.values, equal_nan=True):
            return self.slots
        scored = np.flatnonzero(graph.unit_of_slot >= 0)
        units, first = np.unique(graph.unit_of_slot[scored], return_index=True)
        return SlotScores(scored[first], self.values[units])


def as_array(numbers: Any, name: str) -> np.ndarray:
    """Numbers in float64: of a tensor, wherever it lies and whatever its dtype, or of anything that numpy reads.

    Args:
        numbers: what was given.
        name: of it, for messages.

    Raises:
        CriterionError: these are no numbers.
    """
    if numbers is None:
        raise CriterionError(f"{name} are None: numbers are expected, which a function has to return")
    if isinstance(numbers, (torch.Tensor, np.ndarray)) and "complex" in str(numbers.dtype):
        raise CriterionError(f"{name} are complex: give real numbers, such as their .abs()")
    if isinstance(numbers, torch.Tensor):
        numbers = numbers.detach().to("cpu", torch.float64).numpy()
    try:
        return np.asarray(numbers, dtype=np.float64)
    except Exception as error:  # an object of the caller's may make anything of it
        raise CriterionError(f"{name} are not an array of numbers: {text_of(error)}") from None
