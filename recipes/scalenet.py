"""ScaleNet: residual networks whose blocks aggregate several spatial scales.

Source: Li, Kuang, Chen, Zhang, "Data-Driven Neuron Allocation for Scale Aggregation Networks", CVPR 2019
(arXiv 1904.09460). Modules carry the names of the authors' release, so its checkpoint files load unchanged:
`conv1 bn1 layer1..layer4 fc` in the network, `conv1 bn1 conv2.{i} bn2.{i} conv3 bn3 downsample.0
downsample.1` in a block. Index i is the i-th scale; a scale without neurons is absent, and the others keep
their indices.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allocator.adapters import Adapter, register
from allocator.disk import parse_json, read_text, write_text
from allocator.errors import AllocationMismatchError, FileError, UnknownNameError
from allocator.recipes.residual import (
    PLANES,
    block_names,
    blocks_of,
    class_scores,
    initialise,
    sides_of_stages,
    small_stem_stride,
    stem_convolution,
)
from allocator.recipes.scalenet_allocations import RELEASED

Rows = Sequence[Sequence[int]]
"""One row per block: the neurons of each scale, then the side of the block's features in pixels."""

RATES = (1, 2, 4, 7)
SIDES = (56, 28, 14, 7)


def shrink(x: Tensor, rate: int) -> Tensor:
    """Max-pool (N, C, H, W) by `rate`; an axis shorter than `rate` is pooled whole."""
    if rate == 1:
        return x
    # Rates do not divide every side: what does not fill a window is left out, and brought back by `enlarge`.
    window = (min(rate, x.shape[2]), min(rate, x.shape[3]))
    return F.max_pool2d(x, window, window)


