"""Copies of a model's structure with other tensors in it, so that weights are never copied unasked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .errors import UnsupportedModelError

Replace = Callable[[str, torch.Tensor], torch.Tensor]


def tensor_names(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by its first name; a tied tensor appears once."""
    names = dict(model.named_parameters())
    names.update(model.named_buffers())
    return names


def skeleton(model: nn.Module, replace: Replace) -> nn.Module:
    """Copy the module structure of `model`, putting `replace(name, tensor)` in place of every tensor.

    Args:
        model: any module; it is not changed.
        replace: called once per parameter, buffer and tensor attribute with its name; what it returns
            stands in the copy (for a parameter it is wrapped in `nn.Parameter`).

    Returns:
        A module of the same classes and names whose tensors are those that `replace` returned.

    Raises:
        UnsupportedModelError: the module structure cannot be deep-copied.
    """
    memo: dict[int, object] = {}
    for name, parameter in model.named_parameters():
        memo[id(parameter)] = _as_parameter(replace(name, parameter), parameter)
    for name, tensor in (*model.named_buffers(), *_tensor_attributes(model)):
        if id(tensor) not in memo:
            memo[id(tensor)] = replace(name, tensor)
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); "
            "detach tensors kept as attributes, and drop locks, streams or open files from the module"
        ) from error


def _as_parameter(tensor: torch.Tensor, like: nn.Parameter) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=like.requires_grad)


def _tensor_attributes(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that modules keep as plain attributes, alone or in a list, tuple or dict."""
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if key.startswith("_") and key in _MODULE_FIELDS:
                continue
            items = value if isinstance(value, (list, tuple)) else (value,)
            if isinstance(value, dict):
                items = tuple(value.values())
            for item in items:
                if isinstance(item, torch.Tensor):
                    yield f"{path}.{key}".lstrip("."), item


_MODULE_FIELDS = frozenset(vars(nn.Module()))
