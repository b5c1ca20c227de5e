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


def describes_itself(module: nn.Module) -> bool:
    """Whether a layer's own sizes are known from its tensors, so that no other attribute of it needs to follow."""
    return bool(_describe(module, {field: tuple(t.shape) for field, t in _sources(module).items()}, None))


# Names under which a weight, or what it is computed from, is stored. weight_norm keeps a length (original0, weight_g)
# beside the direction (original1, weight_v), which has the weight's size.
_WEIGHTS = ("weight", "weight_original", "weight_orig", "weight_original1", "weight_v")


def _sources(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameter or buffer of a layer's own size behind its weight, and behind its running mean.

    Looked up where it is stored: reading the field would run a parametrisation (spectral norm then takes a step).
    """
    held: dict[str, torch.Tensor | None] = {**module._parameters, **module._buffers}
    computed = module._modules.get("parametrizations")
    if isinstance(computed, nn.ModuleDict) and "weight" in computed:
        held.update({f"weight_{name}": tensor for name, tensor in computed["weight"]._parameters.items()})
    sources: dict[str, torch.Tensor] = {}
    for name in _WEIGHTS:
        weight = held.get(name)
        if weight is not None:
            sources["weight"] = weight
            break
    running_mean = held.get("running_mean")
    if running_mean is not None:
        sources["running_mean"] = running_mean
    return sources


def _describe(module: nn.Module, sizes: Mapping[str, Sequence[int]], groups: int | None) -> dict[str, Any]:
    weight = [int(n) for n in sizes.get("weight", ())]
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


_SIZES: dict[type[nn.Module], dict[str, int]] = {
    nn.Linear: {"out_features": 0, "in_features": 1},
    nn.Embedding: {"embedding_dim": 1},
    nn.PReLU: {"num_parameters": 0},
}
"""Per class of layers, its attributes and the dim of the weight that each is the size of."""
