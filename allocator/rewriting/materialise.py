"""Materialising an allocation: a copy of the model with fewer neurons, same classes, same names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import nn

from allocator import adapters
from allocator.errors import AllocationMismatchError
from allocator.modules import MODULE_FIELDS, Replace, attribute_of, lies_within, set_attribute, shapes_of, skeleton
from allocator.rewriting.added import Filling
from allocator.rewriting.allocation import Allocation, Indices, architecture_hash
from allocator.rewriting.index_map import length, renumber, take, take_on_meta

Slice = Callable[[torch.Tensor, Sequence[Indices | None] | None], torch.Tensor]
"""Gives the part of a tensor that stays; without indices, a copy of all of it."""


def materialise(model: nn.Module, allocation: Allocation, cut: Slice = take) -> nn.Module:
    """Copy `model` with every tensor cut as the allocation says, and the modules' attributes set.

    Untouched tensors are copied too, so that training the result leaves the original as it is. What a wider network
    adds is filled so that it computes the same.
    """
    small = skeleton(model, replacing(allocation, cut))
    for path in allocation.absent:
        owner, _, name = path.rpartition(".")
        small.get_submodule(owner)._modules[name] = None
    modules = dict(small.named_modules(remove_duplicate=False))
    adapters.take_any_width(modules, allocation.kept)
    for path in modules.keys() & {name.rpartition(".")[0] for name in allocation.kept}:
        _forget_what_is_held_by_device(modules[path])
    for path, values in allocation.attributes.items():
        module = modules[path]
        for name, value in values.items():
            # What the whole model holds is of this copy alone, and meant for all that share it.
            set_attribute(module, name, value, shared=path != "")
    adapters.note_rewritten(modules[path] for path in {"", *allocation.attributes})
    return small


def _forget_what_is_held_by_device(module: nn.Module) -> None:
    """Tensors by the device that they lie on are remembered, of what is cut now; the forward computes them anew."""
    for name, value in vars(module).items():
        by_device = name not in MODULE_FIELDS and isinstance(value, dict) and all(map(_is_device, value))
        if by_device and all(isinstance(remembered, torch.Tensor) for remembered in value.values()):
            value.clear()


def _is_device(key: Any) -> bool:
    return isinstance(key, torch.device) or (isinstance(key, str) and _DEVICE.fullmatch(key) is not None)


_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:\d+)?")


def replacing(allocation: Allocation, cut: Slice = take) -> Replace:
    """A function that gives, of a tensor of the original and its name, the one in its place."""
    filling = Filling.of(allocation.added)

    def replace(name: str, tensor: torch.Tensor) -> torch.Tensor:
        sources = allocation.kept.get(name)
        taken = cut(tensor, sources)
        if name in allocation.renumbered and sources and sources[0] is not None and cut is not take_on_meta:
            taken = renumber(tensor, sources[0])
        if filling is None or sources is None or cut is not take:
            return taken
        return filling.fill(name, taken, sources, like=tensor)

    return replace


def check_fits(model: nn.Module, allocation: Allocation) -> None:
    """Raise AllocationMismatchError unless the allocation was made for a model of this architecture."""
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    for name, dims in allocation.kept.items():
        if name not in tensors:
            raise AllocationMismatchError(f"the allocation names {name}, which {type(model).__name__} does not have")
        _check_indices(name, dims, tuple(tensors[name].shape))
        if not allocation.added and not allocation.parts:
            _check_order(name, dims)
    for field in ("reads", "averaged"):
        for name, dims in allocation.added.get(field, {}).items():
            _check_added(name, dims, allocation.kept.get(name, []))
    _check_attributes(model, allocation)
    architecture = architecture_hash(shapes_of(model))
    if allocation.architecture and allocation.architecture != architecture:
        raise AllocationMismatchError(
            f"the allocation was made for another architecture ({allocation.architecture}, "
            f"this {type(model).__name__} is {architecture}): build the model as it was then"
        )


def _check_order(name: str, dims: Sequence[Indices | None]) -> None:
    """Raise where indices do not ascend: one there twice was added, and nothing says what it is filled with."""
    for indices in dims:
        rows = indices if indices and isinstance(indices[0], Sequence) else [indices or []]
        if any(len(set(row)) < len(row) for row in rows):
            raise AllocationMismatchError(
                f"{name}: the allocation adds indices, and its field 'added' does not say what they are filled with"
            )
        if any(list(row) != sorted(row) for row in rows):
            raise AllocationMismatchError(f"{name}: the allocation's indices are not in ascending order")


def _check_added(name: str, dims: Sequence[Indices | None], kept: Sequence[Indices | None]) -> None:
    """What is said of added indices is said of indices that there are."""
    for places, sources in zip_longest(dims, kept):
        size = 0 if sources is None else length(sources)
        if places and not all(0 <= place < size for place in places):
            raise AllocationMismatchError(f"{name}: the allocation fills added indices beyond the {size} that it has")


def _check_attributes(model: nn.Module, allocation: Allocation) -> None:
    """The modules that the allocation speaks of are there, and so are the numbers that it sets."""
    for path in (*allocation.attributes, *allocation.absent):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            message = f"the allocation names the module {path!r}, which {type(model).__name__} does not have"
            raise AllocationMismatchError(message) from None
        for name, value in allocation.attributes.get(path, {}).items():
            current = attribute_of(module, name)
            if not _may_be_set(module, name, current, value):
                raise AllocationMismatchError(
                    f"the allocation sets {path}.{name} to {value!r:.80}, where the model has {current!r:.80}"
                )


def _may_be_set(module: nn.Module, name: str, current: Any, value: Any) -> bool:
    """Numbers may take the place of numbers; in an object that a module holds, also be added or taken away."""
    held = name.rpartition(".")[0]
    if name in MODULE_FIELDS:
        return False
    if not held:
        return _is_plain(current) and _is_plain(value)  # one number may become a list of them
    if any(part.startswith("_") for part in name.split(".")) or attribute_of(module, held) is None:
        return False
    return all(each is None or _is_plain(each) for each in (current, value))


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
        sizes = tuple(n if kept is None else length(kept) for n, kept in zip(shape, dims))
        if len(shape) != len(dims) or sizes != shape:
            return False
    return not any(lies_within(name, allocation.absent) for name in shapes)


def _check_indices(name: str, dims: Sequence[Indices | None], shape: tuple[int, ...]) -> None:
    """A tensor has the indices that an allocation names, and rows of them only where each output may have its own."""
    if len(dims) != len(shape):
        raise AllocationMismatchError(f"{name}: the allocation expects {len(dims)} dims, the model has {shape}")
    for dim, indices in enumerate(dims):
        if indices is None:
            continue
        array = np.asarray(indices)
        if not array.size and shape[dim]:
            raise AllocationMismatchError(
                f"{name}, dim {dim}: the allocation keeps nothing of the model's {shape[dim]}; a layer that is to be "
                "gone is named in its field 'absent', where the forward can do without it"
            )
        beyond = array[(array < 0) | (array >= shape[dim])]
        if len(beyond):
            raise AllocationMismatchError(
                f"{name}, dim {dim}: the allocation keeps index {beyond[0]}, the model has {shape[dim]}"
            )
        if array.ndim == 2 and (dim != 1 or len(array) != _count(dims[0], shape[0])):
            raise AllocationMismatchError(
                f"{name}, dim {dim}: the allocation has {len(array)} rows of indices, which are for the inputs of "
                f"each of the {_count(dims[0], shape[0])} outputs"
            )


def _count(indices: Indices | None, size: int) -> int:
    return size if indices is None else len(indices)


def reset_parameters(model: nn.Module) -> None:
    """Give every layer that knows how fresh weights, as for training from scratch."""
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
