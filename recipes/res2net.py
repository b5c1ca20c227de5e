"""Res2Net: scales within a block that build on one another; the width of each is learned.

Source: Gao et al., "Res2Net: A New Multi-scale Backbone Architecture", TPAMI 2021 (arXiv 1904.01169).
Parameter names are timm's (`res2net50_26w_4s`): `convs.{i}` and `bns.{i}` in a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allocator.recipes.residual import ResidualBlock, ResidualNet, Small, Widths, build, build_small


class ScalesBottleneck(ResidualBlock):
    """Bottleneck whose middle is split into s parts; all but the last are convolved, and all concatenated.

    Each convolved part is added to the next part ahead of its convolution, but not in a stage's first
    block, where the last part is pooled instead. A row is the widths of the s parts, then those of what
    the s - 1 convolutions give. The forward reads both from its layers.
    """

    meaning = "channels of each part, then those that each convolution gives"

    def __init__(self, incoming: int, row: Sequence[int], outgoing: int, stride: int, first: bool):
        scales = (len(row) + 1) // 2
        parts, given = row[:scales], row[scales:]
        super().__init__((incoming, sum(parts), sum(given) + parts[-1], outgoing), stride, first)
        self.first, self.stride = first, stride
        self.convs, self.bns = nn.ModuleList(), nn.ModuleList()
        # One part more than convolutions: the last goes by them.
        for read, out in zip(parts, given, strict=False):
            self.convs.append(nn.Conv2d(read, out, 3, stride, 1, bias=False))
            self.bns.append(nn.BatchNorm2d(out))

    def transform(self, x: Tensor) -> Tensor:
        features: list[Tensor] = []
        start = 0
        for conv, norm in zip(self._convs(), self.bns, strict=True):
            # Widths are those of the layers, and no numbers written down: allocation changes them part by part.
            part = x.narrow(1, start, conv.in_channels)
            start += conv.in_channels
            # In a stage's first block the convolutions have a stride, and what they give is smaller than the parts.
            if features and not self.first:
                part = features[-1] + part
            features.append(F.relu(norm(conv(part))))
        last_part = x.narrow(1, start, x.shape[1] - start)
        if self.first:
            last_part = F.avg_pool2d(last_part, 3, self.stride, 1)
        features.append(last_part)
        return torch.cat(features, 1)

    def _convs(self) -> list[nn.Conv2d]:
        return cast(list[nn.Conv2d], list(self.convs))

    def _last_part(self) -> int:
        """Channels of the part that is not convolved."""
        return self.conv1.out_channels - sum(conv.in_channels for conv in self._convs())

    def row(self) -> list[int]:
        parts = [conv.in_channels for conv in self._convs()]
        given = [conv.out_channels for conv in self._convs()]
        return [*parts, self._last_part(), *given]

    def parts(self) -> dict[str, int]:
        neurons = {}
        for i, conv in enumerate(self._convs()):
            neurons[f"scale {i + 1}"] = conv.out_channels
        neurons["not convolved"] = self._last_part()
        return neurons

    @classmethod
    def misfit(cls, row: Sequence[int], first: bool) -> str | None:
        if len(row) < 3 or len(row) % 2 == 0:
            return "expected 2s - 1 numbers for s scales"
        scales = (len(row) + 1) // 2
        parts, given = list(row[:scales]), list(row[scales:])
        if not first and given[:-1] != parts[1:-1]:
            return f"expected convolutions that give {parts[1:-1]} channels, since they are added to the next parts"
        return None


def _row(planes: int, scales: int, width: int) -> list[int]:
    """`width` is a scale's in a stage of 64 planes; it grows with the planes."""
    return [max(1, planes * width // 64)] * (2 * scales - 1)


def res2net(
    depth: int = 50,
    widths: Widths | str | Path | None = None,
    scales: int = 4,
    width: int = 26,
    num_classes: int = 1000,
) -> ResidualNet:
    """Res2Net of 50, 101 or 152 layers, or with the widths of an allocation; see `residual.build`.

    Args:
        depth, widths, num_classes: as for `residual.build`.
        scales: parts of every block, where `widths` are left out.
        width: channels per part in the first stage; they double with each stage.
    """
    return build(ScalesBottleneck, "Res2Net", depth, widths, partial(_row, scales=scales, width=width), num_classes)


def res2net_seed(depth: int = 50, scales: int = 4, width: int = 52, num_classes: int = 1000) -> ResidualNet:
    """Res2Net with scales wider than the standard 26 channels."""
    return res2net(depth, None, scales, width, num_classes)


def res2net_small(widths: Widths | None = None, scales: int = 4, width: int = 26, **shape: Any) -> ResidualNet:
    """Res2Net for small images; `shape` as in `residual.Small`."""
    return build_small(ScalesBottleneck, Small(**shape), widths, partial(_row, scales=scales, width=width))


def res2net_small_seed(scales: int = 4, width: int = 52, **shape: Any) -> ResidualNet:
    """Res2Net for small images with scales twice as wide."""
    return res2net_small(None, scales, width, **shape)
