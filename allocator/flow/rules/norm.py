"""Normalisation layers."""

from __future__ import annotations

import numpy as np

from allocator.flow.flow import Flow
from allocator.flow.rules.registry import rule
from allocator.tracing.record import Op

_JOINT = "a norm over the channels mixes them all"


@rule(
    "batch_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_batch_norm_no_update",
    "_batch_norm_with_update",
)
def batch_norm(flow: Flow, op: Op) -> None:
    """Every channel (dim 1) is normalised alone; its scale and shift, mean and variance go with it."""
    x = op.inputs()[0]
    labels = flow.labels(x)
    weight = op.arg("weight")
    for ref in (weight, op.arg("bias"), op.arg("running_mean"), op.arg("running_var")):
        if ref is not None:
            flow.unify(labels[1], flow.labels(ref.index)[0], op)
    if weight is not None:
        flow.note_gamma(labels[1], weight.index)
    if flow.statistics_from_batch(op):
        for dim in (0, *range(2, len(labels))):
            flow.freeze(labels[dim], op, _JOINT)
    flow.set(op.outputs[0], labels)
    for index in op.outputs[1:]:
        if flow.shape(index) == flow.shape(op.inputs()[0])[1:2]:
            flow.set(index, [labels[1]])


@rule("native_layer_norm", "rms_norm", recent=("_fused_rms_norm",))
def layer_norm(flow: Flow, op: Op) -> None:
    """The trailing dims are normalised together, so by default they stay."""
    labels = list(flow.labels(op.inputs()[0]))
    rank = len(op.arg("normalized_shape"))
    for offset, dim in enumerate(range(len(labels) - rank, len(labels))):
        for name in ("weight", "bias"):
            ref = op.arg(name)
            if ref is not None:
                flow.unify(labels[dim], flow.labels(ref.index)[offset], op)
        if flow.norms == "exact":
            flow.freeze(labels[dim], op, _JOINT)
    flow.set(op.outputs[0], labels)


@rule("native_group_norm")
def group_norm(flow: Flow, op: Op) -> None:
    """Channels of a group are normalised together: it stays or goes whole, or every group keeps the same places."""
    labels = flow.labels(op.inputs()[0])
    channels, groups = labels[1], int(op.arg("group"))
    for name in ("weight", "bias"):
        ref = op.arg(name)
        if ref is not None:
            flow.unify(channels, flow.labels(ref.index)[0], op)
    if channels is not None:
        grouped = channels.reshape(groups, -1)
        if flow.norms == "loose":
            flow.tie(grouped, grouped[:1], op)
        else:
            _whole_groups(flow, op, grouped)
    for label in labels[2:]:
        flow.freeze(label, op, "statistics are taken over this dim")
    flow.set(op.outputs[0], labels)


def _whole_groups(flow: Flow, op: Op, grouped: np.ndarray) -> None:
    """Each row of channels stays or goes as one, with its mean and deviation; a single row stays."""
    if len(grouped) == 1:
        flow.freeze(grouped[0], op, _JOINT)
    else:
        flow.tie(grouped, grouped[:, :1], op)
        flow.group(op, op.arg("weight"), grouped[:, 0])
    for index in op.outputs[1:]:
        flow.set(index, [flow.labels(op.inputs()[0])[0], grouped[:, 0]])
