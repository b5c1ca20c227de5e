"""Criteria that look at weights alone."""

from __future__ import annotations

import numpy as np
import torch

from allocator.errors import CriterionError
from allocator.graph.channel_graph import ChannelGraph
from allocator.scoring.registry import Weights, criterion
from allocator.scoring.scores import SlotScores, as_array


@criterion("bn_scale")
def bn_scale(graph: ChannelGraph, weights: Weights) -> SlotScores:
    """Mean |gamma| of the batch norms that scale a neuron (Liu et al., ICCV 2017; Li et al., CVPR 2019)."""
    gammas = {gamma.name: gamma.label for gamma in graph.facts.gammas}  # a norm that runs twice counts once
    if not gammas and graph.size:
        raise CriterionError(
            "the model has no batch norm with a scale to rank neurons by (never had one, or it was folded "
            "into the convolutions): pass criterion='magnitude'"
        )
    return SlotScores.of((label, np.abs(as_array(weights(name), name))) for name, label in gammas.items())


@criterion("magnitude")
def magnitude(graph: ChannelGraph, weights: Weights) -> SlotScores:
    """Root mean square of the weights that write a neuron, relative to its layer's (Li et al., ICLR 2017)."""
    rows = []
    for name, dim, label in _written(graph):
        tensor = weights(name).detach().to(torch.float64)
        others = [d for d in range(tensor.dim()) if d != dim]
        norms = as_array(torch.linalg.vector_norm(tensor, dim=others) if others else tensor.abs(), name)
        mean = norms.mean()
        rows.append((label, norms / mean if mean > 0 else norms))
    return SlotScores.of(rows)


def _written(graph: ChannelGraph) -> list[tuple[str, int, np.ndarray]]:
    """(parameter, dim, its slots) of everything that writes neurons, each once."""
    dim_at = {start: (name, dim) for start, name, dim in graph.slots.names}
    found: dict[int, tuple[str, int, np.ndarray]] = {}
    for label, _ in graph.facts.written:
        first = int(label[0])
        if first in dim_at:
            name, dim = dim_at[first]
            if len(label) == graph.slots.shapes[name][dim]:  # else a part of the dim, as a group of a weight has
                found[first] = name, dim, label
    return list(found.values())


@criterion("random")
def random(graph: ChannelGraph, weights: Weights) -> np.ndarray:
    """A fixed random order: the control that any other criterion has to beat."""
    return np.random.default_rng(0).random(graph.size)
