"""Materialising an allocation: a copy of the model with fewer neurons, same classes, same names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from allocator.errors import AllocationMismatchError
from allocator.flow.flow import Flow
from allocator.modules import shapes_of, skeleton
from allocator.rewriting.allocation import Allocation, Indices, architecture_hash
from allocator.torch_private import BatchNormBase, ConvolutionBase

Slice = Callable[[torch.Tensor, Sequence[Indices | None]], torch.Tensor]


def sliced(tensor: torch.Tensor, kept: Sequence[Indices | None]) -> torch.Tensor:
    """The part of a tensor that stays.

    Args:
        tensor: any tensor.
        kept: per dim the indices that stay, None for all; for dim 1 possibly one row per output that stays.
    """
    result = tensor.detach()
    for dim, indices in enumerate(kept):
        if indices is None:
            continue
        index = torch.as_tensor(np.asarray(indices, dtype=np.int64), device=tensor.device)
        if index.dim() == 1:
            result = result.index_select(dim, index)
        else:
            shape = (*index.shape, *result.shape[2:])
            index = index.reshape(*index.shape, *([1] * (result.dim() - 2))).expand(shape)
            result = result.gather(1, index)
    if result.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return result.contiguous(memory_format=torch.channels_last)
    return result


def sliced_on_meta(tensor: torch.Tensor, kept: Sequence[Indices | None]) -> torch.Tensor:
    """A meta tensor of the size that `sliced` would give."""
    sizes = [n if indices is None else _length(indices) for n, indices in zip(tensor.shape, kept, strict=True)]
    return torch.empty(sizes, dtype=tensor.dtype, device="meta")


def _length(indices: Indices) -> int:
    """How many indices there are, or columns where there is a row of them per output."""
    first = indices[0] if len(indices) else 0
    return len(first) if isinstance(first, Sequence) else len(indices)


def materialise(model: nn.Module, allocation: Allocation, cut: Slice = sliced) -> nn.Module:
    """Copy `model` with every tensor cut as the allocation says, and the modules' attributes set.

    Untouched tensors are copied too, so that training the result leaves the original as it is.
    """

    def replace(name: str, tensor: torch.Tensor) -> torch.Tensor:
        kept = allocation.kept.get(name)
        if kept is None:
            return tensor.detach().clone() if cut is sliced else torch.empty_like(tensor, device="meta")
        return cut(tensor, kept)

    small = skeleton(model, replace)
    for path in allocation.absent:
        owner, _, name = path.rpartition(".")
        small.get_submodule(owner)._modules[name] = None
    modules = dict(small.named_modules(remove_duplicate=False))
    for path, values in allocation.attributes.items():
        module = modules[path]
        for name, value in values.items():
            current = getattr(module, name, None)
            setattr(module, name, tuple(value) if isinstance(current, tuple) else value)
    return small


def check_fits(model: nn.Module, allocation: Allocation) -> None:
    """Raise AllocationMismatchError unless the allocation was made for a model of this architecture."""
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    for name, dims in allocation.kept.items():
        if name not in tensors:
            raise AllocationMismatchError(f"the allocation names {name}, which {type(model).__name__} does not have")
        shape = tuple(tensors[name].shape)
        if len(dims) != len(shape):
            raise AllocationMismatchError(f"{name}: the allocation expects {len(dims)} dims, the model has {shape}")
        for dim, indices in enumerate(dims):
            if indices is not None and np.size(indices) and not _within(indices, shape[dim]):
                raise AllocationMismatchError(
                    f"{name}, dim {dim}: the allocation keeps index {np.max(indices)}, the model has {shape[dim]}"
                )
    _check_attributes(model, allocation)
    architecture = architecture_hash(shapes_of(model))
    if allocation.architecture and allocation.architecture != architecture:
        raise AllocationMismatchError(
            f"the allocation was made for another architecture ({allocation.architecture}, "
            f"this {type(model).__name__} is {architecture}): build the model as it was then"
        )


def _check_attributes(model: nn.Module, allocation: Allocation) -> None:
    """The modules that the allocation speaks of are there, and so are the numbers that it sets."""
    for path in (*allocation.attributes, *allocation.absent):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            message = f"the allocation names the module {path!r}, which {type(model).__name__} does not have"
            raise AllocationMismatchError(message) from None
        for name, value in allocation.attributes.get(path, {}).items():
            current = getattr(module, name, None)
            if not (_is_plain(current) and _is_plain(value)):  # one number may become a list of them
                raise AllocationMismatchError(
                    f"the allocation sets {path}.{name} to {value!r:.80}, where the model has {current!r:.80}"
                )


def _is_plain(value: Any) -> bool:
    """Whether this is a number, or numbers in lists or by names."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (int, float))


