"""Which neurons of a graph an allocation keeps."""

from __future__ import annotations

import numpy as np

from allocator.graph.channel_graph import ChannelGraph
from allocator.rewriting.allocation import Allocation


def kept_by(graph: ChannelGraph, allocation: Allocation) -> np.ndarray | None:
    """(neurons,) bool that an allocation keeps; None where it keeps a neuron in part, or in another order."""
    stays = np.ones(graph.slots.total, dtype=bool)
    known = np.ones(graph.slots.total, dtype=bool)
    for name, dims in allocation.kept.items():
        starts, shape = graph.slots.base[name], graph.slots.shapes[name]
        for start, size, indices in zip(starts, shape, dims, strict=True):
            rows = None if indices is None else np.atleast_2d(np.asarray(indices, dtype=np.int64))
            if rows is None:
                continue
            if not (rows == rows[0]).all() or (np.diff(rows[0]) <= 0).any():
                return None
            stays[start : start + size] = False
            stays[start + rows[0]] = True
    for path in allocation.absent:
        for name, shape in graph.slots.shapes.items():
            if name.startswith(f"{path}."):
                first = graph.slots.base[name][0] if shape else 0
                size = shape[0] if shape else 0
                known[first : first + int(np.sum(shape))] = False
                known[first : first + size] = True
                stays[first : first + size] = False
    free = (graph.unit_of_slot >= 0) & known
    units = graph.unit_of_slot[free]
    count = np.bincount(units, minlength=graph.size)
    kept = np.bincount(units, weights=stays[free], minlength=graph.size)
    fixed = (graph.unit_of_slot < 0) & known
    if ((kept != 0) & (kept != count)).any() or not stays[fixed].all():
        return None
    return kept > 0
