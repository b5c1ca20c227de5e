"""Inputs like given ones in other batches, sides and lengths: shapes without values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from allocator.tracing.inputs import Inputs


def batch_of(inputs: Inputs) -> int | None:
    """How many samples there are: the images in a list, else the first dim of the first tensor."""
    images = _images(inputs)
    if images is not None:
        return len(images)
    first = next(iter(inputs.tensors()), None)
    return int(first.shape[0]) if first is not None and first.dim() else None


def with_batch(inputs: Inputs, size: int) -> Inputs:
    """The same of another number of samples; a tensor whose first dim is no number of samples stays as it is."""
    images, own = _images(inputs), batch_of(inputs)
    if images is not None:
        return Inputs(([images[i % len(images)] for i in range(size)], *inputs.args[1:]), inputs.kwargs)

    def resize(t: torch.Tensor) -> torch.Tensor:
        return _empty(t, (size, *t.shape[1:])) if t.dim() and t.shape[0] == own else t

    return inputs.map(resize)


def with_sides(inputs: Inputs, sides: Mapping[int, int]) -> Inputs:
    """The same with other sizes along these dims of the first tensor, and wherever another tensor has them too.

    Args:
        inputs: what is varied.
        sides: the new size per dim.
    """
    first = inputs.tensors()[0]
    changed = {int(first.shape[dim]): size for dim, size in sides.items()}

    def resize(t: torch.Tensor) -> torch.Tensor:
        shape = list(t.shape)
        for d, n in enumerate(t.shape):
            if t.dim() == first.dim():
                shape[d] = sides[d] if d in sides and n == first.shape[d] else n
            elif d > 0 or n != first.shape[0]:
                shape[d] = changed.get(n, n)
        return _empty(t, shape)

    return inputs.map(resize)


def with_shapes(inputs: Inputs, shapes: Sequence[Sequence[int]]) -> Inputs | None:
    """The same with tensors of these shapes, in order; None where there are not as many of as many dims."""
    if [t.dim() for t in inputs.tensors()] != [len(shape) for shape in shapes]:
        return None
    left = iter(shapes)
    return inputs.map(lambda t: _empty(t, next(left)))


def dims_of_sides(inputs: Inputs) -> list[tuple[int, ...]]:
    """Which dims of the first tensor may be sides or a length, the likeliest first; none for vectors."""
    first = next(iter(inputs.tensors()), None)
    if first is None:
        return []
    if _images(inputs) is not None:
        return [(1, 2)]
    if first.dim() >= 4:
        return [tuple(range(2, first.dim()))]
    if first.dim() == 3:
        return [(2,), (1,)]
    return [(1,)] if first.dim() == 2 and not first.is_floating_point() else []


def larger(size: int) -> Iterator[int]:
    """Larger sizes, first one that is divided by whatever divides the old one.

    Not twice as large: four times the pixels fit views of what was made for the old size all too often.
    """
    yield 3 * size
    yield size + _step(size)


def smaller(size: int) -> Iterator[int]:
    """Smaller sizes, first an odd one if the old one is even; then what halves as often as the old one."""
    tried = {size, 0}
    for each in (size // 2 + 1, size // 2, size - _step(size)):
        if each > 0 and each not in tried:
            tried.add(each)
            yield each


def _step(size: int) -> int:
    """An eighth of a size or more, in multiples of what it has in common with the strides of networks."""
    common = math.gcd(size, 32)
    return common * max(math.ceil(size / 8 / common), 1)


def _images(inputs: Inputs) -> list[Any] | None:
    """The images of a list of them, as detectors take it."""
    given = inputs.args[0] if inputs.args else None
    if isinstance(given, list) and given and all(isinstance(t, torch.Tensor) and t.dim() == 3 for t in given):
        return given
    return None


def _empty(t: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return t if tuple(t.shape) == tuple(shape) else torch.empty(tuple(shape), dtype=t.dtype, device="meta")
