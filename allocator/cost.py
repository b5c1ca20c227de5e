"""FLOPs as fvcore counts them, as a function of how many neurons are kept.

One multiply-add is one FLOP. Every counted call becomes a term: a constant times the sizes of its label
dims, so the cost of a plan needs no forward. Calls that fvcore does not count have no term.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from .flow import Flow, Label
from .tracing import Call, Op, Ref


@dataclass(frozen=True)
class Term:
    """FLOPs of one call.

    Attributes:
        module: path of the module that was running.
        op: index into the trace's ops.
        factor: FLOPs per kept index of every axis.
        axes: label arrays; the FLOPs are the factor times the number of kept labels of each.
    """

    module: str
    op: int
    factor: int
    axes: tuple[np.ndarray, ...]


Counter = Callable[[Flow, Op], "list[tuple[int, Sequence[Label]]]"]
_COUNTERS: dict[str, Counter] = {}


def counted(*names: str) -> Callable[[Counter], Counter]:
    """Register how fvcore counts the named operators."""

    def register(function: Counter) -> Counter:
        for name in names:
            if name in _COUNTERS:
                raise ValueError(f"operator {name} is counted already")
            _COUNTERS[name] = function
        return function

    return register


def cost_terms(flow: Flow) -> list[Term]:
    """All counted calls of a trace in order; composite calls are counted once, as fvcore sees them.

    fvcore counts no call that the outputs do not depend on: its trace has lost them.
    """
    terms: list[Term] = []
    seen: set[int] = set()
    for op in flow.trace.live():
        if op.call is not None and op.call.name in _COMPOSITES:
            if id(op.call) not in seen:
                seen.add(id(op.call))
                terms += _terms(op, _COMPOSITES[op.call.name](flow, op.call))
        elif op.name in _COUNTERS and not _inside_attention(op):
            terms += _terms(op, _COUNTERS[op.name](flow, op))
    return terms


def _inside_attention(op: Op) -> bool:
    """Products of a `multi_head_attention_forward` that calls `scaled_dot_product_attention`, which does not count."""
    call = op.call
    fused = call is not None and call.name == "multi_head_attention_forward" and not call.kwargs.get("need_weights", True)
    return fused and op.name in ("bmm", "baddbmm")


def _terms(op: Op, products: Sequence[tuple[int, Sequence[Label]]]) -> list[Term]:
    return [
        Term(op.module, op.index, factor, tuple(label for label in labels if label is not None))
        for factor, labels in products
    ]


def _elements(flow: Flow, value: int, scale: int, dims: slice = slice(None)) -> tuple[int, list[Label]]:
    """`scale` FLOPs per element of a value, over some of its dims."""
    shape, labels = flow.shape(value)[dims], flow.labels(value)[dims]
    plain = math.prod(n for n, label in zip(shape, labels, strict=True) if label is None)
    return scale * plain, list(labels)


@counted("convolution", "_convolution", "mkldnn_convolution")
def _convolution(flow: Flow, op: Op) -> list[tuple[int, Sequence[Label]]]:
    x, weight = op.inputs()[:2]
    run = flow.shape(x if op.arg("transposed") else op.outputs[0])
    factor, labels = _elements(flow, weight, flow.shape(x)[0] * math.prod(run[2:]))
    return [(factor, labels)]


@counted("addmm", "mm", "bmm", "linear")
def _product(flow: Flow, op: Op) -> list[tuple[int, Sequence[Label]]]:
    inputs = op.inputs()
    a, b = inputs[1:] if op.name == "addmm" else inputs[:2]
    columns = slice(0, 1) if op.name == "linear" else slice(-1, None)
    factor, labels = _elements(flow, a, 1)
    other, more = _elements(flow, b, 1, columns)
    return [(factor * other, [*labels, *more])]


@counted(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "miopen_batch_norm",
)
def _batch_norm(flow: Flow, op: Op) -> list[tuple[int, Sequence[Label]]]:
    affine = op.arg("weight") is not None
    per_element = 4 + affine if op.arg("training") else 1 + affine
    return [_elements(flow, op.inputs()[0], per_element)]


@counted("native_layer_norm", "native_group_norm")
def _norm(flow: Flow, op: Op) -> list[tuple[int, Sequence[Label]]]:
    return [_elements(flow, op.inputs()[0], 4 + (op.arg("weight") is not None))]


@counted("upsample_nearest2d")
def _nearest(flow: Flow, op: Op) -> list[tuple[int, Sequence[Label]]]:
    return [_elements(flow, op.outputs[0], 1)]


@counted("upsample_bilinear2d", "grid_sampler_2d", "grid_sampler_3d")
def _bilinear(flow: Flow, op: Op) -> list[tuple[int, Sequence[Label]]]:
    return [_elements(flow, op.outputs[0], 4)]


def _uncounted(flow: Flow, call: Call) -> list[tuple[int, Sequence[Label]]]:
    return []


def _adaptive_pool(flow: Flow, call: Call) -> list[tuple[int, Sequence[Label]]]:
    return [_elements(flow, _first(call), 1)]


def _instance_norm(flow: Flow, call: Call) -> list[tuple[int, Sequence[Label]]]:
    weight = call.kwargs.get("weight", call.args[3] if len(call.args) > 3 else None)
    return [_elements(flow, _first(call), 4 + (weight is not None))]


def _matmul(flow: Flow, call: Call) -> list[tuple[int, Sequence[Label]]]:
    a, b = (arg.index for arg in (*call.args, *call.kwargs.values()) if isinstance(arg, Ref))
    if call.name == "rmatmul":
        a, b = b, a
    factor, labels = _elements(flow, a, 1)
    other, more = _elements(flow, b, 1, slice(-1, None))
    return [(factor * other, [*labels, *more])]


def _einsum(flow: Flow, call: Call) -> list[tuple[int, Sequence[Label]]]:
    """Two operands: one FLOP per combination of all letters, which is what numpy's path halves to."""
    equation = str(call.args[0]).replace(" ", "")
    operands = call.args[1] if isinstance(call.args[1], tuple) else call.args[1:]
    letters: dict[str, tuple[int, Label]] = {}
    for names, ref in zip(equation.split("->")[0].split(","), operands, strict=True):
        for letter, size, label in zip(names, flow.shape(ref.index), flow.labels(ref.index), strict=True):
            if letter not in letters or label is not None:
                letters[letter] = (size, label)
    factor = math.prod(size for size, label in letters.values() if label is None)
    return [(factor, [label for _, label in letters.values()])]


