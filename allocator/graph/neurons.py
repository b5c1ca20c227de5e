"""From ties and frozen slots to neurons: the connected components that can go as a whole."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from allocator.flow.facts import Facts
from allocator.flow.labels import FROZEN, Slots


def components(total: int, ties: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """(total,) the number of each slot's connected component, where slots in the same place of a tie are linked."""
    pairs = [(a.reshape(-1), b.reshape(-1)) for a, b in ties]
    rows, cols = (np.concatenate([np.zeros(0, int), *(pair[i] for pair in pairs)]) for i in range(2))
    links = coo_matrix((np.ones(len(rows), dtype=np.int8), (rows, cols)), shape=(total, total)).tocsr()
    return np.asarray(connected_components(links, directed=False)[1])


def number_neurons(slots: Slots, facts: Facts) -> tuple[np.ndarray, np.ndarray, int]:
    """Number the components that hold a written slot and nothing that must stay, in the order they are written.

    Returns:
        (slots,) the component of each slot, (slots,) the neuron of each slot or -1, and how many neurons there are.
    """
    ties = [(tie.a, tie.b) for tie in facts.ties]
    for frozen in facts.frozen:
        label = np.unique(frozen.label)
        ties.append((label, np.full(len(label), FROZEN)))
    component = components(slots.total, ties)
    written = np.concatenate([np.zeros(0, int), *(each.label for each in facts.written)])
    first = component[written]
    first = first[first != component[FROZEN]]
    unique, position = np.unique(first, return_index=True)
    number = np.full(component.max() + 1, -1, dtype=component.dtype)
    number[unique[np.argsort(position)]] = np.arange(len(unique))
    return component, number[component], len(unique)
