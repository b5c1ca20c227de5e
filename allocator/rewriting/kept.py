"""Which neurons of a graph an allocation keeps, and how many of each a wider network has."""

from __future__ import annotations

import numpy as np

from allocator.graph.channel_graph import ChannelGraph
from allocator.rewriting.allocation import Allocation, Indices
from allocator.rewriting.index_map import maps_of


def kept_by(graph: ChannelGraph, allocation: Allocation) -> np.ndarray | None:
    """(neurons,) bool that an allocation keeps; None where it keeps a neuron in part, or in another order."""
    stays = _stays_by(graph, allocation)
    if stays is None:
        return None
    known = np.ones(graph.slots.total, dtype=bool)
    for name, shape in graph.slots.shapes.items():
        if shape and any(name.startswith(f"{path}.") for path in allocation.absent):
            # A layer that is gone has none of its outputs; of what it read, the allocation says nothing.
            first, size = graph.slots.base[name][0], shape[0]
            known[first + size : first + sum(shape)] = False
            stays[first : first + size] = False
    free = (graph.unit_of_slot >= 0) & known
    units = graph.unit_of_slot[free]
    count = np.bincount(units, minlength=graph.size)
    kept = np.bincount(units, weights=stays[free], minlength=graph.size)
    fixed = (graph.unit_of_slot < 0) & known
    if ((kept != 0) & (kept != count)).any() or not stays[fixed].all():
        return None
    return kept > 0


def _stays_by(graph: ChannelGraph, allocation: Allocation) -> np.ndarray | None:
    """(slots,) bool that the allocation's indices name; None where some are named twice or in another order."""
    stays = np.ones(graph.slots.total, dtype=bool)
    for name, dims in allocation.kept.items():
        for start, size, indices in zip(graph.slots.base[name], graph.slots.shapes[name], dims, strict=True):
            if indices is None:
                continue
            rows = np.atleast_2d(np.asarray(indices, dtype=np.int64))
            if not (rows == rows[0]).all() or (np.diff(rows[0]) <= 0).any():
                return None
            stays[start : start + size] = False
            stays[start + rows[0]] = True
    return stays


def times_by(graph: ChannelGraph, allocation: Allocation) -> np.ndarray | None:
    """(neurons,) int, how many of each an allocation has that adds some; None where it adds to one in part.

    Or where it puts what it adds elsewhere than `maps_of` does.
    """
    times = np.ones(graph.slots.total, dtype=np.int64)
    for name, dims in allocation.kept.items():
        for start, size, indices in zip(graph.slots.base[name], graph.slots.shapes[name], dims, strict=True):
            if indices is not None:
                times[start : start + size] = np.bincount(_row(indices), minlength=size)
    free = graph.unit_of_slot >= 0
    of_unit = np.ones(graph.size, dtype=np.int64)
    of_unit[graph.unit_of_slot[free]] = times[free]
    if (graph.stays(of_unit) != times).any() or not times.all():
        return None
    maps = maps_of(graph, of_unit)
    for name in maps.keys() | allocation.kept.keys():
        expected = [None if index_map is None else index_map.source for index_map in maps.get(name, ())]
        found = allocation.kept.get(name, [])
        if len(expected) != len(found) or not all(map(_same, expected, found)):
            return None
    return of_unit


def _row(indices: Indices) -> np.ndarray:
    """Source indices, where there is a row of them per output the first: in a wider network all are alike."""
    array = np.asarray(indices, dtype=np.int64)
    return array if array.ndim == 1 else array[0]


def _same(expected: np.ndarray | None, found: Indices | None) -> bool:
    if expected is None or found is None:
        return expected is None and found is None
    return bool((np.atleast_2d(np.asarray(found, dtype=np.int64)) == expected).all())
