"""FLOPs as fvcore counts them, as a function of how many neurons are kept.

One multiply-add is one FLOP. Every counted call becomes a term: a constant times the sizes of its label
dims, so the cost of a plan needs no forward. Calls that fvcore does not count have no term.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from torch import nn

from allocator.flow.flow import Flow, Label
from allocator.tracing.record import Call, Op


@dataclass(frozen=True)
class Term:
    """FLOPs of one call.

    Attributes:
        module: path of the module that was running.
        op: index into the trace's ops.
        factor: FLOPs per kept index of every axis.
        axes: label arrays; the FLOPs are the factor times the number of kept labels of each.
        printed: the factor counts two per multiply-add, and fvcore reads the product off a printed figure.
    """

    module: str
    op: int
    factor: int
    axes: tuple[np.ndarray, ...]
    printed: bool = False


class Product(NamedTuple):
    """FLOPs of one call before its labels are known to stay: see `Term`; a dim without labels is in the factor."""

    factor: int
    labels: Sequence[Label]
    printed: bool = False


Counter = Callable[[Flow, Op], list[Product]]
CallCounter = Callable[[Flow, Call], list[Product]]
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
        elif op.name in _COUNTERS and not (_inside_attention(op) or _inside_recurrence(flow, op)):
            terms += _terms(op, _COUNTERS[op.name](flow, op))
    return terms


def _inside_attention(op: Op) -> bool:
    """Products of a `multi_head_attention_forward` that calls `scaled_dot_product_attention`, which does not count."""
    call = op.call
    fused = (
        call is not None and call.name == "multi_head_attention_forward" and not call.kwargs.get("need_weights", True)
    )
    return fused and op.name in ("bmm", "baddbmm")


def _inside_recurrence(flow: Flow, op: Op) -> bool:
    """fvcore sees an LSTM, GRU or RNN whole, and does not count it; it does count their cells."""
    return isinstance(flow.trace.modules.get(op.module), nn.RNNBase)


def _terms(op: Op, products: Sequence[Product]) -> list[Term]:
    return [
        Term(op.module, op.index, factor, tuple(label for label in labels if label is not None), printed)
        for factor, labels, printed in products
    ]


def _elements(flow: Flow, value: int, scale: int, dims: slice = slice(None)) -> tuple[int, list[Label]]:
    """`scale` FLOPs per element of a value, over some of its dims."""
    shape, labels = flow.shape(value)[dims], flow.labels(value)[dims]
    plain = math.prod(n for n, label in zip(shape, labels, strict=True) if label is None)
    return scale * plain, list(labels)


@counted("convolution", "_convolution", "mkldnn_convolution")
def _convolution(flow: Flow, op: Op) -> list[Product]:
    x, weight = op.inputs()[:2]
    run = flow.shape(x if op.arg("transposed") else op.outputs[0])
    batch, images = _elements(flow, x, math.prod(run[2:]), slice(0, 1))
    factor, labels = _elements(flow, weight, batch)
    return [Product(factor, [*images, *labels])]


@counted("addmm", "mm", "bmm", "linear")
def _product(flow: Flow, op: Op) -> list[Product]:
    inputs = op.inputs()
    a, b = inputs[1:] if op.name == "addmm" else inputs[:2]
    columns = slice(0, 1) if op.name == "linear" else slice(-1, None)
    factor, labels = _elements(flow, a, 1)
    other, more = _elements(flow, b, 1, columns)
    return [Product(factor * other, [*labels, *more])]


@counted(
    "batch_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "miopen_batch_norm",
)
def _batch_norm(flow: Flow, op: Op) -> list[Product]:
    affine = op.arg("weight") is not None
    per_element = 4 + affine if op.arg("training") else 1 + affine
    return [Product(*_elements(flow, op.inputs()[0], per_element))]


@counted("native_layer_norm", "native_group_norm")
def _norm(flow: Flow, op: Op) -> list[Product]:
    return [Product(*_elements(flow, op.inputs()[0], 4 + (op.arg("weight") is not None)))]


@counted("_adaptive_avg_pool2d", "mean")
def _area(flow: Flow, op: Op) -> list[Product]:
    """Adaptive pooling of images; to one pixel `interpolate` by area calls `mean`, and for signals it makes images."""
    if op.call is not None and op.call.name == "interpolate":
        counts = len(flow.shape(_tensor(op.call, 0, "input"))) == 4
    else:
        counts = op.name != "mean"
    return [Product(*_elements(flow, op.inputs()[0], 1))] if counts else []


@counted("upsample_nearest2d")
def _nearest(flow: Flow, op: Op) -> list[Product]:
    return [Product(*_elements(flow, op.outputs[0], 1))]


@counted("upsample_bilinear2d", "grid_sampler_2d", "grid_sampler_3d")
def _bilinear(flow: Flow, op: Op) -> list[Product]:
    return [Product(*_elements(flow, op.outputs[0], 4))]


def _uncounted(flow: Flow, call: Call) -> list[Product]:
    return []


def _adaptive_pool(flow: Flow, call: Call) -> list[Product]:
    return [Product(*_elements(flow, _tensor(call, 0, "input"), 1))]


def _instance_norm(flow: Flow, call: Call) -> list[Product]:
    weight = call.kwargs.get("weight", call.args[3] if len(call.args) > 3 else None)
    return [Product(*_elements(flow, _tensor(call, 0, "input"), 4 + (weight is not None)))]


def _matmul(flow: Flow, call: Call) -> list[Product]:
    a, b = _tensor(call, 0, "input"), _tensor(call, 1, "other")
    if call.name == "rmatmul":
        a, b = b, a
    factor, labels = _elements(flow, a, 1)
    if len(flow.shape(b)) == 1:
        return [Product(factor, labels)]
    other, more = _elements(flow, b, 1, slice(-1, None))
    return [Product(factor * other, [*labels, *more])]


def _einsum(flow: Flow, call: Call) -> list[Product]:
    """Two FLOPs per combination of letters where any are summed over, else one; fvcore halves them.

    It counts two equations by hand, and reads the rest off numpy's printed report. Three operands and more are
    contracted in the order that is best for the sizes as traced.
    """
    equation = str(call.args[0]).replace(" ", "")
    refs = call.args[1] if isinstance(call.args[1], tuple) else call.args[1:]
    operands, result = _spelled(equation, [len(flow.shape(ref.index)) for ref in refs])
    letters: dict[str, tuple[int, Label]] = {}
    for names, ref in zip(operands, refs, strict=True):
        for letter, size, label in zip(names, flow.shape(ref.index), flow.labels(ref.index), strict=True):
            known = letters.get(letter, (1, None))
            letters[letter] = (max(size, known[0]), label if label is not None else known[1])
    if _alphabetical(equation) in ("abc,abd->acd", "abc,adc->adb"):
        return [Product(*_combinations(letters, set(letters)))]
    products = []
    for used, summed, terms in _contractions(operands, result, {name: size for name, (size, _) in letters.items()}):
        factor, labels = _combinations(letters, used)
        products.append(Product(factor * (max(1, terms - 1) + summed), labels, printed=True))
    if len(products) > 1 and not any(label is not None for _, labels, _ in products for label in labels):
        return [Product(sum(factor for factor, _, _ in products), [], printed=True)]
    return products


def _combinations(letters: dict[str, tuple[int, Label]], used: set[str]) -> tuple[int, list[Label]]:
    sizes = [(size, label) for name, (size, label) in letters.items() if name in used]
    return math.prod(size for size, label in sizes if label is None), [label for _, label in sizes]


def _spelled(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """Letters of each operand and of the result, with one for every dim that dots stand for."""
    inputs, arrow, output = equation.partition("->")
    if not arrow:
        plain = inputs.replace(",", "").replace("...", "")
        output = "..." * ("..." in inputs) + "".join(sorted(c for c in set(plain) if plain.count(c) == 1))
    dots = max((rank - len(n) + 3 for n, rank in zip(inputs.split(","), ranks, strict=True) if "..." in n), default=0)

    def spell(names: str, count: int) -> list[str]:
        before, mark, after = names.partition("...")
        return [*before, *(f"dot{k}" for k in range(dots - count, dots) if mark), *after]

    spelled = [spell(n, rank - len(n) + 3) for n, rank in zip(inputs.split(","), ranks, strict=True)]
    return spelled, spell(output, dots)


def _alphabetical(equation: str) -> str:
    """The equation in the letters a, b, c ... as they come."""
    order = dict.fromkeys(c for c in equation if c.isalpha())
    return equation.translate({ord(c): ord("a") + i for i, c in enumerate(order)})


def _contractions(
    operands: list[list[str]], result: list[str], sizes: dict[str, int]
) -> Iterator[tuple[set[str], bool, int]]:
    """Per step of numpy's best path: the letters used, whether any is summed over, and how many operands."""
    number = {name: i for i, name in enumerate(sizes)}
    arguments: list[Any] = []
    for names in operands:
        shape = [sizes[name] for name in names]
        arguments += [np.broadcast_to(0.0, shape), [number[name] for name in names]]
    path = np.einsum_path(*arguments, [number[name] for name in result], optimize="optimal")[0]
    left = [set(names) for names in operands]
    for step in path[1:]:
        taken = [left.pop(i) for i in sorted(step, reverse=True)]
        used = set().union(*taken)
        stays = used & set(result).union(*left)
        left.append(stays)
        yield used, stays != used, len(taken)


