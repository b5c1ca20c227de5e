"""Index maps: where each index of a dim of the rewritten network comes from.

A dim that loses channels keeps a subset of its indices, in order. That is one kind of map; one that puts them in
another order is another, and so is one that repeats an index. What a wider network adds is modelled on a neuron that
is there: each of its indices is a repetition, whatever values it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from allocator.graph.channel_graph import ChannelGraph


@dataclass(frozen=True, eq=False)
class IndexMap:
    """Per index of the new dim, the index of the old one that it comes from.

    Attributes:
        source: (new size,) int64.
        keeps_order: whether it is a subset in its order, as dropping channels gives.
    """

    source: np.ndarray
    keeps_order: bool

    @classmethod
    def of(cls, source: np.ndarray) -> IndexMap:
        """The map with these source indices, of whatever kind."""
        return cls(source, bool((np.diff(source) > 0).all()))

    def __len__(self) -> int:
        return len(self.source)

    @property
    def added(self) -> np.ndarray:
        """The new indices whose source has come before."""
        return added_places(self.source)

    def tolist(self) -> list[int]:
        """The source indices, for a file."""
        indices: list[int] = self.source.tolist()
        return indices


Maps = dict[str, list[IndexMap | None]]
"""Per parameter or buffer that changes, one map per dim; None for a dim that stays as it is."""


def added_places(source: np.ndarray) -> np.ndarray:
    """The places of an array of source indices where one stands that has come before."""
    again = np.ones(len(source), dtype=bool)
    again[np.unique(source, return_index=True)[1]] = False
    return np.flatnonzero(again)


def maps_of(graph: ChannelGraph, kept: np.ndarray) -> Maps:
    """The maps of a choice of neurons.

    Args:
        graph: the model's neurons.
        kept: (neurons,) bool, which neurons stay; or (neurons,) int, how many there are of each, one at least.
    """
    stays = graph.stays(kept)
    return _subsets(graph, stays) if stays.dtype == bool else _repetitions(graph, stays)


def _repetitions(graph: ChannelGraph, times: np.ndarray) -> Maps:
    """The maps by which every slot is there as often as `times`, (slots,), says.

    Neighbours that go together (the channels of a group, the pixels of a channel that was flattened) are repeated as
    one, right after themselves: so what was added lies in the same place wherever its neuron is.
    """
    maps: Maps = {}
    starts, more = graph.slots.starts, np.flatnonzero(times != 1)
    for i in np.unique(np.searchsorted(starts, more, side="right") - 1).tolist():
        start, name, dim = graph.slots.names[i]
        slots = np.arange(start, start + graph.slots.shapes[name][dim])
        units = graph.unit_of_slot[slots]
        first = np.append(True, (units[1:] != units[:-1]) | (units[1:] < 0))
        begins = np.flatnonzero(first)
        lengths, count = np.diff(np.append(begins, len(units))), times[slots][begins]
        begins, lengths = np.repeat(begins, count), np.repeat(lengths, count)
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        source = np.repeat(begins, lengths) + within
        maps.setdefault(name, [None] * len(graph.slots.shapes[name]))[dim] = IndexMap.of(source)
    return maps


def _subsets(graph: ChannelGraph, stays: np.ndarray) -> Maps:
    """The maps by which the slots with `stays` true, (slots,) bool, are left."""
    starts, left = graph.slots.starts, np.flatnonzero(stays)
    losing = np.unique(np.searchsorted(starts, np.flatnonzero(~stays), side="right") - 1).tolist()
    ends = np.searchsorted(left, [*starts.tolist(), len(stays)]).tolist()
    maps: Maps = {}
    for i in losing:
        start, name, dim = graph.slots.names[i]
        dims = maps.setdefault(name, [None] * len(graph.slots.shapes[name]))
        dims[dim] = IndexMap(left[ends[i] : ends[i + 1]] - start, keeps_order=True)
    return maps


def mapped_shape(shape: Sequence[int], maps: Sequence[IndexMap | None]) -> tuple[int, ...]:
    """Sizes of a tensor of this shape after its maps."""
    return tuple(n if dim is None else len(dim) for n, dim in zip(shape, maps, strict=True))


def take(tensor: torch.Tensor, sources: Sequence[Any] | None) -> torch.Tensor:
    """The part of a tensor that an allocation names.

    Args:
        tensor: any tensor.
        sources: per dim the source indices, None for all in order; for dim 1 possibly one row of them per index of
            dim 0, as the groups of a convolution may read other columns each. None for a copy of all of it.
    """
    if sources is None:
        return tensor.detach().clone()
    result = tensor.detach()
    for dim, indices in enumerate(sources):
        if indices is None:
            continue
        index = torch.as_tensor(np.asarray(indices, dtype=np.int64), device=tensor.device)
        if index.dim() == 1:
            result = result.index_select(dim, index)
        else:
            shape = (*index.shape, *result.shape[2:])
            index = index.reshape(*index.shape, *([1] * (result.dim() - 2))).expand(shape)
            result = result.gather(1, index)
    layout = _CHANNELS_LAST.get(result.dim())
    if layout is not None and tensor.is_contiguous(memory_format=layout):
        return result.contiguous(memory_format=layout)
    return result


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The memory format with channels last, by the number of dims."""


def renumbered(numbers: np.ndarray, kept: Sequence[int] | np.ndarray) -> np.ndarray:
    """What is left of numbers of channels, where channels that are no longer named are gone.

    Args:
        numbers: (n,) channels of the original, by number.
        kept: which of the n stay.
    """
    left = numbers[np.asarray(kept, dtype=np.int64)]
    gone = np.setdiff1d(numbers, left)
    return (left - np.searchsorted(gone, left)).astype(numbers.dtype)


def renumber(numbers: torch.Tensor, kept: Sequence[int] | np.ndarray) -> torch.Tensor:
    """`renumbered` for a buffer."""
    return torch.from_numpy(renumbered(numbers.detach().cpu().numpy(), kept)).to(numbers.device)


def take_on_meta(tensor: torch.Tensor, sources: Sequence[Any] | None) -> torch.Tensor:
    """A meta tensor of the size that `take` would give."""
    if sources is None:
        return torch.empty_like(tensor, device="meta")
    sizes = [n if indices is None else length(indices) for n, indices in zip(tensor.shape, sources, strict=True)]
    return torch.empty(sizes, dtype=tensor.dtype, device="meta")


def take_buffers(tensor: torch.Tensor, sources: Sequence[Any] | None) -> torch.Tensor:
    """What `take` gives of a buffer; of a parameter, `take_on_meta`."""
    return (take_on_meta if isinstance(tensor, nn.Parameter) else take)(tensor, sources)


def length(indices: Sequence[Any]) -> int:
    """How many source indices there are, or columns where there is a row of them per index of dim 0."""
    if len(indices) and isinstance(indices[0], Sequence):
        return len(indices[0])
    return len(indices)
