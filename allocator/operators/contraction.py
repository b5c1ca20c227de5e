"""Convolutions, matrix products and embeddings: they read one set of neurons and write another."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from allocator.cost.terms import Product, elements, times
from allocator.flow.flow import Flow
from allocator.flow.labels import Label
from allocator.flow.vanishing import vanishes
from allocator.operators.pointwise import adopt
from allocator.tracing.calls import Op
from allocator.tracing.meta_kernels import empty
from allocator.tracing.operators import AS_ONE_CALL, operator

_ATEN = torch.ops.aten
AsOneCall = tuple[Any, tuple[Any, ...]]
"""An ATen call: its overload and its arguments."""


# Convolutions ---------------------------------------------------------------------------------------


def _convolution_flops(flow: Flow, op: Op) -> list[Product]:
    x, weight = op.inputs()[:2]
    run = flow.shape(x if op.arg("transposed") else op.outputs[0])
    pixels = _REAL_ONES if flow.trace.values[weight].dtype.is_complex else 1
    for size in run[2:]:
        pixels *= size
    return [times(elements(flow, x, pixels, slice(0, 1)), elements(flow, weight))]


_REAL_ONES = 3  # convolutions that one of complex numbers is made of, by Gauss's way to multiply them


def _convolution_window(flow: Flow, op: Op) -> tuple[Any, Any, Any]:
    stride = op.arg("stride")
    if op.arg("transposed"):
        stride = [1 / n for n in stride]
    return flow.shape(op.inputs()[1])[2:], stride, op.arg("dilation")


def _convolved(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> torch.Tensor | None:
    """What a plain convolution gives on meta tensors; None where it is of another sort, or does not fit.

    Raises:
        RuntimeError: it does not fit, and torch sees that on values alone.
    """
    if transposed and x.shape[1] != weight.shape[0]:
        raise RuntimeError(f"a weight of {weight.shape[0]} input channels is given {x.shape[1]} channels")
    if bias is not None and bias.numel() != weight.shape[int(transposed)] * (groups if transposed else 1):
        raise RuntimeError(f"a weight of shape {tuple(weight.shape)} is given a bias of {bias.numel()} numbers")
    plain = not transposed and x.dim() == weight.dim() and x.is_contiguous() and weight.is_contiguous()
    if not plain or x.dtype != weight.dtype or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return None
    if bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1]):
        return None
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=False)
    sides = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    if len(sides) != x.dim() - 2 or min(sides, default=0) < 1:
        return None
    return empty([x.shape[0], weight.shape[0], *sides], x.dtype)


def _convolved_with_flags(*args: Any) -> torch.Tensor:
    """As `aten.convolution`, whose arguments end in flags for the choice of a kernel; torch 2.6 has none for meta."""
    plain = _convolved(*args[:9])
    result: torch.Tensor = _ATEN.convolution.default(*args[:9]) if plain is None else plain
    return result


def _convolution_as_one_call(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> AsOneCall | None:
    """`torch.conv2d` and its like.

    None on values, unless each dim is given its own sizes, and where dtypes differ, which torch sees before that call.
    """
    sides = input.dim() - 2
    if any(type(size) is not tuple or len(size) != sides for size in (stride, padding, dilation)):
        return None
    if not all(t is None or (t.is_meta and t.dtype == weight.dtype) for t in (input, weight, bias)):
        return None
    sizes = ([*stride], [*padding], [*dilation], False, [0] * sides, groups)
    return _ATEN.convolution.default, (input, weight, bias, *sizes)


for _function in (torch.conv1d, torch.conv2d, torch.conv3d):
    AS_ONE_CALL[_function] = _convolution_as_one_call


_CONVOLUTION: dict[str, Any] = {
    "flops": _convolution_flops,
    "multiplies": (0, 1),
    "read_dim": 1,
    "written_dim": 1,
    "window": _convolution_window,
    "sized": True,
    "drawn_as": "conv",
}


@operator("convolution", on_meta=_convolved, **_CONVOLUTION)
@operator("_convolution", on_meta=_convolved_with_flags, **_CONVOLUTION)
@operator("mkldnn_convolution", **_CONVOLUTION)
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


def _gradient_flops(flow: Flow, op: Op) -> list[Product]:
    """Of the gradient of what was read, as torch's own counter has it; fvcore cannot count a forward that takes one."""
    grad, _, weight = op.inputs()[:3]
    return [times(elements(flow, grad, math.prod(flow.shape(grad)[2:]), slice(0, 1)), elements(flow, weight))]


