"""Calls whose result's size depends on values that a trace does not have: they give the largest there can be.

A detector keeps the boxes that its scores and overlaps allow. How many these are changes with the image and
with every weight, so that shapes and cost of one forward would say little of the next. At their largest both
are properties of the network and its settings, and nothing has to be computed to know them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from allocator.tracing.record import Op, Trace

Run = Callable[[Any, Any, Any], Any]
_MASKS = (torch.bool, torch.uint8)


@functools.cache
def largest(func: Any) -> Run | None:
    """How to make a call of this overload on tensors without values; None where it needs no care."""
    return _RUNS.get(func._schema.name)


def value_sized(trace: Trace) -> list[Op]:
    """Recorded calls that gave their largest result."""
    return [op for op in trace.ops if trace.mode != "real" and _depends(trace, op)]


def downstream(trace: Trace) -> set[int]:
    """Indices of the calls whose shapes, and so whose cost, may depend on values."""
    sources = {op.index for op in value_sized(trace)}
    values: set[int] = set()
    found: set[int] = set()
    for op in trace.ops if sources else ():
        if op.index in sources or not values.isdisjoint(op.reads):
            found.add(op.index)
            values.update(op.outputs)
    return found


def _depends(trace: Trace, op: Op) -> bool:
    if op.name in ("index", "index_put", "index_put_"):
        return any(trace.values[i].dtype in _MASKS for i in op.reads[1:]) and op.name == "index"
    return op.target._schema.name in _RUNS


def _without_values(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and (tensor.is_meta or isinstance(tensor, FakeTensor))


def _everywhere(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Indices of all n elements of a tensor, one (n,) tensor per dim."""
    places = torch.arange(tensor.numel(), device=tensor.device)
    return [places // math.prod(tensor.shape[d + 1 :]) % max(size, 1) for d, size in enumerate(tensor.shape)]


def _nonzero(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    if not _without_values(x) or not x.dim():
        return func(*args, **kwargs)
    return torch.stack(_everywhere(x), 1)


def _masked_select(func: Any, args: Any, kwargs: Any) -> Any:
    if not _without_values(args[1]):
        return func(*args, **kwargs)
    return torch.broadcast_tensors(*args)[0].reshape(-1).clone()


def _non_maximum_suppression(func: Any, args: Any, kwargs: Any) -> Any:
    """Keeps all boxes, in the order of their scores."""
    scores = args[1]
    return scores.argsort(descending=True) if _without_values(scores) else func(*args, **kwargs)


def _index(func: Any, args: Any, kwargs: Any) -> Any:
    """All elements in place of those that a mask names."""
    x, indices, *rest = args
    if not any(_is_mask(index) for index in indices):
        return func(*args, **kwargs)
    everywhere: list[torch.Tensor | None] = []
    for index in indices:
        everywhere += _everywhere(index) if _is_mask(index) else [index]
    return func(x, everywhere, *rest, **kwargs)


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in _MASKS and _without_values(index)


_RUNS: dict[str, Run] = {
    "aten::nonzero": _nonzero,
    "aten::masked_select": _masked_select,
    "aten::index": _index,
    "aten::index_put": _index,
    "aten::index_put_": _index,
    "torchvision::nms": _non_maximum_suppression,
}