def gives(allocation: Allocation, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether a model with tensors of these shapes is one that the allocation leads to."""
    for name, dims in allocation.kept.items():
        shape = shapes.get(name, ())
        sizes = tuple(n if kept is None else _length(kept) for n, kept in zip(shape, dims))
        if len(shape) != len(dims) or sizes != shape:
            return False
    return not any(name.startswith(f"{path}.") for path in allocation.absent for name in shapes)


def _within(indices: Indices, size: int) -> bool:
    array = np.asarray(indices)
    return bool(array.min() >= 0 and array.max() < size)


def standard_attributes(
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, torch.Tensor],
    shapes: dict[str, Sequence[int]],
    groups: dict[str, int],
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
    first = {id(tensor): name for name, tensor in tensors.items()}
    changed: dict[str, dict[str, Any]] = {}
    for path, module in modules.items():
        if not (module._parameters or module._buffers or "parametrizations" in module._modules):
            continue
        sources = _sources(module)
        own = {field: first[id(tensor)] for field, tensor in sources.items()}
        gone = any(path == other or path.startswith(f"{other}.") for other in absent)
        if gone or not any(name in shapes or name in groups for name in own.values()):
            continue
        sizes = {f: shapes.get(own[f], tuple(tensor.shape)) for f, tensor in sources.items()}
        new = _describe(module, sizes, groups.get(own.get("weight", "")))
        differs = {
            key: list(value) if isinstance(value, tuple) else value  # as it comes back from a file
            for key, value in new.items()
            if getattr(module, key) != value
        }
        if differs:
            changed[path] = differs
    return changed


def norms_without_tensors(flow: Flow) -> list[tuple[str, str, np.ndarray]]:
    """(path, attribute, labels of the channels) of norms that hold a number of channels, and no tensor of them."""
    found: dict[str, tuple[str, np.ndarray]] = {}
    for op in flow.trace.ops:
        module = flow.trace.modules.get(op.module)
        name = next((name for cls, name in _COUNTED_BY.items() if isinstance(module, cls)), None)
        if module is None or name is None or op.module in found or _sources(module):
            continue
        labels = [label for i in op.inputs() for label in flow.labels(i) if label is not None]
        for label in labels:
            if len(label) == getattr(module, name):
                found[op.module] = name, label
    return [(path, *each) for path, each in found.items()]


_COUNTED_BY: dict[type[nn.Module], str] = {
    BatchNormBase: "num_features",
    nn.GroupNorm: "num_channels",
}


def describes_itself(module: nn.Module) -> bool:
    """Whether a layer's own sizes are known from its tensors, so that no other attribute of it needs to follow."""
    return bool(_describe(module, {field: tuple(t.shape) for field, t in _sources(module).items()}, None))


def _sources(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameter or buffer of a layer's own size behind its weight, and behind its running mean.

    Looked up where it is stored: reading the field would run a parametrisation (spectral norm then takes a step).
    """
    held: dict[str, torch.Tensor | None] = {**module._parameters, **module._buffers}
    computed = module._modules.get("parametrizations")
    if isinstance(computed, nn.ModuleDict) and "weight" in computed:
        held.update({f"weight_{name}": tensor for name, tensor in computed["weight"]._parameters.items()})
    # weight_norm keeps a length (original0, weight_g) beside the direction, which has the weight's size.
    names = ("weight", "weight_original", "weight_orig", "weight_original1", "weight_v")
    weight = next((held[name] for name in names if held.get(name) is not None), None)
    found = {"weight": weight, "running_mean": held.get("running_mean")}
    return {field: tensor for field, tensor in found.items() if tensor is not None}


def _describe(module: nn.Module, sizes: dict[str, Sequence[int]], groups: int | None) -> dict[str, Any]:
    weight = [int(n) for n in sizes.get("weight", ())]
    if isinstance(module, BatchNormBase) and sizes:
        return {"num_features": int(next(iter(sizes.values()))[0])}
    if not weight:
        return {}
    if isinstance(module, ConvolutionBase):
        groups = module.groups if groups is None else groups
        a, b = weight[0], weight[1] * groups
        out, read = (b, a) if module.transposed else (a, b)
        return {"out_channels": out, "in_channels": read, "groups": groups}
    if isinstance(module, nn.Linear):
        return {"out_features": weight[0], "in_features": weight[1]}
    if isinstance(module, nn.LayerNorm):
        return {"normalized_shape": tuple(weight)}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": weight[0], "num_groups": module.num_groups if groups is None else groups}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": weight[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": weight[0]}
    return {}


def reset_parameters(model: nn.Module) -> None:
    """Give every layer that knows how fresh weights, as for training from scratch."""
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
