"""The inputs to refit on: those to fit, and those held back to judge by."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from allocator.clock import Progress, bar
from allocator.errors import DataError
from allocator.scoring.batches import Batch, batches
from allocator.torch_private import tree_flatten, tree_map
from allocator.tracing.inputs import Inputs

HELD = 8
"""One part in so many is held back."""
PARTS = 16
"""How many parts the inputs are led through a network in, where there are enough of them."""
LEAST = 16
"""Inputs per part, where there are enough of them."""
AT_ONCE = 2**27
"""Bytes that a forward of several inputs may hold."""


@dataclass(frozen=True)
class Samples:
    """Inputs in parts, each for one forward.

    Attributes:
        seen: to fit.
        held: to judge by.
        count, held_count: how many inputs these are.
        batches: those to fit with what came with them, for criteria to look at.
    """

    seen: tuple[Inputs, ...]
    held: tuple[Inputs, ...]
    count: int
    held_count: int
    batches: tuple[Batch, ...] = ()

    def cut(self, most: int) -> Samples:
        """The same inputs in parts of at most so many, where they can be parted; neighbours stay together."""
        seen, held = (tuple(piece for part in parts for piece in _even(part, most)) for parts in (self.seen, self.held))
        return Samples(seen, held, self.count, self.held_count)


def gather(
    data: Any,
    model: nn.Module,
    example: Inputs,
    most: int,
    progress: Progress | None = None,
    *,
    targets: bool = False,
) -> Samples:
    """Read the caller's data, up to so many inputs.

    Neighbours go into the same part, since crops of one picture often stand side by side.

    Args:
        data: as for `batches`.
        model: what they are for.
        example: the inputs that it was traced with.
        most: inputs to take.
        progress: called with how far it is.
        targets: keep what came with the inputs.

    Raises:
        DataError: there is none, only one, one that is not finite, or all are the same.
    """
    if data is None:
        raise DataError("there are no data: a few hundred inputs without labels are enough")
    found: list[Batch] = []
    count = 0
    with bar("reading the data", progress) as advance:
        for batch in batches(data, model, example):
            (batch, *_) = (batch if targets else Batch(batch.inputs)).chunks(max(most - count, 1))
            _check_finite(batch.inputs)
            found.append(batch)
            count += batch.size
            advance(f"{count} inputs")
            if count >= most:
                break
    _check_varied([batch.inputs for batch in found], count)
    size = max(min(LEAST, count // 4), -(-count // PARTS), 1)
    parts = [[part] for part in _parts(found, size)] if all(each.parts for each in found) else _groups(found, size)
    if len(parts) < 2:
        raise DataError(f"the data hold {count} inputs in one batch that cannot be parted: give several batches")
    held = tuple(_inputs(part) for i, part in enumerate(parts) if i % HELD == 1)
    seen = [part for i, part in enumerate(parts) if i % HELD != 1]
    held_count = sum(map(size_of, held))
    return Samples(tuple(map(_inputs, seen)), held, count - held_count, held_count, tuple(chain.from_iterable(seen)))


def size_of(inputs: Inputs) -> int:
    """How many samples these are."""
    return max((t.shape[0] for t in inputs.tensors() if t.dim()), default=1)


def most_at_once(samples: Samples, example: Inputs, numbers: int, itemsize: int) -> int:
    """How many inputs a forward is given at once, so that what it holds stays within `AT_ONCE`.

    Args:
        samples: the inputs.
        example: others that a network was traced with.
        numbers: that are alive at once in a forward of these.
        itemsize: bytes of each.
    """
    traced = sum(tensor.numel() for tensor in example.tensors())
    largest = max(sum(t.numel() for t in part.tensors()) / size_of(part) for part in (*samples.seen, *samples.held))
    each = numbers * itemsize * largest / max(traced, 1)
    return max(int(AT_ONCE / max(each, 1)), 1)


def _even(inputs: Inputs, most: int) -> list[Inputs]:
    """Parts that are about as large as each other."""
    size = size_of(inputs)
    if size <= most or not all(isinstance(each, torch.Tensor) for each in (*inputs.args, *inputs.kwargs.values())):
        return [inputs]
    return [batch.inputs for batch in Batch(inputs).chunks(-(-size // -(-size // most)))]


def _check_finite(inputs: Inputs) -> None:
    for tensor in inputs.tensors():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise DataError(f"the data hold NaN or infinite numbers, in {inputs.describe()}: nothing can be fitted to")


def _check_varied(found: list[Inputs], count: int) -> None:
    if count < 2:
        raise DataError("the data hold a single input: one to fit and one to judge by are the least, some 200 are good")
    tensors = [t for inputs in found for t in inputs.tensors() if t.numel()]
    first = tensors[0].flatten()[0]
    if all(bool((t == first).all()) for t in tensors):
        raise DataError(f"all {count} inputs are the same number throughout: nothing can be learned from them")


def _parts(found: list[Batch], size: int) -> list[Batch]:
    """Parts of about this many inputs, put together from neighbours where batches are smaller than that."""
    parts: list[Batch] = []
    waiting: list[Batch] = []
    for batch in found:
        if waiting and _kind(waiting[0]) != _kind(batch):
            parts.append(_joined(waiting))
            waiting = []
        waiting.append(batch)
        if sum(each.size for each in waiting) >= size:
            *whole, last = _joined(waiting).chunks(size)
            waiting = [last] if last.size < size else []
            parts += [*whole, *([] if waiting else [last])]
    if waiting and len(parts) > 1 and _kind(parts[-1]) == _kind(waiting[0]):  # a few more are no part of their own
        waiting.insert(0, parts.pop())
    return [*parts, *([_joined(waiting)] if waiting else [])]


def _groups(found: list[Batch], size: int) -> list[list[Batch]]:
    """Neighbours, about this many inputs together, each as it came: what came with it is the caller's to know."""
    groups: list[list[Batch]] = []
    for batch in found:
        last = groups[-1] if groups else []
        if 0 < sum(each.size for each in last) < size and _kind(Batch(last[0].inputs)) == _kind(Batch(batch.inputs)):
            last.append(batch)
        else:
            groups.append([batch])
    return groups if len(groups) > 1 else [[batch] for batch in found]


def _inputs(several: list[Batch]) -> Inputs:
    return _joined([Batch(each.inputs) for each in several]).inputs


def _tree(batch: Batch) -> Any:
    return batch.inputs.args, batch.inputs.kwargs, batch.target


def _kind(batch: Batch) -> Any:
    """Equal for what can be put together in one batch."""
    leaves, structure = tree_flatten(_tree(batch))
    return structure, [(t.shape[1:], t.dtype) if isinstance(t, torch.Tensor) and t.dim() else t for t in leaves]


def _joined(several: list[Batch]) -> Batch:
    if len(several) == 1:
        return several[0]
    flat = zip(*(tree_flatten(_tree(batch))[0] for batch in several), strict=True)
    joined = (torch.cat(each) if isinstance(each[0], torch.Tensor) and each[0].dim() else each[0] for each in flat)
    args, kwargs, target = tree_map(lambda _: next(joined), _tree(several[0]))
    return Batch(Inputs(args, kwargs), target)
