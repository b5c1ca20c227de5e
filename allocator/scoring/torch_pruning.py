"""Torch-Pruning's importances as criteria: a neuron is handed over as the group that they expect.

Its importances look at a group of layers, at which function prunes each, and at the indices that go together. All of
this is known of our neurons, so that every importance of its, and every subclass of a user's, ranks them.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from allocator.errors import CriterionError, MissingPackageError, in_words, text_of
from allocator.graph.channel_graph import ChannelGraph
from allocator.torch_private import BatchNormBase, ConvolutionBase


def is_importance(thing: Any) -> bool:
    """Whether this is an importance of Torch-Pruning's; it is not imported to find out."""
    package = sys.modules.get("torch_pruning")
    return package is not None and isinstance(thing, package.importance.Importance)


@dataclass
class _Node:
    """What a dependency points at."""

    module: nn.Module
    name: str = ""


@dataclass
class _Dependency:
    """One layer of a group and the function that would prune it, under the two names that importances look for."""

    layer: nn.Module
    pruning_fn: Any

    @property
    def target(self) -> _Node:
        """The layer, as a node."""
        return _Node(self.layer)

    @property
    def handler(self) -> Any:
        """The pruning function, by its other name."""
        return self.pruning_fn


def importance_scores(graph: ChannelGraph, importance: Any, model: nn.Module) -> np.ndarray:
    """(neurons,) what an importance of Torch-Pruning's says of each; NaN where it says nothing.

    Neurons that lie in the same dims of the same layers are one group, as there.

    Args:
        graph: the neurons.
        importance: an instance of `torch_pruning.importance.Importance`.
        model: the model, or a copy of it whose parameters hold the gradients that the importance looks at.

    Raises:
        CriterionError: the importance raised, or gave another number of scores.
        MissingPackageError: Torch-Pruning is not installed.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise MissingPackageError("torch-pruning is not installed: pip install torch-pruning") from error
    modules = dict(model.named_modules())
    scores = np.full(graph.size, np.nan)
    for units, places in _groups(graph).items():
        group = torch_pruning.dependency.Group()
        # Importances give one score per index of the first layer: all layers get as many for a neuron.
        times = math.lcm(*(len(own) for held in places.values() for own in held))
        for (path, dim), held in places.items():
            function = _pruning_function(torch_pruning.function, modules[path], dim)
            if function is None:
                continue
            indices = [own[turn % len(own)] for own in held for turn in range(times)]
            group.add_dep(_Dependency(modules[path], function), indices)
            group[len(group) - 1].root_idxs = list(range(len(indices)))
        values = _call(importance, group, times * len(units)) if len(group) else None
        if values is not None:
            scores[list(units)] = values.reshape(len(units), times).mean(1)
    return scores


def _call(importance: Any, group: Any, size: int) -> np.ndarray | None:
    name = type(importance).__name__
    try:
        values = importance(group)
    except Exception as error:
        hint = "; it looks at gradients: pass data and loss" if "NoneType" in text_of(error) else ""
        raise CriterionError(f"Torch-Pruning's {name} raised {in_words(error)}{hint}") from error
    if values is None:
        return None
    array = torch.as_tensor(values).detach().to("cpu", torch.float64).numpy()
    if array.shape != (size,):
        raise CriterionError(f"Torch-Pruning's {name} gave scores of shape {array.shape}, expected ({size},)")
    return array


Place = tuple[str, int]
"""(path of a layer, dim of its weight)."""


def _groups(graph: ChannelGraph) -> dict[tuple[int, ...], dict[Place, list[list[int]]]]:
    """Neurons that lie in the same dims of the same weights, and per dim the indices of each of them.

    Those that write come first, since an importance may look at the first alone.
    """
    places: list[dict[Place, list[int]]] = [{} for _ in range(graph.size)]
    for neuron in graph.neurons:
        for name, dim, index in neuron.members:
            path, _, field = name.rpartition(".")
            if field == "weight":
                places[neuron.index].setdefault((path, dim), []).append(index)
    by_signature: dict[tuple[Place, ...], list[int]] = {}
    for unit, held in enumerate(places):
        by_signature.setdefault(tuple(sorted(held, key=lambda place: place[1])), []).append(unit)
    groups: dict[tuple[int, ...], dict[Place, list[list[int]]]] = {}
    for signature, units in by_signature.items():
        groups[tuple(units)] = {place: [places[unit][place] for unit in units] for place in signature}
    return groups


def _pruning_function(functions: Any, layer: nn.Module, dim: int) -> Any:
    """What Torch-Pruning would call to drop indices of this dim of the layer's weight; None where it has nothing."""
    if isinstance(layer, ConvolutionBase):
        if layer.groups > 1 and layer.groups == layer.out_channels:
            return functions.prune_depthwise_conv_out_channels if dim == 0 else None
        writes = (dim == 1) if layer.transposed else (dim == 0)
        return functions.prune_conv_out_channels if writes else functions.prune_conv_in_channels
    if isinstance(layer, nn.Linear):
        return functions.prune_linear_out_channels if dim == 0 else functions.prune_linear_in_channels
    if isinstance(layer, BatchNormBase):
        return functions.prune_batchnorm_out_channels
    if isinstance(layer, nn.LayerNorm):
        return functions.prune_layernorm_out_channels
    return functions.prune_groupnorm_out_channels if isinstance(layer, nn.GroupNorm) else None