def enlarge(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (N, C, h, w) to (N, C, *size): nearest where both sides divide, bilinear otherwise."""
    divides = size[0] % x.shape[2] == 0 and size[1] % x.shape[3] == 0
    if divides:
        return F.interpolate(x, size=size, mode="nearest")
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class ScaleBlock(nn.Module):
    """Bottleneck with a scale aggregation for its middle convolution.

    Takes (N, C, H, W), gives (N, C', H / stride, W / stride). Scale i pools the features by `rates[i]`,
    convolves them, brings them back to size and normalises them; what the scales give is concatenated over
    channels.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        neurons: Sequence[int],
        side: int,
        stride: int = 1,
        rates: Sequence[int] = RATES,
    ):
        """Make a block.

        Args:
            in_channels: channels that come in.
            planes: channels between the 1x1 convolution and the scales; `expansion * planes` come out.
            neurons: one count per rate; 0 leaves the scale out.
            side: side of the block's features in pixels. The i-th scale convolves with 3x3, or with 1x1
                where `side / 2**i` is at most 1.
            stride: pooling at the block's entry, ahead of the shortcut too.
            rates: pooling of each scale.
        """
        super().__init__()
        out_channels = self.expansion * planes
        self.stride, self.side, self.rates = stride, side, tuple(rates)
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        convs, norms = [], []
        for i, count in enumerate(neurons):
            convs.append(_scale_conv(planes, count, side / 2**i))
            norms.append(nn.BatchNorm2d(count) if count else None)
        # An absent scale leaves a gap, so that the others keep the names that the released checkpoints give them.
        self.conv2 = nn.ModuleList(cast(list[nn.Module], convs))
        self.bn2 = nn.ModuleList(cast(list[nn.Module], norms))
        self.conv3 = nn.Conv2d(sum(neurons), out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        # Ahead of everything, in place of strides in the convolutions: the shortcut sees the pooled features, too.
        x = shrink(x, self.stride)
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(torch.cat(self._scales(x), dim=1))
        return F.relu(self.bn3(self.conv3(x)) + shortcut)

    def _scales(self, x: Tensor) -> list[Tensor]:
        size = (x.shape[2], x.shape[3])
        features = []
        for rate, conv, norm in zip(self.rates, _entries(self.conv2), _entries(self.bn2), strict=True):
            if conv is None or norm is None:
                continue
            scale = conv(shrink(x, rate))
            if rate != 1:
                scale = enlarge(scale, size)
            # After it is enlarged, so that a norm's statistics are those of what is concatenated.
            features.append(norm(scale))
        return features

    def row(self) -> list[int]:
        """Neurons of each scale as the block is now, then its side."""
        neurons = []
        for conv in cast(Iterator[nn.Conv2d | None], _entries(self.conv2)):
            neurons.append(0 if conv is None else conv.out_channels)
        return [*neurons, self.side]

    def parts(self) -> dict[str, int]:
        """Neurons of each scale by what it is called in a picture."""
        *neurons, _ = self.row()
        parts = {}
        for rate, count in zip(self.rates, neurons, strict=True):
            parts["full size" if rate == 1 else f"pooled by {rate}"] = count
        return parts


def _present_scales(block: nn.Module) -> dict[str, tuple[str, ...]]:
    """The scales that may go as a whole, each with its norm; the others of the block's layers may not."""
    scales: dict[str, tuple[str, ...]] = {}
    for name, conv in block.get_submodule("conv2")._modules.items():
        if conv is not None:
            scales[f"conv2.{name}"] = (f"conv2.{name}", f"bn2.{name}")
    return scales


register(ScaleBlock, Adapter(optional_branches=_present_scales))


class ScaleNet(nn.Module):
    """ScaleNet for (N, in_channels, H, W) images of any size; returns (N, num_classes).

    Sides in `rows` are those of the image size that the network is designed for. Other sizes work too: a
    feature map smaller than a scale's rate is pooled to one pixel.
    """

    def __init__(
        self,
        rows: Rows,
        blocks: Sequence[int],
        planes: Sequence[int] = PLANES,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        rates: Sequence[int] = RATES,
        image_side: int = 224,
        small_stem: int = 0,
    ):
        """Make a network with fresh weights.

        Args:
            rows: one row per block: neurons per rate, then side.
            blocks: blocks per stage.
            planes: planes per stage.
            num_classes: outputs.
            in_channels: channels of the images.
            rates: pooling of each scale.
            image_side: side in pixels of the images that it is meant for.
            small_stem: 0 for the 7x7/2 convolution and 3x3/2 pooling; otherwise the stride of a single 3x3
                convolution, for small images.

        Raises:
            AllocationMismatchError: rows and blocks do not fit; says which block, expected and got.
        """
        super().__init__()
        check_rows(rows, blocks, len(rates))
        self.input_size = (in_channels, image_side, image_side)
        self.stem_pools = not small_stem
        width = planes[0]
        self.conv1 = stem_convolution(in_channels, width, small_stem)
        self.bn1 = nn.BatchNorm2d(width)
        remaining = iter(rows)
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        for i, (name, count, plane) in enumerate(zip(self.stages, blocks, planes, strict=True)):
            stage = nn.Sequential()
            for j in range(count):
                *neurons, side = next(remaining)
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(ScaleBlock(width, plane, neurons, side, stride, rates))
                width = plane * ScaleBlock.expansion
            self.add_module(name, stage)
        self.fc = nn.Linear(width, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return class_scores(self, x)

    def scale_blocks(self) -> list[ScaleBlock]:
        """The blocks in the order of the forward."""
        blocks: list[ScaleBlock] = []
        for name in self.stages:
            blocks.extend(getattr(self, name))
        return blocks

    def rows(self) -> list[list[int]]:
        """The allocation as it stands, one row per block: neurons per scale, then side."""
        return [block.row() for block in self.scale_blocks()]

    def parts(self) -> dict[str, dict[str, int]]:
        """Neurons of each scale of each block."""
        names = block_names([len(getattr(self, name)) for name in self.stages])
        return {name: block.parts() for name, block in zip(names, self.scale_blocks(), strict=True)}


def _entries(modules: nn.ModuleList) -> Iterator[nn.Module | None]:
    """The list's entries; torch allows absent ones, though its types do not say so."""
    return iter(modules)


def _scale_conv(planes: int, count: int, reduced_side: float) -> nn.Conv2d | None:
    if count == 0:
        return None
    # On a single pixel a 3x3 convolution would read nothing but padding with eight of its nine weights.
    kernel = 3 if reduced_side > 1 else 1
    return nn.Conv2d(planes, count, kernel, padding=kernel // 2, bias=False)


def check_rows(rows: Rows, blocks: Sequence[int], scales: int = len(RATES)) -> None:
    """Raise AllocationMismatchError unless `rows` is an allocation for a network of `blocks` per stage."""
    if len(rows) != sum(blocks):
        raise AllocationMismatchError(
            f"expected {sum(blocks)} rows, one per block ({'+'.join(map(str, blocks))}), got {len(rows)}"
        )
    for name, row in zip(block_names(blocks), rows, strict=True):
        if len(row) != scales + 1:
            raise AllocationMismatchError(f"block {name}: expected {scales} neuron counts and a side, got {list(row)}")
        *neurons, side = row
        # A bool is an int in Python, and no number of neurons.
        whole = all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in row)
        if not whole or sum(neurons) == 0 or side == 0:
            raise AllocationMismatchError(
                f"block {name}: expected at least one neuron and a side above 0, in whole numbers, got {list(row)}"
            )


def released_rows(name: str) -> list[list[int]]:
    """The released allocation called `name` as rows [n1, n2, n4, n7, side], sides for 224-pixel images.

    Raises:
        UnknownNameError: the authors released no allocation of this name.
    """
    if name not in RELEASED:
        raise UnknownNameError(f"no released allocation is called {name!r}; there are: {', '.join(RELEASED)}")
    rows = []
    for stage, side in zip(RELEASED[name], SIDES, strict=True):
        for neurons in stage:
            rows.append([*neurons, side])
    return rows


def read_rows(path: str | Path) -> list[list[int]]:
    """Read an allocation in the authors' form: a JSON list with a row [n1, n2, n4, n7, side] per block.

    Raises:
        FileError: the file is missing or is not of that form.
    """
    try:
        rows: list[list[int]] = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(rows, list) or not rows or not all(_is_row(row) for row in rows):
        raise FileError(f"{path}: expected a list of rows [n1, n2, n4, n7, side] of whole numbers")
    return rows


def _is_row(row: object) -> bool:
    return isinstance(row, list) and len(row) > 0 and all(type(value) is int for value in row)


def write_rows(path: str | Path, allocation: ScaleNet | Rows) -> None:
    """Write a network's allocation, or rows, in the authors' JSON form; the sides are the design's."""
    if isinstance(allocation, ScaleNet):
        allocation = allocation.rows()
    rows = [list(row) for row in allocation]
    write_text(path, json.dumps(rows) + "\n")


def scalenet(depth: int, allocation: str | Path | Rows, num_classes: int = 1000) -> ScaleNet:
    """Build a ScaleNet of 50, 101 or 152 layers straight from an allocation.

    Args:
        depth: 50, 101 or 152.
        allocation: rows, the name of a released allocation (`scalenet50-light` ...), or a JSON file of rows
            (a string with a suffix, or a Path).
        num_classes: outputs.

    Raises:
        UnknownNameError: there is no such depth, or no released allocation of that name.
        AllocationMismatchError: the allocation does not fit the depth.
        FileError: the allocation is a path that cannot be read.
    """
    blocks = blocks_of(depth, "ScaleNet")
    if isinstance(allocation, str) and not Path(allocation).suffix:
        return ScaleNet(released_rows(allocation), blocks, num_classes=num_classes)
    rows = read_rows(allocation) if isinstance(allocation, str | Path) else allocation
    return ScaleNet(rows, blocks, num_classes=num_classes)


def scalenet50_light(num_classes: int = 1000) -> ScaleNet:
    """ScaleNet-50-light: 2 883 765 548 FLOPs at 224x224 and 23 631 912 parameters with 1000 classes."""
    return scalenet(50, "scalenet50-light", num_classes)


def scalenet50(num_classes: int = 1000) -> ScaleNet:
    """ScaleNet-50: 3 841 853 887 FLOPs at 224x224 and 31 483 618 parameters with 1000 classes."""
    return scalenet(50, "scalenet50", num_classes)


def scalenet101(num_classes: int = 1000) -> ScaleNet:
    """ScaleNet-101: 7 546 268 526 FLOPs at 224x224 and 54 792 390 parameters with 1000 classes."""
    return scalenet(101, "scalenet101", num_classes)


def scalenet152(num_classes: int = 1000) -> ScaleNet:
    """ScaleNet-152: 11 262 499 918 FLOPs at 224x224 and 77 220 070 parameters with 1000 classes."""
    return scalenet(152, "scalenet152", num_classes)


def scalenet_seed(
    depth: int = 50, neurons_per_scale: int | Sequence[int] | None = None, num_classes: int = 1000
) -> ScaleNet:
    """Build a seed network: every scale of a block has the same, abundant number of neurons.

    Args:
        depth: 50, 101 or 152.
        neurons_per_scale: C, one number per stage; or C of the first stage, which doubles with each stage as
            the planes do. The paper does not print C; by default it is the planes, 64/128/256/512.
        num_classes: outputs.

    Raises:
        UnknownNameError: there is no such depth.
    """
    neurons = _per_stage(neurons_per_scale, PLANES)
    blocks = blocks_of(depth, "ScaleNet")
    return ScaleNet(_even_rows(blocks, neurons, SIDES), blocks, num_classes=num_classes)


def scalenet_small_seed(
    image_side: int = 32,
    blocks: Sequence[int] = (1, 1, 1),
    planes: Sequence[int] = (8, 16, 32),
    neurons_per_scale: int | Sequence[int] | None = None,
    num_classes: int = 10,
    in_channels: int = 1,
    stem_stride: int | None = None,
) -> ScaleNet:
    """Build a small seed for images of 32 to 64 pixels: 3x3 stem, few blocks, few planes.

    The first stage works at the side of the stem's output, each further one at half of that.

    Args:
        image_side: side of the images in pixels.
        blocks: blocks per stage.
        planes: planes per stage.
        neurons_per_scale: as in `scalenet_seed`; by default the planes.
        num_classes: outputs.
        in_channels: channels of the images.
        stem_stride: stride of the stem; by default 1 for images under 48 pixels, 2 from there on.

    Raises:
        AllocationMismatchError: blocks, planes and neurons are not given for the same number of stages.
        InputError: the images are so small that a stage would have no pixels left.
    """
    stride = stem_stride or small_stem_stride(image_side)
    sides = sides_of_stages(image_side, stride, blocks, planes)
    rows = _even_rows(blocks, _per_stage(neurons_per_scale, planes), sides)
    return ScaleNet(
        rows,
        blocks,
        planes,
        num_classes=num_classes,
        in_channels=in_channels,
        image_side=image_side,
        small_stem=stride,
    )


def scalenet_small(image_side: int = 32, num_classes: int = 10, in_channels: int = 1) -> ScaleNet:
    """Build the small network with an even quarter of its planes at each scale."""
    return scalenet_small_seed(
        image_side, neurons_per_scale=(2, 4, 8), num_classes=num_classes, in_channels=in_channels
    )


def _per_stage(neurons: int | Sequence[int] | None, planes: Sequence[int]) -> list[int]:
    """Neurons of one scale in each stage, however they are given; see `scalenet_seed`."""
    if neurons is None:
        return list(planes)
    if isinstance(neurons, int):
        counts = [neurons * planes_of_stage // planes[0] for planes_of_stage in planes]
    else:
        counts = list(neurons)
    if len(counts) != len(planes) or min(counts) < 1:
        raise AllocationMismatchError(
            f"expected neurons per scale as one number above 0, or {len(planes)} of them, got {neurons}"
        )
    return counts


def _even_rows(blocks: Sequence[int], neurons: Sequence[int], sides: Sequence[int]) -> list[list[int]]:
    """The same number of neurons for every scale of every block of a stage."""
    rows = []
    for number, count, side in zip(blocks, neurons, sides, strict=True):
        for _ in range(number):
            rows.append([count] * len(RATES) + [side])
    return rows
