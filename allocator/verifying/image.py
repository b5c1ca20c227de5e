"""How the slots of a rewritten model correspond to the original's, and which labels its tensors should have."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from allocator.flow.facts import Tie
from allocator.flow.labels import FROZEN, Label, Slots
from allocator.graph.channel_graph import ChannelGraph
from allocator.rewriting.index_map import Maps


class Image:
    """Maps slots of the rewritten model to slots of the original.

    Args:
        graph: the original's neurons.
        maps: where each index of the rewritten model's tensors comes from.
        slots: slots of the rewritten model.
    """

    def __init__(self, graph: ChannelGraph, maps: Maps, slots: Slots) -> None:
        self.old = graph.slots
        emptied = {
            name.rpartition(".")[0] for name, dims in maps.items() if any(d is not None and not len(d) for d in dims)
        }
        missing = graph.slots.shapes.keys() - slots.shapes.keys()
        self.absent = {name for name in missing if name.rpartition(".")[0] in emptied}
        self.copies = np.ones(self.old.total, dtype=np.int64)
        self._sources: dict[int, np.ndarray] = {}  # of dims whose indices change their order, by their first slot
        for name, dims in maps.items():
            for start, size, index_map in zip(self.old.base[name], self.old.shapes[name], dims, strict=True):
                if index_map is None:
                    continue
                self.copies[start : start + size] = 0
                if index_map.keeps_order:
                    self.copies[start + index_map.source] = 1
                else:
                    np.add.at(self.copies, start + index_map.source, 1)
                    self._sources[start] = index_map.source
        self.origin = np.full(slots.total, -1)
        self.origin[FROZEN] = FROZEN
        left, before = np.flatnonzero(self.copies), np.append(0, np.cumsum(self.copies > 0))
        for name, shape in slots.shapes.items():
            starts, sizes = self.old.base[name], self.old.shapes[name]
            for first, new_size, start, size in zip(slots.base[name], shape, starts, sizes, strict=True):
                source = left[before[start] : before[start + size]]
                if start in self._sources:
                    source = start + self._sources[start]
                if len(source) == new_size:
                    self.origin[first : first + new_size] = source
        # What was asked about by identity is held, so that no other array has its id.
        self._sizes: dict[int, tuple[np.ndarray, int]] = {}
        self._same: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self.misplaced = np.zeros(0, dtype=np.int64)
        """Of the original's slots, those that were last found in other places than they should be."""

    def size(self, label: np.ndarray) -> int:
        """How many indices these labels of the original become."""
        known = self._sizes.get(id(label))
        if known is None:
            known = self._sizes[id(label)] = label, int(self.copies[label].sum())
        return known[1]

    def holds(self, old: Label, new: Label) -> bool:
        """Whether the new labels are the image of the old ones, in order."""
        if old is None or new is None:
            return old is None and new is None
        key = (id(old), id(new))
        if key not in self._same:
            image = old[self.positions(old)] if self._sources else old[self.copies[old] > 0]
            if not np.array_equal(image, self.origin[new]):
                self.misplaced = _differing(image, self.origin[new])
                return False
            self._same[key] = old, new
        return True

    def positions(self, label: np.ndarray) -> np.ndarray:
        """Which places of these labels, (n,), the image of a dim that has them is made of, in its order.

        Where all maps keep the order, those that stay. Else each run of ascending slots of one dim is put into the
        order of that dim's map; a slot that fills several places (a channel's pixels, flattened) moves as a whole.
        """
        if not self._reorders(label):
            return np.flatnonzero(self.copies[label] > 0)
        parts = [np.zeros(0, int)]
        for run in self._runs(label):
            source = self._source_of(int(label[run[0]]))
            if source is None:
                parts.append(run[self.copies[label[run]] > 0])
                continue
            first, indices = source
            within = label[run] - first  # ascending, so that the places of an index follow one another
            begins, ends = (np.searchsorted(within, indices, side=side) for side in ("left", "right"))
            lengths = ends - begins
            offset = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            parts.append(run[np.repeat(begins, lengths) + offset])
        return np.concatenate(parts)

    def keep_together(self, ties: Iterable[Tie]) -> Tie | None:
        """The first tie whose two sides the maps put into different orders; None where there is none.

        Labels of a tensor say which channels it holds. That two dims which meet hold them in the same order is
        told by the ties, and has to be asked where a map changes an order.
        """
        if not self._sources:
            return None
        for tie in ties:
            a, b = tie.a.reshape(-1), tie.b.reshape(-1)
            if not (self._reorders(a) or self._reorders(b)):
                continue
            here, there = self.positions(a), self.positions(b)
            if not np.array_equal(here, there):
                self.misplaced = a[_differing(here, there)]
                return tie
        return None

    def _reorders(self, label: np.ndarray) -> bool:
        return any(self._source_of(slot) is not None for slot in self._dims_of(label))

    def _dims_of(self, label: np.ndarray) -> list[int]:
        """A slot of every dim that these labels touch; none is looked for where no dim changes its order."""
        if not self._sources:
            return []
        dims = np.unique(np.searchsorted(self.old.starts, label[label != FROZEN], side="right") - 1)
        return [int(start) for start in self.old.starts[dims].tolist()]

    def _source_of(self, slot: int) -> tuple[int, np.ndarray] | None:
        """The first slot of this slot's dim and its map, where that changes the order."""
        if slot == FROZEN or not self._sources:
            return None
        start = int(self.old.starts[np.searchsorted(self.old.starts, slot, side="right") - 1])
        return (start, self._sources[start]) if start in self._sources else None

    def _runs(self, label: np.ndarray) -> list[np.ndarray]:
        """Places of ascending slots of one dim, run by run."""
        dims = np.searchsorted(self.old.starts, label, side="right")
        breaks = (np.diff(dims) != 0) | (np.diff(label) < 0)
        return np.split(np.arange(len(label)), np.flatnonzero(breaks) + 1)


def _differing(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What stands in either where they differ; nothing where they are not as long."""
    if len(a) != len(b):
        return np.zeros(0, dtype=np.int64)
    return np.concatenate([a[a != b], b[a != b]])
