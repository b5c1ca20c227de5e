"""Calls on meta tensors whose results are known without running torch's decompositions of them in Python.

Batch norms, activations, sums, means and convolutions are most of a vision network's calls, and their
decompositions most of the time of a trace. What is not plainly one of these runs as torch has it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

_ATEN = torch.ops.aten
_META = torch.device("meta")
# Without torch's tag for calls that work number by number, though they do.
_POINTWISE = frozenset({_ATEN.hardswish.default, _ATEN.hardswish_.default})


Call = tuple[Any, tuple[Any, ...]]

# What dtype a pointwise call gives, known after the first of its kind.
_GIVES: dict[tuple[Any, torch.dtype], torch.dtype] = {}


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Call:
    """`torch.nn.functional.linear` as one ATen call."""
    return _ATEN.linear.default, (input, weight) if bias is None else (input, weight, bias)


def convolution(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Call | None:
    """`torch.conv2d` and its like as one ATen call.

    None on values, unless each dim is given its own sizes, and where dtypes differ, which torch sees before that call.
    """
    sides = input.dim() - 2
    if any(type(size) is not tuple or len(size) != sides for size in (stride, padding, dilation)):
        return None
    if not all(t is None or (t.is_meta and t.dtype == weight.dtype) for t in (input, weight, bias)):
        return None
    sizes = ([*stride], [*padding], [*dilation], False, [0] * sides, groups)
    return _ATEN.convolution.default, (input, weight, bias, *sizes)


def batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Call | None:
    """`torch.nn.functional.batch_norm` as one ATen call; None on values, in train mode, and where sizes differ."""
    statistics = (weight, bias, running_mean, running_var)
    plain = input.is_meta and not training and running_mean is not None and running_var is not None
    if not plain or any(t is not None and t.shape != input.shape[1:2] for t in statistics):
        return None
    return _ATEN.batch_norm.default, (input, *statistics, training, momentum, eps, False)


def _activation(name: str) -> Callable[..., Call | None]:
    """`torch.nn.functional`'s function of this name as one ATen call; None on values."""
    func, in_place = getattr(_ATEN, name).default, getattr(_ATEN, f"{name}_").default

    def call(input: torch.Tensor, inplace: bool = False) -> Call | None:
        return (in_place if inplace else func, (input,)) if input.is_meta else None

    return call


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """What `func(*args, **kwargs)` gives."""
    x = args[0] if args else None
    if kwargs or not isinstance(x, torch.Tensor) or not x.is_meta:
        return func(*args, **kwargs)
    if func is _ATEN.native_batch_norm.default:
        return _like(x, x.dtype), _empty([x.shape[1]], x.dtype), _empty([x.shape[1]], x.dtype)
    if func is _ATEN.batch_norm.default:
        return _like(x, x.dtype)
    if _works_number_by_number(func):
        return _pointwise(func, args)
    known = _SHAPES.get(func)
    shape = None if known is None else known(*args)
    return func(*args) if shape is None else _empty(shape, x.dtype)


@functools.cache
def _works_number_by_number(func: Any) -> bool:
    return torch.Tag.pointwise in func.tags or func in _POINTWISE


def _pointwise(func: Any, args: Any) -> Any:
    tensors = [item for item in args if isinstance(item, torch.Tensor)]
    widest, dtype = max(tensors, key=torch.Tensor.numel), tensors[0].dtype
    plain = dtype.is_floating_point and all(
        t.is_meta and t.dtype == dtype and t.dim() == widest.dim() and all(map(_fits, t.shape, widest.shape))
        for t in tensors
    )
    if not plain or not all(type(item) in (torch.Tensor, nn.Parameter, float, int) for item in args):
        return func(*args)
    if func._schema.is_mutable:
        return args[0] if args[0].shape == widest.shape else func(*args)
    given = _GIVES.get((func, dtype))
    if given is not None:
        return _like(widest, given)
    out = func(*args)
    if isinstance(out, torch.Tensor):
        _GIVES[func, dtype] = out.dtype
    return out


def _convolved(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> list[int] | None:
    """Shape that a plain convolution gives; None where it is of another sort, or does not fit."""
    plain = not transposed and x.dim() == weight.dim() and x.is_contiguous() and weight.is_contiguous()
    if not plain or x.dtype != weight.dtype or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return None
    if bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1]):
        return None
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=False)
    sides = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    if len(sides) != x.dim() - 2 or min(sides, default=0) < 1:
        return None
    return [x.shape[0], weight.shape[0], *sides]


def _multiplied(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> list[int] | None:
    """Shape of a linear layer's result; None where it does not fit."""
    plain = x.dim() > 1 and weight.dim() == 2 and x.dtype == weight.dtype
    if not plain or x.shape[-1] != weight.shape[1]:
        return None
    if bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1]):
        return None
    return [*x.shape[:-1], weight.shape[0]]


def _like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device)


def _averaged(x: torch.Tensor, dims: list[int] | None, keepdim: bool = False) -> list[int] | None:
    """Shape of a mean over dims; None where it is over all, or the result may lie in memory in another order."""
    if not dims or not x.is_contiguous():
        return None
    gone = {dim % x.dim() for dim in dims}
    return [1 if i in gone else n for i, n in enumerate(x.shape) if keepdim or i not in gone]


def _empty(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=_META)


def _fits(size: int, other: int) -> bool:
    """Whether a dim of this size broadcasts to the other."""
    return size in (1, other)


_SHAPES: dict[Any, Callable[..., list[int] | None]] = {
    _ATEN.convolution.default: _convolved,
    _ATEN.linear.default: _multiplied,
    _ATEN.mean.dim: _averaged,
}

# Functions recorded as one ATen call: the parts of some depend on how large a dim is and how it lies in memory, those
# of others take long to find. Given as the call that stands for them, None where their parts are to be seen.
WHOLE: dict[Any, Callable[..., Call | None]] = {
    functional.linear: linear,
    functional.batch_norm: batch_norm,
    torch.conv1d: convolution,
    torch.conv2d: convolution,
    torch.conv3d: convolution,
    **{getattr(functional, name): _activation(name) for name in ("relu", "silu", "hardswish", "hardsigmoid")},
}