def _first(call: Call) -> int:
    ref = call.args[0] if call.args else call.kwargs["input"]
    return int(ref.index)


_COMPOSITES: dict[str, Callable[[Flow, Call], list[tuple[int, Sequence[Label]]]]] = {
    "adaptive_avg_pool1d": _uncounted,
    "adaptive_avg_pool2d": _adaptive_pool,
    "adaptive_avg_pool3d": _uncounted,
    "adaptive_max_pool2d": _uncounted,
    "einsum": _einsum,
    "instance_norm": _instance_norm,
    "matmul": _matmul,
    "rmatmul": _matmul,
    "scaled_dot_product_attention": _uncounted,
}


class CostModel:
    """FLOPs of a model for any choice of kept neurons.

    An axis is a dim of some tensor: the number of its kept indices is linear in the kept neurons, and the FLOPs
    of a call are a constant times the product over its axes.

    Args:
        terms: counted calls.
        unit_of_slot: the neuron each slot belongs to, or -1 where it must stay.
        units: number of neurons.
    """

    def __init__(self, terms: Sequence[Term], unit_of_slot: np.ndarray, units: int) -> None:
        axes: dict[bytes, int] = {}
        members: list[np.ndarray] = []
        ids: list[tuple[int, ...]] = []
        for term in terms:
            row = []
            for label in term.axes:
                of = unit_of_slot[label]
                key = of.tobytes()
                if key not in axes:
                    axes[key] = len(members)
                    members.append(of)
                row.append(axes[key])
            ids.append(tuple(row))
        rows = np.concatenate([np.full(len(m), i) for i, m in enumerate(members)] or [np.zeros(0, int)])
        cols = np.concatenate(members or [np.zeros(0, int)])
        free = cols >= 0
        self.fixed = np.bincount(rows[~free], minlength=len(members)).astype(np.int64)
        ones = np.ones(int(free.sum()), dtype=np.int64)
        self.incidence = csr_matrix((ones, (rows[free], cols[free])), shape=(len(members), units))
        self.incidence.sum_duplicates()
        self._transpose = self.incidence.T.tocsr()
        degree = max((len(row) for row in ids), default=0)
        self._factor = np.array([term.factor for term in terms], dtype=np.int64)
        one = len(members)
        self._axes = np.full((len(terms), degree), one, dtype=np.int64)
        for i, chosen in enumerate(ids):
            self._axes[i, : len(chosen)] = chosen
        self.terms = list(terms)
        self._share()

    def counts(self, kept: np.ndarray) -> np.ndarray:
        """Kept indices per axis, with a final 1 that stands for no axis."""
        counts = self.fixed + self.incidence @ kept.astype(np.int64)
        return np.append(counts, 1)

    def per_term(self, kept: np.ndarray) -> np.ndarray:
        """FLOPs of every counted call when the units with `kept` true are kept."""
        return self._factor * self.counts(kept)[self._axes].prod(axis=1)

    def flops(self, kept: np.ndarray) -> int:
        """Total FLOPs when the units with `kept` true are kept."""
        return int(self.per_term(kept).sum())

    def added(self, kept: np.ndarray, unit: int) -> int:
        """FLOPs that one more unit would cost."""
        more = kept.copy()
        more[unit] = True
        return self.flops(more) - self.flops(kept)

    def added_each(self, kept: np.ndarray) -> np.ndarray:
        """FLOPs that each single further unit would cost; exact where a call has no more than two axes."""
        grid = self.counts(kept)[self._axes]
        slope = np.zeros(len(self.fixed) + 1, dtype=np.int64)
        for d in range(self._axes.shape[1]):
            others = np.delete(grid, d, axis=1).prod(axis=1)
            np.add.at(slope, self._axes[:, d], self._factor * others)
        both = np.array(
            [self._factor[t] * np.delete(grid[t], dims).prod() for t, dims in self._shared_terms], dtype=np.int64
        )
        return np.asarray(self._transpose @ slope[:-1] + self._shared @ both)

    def _share(self) -> None:
        """Units that lie on two axes of one call (a convolution within a stream): their counts multiply."""
        self._shared_terms: list[tuple[int, tuple[int, int]]] = []
        products: list[tuple[np.ndarray, np.ndarray]] = []
        pointer, units, times = (getattr(self.incidence, name) for name in ("indptr", "indices", "data"))
        for t, axes in enumerate(self._axes):
            for dims in itertools.combinations(range(len(axes)), 2):
                i, j = (int(axes[d]) for d in dims)
                if max(i, j) == len(self.fixed):
                    continue
                a, b = (slice(pointer[k], pointer[k + 1]) for k in (i, j))
                common, at, bt = np.intersect1d(units[a], units[b], assume_unique=True, return_indices=True)
                if len(common):
                    products.append((common, times[a][at] * times[b][bt]))
                    self._shared_terms.append((t, dims))
        cols = np.repeat(np.arange(len(products)), [len(c) for c, _ in products])
        empty = np.zeros(0, dtype=np.int64)
        rows = np.concatenate([empty, *(common for common, _ in products)])
        data = np.concatenate([empty, *(product for _, product in products)])
        shape = (self.incidence.shape[1], len(products))
        self._shared = csr_matrix((data, (rows, cols)), shape=shape)
