"""Criteria that look at weights alone."""

from __future__ import annotations

from collections.abc import Iterator

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
    return SlotScores.of((label, np.abs(_finite(weights(name), name))) for name, label in gammas.items())


@criterion("magnitude")
def magnitude(graph: ChannelGraph, weights: Weights) -> SlotScores:
    """Root mean square of the weights that write a neuron, relative to its layer's (Li et al., ICLR 2017)."""
    return SlotScores.of((label, _over_mean(_norms(weights(name), dim, name))) for name, dim, label in _written(graph))


@criterion("group_norm")
def group_norm(graph: ChannelGraph, weights: Weights) -> SlotScores:
    """Mean over all tensors that write, scale or read a neuron of the norm of its slice, relative to its branch's.

    After the group L2 norm of Fang et al. (CVPR 2023), with every tensor's slices brought to one scale first.
    """
    rows = []
    for name, dim, label in _dims_of_neurons(graph):
        rows.append((label, _norms(weights(name), dim, name)))
    return SlotScores.of((label, _over_branch(graph, label, norms)) for label, norms in rows)


@criterion("fpgm")
def fpgm(graph: ChannelGraph, weights: Weights) -> SlotScores:
    """Sum of a filter's distances to all others of its layer, relative to its layer's (He et al., CVPR 2019)."""
    rows = []
    for name, dim, label in _written(graph):
        filters = weights(name).detach().to(torch.float32).movedim(dim, 0).flatten(1)
        distances = _finite(torch.cdist(filters[None], filters[None])[0].sum(1), name)
        rows.append((label, _over_mean(distances)))
    return SlotScores.of(rows)


@criterion("random")
def random(graph: ChannelGraph, weights: Weights) -> np.ndarray:
    """A fixed random order: the control that any other criterion has to beat."""
    return np.random.default_rng(0).random(graph.size)


def _norms(tensor: torch.Tensor, dim: int, name: str) -> np.ndarray:
    """(n,) the L2 norm of every slice along a dim; the name is for messages."""
    wide = tensor.detach().to(torch.float64)
    others = [d for d in range(wide.dim()) if d != dim]
    return _finite(torch.linalg.vector_norm(wide, dim=others) if others else wide.abs(), name)


def _finite(numbers: torch.Tensor, name: str) -> np.ndarray:
    array = as_array(numbers, name)
    if not np.isfinite(array).all():
        raise CriterionError(
            f"{name} holds values that are not finite, so neurons cannot be ranked by it: mend the weights, or pass a "
            "criterion that does not read them"
        )
    return array


def _over_mean(values: np.ndarray) -> np.ndarray:
    mean = values.mean()
    return values / mean if mean > 0 else values


def _over_branch(graph: ChannelGraph, label: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values relative to the mean of those of the same branch, since a tensor may read several side by side."""
    units = graph.unit_of_slot[label]
    branch = np.where(units >= 0, graph.branch_of[units], -1) + 1
    count = np.bincount(branch)
    mean = np.bincount(branch, weights=values) / np.maximum(count, 1)
    divisor = mean[branch]
    return np.divide(values, divisor, out=values.copy(), where=divisor > 0)


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


def _dims_of_neurons(graph: ChannelGraph) -> Iterator[tuple[str, int, np.ndarray]]:
    """(parameter, dim, its slots) of every dim of a weight or scale that holds neurons; shifts tell nothing of size."""
    scales = {gamma.name for gamma in graph.facts.gammas}
    for name, tensor in graph.tensors.items():
        if not isinstance(tensor, torch.nn.Parameter) or not tensor.is_floating_point():
            continue
        if tensor.dim() < 2 and name not in scales:
            continue
        for dim, label in enumerate(graph.slots.labels(name)):
            if (graph.unit_of_slot[label] >= 0).any():
                yield name, dim, label