def _tensor(call: Call, position: int, name: str) -> int:
    ref = call.args[position] if position < len(call.args) else call.kwargs[name]
    return int(ref.index)


_COMPOSITES: dict[str, CallCounter] = {
    "adaptive_avg_pool1d": _uncounted,
    "adaptive_avg_pool2d": _adaptive_pool,
    "adaptive_avg_pool3d": _uncounted,
    "adaptive_max_pool2d": _uncounted,
    "chain_matmul": _uncounted,
    "einsum": _einsum,
    "inner": _uncounted,
    "instance_norm": _instance_norm,
    "linalg_matrix_power": _uncounted,
    "linalg_multi_dot": _uncounted,
    "matmul": _matmul,
    "matrix_power": _uncounted,
    "rmatmul": _matmul,
    "scaled_dot_product_attention": _uncounted,
    "tensordot": _uncounted,
}


def _as_printed(count: int) -> int:
    """Half of a count that numpy's report adds one to and prints with four digits."""
    return math.floor(float(f"{count + 1:.3e}") / 2)


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
        known: dict[int, int] = {}
        members: list[np.ndarray] = []
        ids: list[tuple[int, ...]] = []
        for term in terms:
            for label in term.axes:
                if id(label) in known:
                    continue
                of = unit_of_slot[label]
                known[id(label)] = axis = axes.setdefault(of.tobytes(), len(members))
                if axis == len(members):
                    members.append(of)
            ids.append(tuple([known[id(label)] for label in term.axes]))
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
        self._printed = np.array([term.printed for term in terms], dtype=bool)
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
        flops = self._factor * self.counts(kept)[self._axes].prod(axis=1)
        flops[self._printed] = [_as_printed(n) for n in flops[self._printed].tolist()]
        return flops

    def flops(self, kept: np.ndarray) -> int:
        """Total FLOPs when the units with `kept` true are kept."""
        return int(self.per_term(kept).sum())

    def added(self, kept: np.ndarray, unit: int) -> int:
        """FLOPs that one more unit would cost."""
        more = kept.copy()
        more[unit] = True
        return self.flops(more) - self.flops(kept)

    def added_each(self, kept: np.ndarray) -> np.ndarray:
        """FLOPs that each single further unit would cost; exact where a call has no more than two axes.

        An `einsum`, whose count fvcore rounds, is taken as it is before that.
        """
        grid = self.counts(kept)[self._axes]
        factor = self._factor // (1 + self._printed)
        slope = np.zeros(len(self.fixed) + 1, dtype=np.int64)
        for d in range(self._axes.shape[1]):
            others = np.delete(grid, d, axis=1).prod(axis=1)
            np.add.at(slope, self._axes[:, d], factor * others)
        both = np.array([factor[t] * np.delete(grid[t], dims).prod() for t, dims in self._shared_terms], dtype=np.int64)
        return np.asarray(self._transpose @ slope[:-1] + self._shared @ both)

    def _share(self) -> None:
        """Units that lie on two axes of one call (a convolution within a stream): their counts multiply."""
        self._shared_terms: list[tuple[int, tuple[int, int]]] = []
        products: list[tuple[np.ndarray, np.ndarray]] = []
        pointer, units, times = (getattr(self.incidence, name) for name in ("indptr", "indices", "data"))
        some = np.diff(pointer) > 0
        first, last = np.full(len(self.fixed) + 1, self.incidence.shape[1]), np.full(len(self.fixed) + 1, -1)
        first[:-1][some] = units[pointer[:-1][some]]  # the units of an axis are in ascending order
        last[:-1][some] = units[pointer[1:][some] - 1]
        for dims in itertools.combinations(range(self._axes.shape[1]), 2):
            one, other = (self._axes[:, d] for d in dims)
            for t in np.flatnonzero((first[one] <= last[other]) & (first[other] <= last[one])).tolist():
                a, b = (slice(pointer[k], pointer[k + 1]) for k in (one[t], other[t]))
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