@operator("convolution_backward", flops=_gradient_flops, multiplies=(0, 2), sized=True)
def convolution_backward(flow: Flow, op: Op) -> None:
    """The gradient of what a convolution read: that of what it gave (dim 1) is contracted with the weight."""
    grad, x, weight = op.inputs()[:3]
    if int(op.arg("groups")) > 1 or op.arg("transposed") or list(op.arg("output_mask")) != [True, False, False]:
        flow.refuse(op, "the gradient of a weight, or of a convolution with groups")
        return
    written, read = flow.labels(weight)[:2]
    sum_over(flow, op, (grad, flow.labels(grad)[1]), (weight, written))
    flow.freeze_all([*flow.labels(grad)[2:], *flow.labels(x)[2:]], op, "a convolution runs along this dim")
    batch = flow.unify_all([flow.labels(grad)[0], flow.labels(x)[0]], op)
    channels = flow.unify_all([flow.labels(x)[1], read], op)
    flow.set(op.outputs[0], [batch, channels, *[None] * (len(flow.shape(x)) - 2)])


def _grouped(flow: Flow, op: Op, x: int, weight: int, groups: int, transposed: bool) -> Label:
    """Tie what a grouped convolution needs tied; return the labels of its output channels.

    With `groups="width"` every group keeps the same places, else all inputs and outputs of a group go together. A
    depthwise convolution has groups of one input either way.
    """
    source = flow.labels(x)[1]
    if source is not None and groups == len(source) == flow.shape(weight)[0] and flow.is_repeated(weight, 0):
        flow.repeat(weight, 0, source, op)  # one kernel for all channels
    w0, w1 = flow.labels(weight)[:2]
    per_out = flow.shape(op.outputs[0])[1] // groups
    if source is None or w0 is None:
        flow.freeze(source, op, "a grouped convolution reads channels that must stay")
        flow.freeze(w0, op, "a grouped convolution reads channels that must stay")
        return None if transposed else w0
    inputs, rows = source.reshape(groups, -1), w0.reshape(groups, -1)
    if inputs.shape[1] > 1 and (inputs == inputs[0]).all() and (rows == rows[0]).all() and not transposed:
        flow.contract(inputs[0], w1, op, weight)  # samples side by side, each with a kernel of its own
        return w0
    if inputs.shape[1] > 1:
        flow.join("groups", op, 1, [x])
    if flow.options.groups != "width" or inputs.shape[1] == 1:
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


# Matrix products ------------------------------------------------------------------------------------


def _product_flops(flow: Flow, op: Op) -> list[Product]:
    """Rows times what is summed over times columns, as fvcore counts it."""
    a, b = (op.inputs()[i] for i in op.declared.multiplies)
    return [times(elements(flow, a), elements(flow, b, dims=slice(-1, None)))]


@operator("mm", flops=_product_flops, multiplies=(0, 1), read_dim=0, written_dim=-1, drawn_as="linear")
@operator("_int_mm")
def matrix_product(flow: Flow, op: Op) -> None:
    """(n, k) @ (k, m): the k are one set of neurons."""
    a, b = op.inputs()
    _product(flow, op, a, b)


@operator("addmm", flops=_product_flops, multiplies=(1, 2), read_dim=0, written_dim=-1, drawn_as="linear")
def biased_matrix_product(flow: Flow, op: Op) -> None:
    """bias + (n, k) @ (k, m)."""
    bias, a, b = op.inputs()
    _product(flow, op, a, b)
    _add_bias(flow, op, bias)


def _product(flow: Flow, op: Op, a: int, b: int) -> None:
    (rows, inner_a), (inner_b, columns) = flow.labels(a), flow.labels(b)
    flow.multiply(a, b)
    sum_over(flow, op, (a, inner_a), (b, inner_b))
    flow.produce(columns, op, b)
    flow.produce(rows, op, a)
    flow.set(op.outputs[0], [rows, columns])


def sum_over(flow: Flow, op: Op, a: tuple[int, Label], b: tuple[int, Label]) -> None:
    """Sum over one dim of two operands, on either side of which a parameter may stand and read neurons."""
    (value, x), (weight_value, weight) = (b, a) if flow.is_activation(b[0]) else (a, b)
    last = value == a[0] or len(flow.shape(value)) == 1
    if x is None and weight is not None and last and value in flow.uniform and not flow.is_activation(weight_value):
        adopt(flow, op, value, [weight])  # the first state of a recurrent layer
        x = weight
    flow.contract(x, weight, op, weight_value)
    both = x is not None and weight is not None and flow.is_activation(weight_value)
    if both and not (vanishes(flow, value, x) or vanishes(flow, weight_value, weight)):  # type: ignore[arg-type]
        flow.freeze(weight, op, "products are summed that are not zero where these channels are")


def _linear_flops(flow: Flow, op: Op) -> list[Product]:
    x, weight = op.inputs()[:2]
    return [times(elements(flow, x), elements(flow, weight, dims=slice(0, 1)))]


def _multiplied(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
    """What a linear layer gives on meta tensors; None where it does not fit."""
    plain = x.dim() > 1 and weight.dim() == 2 and x.dtype == weight.dtype
    if not plain or x.shape[-1] != weight.shape[1]:
        return None
    if bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1]):
        return None
    return empty([*x.shape[:-1], weight.shape[0]], x.dtype)


