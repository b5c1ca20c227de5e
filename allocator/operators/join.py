"""Operators where branches meet: concatenation and stacking."""

from __future__ import annotations

import numpy as np

from allocator.flow.flow import Flow
from allocator.flow.labels import Label
from allocator.operators.pointwise import adopt
from allocator.tracing.calls import Op
from allocator.tracing.operators import operator


@operator("cat", "concat")
def concatenate(flow: Flow, op: Op) -> None:
    """Labels follow one another along the dim; on the other dims the parts must agree."""
    inputs = [i for i in op.inputs() if flow.shape(i) != (0,)]
    out = flow.shape(op.outputs[0])
    dim = int(op.arg("dim") or 0) % len(out)
    _told_by_reader(flow, op, inputs, dim)
    result = [
        _joined(flow, op, inputs, dim) if d == dim else flow.unify_all([flow.labels(i)[d] for i in inputs], op)
        for d in range(len(out))
    ]
    flow.set(op.outputs[0], result)


def _told_by_reader(flow: Flow, op: Op, inputs: list[int], dim: int) -> None:
    """A part that is the same everywhere (a first state of zeros) has the channels that a layer reads of it next."""
    open_parts = [i for i in inputs if i in flow.uniform and flow.labels(i)[dim] is None]
    reads = [flow.reads_channels(user, op.outputs[0], dim) for user in flow.users.get(op.outputs[0], ())]
    label = next((label for label in reads if label is not None), None)
    if not open_parts or label is None:
        return
    starts = np.cumsum([0, *(flow.shape(i)[dim] for i in inputs)])
    for i, start in zip(inputs, starts, strict=False):
        if i in open_parts:
            part = label[start : start + flow.shape(i)[dim]]
            adopt(flow, op, i, [part, *[None] * (len(flow.shape(i)) - 1 - dim)])


def _joined(flow: Flow, op: Op, inputs: list[int], dim: int) -> Label:
    parts = [flow.labels(i)[dim] for i in inputs]
    if all(part is None for part in parts):
        return None
    fixed = [np.zeros(flow.shape(i)[dim], dtype=np.int64) for i in inputs]
    joined = np.concatenate([f if part is None else part for part, f in zip(parts, fixed, strict=True)])
    if len(inputs) > 1:
        flow.join("concat", op, dim, inputs)
        flow.floor(joined, op)
    return joined


@operator("stack")
def stack(flow: Flow, op: Op) -> None:
    """A new dim; the parts must agree on all others."""
    inputs = op.inputs()
    rank = len(flow.shape(op.outputs[0]))
    dim = int(op.arg("dim") or 0) % rank
    labels = [flow.unify_all([flow.labels(i)[d] for i in inputs], op) for d in range(rank - 1)]
    for d, label in enumerate(labels):
        if label is not None and len(inputs) > 1:
            flow.join("stack", op, d, inputs)
    flow.set(op.outputs[0], [*labels[:dim], None, *labels[dim:]])


@operator("block_diag")
def block_diagonal(flow: Flow, op: Op) -> None:
    """Matrices one after the other in rows and in columns, with zeros around them."""
    inputs = list(op.inputs())
    if any(len(flow.shape(i)) != 2 for i in inputs):
        flow.refuse(op, "blocks that are no matrices")
        return
    flow.set(op.outputs[0], [_joined(flow, op, inputs, dim) for dim in (0, 1)])
