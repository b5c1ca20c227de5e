"""Normalisation layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from allocator.cost.terms import Product, elements
from allocator.flow.facts import JOINT
from allocator.flow.flow import Flow
from allocator.flow.labels import Label
from allocator.tracing.calls import Op
from allocator.tracing.meta_kernels import empty, like
from allocator.tracing.operators import AS_ONE_CALL, operator


def _batch_norm_flops(flow: Flow, op: Op) -> list[Product]:
    per_element = 4 if op.arg("training") else 1
    return [elements(flow, op.inputs()[0], per_element + (op.arg("weight") is not None))]


def _norm_flops(flow: Flow, op: Op) -> list[Product]:
    return [elements(flow, op.inputs()[0], 4 + (op.arg("weight") is not None))]


def _as_large_as_its_input(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return like(x, x.dtype)


def _with_statistics(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return like(x, x.dtype), empty([x.shape[1]], x.dtype), empty([x.shape[1]], x.dtype)


def _batch_norm_as_one_call(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Any, tuple[Any, ...]] | None:
    """`torch.nn.functional.batch_norm`; None on values, where sizes differ, and in train mode on one number each."""
    statistics = (weight, bias, running_mean, running_var)
    plain = input.is_meta and running_mean is not None and running_var is not None
    plain = plain and input.dim() > 1 and not (training and input.numel() == input.shape[1])
    if not plain or any(t is not None and t.shape != input.shape[1:2] for t in statistics):
        return None
    return torch.ops.aten.batch_norm.default, (input, *statistics, training, momentum, eps, False)


AS_ONE_CALL[functional.batch_norm] = _batch_norm_as_one_call


@operator("batch_norm", flops=_batch_norm_flops, on_meta=_as_large_as_its_input)
@operator("native_batch_norm", flops=_batch_norm_flops, on_meta=_with_statistics)
@operator(
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    flops=_batch_norm_flops,
)
@operator("_batch_norm_no_update", "_batch_norm_with_update")
def batch_norm(flow: Flow, op: Op) -> None:
    """Every channel (dim 1) is normalised alone; its scale and shift, mean and variance go with it."""
    x = op.inputs()[0]
    labels = flow.labels(x)
    weight = op.arg("weight")
    for ref in (weight, op.arg("bias"), op.arg("running_mean"), op.arg("running_var")):
        if ref is not None:
            flow.unify(labels[1], flow.labels(ref.index)[0], op)
    if weight is not None:
        flow.note_gamma(weight.index)
    if flow.statistics_from_batch(op):
        for dim in (0, *range(2, len(labels))):
            flow.freeze(labels[dim], op, JOINT)
    flow.set(op.outputs[0], labels)
    for index in op.outputs[1:]:
        if flow.shape(index) == flow.shape(op.inputs()[0])[1:2]:
            flow.set(index, [labels[1]])


@operator("native_layer_norm", flops=_norm_flops, sized=True)
@operator("rms_norm", recent=("_fused_rms_norm",))
def layer_norm(flow: Flow, op: Op) -> None:
    """The trailing dims are normalised together, by averages over them."""
    labels = list(flow.labels(op.inputs()[0]))
    rank = len(op.arg("normalized_shape"))
    for offset, dim in enumerate(range(len(labels) - rank, len(labels))):
        for name in ("weight", "bias"):
            ref = op.arg(name)
            if ref is not None:
                flow.unify(labels[dim], flow.labels(ref.index)[offset], op)
        flow.average(labels[dim], op, JOINT)
    flow.set(op.outputs[0], labels)
    for averages in op.outputs[1:]:
        if len(flow.shape(averages)) == len(labels):
            flow.set(averages, [*labels[: len(labels) - rank], *[None] * rank])


@operator("native_group_norm", flops=_norm_flops, sized=True)
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
        if flow.options.norms == "loose":
            flow.tie(grouped, grouped[:1], op)
        else:
            _whole_groups(flow, op, grouped)
    for label in labels[2:]:
        flow.freeze(label, op, "statistics are taken over this dim")
    flow.set(op.outputs[0], labels)


def _whole_groups(flow: Flow, op: Op, grouped: np.ndarray) -> None:
    """Each row of channels stays or goes as one, with its mean and deviation; a single row is normalised together."""
    if len(grouped) == 1:
        flow.average(grouped[0], op, JOINT)
        if flow.options.grows:  # its channels become more, and it stays one group
            return
    else:
        flow.tie(grouped, grouped[:, :1], op)
        flow.group(op, op.arg("weight"), grouped[:, 0])
    for index in op.outputs[1:]:
        flow.set(index, [flow.labels(op.inputs()[0])[0], grouped[:, 0]])


@operator("_weight_norm_interface")
def weight_norm(flow: Flow, op: Op) -> None:
    """Direction and length of a weight: along one dim an index goes with its length, which is of all the others."""
    direction, length = op.inputs()
    labels = list(flow.labels(direction))
    dim = int(op.arg("dim")) % len(labels)
    flow.unify(labels[dim], flow.labels(length)[dim], op)
    _length_of_all_but(flow, op, labels, dim)
    flow.set(op.outputs[0], labels)
    flow.set(op.outputs[1], [labels[dim] if d == dim else None for d in range(len(labels))])


@operator("renorm")
def renorm(flow: Flow, op: Op) -> None:
    """Along one dim each index is shortened alone where its length, which is of all the others, is too large."""
    labels = list(flow.labels(op.inputs()[0]))
    _length_of_all_but(flow, op, labels, int(op.arg("dim")) % len(labels))
    flow.set(op.outputs[0], labels)


def _length_of_all_but(flow: Flow, op: Op, labels: list[Label], dim: int) -> None:
    if flow.options.norms != "loose":  # twice as many inputs make it longer
        for other in (*labels[:dim], *labels[dim + 1 :]):
            flow.freeze(other, op, JOINT)
