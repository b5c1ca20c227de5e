"""Copies of a model's structure with other tensors in it, so that weights are never copied unasked."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn

from .errors import UnsupportedModelError

Replace = Callable[[str, torch.Tensor], torch.Tensor]


def tensor_names(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by its first name; a tied tensor appears once."""
    names: dict[str, torch.Tensor] = dict(model.named_parameters())
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
        return cast(nn.Module, _copy(model, memo))
    except (TypeError, RuntimeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); "
            "detach tensors kept as attributes, and drop locks, streams or open files from the module"
        ) from error


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy`, with a short way for modules and plain containers: most of a network is these."""
    if type(value) in _ATOMS:
        return value
    known = memo.get(id(value))
    if known is not None:
        return known
    if isinstance(value, nn.Module) and _copies_plainly(type(value)):
        new = memo[id(value)] = type(value).__new__(type(value))
        # A forward compiled in place (Module.compile) stays behind: it would run the original's weights.
        state = value.__getstate__() if "_compiled_call_impl" in vars(value) else vars(value)
        vars(new).update((key, _copy(item, memo)) for key, item in state.items())
        return new
    if type(value) is tuple:
        return tuple(_copy(item, memo) for item in value)
    if type(value) in (dict, OrderedDict):
        mapping = memo[id(value)] = type(value)()
        mapping.update((_copy(key, memo), _copy(item, memo)) for key, item in value.items())
        return mapping
    return copy.deepcopy(value, memo)


def _copies_plainly(cls: type) -> bool:
    return all(getattr(cls, name, None) is getattr(nn.Module, name, None) for name in _COPY_HOOKS)


_ATOMS = frozenset({int, float, bool, str, type(None)})
_COPY_HOOKS = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__new__")


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
