"""What ResNet, SE-ResNet, ResNeXt and Res2Net share: a stem, four stages of bottlenecks, a classifier.

A network is data: its depth and its `Widths`, one row of numbers per block. What a row means is the block's
own affair. Modules carry torchvision's names (`conv1 bn1 layer1..layer4 fc`; `conv1 bn1 conv2 bn2 conv3 bn3
downsample.0 downsample.1` in a block), so that pretrained checkpoints load unchanged.

Sources: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv 1512.03385), with the
stride on the 3x3 convolution as in torchvision's and timm's weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allocator.disk import parse_json, read_text, write_text
from allocator.errors import AllocationMismatchError, FileError, InputError, UnknownNameError

DEPTHS: dict[int, tuple[int, ...]] = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
PLANES = (64, 128, 256, 512)
EXPANSION = 4


@dataclass(frozen=True)
class Widths:
    """Everything that allocation decides about a residual network.

    Attributes:
        rows: one row per block; what its numbers are is said by the block's class (`row_of`).
        stages: channels of each stage's residual stream.
        stem: channels of the first convolution.
    """

    rows: Sequence[Sequence[int]]
    stages: Sequence[int] = tuple(EXPANSION * planes for planes in PLANES)
    stem: int = PLANES[0]

    def save(self, path: str | Path) -> None:
        """Write as JSON, in one piece."""
        write_text(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Widths:
        """Read what `save` wrote.

        Raises:
            FileError: the file is missing, or not of that form.
        """
        try:
            data = parse_json(read_text(path))
            widths = cls([list(row) for row in data["rows"]], list(data["stages"]), data["stem"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileError(f"{path}: not a readable file of widths: {error!r}") from error
        for numbers in ([widths.stem], widths.stages, *widths.rows):
            # Exactly int: JSON's `true` would pass for one otherwise.
            if not all(type(n) is int for n in numbers):
                raise FileError(f"{path}: expected whole numbers throughout")
        return widths


class ResidualBlock(nn.Module):
    """1x1 convolution, a transform of the subclass's, 1x1 convolution, and the shortcut's sum.

    Takes (N, C, H, W), gives (N, C', H / stride, W / stride).
    """

    meaning: ClassVar[str]
    """What the numbers of a row are, in words, for messages."""

    conv1: nn.Conv2d
    conv3: nn.Conv2d

    def __init__(self, sizes: tuple[int, int, int, int], stride: int, first: bool):
        """Make the parts that all blocks have.

        Args:
            sizes: channels that come in, that the transform reads, that it gives, and that go out.
            stride: of the shortcut's projection.
            first: whether the block begins a stage and so projects its shortcut.
        """
        super().__init__()
        incoming, read, given, outgoing = sizes
        self.conv1 = nn.Conv2d(incoming, read, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(read)
        self.conv3 = nn.Conv2d(given, outgoing, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outgoing)
        self.downsample: nn.Sequential | None = None
        # Whether sizes would fit without it or not: an allocated network keeps the parameters that it was made with.
        if first:
            projection = nn.Conv2d(incoming, outgoing, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outgoing))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.transform(F.relu(self.bn1(self.conv1(x))))
        return F.relu(self.rescale(self.bn3(self.conv3(x))) + shortcut)

    def transform(self, x: Tensor) -> Tensor:
        """What lies between the two 1x1 convolutions."""
        raise NotImplementedError

    def rescale(self, x: Tensor) -> Tensor:
        """What happens to the features ahead of the sum."""
        return x

    def row(self) -> list[int]:
        """The numbers that the block was made from, as its layers are now."""
        raise NotImplementedError

    def parts(self) -> dict[str, int]:
        """Neurons of each part of the block that allocation decides on."""
        raise NotImplementedError

    @classmethod
    def misfit(cls, row: Sequence[int], first: bool) -> str | None:
        """Why no block can be made from a row of positive numbers, or None."""
        raise NotImplementedError


# Subclasses take other arguments than their base class, so a block's class is called as one of these.
BlockMaker = Callable[[int, Sequence[int], int, int, bool], ResidualBlock]


class ResidualNet(nn.Module):
    """Residual network for (N, in_channels, H, W) images of any size; returns (N, num_classes)."""

    def __init__(
        self,
        block: type[ResidualBlock],
        widths: Widths,
        blocks: Sequence[int],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        image_side: int = 224,
        small_stem: int = 0,
    ):
        """Make a network with fresh weights.

        Args:
            block: its blocks' class; called with channels in, row, channels out, stride and whether the
                block begins a stage.
            widths: channels of every part.
            blocks: blocks per stage.
            num_classes: outputs.
            in_channels: channels of the images.
            image_side: side in pixels of the images that it is meant for.
            small_stem: 0 for the 7x7/2 convolution and 3x3/2 pooling; otherwise the stride of a single 3x3
                convolution, for small images.

        Raises:
            AllocationMismatchError: widths and blocks do not fit; says which block, expected and got.
        """
        super().__init__()
        check_widths(block, widths, blocks)
        self.input_size = (in_channels, image_side, image_side)
        self.stem_pools = not small_stem
        self.conv1 = stem_convolution(in_channels, widths.stem, small_stem)
        self.bn1 = nn.BatchNorm2d(widths.stem)
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        rows, width = iter(widths.rows), widths.stem
        make = cast(BlockMaker, block)
        for i, (name, count, outgoing) in enumerate(zip(self.stages, blocks, widths.stages, strict=True)):
            stage = nn.Sequential()
            for j in range(count):
                # The stem has brought the features to the first stage's size.
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(make(width, next(rows), outgoing, stride, j == 0))
                width = outgoing
            self.add_module(name, stage)
        self.fc = nn.Linear(width, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return class_scores(self, x)

    def blocks(self) -> dict[str, ResidualBlock]:
        """The blocks by name, such as "layer1.0", in the order of the forward."""
        blocks = {}
        for name in self.stages:
            for j, block in enumerate(getattr(self, name)):
                blocks[f"{name}.{j}"] = block
        return blocks

    def widths(self) -> Widths:
        """The widths as they stand; a network built from them loads this one's state_dict."""
        rows = [block.row() for block in self.blocks().values()]
        stages = [getattr(self, name)[0].conv3.out_channels for name in self.stages]
        return Widths(rows, stages, self.conv1.out_channels)

    def parts(self) -> dict[str, dict[str, int]]:
        """Neurons of each part of each block."""
        return {name: block.parts() for name, block in self.blocks().items()}


def stage_features(network: nn.Module, x: Tensor) -> list[Tensor]:
    """What the stem and then each stage of a recipe's network gives; one (N, C, H, W) tensor per stage."""
    x = F.relu(network.get_submodule("bn1")(network.get_submodule("conv1")(x)))
    if network.stem_pools:
        x = F.max_pool2d(x, 3, 2, 1)
    features = []
    for name in cast(list[str], network.stages):
        x = network.get_submodule(name)(x)
        features.append(x)
    return features


def class_scores(network: nn.Module, x: Tensor) -> Tensor:
    """What a recipe's network gives for (N, C, H, W) images: (N, classes), from the last stage's means."""
    features = stage_features(network, x)[-1]
    scores: Tensor = network.get_submodule("fc")(torch.flatten(F.adaptive_avg_pool2d(features, 1), 1))
    return scores


def stem_convolution(in_channels: int, out_channels: int, small_stem: int) -> nn.Conv2d:
    """The first convolution: 7x7 with stride 2, or 3x3 with the stride `small_stem` where that is not 0."""
    if small_stem:
        return nn.Conv2d(in_channels, out_channels, 3, small_stem, padding=1, bias=False)
    return nn.Conv2d(in_channels, out_channels, 7, 2, padding=3, bias=False)


def initialise(model: nn.Module) -> None:
    """Normal weights of variance 2 / fan-out for convolutions, in place; norms start as the identity."""
    # No norm starts at zero, as the last one of a block often does: their scales are what neurons are ranked by.
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def check_widths(block: type[ResidualBlock], widths: Widths, blocks: Sequence[int]) -> None:
    """Raise AllocationMismatchError unless a network of `blocks` per stage can be made with these widths."""
    if len(widths.stages) != len(blocks):
        raise AllocationMismatchError(f"expected widths of {len(blocks)} stages, got {len(widths.stages)}")
    if len(widths.rows) != sum(blocks):
        raise AllocationMismatchError(
            f"expected {sum(blocks)} rows, one per block ({'+'.join(map(str, blocks))}), got {len(widths.rows)}"
        )
    if not _positive([widths.stem, *widths.stages]):
        raise AllocationMismatchError(
            f"expected stem and stages of at least one channel, got {widths.stem} and {list(widths.stages)}"
        )
    for name, row in zip(block_names(blocks), widths.rows, strict=True):
        begins_stage = name.endswith(".0")
        reason = block.misfit(row, begins_stage) if _positive(row) else "expected whole numbers above 0"
        if reason:
            raise AllocationMismatchError(f"block {name}: {reason}, got {list(row)} ({block.meaning})")


def block_names(blocks: Sequence[int]) -> list[str]:
    """`layer1.0`, `layer1.1` ... of a network with these many blocks per stage."""
    names = []
    for i, count in enumerate(blocks):
        for j in range(count):
            names.append(f"layer{i + 1}.{j}")
    return names


def _positive(numbers: Sequence[int]) -> bool:
    return len(numbers) > 0 and all(type(n) is int and n > 0 for n in numbers)


def blocks_of(depth: int, name: str) -> tuple[int, ...]:
    """Blocks per stage of a network of this depth.

    Raises:
        UnknownNameError: there is no such depth.
    """
    if depth not in DEPTHS:
        near = min(DEPTHS, key=lambda known: abs(known - depth))
        raise UnknownNameError(
            f"no {name} has {depth} layers; there are {', '.join(map(str, DEPTHS))} (nearest: {near})"
        )
    return DEPTHS[depth]


def even_rows(blocks: Sequence[int], planes: Sequence[int], row: Callable[[int], list[int]]) -> list[list[int]]:
    """The same row for all blocks of a stage, made from the stage's planes."""
    rows = []
    for count, planes_of_stage in zip(blocks, planes, strict=True):
        for _ in range(count):
            rows.append(row(planes_of_stage))
    return rows


def build(
    block: type[ResidualBlock],
    name: str,
    depth: int,
    widths: Widths | str | Path | None,
    row: Callable[[int], list[int]],
    num_classes: int,
) -> ResidualNet:
    """A network for 224-pixel images.

    Args:
        block: its blocks' class.
        name: what it is called in messages.
        depth: 50, 101 or 152.
        widths: from an allocated network, or the file that they were saved to; None for even ones.
        row: gives a block's row for even widths from its planes.
        num_classes: outputs.

    Raises:
        UnknownNameError: there is no such depth.
        AllocationMismatchError: the widths do not fit.
        FileError: the file cannot be read.
    """
    blocks = blocks_of(depth, name)
    if widths is None:
        widths = Widths(even_rows(blocks, PLANES, row))
    elif not isinstance(widths, Widths):
        widths = Widths.load(widths)
    return ResidualNet(block, widths, blocks, num_classes=num_classes)


@dataclass(frozen=True)
class Small:
    """Shape of a small network for images of 32 to 64 pixels: 3x3 stem, few blocks, few planes.

    Attributes:
        image_side: side of the images in pixels; the stem halves those of 48 pixels or more.
        blocks: blocks per stage; each further stage halves the features' side.
        planes: planes per stage; its residual stream has four times as many channels.
        num_classes: outputs.
        in_channels: channels of the images.
    """

    image_side: int = 32
    blocks: Sequence[int] = (1, 1, 1)
    planes: Sequence[int] = (8, 16, 32)
    num_classes: int = 10
    in_channels: int = 1


def small_stem_stride(image_side: int) -> int:
    """Stride of the stem of a network for small images."""
    return 1 if image_side < 48 else 2


def sides_of_stages(image_side: int, stem_stride: int, blocks: Sequence[int], planes: Sequence[int]) -> list[int]:
    """Side in pixels of the features of each stage of a network for small images; each stage halves it.

    Raises:
        AllocationMismatchError: blocks and planes are not given for the same number of stages.
        InputError: the images are so small that a stage would have no pixels left.
    """
    if len(blocks) != len(planes):
        raise AllocationMismatchError(
            f"expected blocks and planes for the same number of stages, got {len(blocks)} and {len(planes)}"
        )
    # Rounded up, as a padded convolution does; the halving of the stages is rounded down.
    side = math.ceil(image_side / stem_stride)
    sides = []
    for _ in blocks:
        sides.append(side)
        side //= 2
    if 0 in sides:
        raise InputError(f"{len(blocks)} stages halve images of {image_side} pixels to nothing")
    return sides


def build_small(
    block: type[ResidualBlock], shape: Small, widths: Widths | None, row: Callable[[int], list[int]]
) -> ResidualNet:
    """A network for small images; arguments as for `build`.

    Raises:
        AllocationMismatchError: blocks, planes or widths do not fit.
        InputError: the images are so small that a stage would have no pixels left.
    """
    stride = small_stem_stride(shape.image_side)
    sides_of_stages(shape.image_side, stride, shape.blocks, shape.planes)
    if widths is None:
        stages = [EXPANSION * planes for planes in shape.planes]
        widths = Widths(even_rows(shape.blocks, shape.planes, row), stages, shape.planes[0])
    return ResidualNet(
        block,
        widths,
        shape.blocks,
        num_classes=shape.num_classes,
        in_channels=shape.in_channels,
        image_side=shape.image_side,
        small_stem=stride,
    )
