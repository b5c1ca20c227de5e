"""What there is to choose from: neurons with their scores, those that must stay, and the budgets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from allocator.cost.budget import Budgets
from allocator.errors import InputError, as_given
from allocator.flow.facts import AtLeast
from allocator.graph.channel_graph import SCOPES, ChannelGraph
from allocator.graph.lent import LentGraph
from allocator.graph.selection import matches, unmatched
from allocator.scoring.scores import Scores


@dataclass(frozen=True)
class Widths:
    """What the caller asked of the widths of layers.

    Attributes:
        at_least: channels that a layer keeps: a number, a share of its own ("25%", or below 1), or one of these per
            name pattern.
        multiple: widths that change are multiples of this.
    """

    at_least: Any = None
    multiple: int = 1

    def minimum(self, name: str, width: int) -> int:
        """How many of its channels the layer with this weight keeps at least."""
        asked = self.at_least
        if isinstance(asked, Mapping):
            asked = max((_minimum(each, width) for pattern, each in asked.items() if matches(name, pattern)), default=0)
        return 0 if asked is None else min(_minimum(asked, width), width)

    def of(self, graph: ChannelGraph) -> Any:
        """`at_least` as numbers by layer, so that shares are of this network's widths and not of what comes of it."""
        if self.at_least is None:
            return None
        return {name: self.minimum(name, width) for name, width in _layers(graph).items()}

    def unmatched(self, graph: ChannelGraph) -> list[str]:
        """A note for every pattern of `at_least` that means no layer, since it may be misspelled."""
        patterns = tuple(self.at_least) if isinstance(self.at_least, Mapping) else ()
        return unmatched(graph.modules, _layers(graph), "at_least", patterns, "layer that writes channels")


def _layers(graph: ChannelGraph) -> dict[str, int]:
    """Channels of each layer, by the name of its weight."""
    return {graph.slots.name_of(int(label[0])): len(label) for label, _ in graph.facts.written}


def _minimum(asked: Any, width: int) -> int:
    """A number of channels, or a share of `width`."""
    try:
        text = str(asked).strip()
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share < math.inf or (share > 1 and text.endswith("%")):
        raise InputError(f"at_least={as_given(asked)} is neither a number of channels nor a share such as '25%'")
    return math.ceil(share * width - 1e-9) if text.endswith("%") or share < 1 else int(share)


@dataclass(frozen=True)
class Problem:
    """One question to a policy: which neurons to keep.

    Attributes:
        graph: the model's neurons and their cost.
        scores: their importance.
        forced: (neurons,) bool, those that stay whatever the budget.
        budgets: what may be kept at most.
        fill: whether the rest of the budgets is spent on the next best neurons that fit.
        widths: what is asked of the widths of layers.
        gone: (neurons,) bool, those that are not kept in any case.
    """

    graph: ChannelGraph
    scores: Scores
    forced: np.ndarray
    budgets: Budgets
    fill: bool = True
    widths: Widths = field(default_factory=Widths)
    gone: np.ndarray | None = None

    @property
    def open(self) -> np.ndarray:
        """(neurons,) bool: those that may be kept."""
        everything = np.ones(len(self.forced), dtype=bool)
        return everything if self.gone is None else ~self.gone | self.forced

    def lent(self) -> Problem:
        """The same question to a function of the caller's, which may write into its arrays and its graph's model."""
        return replace(
            self,
            graph=LentGraph(self.graph),
            scores=replace(self.scores, values=self.scores.values.copy()),
            forced=self.forced.copy(),
            gone=None if self.gone is None else self.gone.copy(),
        )


def free_neurons(graph: ChannelGraph, scores: Scores, scope: str) -> np.ndarray:
    """(neurons,) bool: those that a scope lets go and that have a score."""
    return (graph.scope_of <= SCOPES[scope]) & ~np.isnan(scores.values)


def forced_neurons(graph: ChannelGraph, scores: Scores, free: np.ndarray, widths: Widths | None = None) -> np.ndarray:
    """(neurons,) bool: those that stay whatever the budget.

    Beside all that are not free, the best of every layer, part and attention that would be left with too few.
    """
    forced = ~free
    floors = list(graph.facts.at_least)
    if widths is not None and widths.at_least is not None:
        for label, module in graph.facts.written:
            name = graph.slots.name_of(int(label[0]))
            floors.append(AtLeast(label, module, widths.minimum(name, len(label))))
    # Small minima first: most layers have one of a single neuron, and what that forces counts for the larger ones.
    for label, module, minimum in sorted(floors, key=lambda floor: floor.minimum):
        if module in graph.optional:
            continue
        units = graph.unit_of_slot[label]
        goes = (units >= 0) & ~forced[units]
        loose, slots = np.unique(units[goes], return_counts=True)
        missing = minimum - int((~goes).sum())
        if missing > 0:
            best = np.argsort(-scores.values[loose], kind="stable")
            # A neuron that holds several of the slots counts as often.
            enough = int(np.searchsorted(np.cumsum(slots[best]), missing)) + 1
            forced[loose[best[:enough]]] = True
    return forced


def least(graph: ChannelGraph, scores: Scores, metric: str) -> dict[str, int]:
    """Per scope what no plan goes below; a rewritten forward that does not fit may need more."""
    costs = {}
    for scope in SCOPES:
        forced = forced_neurons(graph, scores, free_neurons(graph, scores, scope))
        costs[scope] = graph.metric(metric).value(forced)
    return costs
