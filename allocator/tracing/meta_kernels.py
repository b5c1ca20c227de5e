"""Calls on meta tensors whose results are known without running torch's decompositions of them in Python.

Batch norms, activations, sums, means and convolutions are most of a vision network's calls, and their
decompositions most of the time of a trace. What is not plainly one of these runs as torch has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from allocator.torch_private import OpOverload
from allocator.tracing.operators import operator_of

_META = torch.device("meta")

# What dtype a pointwise call gives, known after the first of its kind.
_GIVES: dict[tuple[OpOverload, torch.dtype], torch.dtype] = {}


def run(func: OpOverload, args: Any, kwargs: Any) -> Any:
    """What `func(*args, **kwargs)` gives."""
    x = args[0] if args else None
    if kwargs or not isinstance(x, torch.Tensor) or not x.is_meta:
        return func(*args, **kwargs)
    operator = operator_of(func)
    if operator.pointwise:
        return _pointwise(func, args, operator.writes)
    on_meta = operator.declared.on_meta
    result = None if on_meta is None else on_meta(*args)
    return func(*args) if result is None else result


def _pointwise(func: OpOverload, args: Any, writes: bool) -> Any:
    """As large as the widest operand, where all are plain tensors of one dtype that broadcast to it."""
    tensors = [item for item in args if isinstance(item, torch.Tensor)]
    widest, dtype = max(tensors, key=torch.Tensor.numel), tensors[0].dtype
    plain = dtype.is_floating_point and all(
        t.is_meta and t.dtype == dtype and t.dim() == widest.dim() and all(map(_fits, t.shape, widest.shape))
        for t in tensors
    )
    if not plain or not all(type(item) in (torch.Tensor, nn.Parameter, float, int) for item in args):
        return func(*args)
    if writes:
        return args[0] if args[0].shape == widest.shape else func(*args)
    given = _GIVES.get((func, dtype))
    if given is not None:
        return like(widest, given)
    out = func(*args)
    if isinstance(out, torch.Tensor):
        _GIVES[func, dtype] = out.dtype
    return out


def empty(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """A meta tensor of this shape."""
    return torch.empty(shape, dtype=dtype, device=_META)


def like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A meta tensor that lies in memory as `x` does."""
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=_META)


def _fits(size: int, other: int) -> bool:
    """Whether a dim of this size broadcasts to the other."""
    return size in (1, other)
