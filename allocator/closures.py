"""Copies of functions that hold a part of a model, as hooks do: `copy.deepcopy` takes functions as they are."""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

CALLABLES = frozenset({FunctionType, MethodType, functools.partial, weakref.ref})
_ATOMS = frozenset({int, float, bool, str, type(None), ModuleType})
_DEPTH = 4


class Memo(dict[int, Any]):
    """What `copy.deepcopy` has copied by its id; and `own`, the ids of what is the model's: modules and tensors.

    `empty` stands for all of torch's own ordered dicts in a module that hold nothing; None for one of its own each.
    """

    def __init__(self, own: Iterable[int], empty: OrderedDict[Any, Any] | None = None) -> None:
        super().__init__()
        self.own, self.empty = set(own), empty


Copy = Callable[[Any, Memo], Any]


def reaches(value: Any, own: set[int], depth: int = _DEPTH) -> bool:
    """Whether a function or other callable holds a part of the model."""
    if id(value) in own:
        return True
    if not depth:
        return False
    return any(reaches(item, own, depth - 1) for item in _held_by(value) if type(item) not in _ATOMS)


def _held_by(value: Any) -> Iterable[Any]:
    """What can be reached from a value in one step."""
    if isinstance(value, FunctionType):
        held = [*_cells(value).values(), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return held + [value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, weakref.ref):
        return [value()]
    if isinstance(value, (list, tuple, set)):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    # A module or tensor that is not the model's leads to others' parts, and a class to those of all its instances.
    return () if isinstance(value, (type, nn.Module, torch.Tensor)) else list(getattr(value, "__dict__", {}).values())


def _cells(function: FunctionType) -> dict[int, Any]:
    """Contents of the cells of a closure that have any, by their places."""
    cells = enumerate(function.__closure__ or ())
    return {place: cell.cell_contents for place, cell in cells if cell != CellType()}


def copy_callable(value: Any, memo: Memo, copy: Copy) -> Any:
    """A callable that holds what the copy of the model has in place of the model's.

    Args:
        value: of one of `CALLABLES`.
        memo: copies so far.
        copy: makes further ones.
    """
    if isinstance(value, MethodType):
        return MethodType(copy(value.__func__, memo), copy(value.__self__, memo))
    if isinstance(value, functools.partial):
        return functools.partial(
            copy(value.func, memo), *copy(value.args, memo), **{k: copy(v, memo) for k, v in value.keywords.items()}
        )
    if isinstance(value, weakref.ref):
        return weakref.ref(copy(value(), memo))
    held = _cells(value)
    cells = [cell if place not in held else CellType() for place, cell in enumerate(value.__closure__ or ())]
    names = [name for name in value.__code__.co_names if id(value.__globals__.get(name)) in memo.own]
    space = {**value.__globals__} if names else value.__globals__
    new = FunctionType(value.__code__, space, value.__name__, None, tuple(cells) if value.__closure__ else None)
    memo[id(value)] = new  # before what it holds, which may hold it in turn
    vars(new).update(vars(value))
    new.__qualname__, new.__module__, new.__doc__ = value.__qualname__, value.__module__, value.__doc__
    new.__defaults__ = _held(value.__defaults__, memo, copy)
    new.__kwdefaults__ = _held(value.__kwdefaults__, memo, copy)
    space.update({name: copy(space[name], memo) for name in names})
    for place, content in held.items():
        cells[place].cell_contents = _held(content, memo, copy)
    return new


def _held(value: Any, memo: Memo, copy: Copy) -> Any:
    """What a copied function holds: its own where that is a part of the model, else what the function held."""
    return copy(value, memo) if reaches(value, memo.own) else value
