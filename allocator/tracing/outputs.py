"""What a forward returns: its tensors, and the numbers and words beside them, wherever they are held."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import AsyncGenerator, Generator, ItemsView, Iterator, KeysView, Mapping, Set, ValuesView
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from allocator import adapters
from allocator.tracing.memory import in_slots

_LISTED = (list, tuple, Set, deque, KeysView, ValuesView, ItemsView)
_SAID = (bool, int, float, complex, str, bytes, np.ndarray, np.generic)
_MOST_NUMBERS = 64  # of an array, that are kept one by one


class UnseenOutputError(TypeError):
    """A forward returns what computes its tensors only when they are asked for."""


def tensors_in(output: Any) -> list[torch.Tensor]:
    """Tensors in a model's output, through containers, dataclasses and plain objects that are no state of its."""
    return [leaf for leaf in _leaves(output) if isinstance(leaf, torch.Tensor)]


def said_in(output: Any) -> list[Any]:
    """Numbers, words and numpy's arrays in a model's output, from the same places."""
    return [leaf for leaf in _leaves(output) if isinstance(leaf, _SAID)]


def as_data(leaf: Any) -> Any:
    """One of those as what can be compared: an array as a list of its numbers, or of many as its bytes' hash."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        return (leaf.shape, leaf.tolist() if leaf.size <= _MOST_NUMBERS else hash(leaf.tobytes()))
    return leaf


def require_seen(output: Any) -> None:
    """Raise UnseenOutputError where a generator is returned."""
    for leaf in _leaves(output):
        if isinstance(leaf, (Generator, AsyncGenerator)):
            raise UnseenOutputError(
                "the forward returns a generator, whose tensors are made only when they are asked for: return a list, "
                "as a module around this one may do: list(model(x))"
            )


def holds_itself(output: Any, around: tuple[Any, ...] = ()) -> bool:
    """Whether a list or dict is found within itself, where torch's tracer would go round until the process ends."""
    if not isinstance(output, (list, tuple, dict)):
        return False
    within = output.values() if isinstance(output, dict) else output
    return any(each is output for each in around) or any(holds_itself(each, (*around, output)) for each in within)


def _leaves(output: Any) -> list[Any]:
    """What holds nothing further, the outermost first; what is held twice counts once, but for tensors and numbers."""
    found: list[Any] = []
    queue, seen = deque([output]), set[int]()
    held = []  # so that no other object gets the identity of one that was seen
    while queue:
        item = queue.popleft()
        parts = None if isinstance(item, (torch.Tensor, *_SAID)) else _parts(item)
        if parts is None:
            found.append(item)
        elif id(item) not in seen:
            seen.add(id(item))
            held.append(item)
            queue.extend(parts)
    return found


def _parts(item: Any) -> list[Any] | None:
    """What an object holds; None where nothing is to be looked for in it."""
    if isinstance(item, Mapping):
        return list(item.values())
    if isinstance(item, _LISTED):
        return list(item)
    if isinstance(item, functools.partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, MethodType):
        return [item.__self__]
    if isinstance(item, FunctionType):
        return [*map(_contents, item.__closure__ or ()), *(item.__defaults__ or ()), *vars(item).values()]
    if isinstance(item, (Generator, AsyncGenerator, nn.Module, type, ModuleType)) or adapters.is_state(item):
        return None
    if isinstance(item, Iterator) and type(item).__module__ == "builtins":
        return list(item.__reduce__()[1])  # what it goes over, of which nothing is taken
    return [*getattr(item, "__dict__", {}).values(), *in_slots(item).values()] or None


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was put there yet
        return None
