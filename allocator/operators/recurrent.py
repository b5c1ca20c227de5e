"""Recurrent layers that a device runs as one call, and sequences of several lengths packed for them."""

from __future__ import annotations

from allocator.flow.flow import Flow
from allocator.flow.labels import Label
from allocator.operators.contraction import sum_over
from allocator.operators.pointwise import adopt
from allocator.tracing.calls import Op
from allocator.tracing.operators import operator

_GATES = 4


@operator("mkldnn_rnn_layer", sized=True)
def lstm_layer(flow: Flow, op: Op) -> None:
    """An LSTM in one direction: four gates of the same units, which the state carries from step to step."""
    x, reads, recurs, *biases, state, cell = op.inputs()
    written, read = flow.labels(reads)
    rows, columns = flow.labels(recurs)
    sum_over(flow, op, (x, flow.labels(x)[-1]), (reads, read))
    sum_over(flow, op, (state, flow.labels(state)[-1]), (recurs, columns))
    flow.produce(written, op, reads)
    flow.produce(rows, op, recurs)
    flow.unify(written, rows, op)
    for bias in biases:
        _meets(flow, op, bias, written)
    units: Label = None
    if written is not None:
        gates = written.reshape(_GATES, -1)
        units = gates[0]
        flow.tie(gates, gates[:1], op)
    flow.unify(units, columns, op)
    _meets(flow, op, cell, units)
    for value in op.outputs[:3]:
        flow.set(value, [*[None] * (len(flow.shape(value)) - 1), units])


def _meets(flow: Flow, op: Op, value: int, label: Label) -> None:
    """The last dim of a value is these channels."""
    if value in flow.uniform:
        adopt(flow, op, value, [label])
    else:
        flow.unify(label, flow.labels(value)[-1], op)


@operator("_pack_padded_sequence")
def pack(flow: Flow, op: Op) -> None:
    """Steps of all sequences one after the other, without those beyond their ends; channels pass."""
    steps, sizes = op.outputs
    flow.set(steps, [None, *flow.labels(op.inputs()[0])[2:]])
    flow.set(sizes, [None])
