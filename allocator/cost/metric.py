"""A cost of the network as a function of the neurons that are kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
from scipy.sparse import csr_matrix

from allocator.cost.terms import Term


class Metric:
    """A sum of products, each a constant times the numbers of kept indices along its axes.

    An axis is a dim of some tensor. The number of its kept indices is linear in the kept neurons, so a metric never
    falls when a neuron is added, and a budget can be met by bisection.

    Args:
        name: what is measured, such as "flops".
        unit: in words, such as "FLOPs".
        terms: the products.
        unit_of_slot: the neuron each slot belongs to, or -1 where it must stay.
        size: number of neurons.
    """

    def __init__(self, name: str, unit: str, terms: Sequence[Term], unit_of_slot: np.ndarray, size: int) -> None:
        self.name, self.unit, self.terms = name, unit, list(terms)
        axes, chosen = _distinct_axes(self.terms, unit_of_slot)
        rows = np.concatenate([np.full(len(axis), i) for i, axis in enumerate(axes)] or [np.zeros(0, int)])
        cols = np.concatenate(axes or [np.zeros(0, int)])
        free = cols >= 0
        self.fixed = np.bincount(rows[~free], minlength=len(axes)).astype(np.int64)
        ones = np.ones(int(free.sum()), dtype=np.int64)
        self.incidence = csr_matrix((ones, (rows[free], cols[free])), shape=(len(axes), size))
        self.incidence.sum_duplicates()
        self._transpose = self.incidence.T.tocsr()
        whole = all(isinstance(term.factor, int) for term in self.terms)
        self._factor = np.array([term.factor for term in self.terms], dtype=np.int64 if whole else np.float64)
        self._printed = np.array([term.printed for term in self.terms], dtype=bool)
        self._alone, self._together = _reports(self.terms)
        # Terms have different numbers of axes; a last axis, whose count is always one, fills the table up.
        degree = max((len(row) for row in chosen), default=0)
        self.axes_of_term = np.full((len(self.terms), degree), len(axes), dtype=np.int64)
        for i, row in enumerate(chosen):
            self.axes_of_term[i, : len(row)] = row
        self._find_shared_axes()

    @property
    def size(self) -> int:
        """Number of neurons."""
        return int(self.incidence.shape[1])

    def times(self, kept: np.ndarray) -> np.ndarray:
        """(terms,) how often each counts when the neurons with `kept` true are kept: once, in a sum of all."""
        return np.ones(len(self.terms), dtype=np.int64)

    @property
    def factors(self) -> np.ndarray:
        """(terms,) the cost of each per kept index of all its axes, before fvcore's rounding; at most the metric's."""
        return self._factor / (1 + self._printed) * self.times(np.ones(self.size, dtype=bool))

    def show(self, value: float) -> str:
        """A cost with its unit, for people."""
        return f"{value:,.0f} {self.unit}"

    def counts(self, kept: np.ndarray) -> np.ndarray:
        """Kept indices per axis, with a final 1 that stands for no axis."""
        counts = self.fixed + self.incidence @ kept.astype(np.int64)
        return np.append(counts, 1)

    def per_term(self, kept: np.ndarray) -> np.ndarray:
        """The cost of every term when the neurons with `kept` true, (neurons,) bool, are kept."""
        counts = self.counts(kept)
        costs = self._factor * counts[self.axes_of_term].prod(axis=1)
        costs[self._alone] = [_as_printed(n) for n in costs[self._alone].tolist()]
        for whole, steps, recount in self._together:
            costs[steps] //= 2
            sizes = counts[self.axes_of_term[whole, : len(self.terms[whole].axes)]]
            costs[whole] = _as_printed(recount(*sizes.tolist())) - costs[steps].sum()
        return costs

    def value(self, kept: np.ndarray) -> int:
        """The cost when the neurons with `kept` true are kept."""
        return int((self.times(kept) * self.per_term(kept)).sum())

    @cached_property
    def whole(self) -> int:
        """The cost of the network as it is."""
        return self.value(np.ones(self.size, dtype=bool))

    def added(self, kept: np.ndarray, units: int | np.ndarray) -> int:
        """What one more neuron, or several together, would cost."""
        more = kept.copy()
        more[units] = True
        return self.value(more) - self.value(kept)

    def added_each(self, kept: np.ndarray) -> np.ndarray:
        """(neurons,) what each single further neuron would cost; exact where a term has no more than two axes.

        An `einsum`, whose count fvcore rounds, is taken as it is before that.
        """
        grid = self.counts(kept)[self.axes_of_term]
        factor = self._factor * self.times(kept)
        factor[self._printed] //= 2
        slope = np.zeros(len(self.fixed) + 1, dtype=factor.dtype)
        for d in range(self.axes_of_term.shape[1]):
            others = np.delete(grid, d, axis=1).prod(axis=1)
            np.add.at(slope, self.axes_of_term[:, d], factor * others)
        products = [factor[t] * np.delete(grid[t], dims).prod() for t, dims in self._shared_terms]
        both = np.array(products, dtype=factor.dtype)
        return np.asarray(self._transpose @ slope[:-1] + self._shared @ both)

    def _find_shared_axes(self) -> None:
        """Neurons that lie on two axes of one term (a convolution within a stream): their counts multiply."""
        self._shared_terms: list[tuple[int, tuple[int, int]]] = []
        products: list[tuple[np.ndarray, np.ndarray]] = []
        pointer, units, times = (getattr(self.incidence, name) for name in ("indptr", "indices", "data"))
        filled = np.diff(pointer) > 0
        first, last = np.full(len(self.fixed) + 1, self.size), np.full(len(self.fixed) + 1, -1)
        first[:-1][filled] = units[pointer[:-1][filled]]  # the units of an axis are in ascending order
        last[:-1][filled] = units[pointer[1:][filled] - 1]
        for dims in itertools.combinations(range(self.axes_of_term.shape[1]), 2):
            one, other = (self.axes_of_term[:, d] for d in dims)
            for t in np.flatnonzero((first[one] <= last[other]) & (first[other] <= last[one])).tolist():
                a, b = (slice(pointer[k], pointer[k + 1]) for k in (one[t], other[t]))
                common, at, bt = np.intersect1d(units[a], units[b], assume_unique=True, return_indices=True)
                if len(common):
                    products.append((common, times[a][at] * times[b][bt]))
                    self._shared_terms.append((t, dims))
        cols = np.repeat(np.arange(len(products)), [len(common) for common, _ in products])
        empty = np.zeros(0, dtype=np.int64)
        rows = np.concatenate([empty, *(common for common, _ in products)])
        data = np.concatenate([empty, *(product for _, product in products)])
        self._shared = csr_matrix((data, (rows, cols)), shape=(self.size, len(products)))


def _distinct_axes(terms: Sequence[Term], unit_of_slot: np.ndarray) -> tuple[list[np.ndarray], list[list[int]]]:
    """The neurons on every axis that some term has, each once, and per term the indices of its axes among them."""
    axes: list[np.ndarray] = []
    number_of: dict[bytes, int] = {}
    # Values share their label arrays, so that most axes are known by identity and need not be compared.
    known: dict[int, int] = {}
    chosen = []
    for term in terms:
        for label in term.axes:
            if id(label) not in known:
                units = unit_of_slot[label]
                number = number_of.setdefault(units.tobytes(), len(axes))
                if number == len(axes):
                    axes.append(units)
                known[id(label)] = number
        chosen.append([known[id(label)] for label in term.axes])
    return axes, chosen


def _reports(terms: Sequence[Term]) -> tuple[list[int], list[tuple[int, list[int], Callable[..., int]]]]:
    """Indices of the terms that fvcore reads off a printed figure of their own, and those that stand for others too."""
    steps_of: dict[int, list[int]] = {}
    whole: dict[int, tuple[int, Callable[..., int]]] = {}
    for i, term in enumerate(terms):
        if term.recount is not None:
            whole[term.op] = i, term.recount
        elif term.printed:
            steps_of.setdefault(term.op, []).append(i)
    alone = [steps[0] for op, steps in steps_of.items() if op not in whole]
    return alone, [(i, steps_of[op], recount) for op, (i, recount) in whole.items()]


def _as_printed(count: int) -> int:
    """Half of a count that numpy's report adds one to and prints with four digits."""
    return math.floor(float(f"{count + 1:.3e}") / 2)
