"""ResNeXt: parallel groups per block; how many there are, or how wide they are, is learned.

Source: Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017
(arXiv 1611.05431). Parameter names are torchvision's (`resnext50_32x4d`).

With `allocate(..., groups="whole")` groups compete and go as a whole, so that the cardinality of each block
is learned; with `groups="width"` all groups stay and the width that they share is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from allocator.recipes.residual import ResidualBlock, ResidualNet, Small, Widths, build, build_small


class GroupedBottleneck(ResidualBlock):
    """Bottleneck with a grouped 3x3 convolution. A row is groups, and width of a group before and after."""

    meaning = "groups, channels per group before the 3x3 convolution, and after it"

    def __init__(self, incoming: int, row: Sequence[int], outgoing: int, stride: int, first: bool):
        groups, read, given = row
        super().__init__((incoming, groups * read, groups * given, outgoing), stride, first)
        self.conv2 = nn.Conv2d(groups * read, groups * given, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(groups * given)

    def transform(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(x)))

    def row(self) -> list[int]:
        groups = self.conv2.groups
        return [groups, self.conv2.in_channels // groups, self.conv2.out_channels // groups]

    def parts(self) -> dict[str, int]:
        return {"1x1": self.conv2.in_channels, "3x3": self.conv2.out_channels}

    @classmethod
    def misfit(cls, row: Sequence[int], first: bool) -> str | None:
        return None if len(row) == 3 else "expected 3 numbers"


def _row(planes: int, groups: int, width: int) -> list[int]:
    """`width` is a group's in a stage of 64 planes; it grows with the planes."""
    return [groups, *[max(1, width * planes // 64)] * 2]


def resnext(
    depth: int = 50,
    widths: Widths | str | Path | None = None,
    groups: int = 32,
    width: int = 4,
    num_classes: int = 1000,
) -> ResidualNet:
    """ResNeXt of 50, 101 or 152 layers, or with the widths of an allocation; see `residual.build`.

    Args:
        depth, widths, num_classes: as for `residual.build`.
        groups: groups of every block, where `widths` are left out.
        width: channels per group in the first stage; they double with each stage.
    """
    row = partial(_row, groups=groups, width=width)
    return build(GroupedBottleneck, "ResNeXt", depth, widths, row, num_classes)


def resnext_seed(depth: int = 50, groups: int = 64, width: int = 4, num_classes: int = 1000) -> ResidualNet:
    """ResNeXt with more than 32 groups of 4: by default 64x4d, for learning the cardinality; or 32x8d, the width."""
    return resnext(depth, None, groups, width, num_classes)


def resnext_small(widths: Widths | None = None, groups: int = 8, width: int = 16, **shape: Any) -> ResidualNet:
    """ResNeXt for small images; `width` is that of a stage of 64 planes."""
    return build_small(GroupedBottleneck, Small(**shape), widths, partial(_row, groups=groups, width=width))


def resnext_small_seed(groups: int = 16, width: int = 16, **shape: Any) -> ResidualNet:
    """ResNeXt for small images with twice the groups."""
    return resnext_small(None, groups, width, **shape)