def _linear_as_one_call(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> AsOneCall:
    """The parts of `torch.nn.functional.linear` depend on how many dims there are."""
    return _ATEN.linear.default, (input, weight) if bias is None else (input, weight, bias)


AS_ONE_CALL[functional.linear] = _linear_as_one_call


@operator(
    "linear", flops=_linear_flops, multiplies=(0, 1), read_dim=1, written_dim=-1, on_meta=_multiplied, drawn_as="linear"
)
def linear(flow: Flow, op: Op) -> None:
    """(..., k) with a weight (m, k)."""
    x, weight, *bias = op.inputs()
    written, read = flow.labels(weight)
    sum_over(flow, op, (x, flow.labels(x)[-1]), (weight, read))
    flow.produce(written, op, weight)
    flow.set(op.outputs[0], [*flow.labels(x)[:-1], written])
    for index in bias:
        _add_bias(flow, op, index)


def _batched_product_flops(flow: Flow, op: Op) -> list[Product]:
    """Those of a `multi_head_attention_forward` without weights stand for a fused call, which fvcore does not count."""
    call = op.call
    if call is not None and call.name == "multi_head_attention_forward" and not call.kwargs.get("need_weights", True):
        return []
    return _product_flops(flow, op)


@operator("bmm", flops=_batched_product_flops, multiplies=(0, 1), drawn_as="product")
def batched_product(flow: Flow, op: Op) -> None:
    """(b, n, k) @ (b, k, m)."""
    a, b = op.inputs()
    _batched(flow, op, a, b)


@operator("baddbmm", drawn_as="product")
def biased_batched_product(flow: Flow, op: Op) -> None:
    """bias + (b, n, k) @ (b, k, m)."""
    bias, a, b = op.inputs()
    _batched(flow, op, a, b)
    _add_bias(flow, op, bias)


def _batched(flow: Flow, op: Op, a: int, b: int) -> None:
    (batch_a, rows, inner_a), (batch_b, inner_b, columns) = flow.labels(a), flow.labels(b)
    flow.multiply(a, b)
    batch = flow.unify_all([batch_a, batch_b], op)
    sum_over(flow, op, (a, inner_a), (b, inner_b))
    flow.produce(columns, op, b)
    flow.produce(rows, op, a)
    flow.set(op.outputs[0], [batch, rows, columns])


@operator("mv")
def matrix_vector(flow: Flow, op: Op) -> None:
    """(n, k) @ (k)."""
    a, b = op.inputs()
    rows, inner = flow.labels(a)
    sum_over(flow, op, (a, inner), (b, flow.labels(b)[0]))
    flow.produce(rows, op, a)
    flow.set(op.outputs[0], [rows])


@operator("dot", "vdot")
def inner_product(flow: Flow, op: Op) -> None:
    """(k) @ (k)."""
    a, b = op.inputs()
    sum_over(flow, op, (a, flow.labels(a)[0]), (b, flow.labels(b)[0]))
    flow.set(op.outputs[0], [])


@operator("_trilinear")
def three_way_product(flow: Flow, op: Op) -> None:
    """Three tensors, spread over common dims, multiplied and summed over some of these: `torch.nn.Bilinear`."""
    inputs, spread = op.inputs(), [set(op.arg(f"expand{i}")) for i in (1, 2, 3)]
    rank = len(flow.shape(inputs[0])) + len(spread[0])
    result: list[Label] = []
    for dim in range(rank):
        there = [
            (i, sum(d not in new for d in range(dim))) for i, new in zip(inputs, spread, strict=True) if dim not in new
        ]
        labels = [(i, flow.labels(i)[own]) for i, own in there]
        if dim in op.arg("sumdim"):
            for other in labels[1:]:
                sum_over(flow, op, labels[0], other)
        else:
            result.append(flow.unify_all([label for _, label in labels], op))
            for i, label in labels:
                flow.produce(label, op, i)
    flow.set(op.outputs[0], result)


def _add_bias(flow: Flow, op: Op, bias: int) -> None:
    out = flow.labels(op.outputs[0])
    shape, own = flow.shape(op.outputs[0]), flow.shape(bias)
    for back in range(1, len(own) + 1):
        if own[-back] == shape[-back]:
            flow.unify(out[-back], flow.labels(bias)[-back], op)


@operator("embedding")
def embedding(flow: Flow, op: Op) -> None:
    """Rows of a table: the row index stays, its columns are neurons."""
    weight, indices = op.inputs()
    entries, features = flow.labels(weight)
    flow.freeze(entries, op, "rows of an embedding are read by their index")
    flow.produce(features, op, weight)
    flow.set(op.outputs[0], [*flow.labels(indices), features])


@operator("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(flow: Flow, op: Op) -> None:
    """Rows of a table, of each bag their sum, mean or largest: as for `embedding`."""
    weight = op.inputs()[0]
    entries, features = flow.labels(weight)
    flow.freeze(entries, op, "rows of an embedding are read by their index")
    flow.produce(features, op, weight)
    for index in op.outputs:
        shape = flow.shape(index)
        flow.set(index, [None, features] if len(shape) == 2 and features is not None else [None] * len(shape))
