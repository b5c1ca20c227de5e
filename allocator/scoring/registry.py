"""The table of criteria: what ranks neurons, by name, by function or by numbers of the caller's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from allocator.errors import (
    CriterionError,
    CriterionFallbackWarning,
    UninformativeScoresWarning,
    UnknownNameError,
    did_you_mean,
    warn,
)
from allocator.graph.channel_graph import ChannelGraph
from allocator.scoring.scores import Scores, SlotScores, as_array

Weights = Callable[[str], torch.Tensor]
"""Gives a parameter or buffer of the model by its name."""
Criterion = Callable[[ChannelGraph, Weights], "np.ndarray | SlotScores"]
"""One number per neuron, or scores by parameter index."""
CRITERIA: dict[str, Criterion] = {}
AUTO = "auto"
NO_BATCH_NORM = "no batch norm scales a neuron that can be removed"


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
    names = (AUTO, *CRITERIA)
    if criterion not in names:
        near = did_you_mean(criterion, names, mark="'")
        raise UnknownNameError(
            f"no criterion {criterion!r}{near and '; ' + near} (there are {', '.join(sorted(names))})"
        )
    if criterion != AUTO:
        return [criterion]
    if any(len(graph.units(gamma.label)) for gamma in graph.facts.gammas):
        return ["bn_scale", "magnitude"]
    return ["magnitude"]


def say_fallback(reason: str) -> str:
    """Warn that "auto" ranks by magnitude, and why; returns what was said."""
    message = f"{reason}: neurons are ranked by magnitude (criterion='auto'); name a criterion to choose yourself"
    warn(message, CriterionFallbackWarning)
    return message


def score(graph: ChannelGraph, criterion: Any = AUTO) -> Scores:
    """Rank all neurons.

    Args:
        graph: the model's neurons.
        criterion: a registered name ("bn_scale", "magnitude" or "random"); "auto" for bn_scale where batch norms
            scale neurons that can be removed, else magnitude, with a warning; a function like a registered one; an
            array of one number per neuron; or, by the names of parameters, arrays of their shapes, whose entries
            are added up over everything that goes with a neuron.

    Raises:
        UnknownNameError: no such criterion, or no such parameter.
        CriterionError: it has nothing to rank this model by, as where its weights lie on the meta device, or gave
            something else than one number per neuron.
    """
    if isinstance(criterion, Scores):
        criterion.by_slot(graph)
        return criterion
    if isinstance(criterion, Mapping):
        return _checked(graph, "own", _by_parameter(graph, criterion))
    if isinstance(criterion, str):
        return _by_name(graph, criterion)
    if callable(criterion):
        name = getattr(criterion, "__name__", type(criterion).__name__)
        return _checked(graph, name, criterion(graph, _weights_of(graph, name)))
    return _checked(graph, "own", criterion)


def _by_name(graph: ChannelGraph, criterion: str) -> Scores:
    chosen = candidates(graph, criterion)[0]
    if chosen != criterion and chosen != "bn_scale":
        say_fallback(NO_BATCH_NORM)
    return _checked(graph, chosen, CRITERIA[chosen](graph, _weights_of(graph, chosen)))


def _weights_of(graph: ChannelGraph, criterion: str) -> Weights:
    tensors = graph.tensors

    def weights(name: str) -> torch.Tensor:
        if tensors[name].is_meta:
            raise CriterionError(
                f"criterion {criterion!r} reads {name}, which lies on the meta device and has no values: build the "
                "model on a real device and load its weights, or pass criterion='random'"
            )
        return tensors[name]

    return weights


def _by_parameter(graph: ChannelGraph, arrays: Mapping[str, Any]) -> SlotScores:
    """An importance per entry of each parameter, added up along all dims but one."""
    rows = []
    for name, given in arrays.items():
        if name not in graph.slots.shapes:
            near = did_you_mean(name, graph.slots.shapes, mark="'")
            raise UnknownNameError(f"scores for {name!r}, which is no parameter of the model{near and '; ' + near}")
        array = as_array(given, f"the scores of {name}")
        expected = graph.slots.shapes[name]
        if array.shape != expected:
            raise CriterionError(f"the scores of {name} have shape {array.shape}, expected {expected}")
        for dim, label in enumerate(graph.slots.labels(name)):
            others = tuple(d for d in range(array.ndim) if d != dim)
            rows.append((label, array.sum(axis=others)))
    return SlotScores.of(rows, "sum")


def _checked(graph: ChannelGraph, name: str, given: np.ndarray | SlotScores) -> Scores:
    if isinstance(given, SlotScores):
        scores = Scores(name, given.on(graph), given)
    else:
        scores = Scores(name, given)
        scores.by_slot(graph)
    ranked = scores.values[~np.isnan(scores.values)]
    if len(ranked) > 1 and np.ptp(ranked) == 0:
        warn(
            f"all {len(ranked)} scores of criterion {name!r} are {ranked[0]:g}, so the ranking carries no "
            "information (an untrained model?); neurons are dropped evenly over the branches",
            UninformativeScoresWarning,
        )
    return scores
