"""Reductions, and operators that mix all indices of a dim."""

from __future__ import annotations

from allocator.flow.flow import Flow, Label
from allocator.flow.rules.registry import rule
from allocator.tracing.record import Op


@rule(
    "mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "prod", "logsumexp",
    "linalg_vector_norm", "norm", "argmax", "argmin", "any", "all", "median", "aminmax", "nansum", "count_nonzero",
)  # fmt: skip
def reduce(flow: Flow, op: Op) -> None:
    """Reduced dims must stay, the others pass."""
    source = op.inputs()[0]
    labels = flow.labels(source)
    if len(op.inputs()) == 2:
        flow.refuse(op, "a reduction of two tensors")
        return
    dims = op.arg("dim")
    dims = [dims] if isinstance(dims, int) else dims
    reduced = {d % len(labels) for d in dims} if dims else set(range(len(labels)))
    for d in reduced:
        flow.freeze(labels[d], op, "a reduction runs over these channels")
    kept: list[Label] = [label for d, label in enumerate(labels) if d not in reduced]
    if len(flow.shape(op.outputs[0])) == len(labels):
        kept = [None if d in reduced else label for d, label in enumerate(labels)]
    for index in op.outputs:
        flow.set(index, kept)


@rule(
    "_softmax",
    "_log_softmax",
    "_safe_softmax",
    "softmax",
    "log_softmax",
    "cumsum",
    "cumprod",
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
