"""ResNet and SE-ResNet: one path per block, its two inner widths learned.

Sources: He et al., CVPR 2016 (arXiv 1512.03385); Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018
(arXiv 1709.01507). Parameter names are torchvision's (`resnet50`) and timm's (`seresnet50`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from allocator.recipes.residual import EXPANSION, ResidualBlock, ResidualNet, Small, Widths, build, build_small


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolution, each with batch norm. A row is the width before and after the 3x3."""

    meaning = "channels before the 3x3 convolution, and after it"

    def __init__(self, incoming: int, row: Sequence[int], outgoing: int, stride: int, first: bool):
        read, given = row[:2]
        super().__init__((incoming, read, given, outgoing), stride, first)
        self.conv2 = nn.Conv2d(read, given, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(given)

    def transform(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(x)))

    def row(self) -> list[int]:
        return [self.conv1.out_channels, self.conv2.out_channels]

    def parts(self) -> dict[str, int]:
        return {"1x1": self.conv1.out_channels, "3x3": self.conv2.out_channels}

    @classmethod
    def misfit(cls, row: Sequence[int], first: bool) -> str | None:
        return None if len(row) == 2 else "expected 2 numbers"


class SqueezeExcite(nn.Module):
    """Scales each channel of (N, C, H, W) by a gate computed from all channels' means."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.relu(self.fc1(x.mean((2, 3), keepdim=True)))
        return x * self.fc2(gate).sigmoid()


class SEBottleneck(Bottleneck):
    """Bottleneck that recalibrates its output. A row has the squeezed width for its third number."""

    meaning = "channels before the 3x3 convolution, after it, and in the squeeze"

    def __init__(self, incoming: int, row: Sequence[int], outgoing: int, stride: int, first: bool):
        super().__init__(incoming, row, outgoing, stride, first)
        self.se = SqueezeExcite(outgoing, row[2])

    def rescale(self, x: Tensor) -> Tensor:
        recalibrated: Tensor = self.se(x)
        return recalibrated

    def row(self) -> list[int]:
        return [*super().row(), self.se.fc1.out_channels]

    @classmethod
    def misfit(cls, row: Sequence[int], first: bool) -> str | None:
        return None if len(row) == 3 else "expected 3 numbers"


def _row(planes: int, widen: float = 1) -> list[int]:
    return [max(1, round(planes * widen))] * 2


def _se_row(planes: int, widen: float = 1) -> list[int]:
    squeezed = planes * EXPANSION // 16
    return [*_row(planes, widen), max(8, squeezed)]


def resnet(depth: int = 50, widths: Widths | str | Path | None = None, num_classes: int = 1000) -> ResidualNet:
    """ResNet of 50, 101 or 152 layers, standard or with the widths of an allocation; see `residual.build`."""
    return build(Bottleneck, "ResNet", depth, widths, _row, num_classes)


def resnet_seed(depth: int = 50, widen: float = 2, num_classes: int = 1000) -> ResidualNet:
    """ResNet with `widen` times the inner channels; at 2 it is torchvision's `wide_resnet50_2` or `101_2`."""
    return build(Bottleneck, "ResNet", depth, None, partial(_row, widen=widen), num_classes)


def resnet_small(widths: Widths | None = None, **shape: Any) -> ResidualNet:
    """ResNet for small images; `shape` as in `residual.Small`."""
    return build_small(Bottleneck, Small(**shape), widths, _row)


def resnet_small_seed(widen: float = 2, **shape: Any) -> ResidualNet:
    """ResNet for small images with `widen` times the inner channels."""
    return build_small(Bottleneck, Small(**shape), None, partial(_row, widen=widen))


def se_resnet(depth: int = 50, widths: Widths | str | Path | None = None, num_classes: int = 1000) -> ResidualNet:
    """SE-ResNet of 50, 101 or 152 layers, standard or with the widths of an allocation; see `residual.build`."""
    return build(SEBottleneck, "SE-ResNet", depth, widths, _se_row, num_classes)


def se_resnet_seed(depth: int = 50, widen: float = 2, num_classes: int = 1000) -> ResidualNet:
    """SE-ResNet with `widen` times the inner channels; the squeeze stays as it is."""
    return build(SEBottleneck, "SE-ResNet", depth, None, partial(_se_row, widen=widen), num_classes)


def se_resnet_small(widths: Widths | None = None, **shape: Any) -> ResidualNet:
    """SE-ResNet for small images; `shape` as in `residual.Small`."""
    return build_small(SEBottleneck, Small(**shape), widths, _se_row)


def se_resnet_small_seed(widen: float = 2, **shape: Any) -> ResidualNet:
    """SE-ResNet for small images with `widen` times the inner channels."""
    return build_small(SEBottleneck, Small(**shape), None, partial(_se_row, widen=widen))
