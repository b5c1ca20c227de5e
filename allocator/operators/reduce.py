"""Reductions, and operators that mix all indices of a dim."""

from __future__ import annotations

import torch

from allocator.flow.facts import JOINT
from allocator.flow.flow import Flow
from allocator.flow.labels import Label
from allocator.operators.contraction import sum_over
from allocator.operators.functions import area_flops
from allocator.tracing.calls import Op
from allocator.tracing.meta_kernels import empty
from allocator.tracing.operators import operator


def _averaged(x: torch.Tensor, dims: list[int] | None = None, keepdim: bool = False) -> torch.Tensor | None:
    """What a mean gives on meta tensors; None over all dims, or where the result may lie in memory in another order."""
    if not isinstance(dims, list) or not dims or not x.is_contiguous():
        return None
    gone = {dim % x.dim() for dim in dims}
    return empty([1 if i in gone else n for i, n in enumerate(x.shape) if keepdim or i not in gone], x.dtype)


@operator("mean", flops=area_flops, on_meta=_averaged)
@operator(
    "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "prod", "logsumexp",
    "linalg_vector_norm", "norm", "argmax", "argmin", "any", "all", "median", "aminmax", "nansum", "count_nonzero",
)  # fmt: skip
def reduce(flow: Flow, op: Op) -> None:
    """Reduced dims must stay, unless products are summed; the others pass."""
    source = op.inputs()[0]
    labels = flow.labels(source)
    if len(op.inputs()) == 2:
        flow.refuse(op, "a reduction of two tensors")
        return
    dims = op.arg("dim")
    dims = [dims] if isinstance(dims, int) else dims
    reduced = {d % len(labels) for d in dims} if dims else set(range(len(labels)))
    is_norm = any(labels[d] is not None for d in reduced) and _normalises(flow, op)
    reason = JOINT if is_norm else "a reduction runs over these channels"
    for d in reduced:
        if op.name == "sum" and not flow.options.grows and _product_by_hand(flow, op, source, d):
            continue
        if flow.options.grows and _averages(flow, op):
            flow.average(labels[d], op, reason)
        elif flow.options.norms != "loose" or not is_norm:
            flow.freeze(labels[d], op, reason)
    kept: list[Label] = [label for d, label in enumerate(labels) if d not in reduced]
    if len(flow.shape(op.outputs[0])) == len(labels):
        kept = [None if d in reduced else label for d, label in enumerate(labels)]
    for index in op.outputs:
        flow.set(index, kept)


def _product_by_hand(flow: Flow, op: Op, source: int, dim: int) -> bool:
    """Whether two tensors with these channels were multiplied, which so are contracted: a product written by hand."""
    makers = flow.makers.get(source, ())
    if len(makers) != 1 or makers[0].name != "mul" or len(makers[0].inputs()) != 2:
        return False
    factors = []
    for value in makers[0].inputs():
        own = dim - len(flow.shape(source)) + len(flow.shape(value))
        label = flow.labels(value)[own] if own >= 0 and flow.shape(value)[own] == flow.shape(source)[dim] else None
        if label is None:
            return False
        factors.append((value, label))
    passive = [value for value, _ in factors if not flow.is_activation(value)]
    computed = any(flow.trace.values[flow.trace.root(value)].name is None for value in passive)
    if factors[0][0] == factors[1][0] or len(passive) > 1 or computed:  # exp(weight) is not zero where the weight is
        return False
    sum_over(flow, op, *factors)
    return True


_DEVIATIONS = frozenset({"var", "std", "var_mean", "std_mean"})
_EXTREMES = frozenset({"amax", "amin", "max", "min", "aminmax", "any", "all"})


def _averages(flow: Flow, op: Op) -> bool:
    """Whether the result is the same where every index is there equally often: no sum, and no number of an index."""
    if op.name in _DEVIATIONS:
        return (op.arg("correction") if "correction" in op.operator.arguments else op.arg("unbiased")) in (0, False)
    if op.name in _EXTREMES:
        numbers = op.outputs[1:] if op.name in ("max", "min") else []
        return not any(flow.users.get(value) or value in flow.trace.outputs for value in numbers)
    return op.name == "mean"


# What a norm is written with: a statistic, the way to its scale, and back to the channels.
_STATISTICS = frozenset({"mean", "sum", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm"})
_TO_SCALE = frozenset({"add", "div", "mul", "pow", "sqrt", "rsqrt", "reciprocal", "clamp", "clamp_min", "getitem"})
_BACK = frozenset({"mul", "div", "sub"})


def _normalises(flow: Flow, op: Op) -> bool:
    """Whether a statistic over channels is used for nothing but to shift and scale these channels, as a norm does."""
    if op.name not in _STATISTICS or not op.arg("keepdim"):
        return False
    channels, narrow = flow.shape(op.inputs()[0]), flow.shape(op.outputs[0])
    waiting, seen, back = [*op.outputs], set[int](), False
    while waiting:
        value = waiting.pop()
        if value in flow.trace.outputs:
            return False
        if value in seen:  # a call that works in place gives what it read
            continue
        seen.add(value)
        for later in flow.users.get(value, ()):
            shape, name = flow.shape(later.outputs[0]), later.name.rstrip("_")
            if name in _TO_SCALE and shape == narrow:
                waiting += later.outputs
            elif name not in _BACK or shape != channels:
                return False
            else:
                back = True
    return back


@operator(
    "_softmax",
    "_log_softmax",
    "_safe_softmax",
    "softmax",
    "log_softmax",
    "cumsum",
    "cumprod",
    "cummax",
    "cummin",
    "sort",
    "logcumsumexp",
)
def along_dim(flow: Flow, op: Op) -> None:
    """Every result along the dim depends on all its indices, so they stay."""
    labels = flow.labels(op.inputs()[0])
    if labels:
        flow.freeze(labels[int(op.arg("dim"))], op, "every channel depends on all others here")
    for index in op.outputs:
        flow.set(index, labels)
