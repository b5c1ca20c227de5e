"""The most activations that are alive at once in a forward."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix

from allocator.cost.metric import Metric
from allocator.cost.terms import Term, elements
from allocator.flow.flow import Flow


class PeakMetric(Metric):
    """The largest of several sums of products.

    Args:
        name, unit, terms, unit_of_slot, size: as for `Metric`.
        instants: (instants, terms) 1 where a term counts in a sum.
    """

    def __init__(
        self,
        name: str,
        unit: str,
        terms: Sequence[Term],
        unit_of_slot: np.ndarray,
        size: int,
        instants: csr_matrix,
    ) -> None:
        super().__init__(name, unit, terms, unit_of_slot, size)
        self.instants = instants

    def times(self, kept: np.ndarray) -> np.ndarray:
        """(terms,) 1 for those that count where the sum is largest."""
        counted = np.zeros(len(self.terms), dtype=np.int64)
        if self.instants.shape[0]:
            largest = int(np.argmax(self.instants @ self.per_term(kept)))
            start, end = self.instants.indptr[largest : largest + 2]
            counted[self.instants.indices[start:end]] = 1
        return counted

    def value(self, kept: np.ndarray) -> int:
        """The largest sum when the neurons with `kept` true are kept."""
        return int((self.instants @ self.per_term(kept)).max(initial=0))


def live_terms(flow: Flow) -> tuple[list[Term], csr_matrix]:
    """Memory of a forward without gradients, in numbers.

    A tensor is alive from the call that makes it to the last that reads it or a view of it, the model's inputs and
    outputs throughout; what is written in place takes none. Variables that hold a tensor for longer are not seen.

    Returns:
        One term per tensor, and (instants, terms) which of them are alive at each call that makes one.
    """
    born, last = _lifetimes(flow)
    values = sorted(born, key=lambda value: born[value])
    terms = [Term.of(elements(flow, value)) for value in values]
    rows: list[int] = []
    cols: list[int] = []
    makers = sorted({born[value] for value in values})
    for column, value in enumerate(values):
        first, end = np.searchsorted(makers, [born[value], last[value] + 1])
        rows += range(int(first), int(end))
        cols += [column] * int(end - first)
    ones = np.ones(len(rows), dtype=np.int64)
    return terms, csr_matrix((ones, (rows, cols)), shape=(len(makers), len(values)))


def _lifetimes(flow: Flow) -> tuple[dict[int, int], dict[int, int]]:
    """By tensor that owns its memory: the call that makes it, -1 for the model's inputs, and the last that reads it."""
    trace = flow.trace
    born: dict[int, int] = {}
    last: dict[int, int] = {}
    for op in trace.ops:
        for value in (*op.reads, *op.outputs):
            root = trace.root(value)
            if trace.values[root].name is None:
                born.setdefault(root, op.index if value in op.outputs and value not in op.reads else -1)
                last[root] = op.index
    end = len(trace.ops)
    for value in trace.outputs:
        root = trace.root(value)
        if root in last:
            last[root] = end
    last |= {value: end for value, first in born.items() if first == -1}
    return born, last
