"""Criteria: one number per neuron, the higher the more it matters."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from allocator.errors import (
    CriterionError,
    CriterionFallbackWarning,
    UninformativeScoresWarning,
    UnknownNameError,
    warn,
)
from allocator.graph.channel_graph import ChannelGraph

Weights = Callable[[str], torch.Tensor]
Criterion = Callable[[ChannelGraph, Weights], np.ndarray]
CRITERIA: dict[str, Criterion] = {}
AUTO = "auto"


@dataclass(frozen=True)
class Scores:
    """Importance of every neuron.

    Attributes:
        criterion: the name it was ranked by.
        values: (neurons,) float64; NaN where the criterion has nothing to say, and the neuron stays.
    """

    criterion: str
    values: np.ndarray


def criterion(name: str) -> Callable[[Criterion], Criterion]:
    """Register a criterion: a function of the graph and of a look-up of tensors by name.

    Raises:
        ValueError: the name is taken.
    """

    def register(function: Criterion) -> Criterion:
        if name in CRITERIA:
            raise ValueError(f"criterion {name} is registered already")
        CRITERIA[name] = function
        return function

    return register


def candidates(graph: ChannelGraph, criterion: str) -> list[str]:
    """The criteria to try in turn: the one that was named, or for "auto" those that fit the model.

    Raises:
        UnknownNameError: no such criterion.
    """
    if criterion not in (AUTO, *CRITERIA):
        near = difflib.get_close_matches(criterion, (AUTO, *CRITERIA), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UnknownNameError(f"no criterion {criterion!r}{hint} (there are {', '.join(sorted((AUTO, *CRITERIA)))})")
    if criterion != AUTO:
        return [criterion]
    return (
        ["bn_scale", "magnitude"] if any(len(graph.units(slots)) for slots, _ in graph.facts.gammas) else ["magnitude"]
    )


def say_fallback(reason: str) -> str:
    """Warn that "auto" ranks by magnitude, and why; returns what was said."""
    message = f"{reason}: neurons are ranked by magnitude (criterion='auto'); name a criterion to choose yourself"
    warn(message, CriterionFallbackWarning)
    return message


NO_BATCH_NORM = "no batch norm scales a neuron that can be removed"


def score(graph: ChannelGraph, criterion: str) -> Scores:
    """Rank all neurons.

    Args:
        graph: the model's neurons.
        criterion: a registered name ("bn_scale", "magnitude" or "random"), or "auto" for bn_scale where batch norms
            scale neurons that can be removed, else magnitude, with a warning.

    Raises:
        UnknownNameError: no such criterion.
        CriterionError: it has nothing to rank this model by, as where its weights lie on the meta device.
    """
    chosen = candidates(graph, criterion)[0]
    if chosen != criterion and chosen != "bn_scale":
        say_fallback(NO_BATCH_NORM)
    criterion = chosen
    tensors = graph.tensors

    def weights(name: str) -> torch.Tensor:
        if tensors[name].is_meta:
            raise CriterionError(
                f"criterion {criterion!r} reads {name}, which lies on the meta device and has no values: build the "
                "model on a real device and load its weights, or pass criterion='random'"
            )
        return tensors[name]

    values = CRITERIA[criterion](graph, weights)
    ranked = values[~np.isnan(values)]
    if not np.isfinite(ranked).all():
        raise CriterionError(f"criterion {criterion!r} gave infinite scores: the model's weights are not finite")
    if len(ranked) > 1 and np.ptp(ranked) == 0:
        warn(
            f"all {len(ranked)} scores of criterion {criterion!r} are {ranked[0]:g}, so the ranking carries no "
            "information (an untrained model?); neurons are dropped evenly over the branches",
            UninformativeScoresWarning,
        )
    return Scores(criterion, values)


def _mean_per_unit(graph: ChannelGraph, rows: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Mean over all (slots, values) rows that fall on a neuron; NaN where none does."""
    units = graph.unit_of_slot[np.concatenate([np.zeros(0, int), *(slots for slots, _ in rows)])]
    values = np.concatenate([np.zeros(0), *(values for _, values in rows)])
    free = units >= 0
    count = np.bincount(units[free], minlength=graph.size)
    total = np.bincount(units[free], weights=values[free], minlength=graph.size)
    return np.divide(total, count, out=np.full(graph.size, np.nan), where=count > 0)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().to("cpu", torch.float64).numpy())


@criterion("bn_scale")
def bn_scale(graph: ChannelGraph, weights: Weights) -> np.ndarray:
    """Mean |gamma| of the batch norms that scale a neuron (Liu et al., ICCV 2017; Li et al., CVPR 2019)."""
    gammas = {name: slots for slots, name in graph.facts.gammas}
    if not gammas and graph.size:
        raise CriterionError(
            "the model has no batch norm with a scale to rank neurons by (never had one, or it was folded "
            "into the convolutions): pass criterion='magnitude'"
        )
    return _mean_per_unit(graph, [(slots, np.abs(_array(weights(name)))) for name, slots in gammas.items()])


@criterion("magnitude")
def magnitude(graph: ChannelGraph, weights: Weights) -> np.ndarray:
    """Root mean square of the weights that write a neuron, relative to its layer's (Li et al., ICLR 2017)."""
    table = {int(slots[0]): (name, dim, slots) for name, dim, slots in _written(graph)}
    rows = []
    for name, dim, slots in table.values():
        tensor = weights(name).detach()
        other = [d for d in range(tensor.dim()) if d != dim]
        wide = tensor.to(torch.float64)
        norms = _array(torch.linalg.vector_norm(wide, dim=other) if other else wide.abs())
        mean = norms.mean()
        rows.append((slots, norms / mean if mean > 0 else norms))
    return _mean_per_unit(graph, rows)


def _written(graph: ChannelGraph) -> list[tuple[str, int, np.ndarray]]:
    """(parameter, dim, its slots) of everything that writes neurons."""
    start_of = {start: (name, dim) for start, name, dim in graph.slots.names}
    found = []
    for label, _ in graph.facts.written:
        known = start_of.get(int(label[0]))
        if known is not None and len(label) == graph.slots.shapes[known[0]][known[1]]:
            found.append((*known, label))
    return found


@criterion("random")
def random(graph: ChannelGraph, weights: Weights) -> np.ndarray:
    """A fixed random order: the control that any other criterion has to beat."""
    return np.random.default_rng(0).random(graph.size)
