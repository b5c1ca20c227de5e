"""Reductions, and operators that mix all indices of a dim."""

from __future__ import annotations

import torch

from allocator.flow.flow import Flow
from allocator.flow.labels import Label
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


@operator(
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
