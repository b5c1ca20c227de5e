"""What layers say of themselves (`out_channels`, `num_features` ...), and what it becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from allocator.flow.flow import Flow
from allocator.modules import lies_within
from allocator.torch_private import BatchNormBase, ConvolutionBase


def standard_attributes(
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, torch.Tensor],
    shapes: Mapping[str, Sequence[int]],
    groups: Mapping[str, int],
    absent: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """What torch's own layers say of themselves, wherever it changes with the sizes of their tensors.

    Args:
        modules: the original's, by path.
        tensors: the original's parameters and buffers, by name.
        shapes: new sizes of the parameters and buffers that change.
        groups: new number of groups per weight of a grouped convolution or norm.
        absent: paths of layers that are gone.
    """
    name_of = {id(tensor): name for name, tensor in tensors.items()}
    changed: dict[str, dict[str, Any]] = {}
    for path, module in modules.items():
        if not (module._parameters or module._buffers or "parametrizations" in module._modules):
            continue
        sources = _sources(module)
        names = {field: name_of[id(tensor)] for field, tensor in sources.items()}
        if lies_within(path, absent) or not any(name in shapes or name in groups for name in names.values()):
            continue
        sizes = {field: shapes.get(names[field], tuple(tensor.shape)) for field, tensor in sources.items()}
        differs = _differing(module, _describe(module, sizes, groups.get(names.get("weight", ""))))
        if differs:
            changed[path] = differs
    return changed


def _differing(module: nn.Module, described: Mapping[str, Any]) -> dict[str, Any]:
    """What a layer says of itself otherwise."""
    differs = {}
    for key, value in described.items():
        if getattr(module, key) != value:
            differs[key] = list(value) if isinstance(value, tuple) else value  # as it comes back from a file
    return differs


def norms_without_tensors(flow: Flow) -> list[tuple[str, str, np.ndarray]]:
    """(path, attribute, labels of the channels) of norms that hold a number of channels, and no tensor of them."""
    found: dict[str, tuple[str, np.ndarray]] = {}
    for op in flow.trace.ops:
        module = flow.trace.modules.get(op.module)
        attribute = _channel_count(module)
        if module is None or attribute is None or op.module in found or _sources(module):
            continue
        for value in op.inputs():
            for label in flow.labels(value):
                if label is not None and len(label) == getattr(module, attribute):
                    found[op.module] = attribute, label
    return [(path, *each) for path, each in found.items()]


def _channel_count(module: nn.Module | None) -> str | None:
    """The attribute by which a norm counts its channels."""
    if isinstance(module, BatchNormBase):
        return "num_features"
    return "num_channels" if isinstance(module, nn.GroupNorm) else None


def told_by_tensors(module: nn.Module) -> frozenset[str]:
    """Attributes of a layer that follow its tensors: those of torch's own class; none of a module that is no layer."""
    sizes = _describe(module, {field: tuple(t.shape) for field, t in _sources(module).items()}, None)
    if not sizes:
        return frozenset()
    own = (vars(base).get("__annotations__", {}) for base in type(module).__mro__ if base.__module__.startswith(_TORCH))
    return frozenset(sizes).union(*own)


_TORCH = "torch.nn."


# What is appended to a tensor's name where it is stored, or what it is computed from. weight_norm keeps a length
# (original0, _g) beside the direction (original1, _v), which has the weight's size.
_STORED = ("", "_original", "_orig", "_original1", "_v")
# Of a recurrent layer: what reads its inputs, what reads its state, and what projects that, in a cell and in a layer.
_RECURRENT = {name: (name, f"{name}_l0") for name in ("weight_ih", "weight_hh", "weight_hr")}
_NAMES = {"weight": ("weight",), "running_mean": ("running_mean",), **_RECURRENT}


def _sources(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameter or buffer of a layer's own size behind its weight, and behind its running mean.

    Looked up where it is stored: reading the field would run a parametrisation (spectral norm then takes a step).
    """
    held: dict[str, torch.Tensor | None] = {**module._parameters, **module._buffers}
    computed = module._modules.get("parametrizations")
    for name, computing in computed.items() if isinstance(computed, nn.ModuleDict) else ():
        held.update({f"{name}_{key}": tensor for key, tensor in computing._parameters.items()})
    sources: dict[str, torch.Tensor] = {}
    for field, names in _NAMES.items():
        stored = (held.get(name + suffix) for name in names for suffix in _STORED)
        found = next((tensor for tensor in stored if tensor is not None), None)
        if found is not None:
            sources[field] = found
    return sources


def _describe(module: nn.Module, sizes: Mapping[str, Sequence[int]], groups: int | None) -> dict[str, Any]:
    weight = [int(n) for n in sizes.get("weight", ())]
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return _describe_recurrent(module, sizes)
    if isinstance(module, BatchNormBase) and sizes:
        return {"num_features": int(next(iter(sizes.values()))[0])}
    if not weight:
        return {}
    if isinstance(module, ConvolutionBase):
        groups = module.groups if groups is None else groups
        first, second = weight[0], weight[1] * groups
        if module.transposed:
            first, second = second, first
        return {"out_channels": first, "in_channels": second, "groups": groups}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": weight[0], "num_groups": module.num_groups if groups is None else groups}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape": tuple(weight)}
    for kind, fields in _SIZES.items():
        if isinstance(module, kind):
            return {field: weight[dim] for field, dim in fields.items()}
    return {}


def _describe_recurrent(module: nn.Module, sizes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Sizes by the first layer's weights, whose rows are so many gates of the hidden units."""
    gates = next((count for kinds, count in _GATES.items() if isinstance(module, kinds)), None)
    if gates is None or not {"weight_ih", "weight_hh"} <= sizes.keys():
        return {}
    described = {"input_size": int(sizes["weight_ih"][1]), "hidden_size": int(sizes["weight_hh"][0]) // gates}
    return {**described, "proj_size": int(sizes["weight_hr"][0])} if "weight_hr" in sizes else described


_GATES: dict[tuple[type[nn.Module], ...], int] = {
    (nn.LSTM, nn.LSTMCell): 4,
    (nn.GRU, nn.GRUCell): 3,
    (nn.RNN, nn.RNNCell): 1,
}
_SIZES: dict[type[nn.Module], dict[str, int]] = {
    nn.Linear: {"out_features": 0, "in_features": 1},
    nn.Embedding: {"embedding_dim": 1},
    nn.EmbeddingBag: {"embedding_dim": 1},
    nn.PReLU: {"num_parameters": 0},
}
"""Per class of layers, its attributes and the dim of the weight that each is the size of."""
