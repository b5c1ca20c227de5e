"""Operators that work on the trailing (spatial) dims and leave batch and channels alone."""

from __future__ import annotations

import re

import numpy as np

from ..flow import Flow
from ..tracing import Op
from .registry import rule


@rule(
    "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
    "adaptive_avg_pool1d", "max_pool2d", "max_pool3d", "fractional_max_pool2d", "fractional_max_pool3d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
    "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "replication_pad1d", "replication_pad2d", "replication_pad3d",
)  # fmt: skip
def spatial(flow: Flow, op: Op) -> None:
    """Pooling, resampling and padding by reflection: the last n dims change, all others pass."""
    labels = list(flow.labels(op.inputs()[0]))
    match = re.search(r"([123])d", op.name)
    assert match is not None
    for d in range(len(labels) - int(match.group(1)), len(labels)):
        flow.freeze(labels[d], op, "this dim is resampled")
        labels[d] = None
    for index in op.outputs:
        flow.set(index, labels)


@rule("im2col")
def unfold(flow: Flow, op: Op) -> None:
    """(B, C, H, W) to (B, C k k, L): a channel's k*k rows follow one another."""
    labels = flow.labels(op.inputs()[0])
    factor = int(np.prod(op.arg("kernel_size")))
    channels = None if labels[1] is None else np.repeat(labels[1], factor)
    flow.set(op.outputs[0], [labels[0], channels, None])


@rule("grid_sampler_2d", "grid_sampler_3d")
def grid_sample(flow: Flow, op: Op) -> None:
    """Samples every channel at the same places."""
    labels = flow.labels(op.inputs()[0])
    rank = len(flow.shape(op.outputs[0]))
    flow.set(op.outputs[0], [labels[0], labels[1], *([None] * (rank - 2))])


@rule("torchvision::roi_align", "torchvision::roi_pool")
def roi_pool(flow: Flow, op: Op) -> None:
    """Regions of every channel alike: (B, C, H, W) to (R, C, h, w)."""
    labels = flow.labels(op.inputs()[0])
    for index in op.outputs:
        flow.set(index, [None, labels[1], None, None])
