"""Operators that work on the trailing (spatial) dims and leave batch and channels alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from allocator.cost.terms import Product, elements
from allocator.flow.flow import Flow
from allocator.flow.labels import Label
from allocator.operators.functions import area_flops
from allocator.tracing.calls import Op
from allocator.tracing.meta_kernels import empty
from allocator.tracing.operators import operator


def _pool_window(flow: Flow, op: Op) -> tuple[Any, Any, Any]:
    return op.arg("kernel_size"), op.arg("stride") or op.arg("kernel_size"), 1


def _nearest_flops(flow: Flow, op: Op) -> list[Product]:
    return [elements(flow, op.outputs[0])]


def _bilinear_flops(flow: Flow, op: Op) -> list[Product]:
    return [elements(flow, op.outputs[0], 4)]


def _resampled(x: torch.Tensor, size: list[int] | None, *_: Any) -> torch.Tensor | None:
    """What a change of the sides gives on meta tensors; None where the result may lie in memory in another order."""
    if size is None or x.dim() != 4 or not x.is_contiguous():
        return None
    return empty([x.shape[0], x.shape[1], *size], x.dtype)


@operator("max_pool2d_with_indices", "max_pool3d_with_indices", window=_pool_window, drawn_as="max pool")
@operator("avg_pool1d", "avg_pool2d", "avg_pool3d", window=_pool_window, drawn_as="average pool")
@operator("max_pool2d", "max_pool3d", drawn_as="max pool")
@operator("_adaptive_avg_pool2d", flops=area_flops, drawn_as="adaptive average pool")
@operator("_adaptive_avg_pool3d", drawn_as="adaptive average pool")
@operator("upsample_nearest2d", flops=_nearest_flops, on_meta=_resampled, drawn_as="upsample")
@operator("upsample_bilinear2d", flops=_bilinear_flops, on_meta=_resampled, drawn_as="upsample")
@operator(
    "upsample_nearest1d", "upsample_nearest3d", "upsample_linear1d", "upsample_trilinear3d", "upsample_bicubic2d",
    drawn_as="upsample",
)  # fmt: skip
@operator(
    "adaptive_max_pool2d", "adaptive_max_pool3d", "adaptive_avg_pool1d", "fractional_max_pool2d",
    "fractional_max_pool3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "replication_pad1d", "replication_pad2d", "replication_pad3d",
)  # fmt: skip
def spatial(flow: Flow, op: Op) -> None:
    """Pooling, resampling and padding by reflection: the last n dims change, all others pass."""
    labels = list(flow.labels(op.inputs()[0]))
    match = re.search(r"([123])d", op.name)
    assert match is not None
    rank = int(match.group(1))
    _stay(flow, op, labels[-rank:])
    labels[-rank:] = [None] * rank
    for index in op.outputs:
        flow.set(index, labels)


@operator("im2col")
def patches(flow: Flow, op: Op) -> None:
    """(B, C, H, W) to (B, C k k, L): a channel's k*k rows follow one another; the batch may be missing."""
    *batch, channels, height, width = flow.labels(op.inputs()[0])
    _stay(flow, op, [height, width])
    factor = int(np.prod(op.arg("kernel_size")))
    rows = None if channels is None else np.repeat(channels, factor)
    flow.set(op.outputs[0], [*batch, rows, None])


@operator("col2im")
def fold(flow: Flow, op: Op) -> None:
    """(B, C k k, L) to (B, C, H, W): a channel's k*k rows go together; the batch may be missing."""
    *batch, rows, places = flow.labels(op.inputs()[0])
    _stay(flow, op, [places])
    if rows is not None:
        grid = rows.reshape(-1, int(np.prod(op.arg("kernel_size"))))
        flow.tie(grid, grid[:, :1], op)
        rows = grid[:, 0]
    flow.set(op.outputs[0], [*batch, rows, None, None])


@operator("unfold", "unfold_copy")
def windows(flow: Flow, op: Op) -> None:
    """Sliding windows over one dim become a new last dim; neither carries anything further."""
    labels = list(flow.labels(op.inputs()[0]))
    dim = int(op.arg("dimension"))
    _stay(flow, op, [labels[dim]])
    labels[dim] = None
    flow.set(op.outputs[0], [*labels, None])


@operator("grid_sampler_2d", "grid_sampler_3d", flops=_bilinear_flops)
def grid_sample(flow: Flow, op: Op) -> None:
    """Samples every channel at the same places: (B, C, H, W) by (B, h, w, 2) to (B, C, h, w)."""
    source, grid = op.inputs()
    batch, channels, *pixels = flow.labels(source)
    other, *places = flow.labels(grid)
    _stay(flow, op, [*pixels, *places])
    flow.set(op.outputs[0], [flow.unify_all([batch, other], op), channels, *([None] * len(pixels))])


@operator("affine_grid_generator", sized=True)
def affine_grid(flow: Flow, op: Op) -> None:
    """Places for an image of the given sizes, whose channels do not count: (B, 2, 3) to (B, H, W, 2)."""
    batch, *matrix = flow.labels(op.inputs()[0])
    _stay(flow, op, matrix)
    flow.set(op.outputs[0], [batch, *[None] * (len(flow.shape(op.outputs[0])) - 1)])


@operator("max_unpool2d", "max_unpool3d")
def unpool(flow: Flow, op: Op) -> None:
    """Numbers go back to the places where pooling found them, channel by channel."""
    x, places = op.inputs()
    rank = 2 if op.name.endswith("2d") else 3
    labels = [flow.unify_all(pair, op) for pair in zip(flow.labels(x), flow.labels(places), strict=True)]
    _stay(flow, op, labels[-rank:])
    flow.set(op.outputs[0], [*labels[:-rank], *[None] * rank])


@operator("torchvision::roi_align", "torchvision::roi_pool")
def roi_pool(flow: Flow, op: Op) -> None:
    """Regions of every channel alike: (B, C, H, W) by (R, 5) to (R, C, h, w)."""
    source, regions = op.inputs()
    batch, channels, *pixels = flow.labels(source)
    _stay(flow, op, [batch, *pixels, *flow.labels(regions)])
    for index in op.outputs:
        flow.set(index, [None, channels, None, None])


@operator("torchvision::deform_conv2d", drawn_as="conv")
def deformed_convolution(flow: Flow, op: Op) -> None:
    """A convolution at places that another tensor gives, for groups of input channels alike; these keep their sizes."""
    x, weight = op.inputs()[:2]
    if int(op.arg("groups")) > 1:
        flow.refuse(op, "a deformed convolution in groups")
        return
    batch, channels, *pixels = flow.labels(x)
    written, read, *kernel = flow.labels(weight)
    _stay(flow, op, [*pixels, *kernel])
    for name in ("offset", "mask"):
        _stay(flow, op, flow.labels(op.arg(name).index))
    if channels is not None:
        grouped = channels.reshape(int(op.arg("offset_groups")), -1)
        flow.tie(grouped, grouped[:1], op)
    flow.contract(channels, read, op, weight)
    flow.produce(written, op, weight)
    flow.unify(written, flow.labels(op.arg("bias").index)[0], op)
    flow.set(op.outputs[0], [batch, written, *([None] * len(pixels))])


def _stay(flow: Flow, op: Op, labels: Sequence[Label]) -> None:
    for label in labels:
        flow.freeze(label, op, "this dim is resampled")
