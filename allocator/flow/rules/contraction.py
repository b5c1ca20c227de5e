"""Convolutions, matrix products and embeddings: they read one set of neurons and write another."""

from __future__ import annotations

import numpy as np

from allocator.flow.flow import Flow, Label
from allocator.flow.rules.registry import rule
from allocator.tracing.record import Op


@rule("convolution", "_convolution", "mkldnn_convolution")
def convolution(flow: Flow, op: Op) -> None:
    """Input channels (dim 1) are contracted with the weight; output channels are the weight's own."""
    x, weight = op.inputs()[:2]
    transposed = bool(op.arg("transposed") or False)
    w0, w1 = flow.labels(weight)[:2]
    groups = int(op.arg("groups"))
    if groups == 1:
        read, written = (w0, w1) if transposed else (w1, w0)
        flow.contract(flow.labels(x)[1], read, op, weight)
    else:
        written = _grouped(flow, op, x, weight, groups, transposed)
    shape = flow.shape(op.outputs[0])
    flow.produce(written, op, weight)
    if op.arg("bias") is not None:
        flow.unify(written, flow.labels(op.arg("bias").index)[0], op)
    spatial: list[Label] = [None] * (len(shape) - 2)
    for label in flow.labels(x)[2:]:
        flow.freeze(label, op, "a convolution runs along this dim")
    flow.set(op.outputs[0], [flow.labels(x)[0], written, *spatial])


def _grouped(flow: Flow, op: Op, x: int, weight: int, groups: int, transposed: bool) -> Label:
    """Tie what a grouped convolution needs tied; return the labels of its output channels.

    With `groups="whole"` all inputs and outputs of a group go together. With `groups="width"` every
    group keeps the same places. A depthwise convolution has groups of one input either way.
    """
    source = flow.labels(x)[1]
    w0, w1 = flow.labels(weight)[:2]
    per_out = flow.shape(op.outputs[0])[1] // groups
    if source is None or w0 is None:
        flow.freeze(source, op, "a grouped convolution reads channels that must stay")
        flow.freeze(w0, op, "a grouped convolution reads channels that must stay")
        return None if transposed else w0
    inputs, rows = source.reshape(groups, -1), w0.reshape(groups, -1)
    if inputs.shape[1] > 1:
        flow.join("groups", op, 1, [x])
    if flow.groups == "whole" or inputs.shape[1] == 1:
        flow.tie(inputs, inputs[:, :1], op)
        flow.tie(rows, inputs[:, :1], op)
        flow.group(op, op.arg("weight"), inputs[:, 0])
        return np.repeat(rows[:, 0], per_out) if transposed else w0
    flow.tie(inputs, inputs[:1], op)
    if transposed:
        flow.contract(source, w0, op, weight)
        return None if w1 is None else np.tile(w1, groups)
    flow.contract(inputs[0], w1, op, weight)
    flow.tie(rows, rows[:1], op)
    return w0


@rule("mm", "_int_mm")
def matrix_product(flow: Flow, op: Op) -> None:
    """(n, k) @ (k, m): the k are one set of neurons."""
    a, b = op.inputs()
    _product(flow, op, a, b)


@rule("addmm")
def biased_matrix_product(flow: Flow, op: Op) -> None:
    """bias + (n, k) @ (k, m)."""
    bias, a, b = op.inputs()
    _product(flow, op, a, b)
    _add_bias(flow, op, bias)


def _product(flow: Flow, op: Op, a: int, b: int) -> None:
    (rows, inner_a), (inner_b, columns) = flow.labels(a), flow.labels(b)
    flow.multiply(a, b)
    _contract(flow, op, (a, inner_a), (b, inner_b))
    flow.produce(columns, op, b)
    flow.produce(rows, op, a)
    flow.set(op.outputs[0], [rows, columns])


def _contract(flow: Flow, op: Op, a: tuple[int, Label], b: tuple[int, Label]) -> None:
    """Sum over one dim of two operands, on either side of which a parameter may stand and read neurons."""
    (_, x), (weight_value, weight) = (b, a) if b[0] in flow.active else (a, b)
    flow.contract(x, weight, op, weight_value)


@rule("linear")
def linear(flow: Flow, op: Op) -> None:
    """(..., k) with a weight (m, k)."""
    x, weight, *bias = op.inputs()
    written, read = flow.labels(weight)
    flow.contract(flow.labels(x)[-1], read, op, weight)
    flow.produce(written, op, weight)
    flow.set(op.outputs[0], [*flow.labels(x)[:-1], written])
    for index in bias:
        _add_bias(flow, op, index)


@rule("bmm")
def batched_product(flow: Flow, op: Op) -> None:
    """(b, n, k) @ (b, k, m)."""
    a, b = op.inputs()
    _batched(flow, op, a, b)


@rule("baddbmm")
def biased_batched_product(flow: Flow, op: Op) -> None:
    """bias + (b, n, k) @ (b, k, m)."""
    bias, a, b = op.inputs()
    _batched(flow, op, a, b)
    _add_bias(flow, op, bias)


def _batched(flow: Flow, op: Op, a: int, b: int) -> None:
    (batch_a, rows, inner_a), (batch_b, inner_b, columns) = flow.labels(a), flow.labels(b)
    flow.multiply(a, b)
    batch = flow.unify_all([batch_a, batch_b], op)
    _contract(flow, op, (a, inner_a), (b, inner_b))
    flow.produce(columns, op, b)
    flow.produce(rows, op, a)
    flow.set(op.outputs[0], [batch, rows, columns])


@rule("mv")
def matrix_vector(flow: Flow, op: Op) -> None:
    """(n, k) @ (k)."""
    a, b = op.inputs()
    rows, inner = flow.labels(a)
    _contract(flow, op, (a, inner), (b, flow.labels(b)[0]))
    flow.produce(rows, op, a)
    flow.set(op.outputs[0], [rows])


@rule("dot", "vdot")
def inner_product(flow: Flow, op: Op) -> None:
    """(k) @ (k)."""
    a, b = op.inputs()
    _contract(flow, op, (a, flow.labels(a)[0]), (b, flow.labels(b)[0]))
    flow.set(op.outputs[0], [])


def _add_bias(flow: Flow, op: Op, bias: int) -> None:
    out = flow.labels(op.outputs[0])
    shape, own = flow.shape(op.outputs[0]), flow.shape(bias)
    for back in range(1, len(own) + 1):
        if own[-back] == shape[-back]:
            flow.unify(out[-back], flow.labels(bias)[-back], op)


@rule("embedding")
def embedding(flow: Flow, op: Op) -> None:
    """Rows of a table: the row index stays, its columns are neurons."""
    weight, indices = op.inputs()
    entries, features = flow.labels(weight)
    flow.freeze(entries, op, "rows of an embedding are read by their index")
    flow.produce(features, op, weight)
    flow.set(op.outputs[0], [*flow.labels(indices), features])
