"""Criteria that look at weights alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    rows = []
    for name, dim, label in _written(graph):
        (norms,) = _norms(weights(name), [dim], name)
        rows.append((label, _over_mean(norms)))
    return SlotScores.of(rows)


@criterion("group_norm")
def group_norm(graph: ChannelGraph, weights: Weights) -> SlotScores:
    """Mean over all tensors that write, scale or read a neuron of the norm of its slice, relative to its branch's.

    After the group L2 norm of Fang et al. (CVPR 2023), with every tensor's slices brought to one scale first. Where a
    neuron is several channels, as a head is, their mean is nearer to the branch's than one channel's is, by the root
    of their number; that is made up for, or heads and whole groups would stay to the last.
    """
    width = _channels(graph)
    rows = []
    for name, labels in _dims_of_neurons(graph):
        for label, norms in zip(labels.values(), _norms(weights(name), list(labels), name), strict=True):
            rows.append((label, _spread(graph, label, _over_branch(graph, label, norms), width)))
    return SlotScores.of(rows)


@criterion("fpgm")
def fpgm(graph: ChannelGraph, weights: Weights) -> SlotScores:
    """Sum of a filter's distances to all others of its layer, relative to its layer's (He et al., CVPR 2019)."""
    rows = []
    for name, dim, label in _written(graph):
        filters = weights(name).detach()
        filters = torch.view_as_real(filters) if filters.is_complex() else filters
        filters = filters.to(torch.float32).movedim(dim, 0).flatten(1)
        distances = _finite(torch.cdist(filters[None], filters[None])[0].sum(1), name)
        rows.append((label, _over_mean(distances)))
    return SlotScores.of(rows)


@criterion("random")
def random(graph: ChannelGraph, weights: Weights) -> np.ndarray:
    """A fixed random order: the control that any other criterion has to beat."""
    return np.random.default_rng(0).random(graph.size)


def _norms(tensor: torch.Tensor, dims: Sequence[int], name: str) -> list[np.ndarray]:
    """Per dim, (n,) the L2 norm of every slice along it; the name is for messages."""
    tensor = tensor.detach()
    squares = (tensor.abs() if tensor.is_complex() else tensor).to(torch.float64, copy=True).square_()
    squares = _sum_but(squares, dims, keepdim=True)
    return [_finite(_sum_but(squares, [dim]).sqrt(), name) for dim in dims]


def _sum_but(tensor: torch.Tensor, dims: Sequence[int], *, keepdim: bool = False) -> torch.Tensor:
    """The sum over all dims but these."""
    others = [d for d in range(tensor.dim()) if d not in dims]
    return tensor.sum(others, keepdim=keepdim) if others else tensor


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


def _channels(graph: ChannelGraph) -> np.ndarray:
    """(neurons,) how many channels each is: its slots in the dim where it has fewest, as a flattened map has more."""
    fewest = np.full(graph.size, np.inf)
    for _, labels in _dims_of_neurons(graph):
        for label in labels.values():
            units = graph.unit_of_slot[label]
            found, count = np.unique(units[units >= 0], return_counts=True)
            fewest[found] = np.minimum(fewest[found], count)
    return fewest


def _spread(graph: ChannelGraph, label: np.ndarray, values: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Relative values as far from one as single channels' are, of neurons that are several: 0 stays 0."""
    units = graph.unit_of_slot[label]
    several = (units >= 0) & (width[units] > 1)
    found, place, count = np.unique(units[several], return_inverse=True, return_counts=True)
    mean, farther = np.bincount(place, weights=values[several]) / count, np.sqrt(width[found])
    with np.errstate(divide="ignore"):
        spread = np.where(mean < 1, 1 / (1 + farther * (1 / mean - 1)), 1 + farther * (mean - 1))
    result = values.copy()
    result[several] = spread[place]
    return result


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


def _dims_of_neurons(graph: ChannelGraph) -> Iterator[tuple[str, dict[int, np.ndarray]]]:
    """The slots of every dim that holds neurons, by weight or scale; shifts tell nothing of size."""
    scales = {gamma.name for gamma in graph.facts.gammas}
    for name, tensor in graph.tensors.items():
        if not isinstance(tensor, torch.nn.Parameter) or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        if tensor.dim() < 2 and name not in scales:
            continue
        labels = enumerate(graph.slots.labels(name))
        found = {dim: label for dim, label in labels if (graph.unit_of_slot[label] >= 0).any()}
        if found:
            yield name, found
