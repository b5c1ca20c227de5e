"""Aggregation blocks, stated by hand from each architecture's paper and definition.

Sizes are those of the default input (224 pixels; 299 for Inception v3). A branch lists all convolutions
between the block's entry and the aggregation in the order in which they run. Stride is how much smaller the
features are at the branch's end than at its start, scale how much coarser its coarsest features are than
the block's output.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from meetings import FIVE, ONE, THREE, Meeting, Way, check_meetings, meeting
from torch import nn

import allocator
from allocator import Block
from allocator.graph.blocks import INPUT, call_graph


@cache
def traced(model: str) -> tuple[Block, ...]:
    return tuple(allocator.trace(allocator.build(model)).blocks)


def blocks_of(model: str, *stages: str) -> list[Block]:
    """The blocks at these module paths and below."""

    def inside(block: Block, stage: str) -> bool:
        name = block.name.partition("#")[0]
        return name == stage or name.startswith(f"{stage}.")

    return [block for block in traced(model) if any(inside(block, stage) for stage in stages)]


def check(model: str, stages: tuple[str, ...], expected: list[Meeting]) -> None:
    """The blocks of these stages are the stated ones: all of them, no others, in order."""
    check_meetings(blocks_of(model, *stages), expected, model)


# ScaleNet -------------------------------------------------------------------------------------------


def scale_block(path: str, neurons: tuple[int, ...], planes: int, downsample: bool) -> list[Meeting]:
    """Scales at rates 1, 2, 4 and 7 of a feature map whose side all of them divide, and the shortcut.

    The stage's stride is a max-pool ahead of both the first convolution and the projection, so no branch
    holds it.
    """
    scales = [(f"conv2.{i}", n, rate) for i, (n, rate) in enumerate(zip(neurons, (1, 2, 4, 7))) if n]
    coarsest = max(rate for _, _, rate in scales)
    kernels = (ONE, *(THREE for _ in scales), ONE)
    shortcut = Way("downsample.0", 4 * planes, (ONE,)) if downsample else Way("identity", 4 * planes)
    return [
        meeting(path, "concat", *(Way(name, n, (THREE,), scale=rate) for name, n, rate in scales)),
        meeting(f"{path}#2", "sum", Way("conv3", 4 * planes, kernels, scale=coarsest), shortcut),
    ]


def test_scalenet_blocks() -> None:
    """First two stages of ScaleNet-50: released neurons 62/9/5/12, 55/27/5/1, 59/26/0/3 and so on."""
    check(
        "recipe:scalenet50",
        ("layer1", "layer2"),
        [
            *scale_block("layer1.0", (62, 9, 5, 12), 64, downsample=True),
            *scale_block("layer1.1", (55, 27, 5, 1), 64, downsample=False),
            *scale_block("layer1.2", (59, 26, 0, 3), 64, downsample=False),
            *scale_block("layer2.0", (125, 41, 6, 3), 128, downsample=True),
            *scale_block("layer2.1", (90, 39, 9, 37), 128, downsample=False),
            *scale_block("layer2.2", (106, 56, 4, 9), 128, downsample=False),
            *scale_block("layer2.3", (116, 56, 3, 0), 128, downsample=False),
        ],
    )


# GoogLeNet and Inception ----------------------------------------------------------------------------


def inception(path: str, one: int, three: int, five: int, pool: int) -> Meeting:
    """Module of "Going deeper with convolutions"; torchvision's 5x5 branch has a 3x3 kernel."""
    return meeting(
        path,
        "concat",
        Way("branch1.conv", one, (ONE,)),
        Way("branch2.1.conv", three, (ONE, THREE)),
        Way("branch3.1.conv", five, (ONE, THREE)),
        Way("branch4.1.conv", pool, (ONE,)),
    )


def test_googlenet_blocks() -> None:
    """All modules of stages 3, 4 and 5, by table 1 of the paper."""
    check(
        "torchvision:googlenet",
        ("inception3a", "inception3b", "inception4a", "inception4b", "inception4c", "inception4d", "inception4e",
         "inception5a", "inception5b"),
        [
            inception("inception3a", 64, 128, 32, 32),
            inception("inception3b", 128, 192, 96, 64),
            inception("inception4a", 192, 208, 48, 64),
            inception("inception4b", 160, 224, 64, 64),
            inception("inception4c", 128, 256, 64, 64),
            inception("inception4d", 112, 288, 64, 64),
            inception("inception4e", 256, 320, 128, 128),
            inception("inception5a", 256, 320, 128, 128),
            inception("inception5b", 384, 384, 128, 128),
        ],
    )  # fmt: skip


def inception_a(path: str, pool: int) -> Meeting:
    """35x35 grid: 1x1, 5x5, two 3x3, pooling."""
    return meeting(
        path,
        "concat",
        Way("branch1x1.conv", 64, (ONE,)),
        Way("branch5x5_2.conv", 64, (ONE, FIVE)),
        Way("branch3x3dbl_3.conv", 96, (ONE, THREE, THREE)),
        Way("branch_pool.conv", pool, (ONE,)),
    )


def inception_c(path: str) -> Meeting:
    """17x17 grid: 7x7 convolutions as rows and columns."""
    row, column = (1, 7), (7, 1)
    return meeting(
        path,
        "concat",
        Way("branch1x1.conv", 192, (ONE,)),
        Way("branch7x7_3.conv", 192, (ONE, row, column)),
        Way("branch7x7dbl_5.conv", 192, (ONE, column, row, column, row)),
        Way("branch_pool.conv", 192, (ONE,)),
    )


def inception_e(path: str) -> Meeting:
    """8x8 grid: expanded filter banks, six ways into one concatenation."""
    row, column = (1, 3), (3, 1)
    return meeting(
        path,
        "concat",
        Way("branch1x1.conv", 320, (ONE,)),
        Way("branch3x3_2a.conv", 384, (ONE, row)),
        Way("branch3x3_2b.conv", 384, (ONE, column)),
        Way("branch3x3dbl_3a.conv", 384, (ONE, THREE, row)),
        Way("branch3x3dbl_3b.conv", 384, (ONE, THREE, column)),
        Way("branch_pool.conv", 192, (ONE,)),
    )


def test_inception_blocks_of_one_grid() -> None:
    check(
        "torchvision:inception_v3",
        ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b", "Mixed_7c"),
        [
            inception_a("Mixed_5b", 32),
            inception_a("Mixed_5c", 64),
            inception_a("Mixed_5d", 64),
            inception_c("Mixed_6b"),
            inception_c("Mixed_6c"),
            inception_c("Mixed_6d"),
            inception_c("Mixed_6e"),
            inception_e("Mixed_7b"),
            inception_e("Mixed_7c"),
        ],
    )


def test_inception_blocks_that_halve_the_grid() -> None:
    """Strided convolutions beside a max-pool; 35 pixels give 17 and these 8, at stride 2."""
    check(
        "torchvision:inception_v3",
        ("Mixed_6a", "Mixed_7a"),
        [
            meeting(
                "Mixed_6a",
                "concat",
                Way("branch3x3.conv", 384, (THREE,), stride=2),
                Way("branch3x3dbl_3.conv", 96, (ONE, THREE, THREE), stride=2),
                Way("identity", 288, (), stride=2),
            ),
            meeting(
                "Mixed_7a",
                "concat",
                Way("branch3x3_2.conv", 320, (ONE, THREE), stride=2),
                Way("branch7x7x3_4.conv", 192, (ONE, (1, 7), (7, 1), THREE), stride=2),
                Way("identity", 768, (), stride=2),
            ),
        ],
    )


# DenseNet -------------------------------------------------------------------------------------------


def test_densenet_blocks() -> None:
    """A dense block is one concatenation: what comes in, then growth 32 from each of its layers."""
    entries = {1: (64, 6), 2: (128, 12), 3: (256, 24), 4: (512, 16)}
    expected = [
        meeting(
            f"features.denseblock{number}",
            "concat",
            Way("identity", enters),
            *(Way(f"denselayer{i}.conv2", 32, (ONE, THREE)) for i in range(1, layers + 1)),
        )
        for number, (enters, layers) in entries.items()
    ]
    check("torchvision:densenet121", tuple(f"features.denseblock{n}" for n in entries), expected)


# Res2Net --------------------------------------------------------------------------------------------


def res2net_parts(path: str, width: int, stride: int) -> Meeting:
    """Four parts of equal width; the last is only pooled, or passed on as it is."""
    threes = [Way(f"convs.{i}", width, (THREE,), stride=stride) for i in range(3)]
    return meeting(path, "split", *threes, Way("identity", width, (), stride=stride))


def res2net_first(path: str, width: int, planes: int, stride: int) -> list[Meeting]:
    """The first block of a stage convolves its parts side by side."""
    kernels = (ONE, THREE, THREE, THREE, ONE)
    return [
        res2net_parts(path, width, stride),
        meeting(
            f"{path}#2",
            "sum",
            Way("conv3", 4 * planes, kernels, stride=stride),
            Way("downsample.0", 4 * planes, (ONE,), stride=stride),
        ),
    ]


def res2net_later(path: str, width: int, planes: int) -> list[Meeting]:
    """Later blocks add each part's result to the next part ahead of its convolution."""
    kernels = (ONE, THREE, THREE, THREE, ONE)
    return [
        meeting(path, "sum", Way("convs.0", width, (THREE,)), Way("identity", width)),
        meeting(f"{path}#2", "sum", Way("convs.1", width, (THREE, THREE)), Way("identity", width)),
        Meeting(f"{path}#3", "split", 4 * width, res2net_parts(path, width, 1).branches),
        meeting(f"{path}#4", "sum", Way("conv3", 4 * planes, kernels), Way("identity", 4 * planes)),
    ]


def test_res2net_blocks() -> None:
    """26w x 4s: parts of 26 channels in stage 1, of 52 in stage 2."""
    check(
        "timm:res2net50_26w_4s",
        ("layer1", "layer2"),
        [
            *res2net_first("layer1.0", 26, 64, 1),
            *res2net_later("layer1.1", 26, 64),
            *res2net_later("layer1.2", 26, 64),
            *res2net_first("layer2.0", 52, 128, 2),
            *res2net_later("layer2.1", 52, 128),
            *res2net_later("layer2.2", 52, 128),
            *res2net_later("layer2.3", 52, 128),
        ],
    )


# ResNeXt --------------------------------------------------------------------------------------------


def resnext(path: str, per_group: int, planes: int, stride: int, downsample: bool) -> list[Meeting]:
    """Cardinality 32: 32 groups side by side in the 3x3 convolution, then the shortcut."""
    out = 4 * planes
    shortcut = Way("downsample.0", out, (ONE,), stride=stride) if downsample else Way("identity", out)
    return [
        meeting(
            f"{path}.conv2",
            "groups",
            *(Way(f"group{i}", per_group, (THREE,), stride=stride) for i in range(32)),
        ),
        meeting(path, "sum", Way("conv3", out, (ONE, THREE, ONE), stride=stride), shortcut),
    ]


def test_resnext_blocks() -> None:
    """32x4d: groups of 4 channels in stage 1, of 8 in stage 2."""
    check(
        "torchvision:resnext50_32x4d",
        ("layer1", "layer2"),
        [
            *resnext("layer1.0", 4, 64, 1, downsample=True),
            *resnext("layer1.1", 4, 64, 1, downsample=False),
            *resnext("layer1.2", 4, 64, 1, downsample=False),
            *resnext("layer2.0", 8, 128, 2, downsample=True),
            *resnext("layer2.1", 8, 128, 1, downsample=False),
            *resnext("layer2.2", 8, 128, 1, downsample=False),
            *resnext("layer2.3", 8, 128, 1, downsample=False),
        ],
    )


# SKNet ----------------------------------------------------------------------------------------------


def selective_kernel(path: str, planes: int, stride: int, side: int, downsample: bool) -> list[Meeting]:
    """A 3x3 path beside a 5x5 one (3x3 at dilation 2), weighed by an attention over globally pooled features.

    The residual branch holds both paths, the two 1x1 convolutions of the attention and the second 3x3; its
    coarsest features are those of the attention, which is no scale of its own.
    """
    kernels = (THREE, THREE, ONE, ONE, THREE)
    residual = Way("conv2.conv", planes, kernels, stride=stride, scale=None, dilation=2)
    shortcut = Way("downsample.0", planes, (ONE,), stride=stride) if downsample else Way("identity", planes)
    return [
        meeting(
            f"{path}.conv1",
            "stack",
            Way("paths.0.conv", planes, (THREE,), stride=stride),
            Way("paths.1.conv", planes, (THREE,), stride=stride, dilation=2),
        ),
        meeting(
            f"{path}.conv1#2",
            "product",
            Way("identity", planes),
            Way("attn.fc_select", planes, (ONE, ONE), stride=side, scale=side),
        ),
        meeting(path, "sum", residual, shortcut),
    ]


def test_sknet_blocks() -> None:
    check(
        "timm:skresnet18",
        ("layer1", "layer2"),
        [
            *selective_kernel("layer1.0", 64, 1, 56, downsample=False),
            *selective_kernel("layer1.1", 64, 1, 56, downsample=False),
            *selective_kernel("layer2.0", 128, 2, 28, downsample=True),
            *selective_kernel("layer2.1", 128, 1, 28, downsample=False),
        ],
    )


# HRNet ----------------------------------------------------------------------------------------------


def basic(path: str, channels: int) -> Meeting:
    """Residual block of two 3x3 convolutions."""
    return meeting(path, "sum", Way("conv2", channels, (THREE, THREE)), Way("identity", channels))


def test_hrnet_blocks() -> None:
    """Second stage: two resolutions of 16 and 32 channels, two residual blocks each, exchanged by two sums.

    The exchange's branches start where the resolutions part, ahead of the transition (one more 3x3 each, at
    stride 2 into the coarser one). The coarser resolution joins the finer by a 1x1 convolution and doubling,
    the finer the coarser by a 3x3 at stride 2.
    """
    own = (THREE,) * 5
    check(
        "timm:hrnet_w18_small",
        ("stage2",),
        [
            basic("stage2.0.branches.0.0", 16),
            basic("stage2.0.branches.0.1", 16),
            basic("stage2.0.branches.1.0", 32),
            basic("stage2.0.branches.1.1", 32),
            meeting(
                "stage2.0",
                "sum",
                Way("branches.0.1.conv2", 16, own),
                Way("fuse_layers.0.1.0", 16, (*own, ONE), scale=2),
            ),
            meeting(
                "stage2.0#2",
                "sum",
                Way("fuse_layers.1.0.0.0", 32, (*own, THREE), stride=2),
                Way("branches.1.1.conv2", 32, own, stride=2),
            ),
        ],
    )


def test_hrnet_exchanges_all_resolutions_in_later_stages() -> None:
    """Stages 3 and 4 sum three and four resolutions into each of them."""
    widths = (16, 32, 64, 128)
    for stage, resolutions in ((3, 3), (4, 4)):
        path = f"stage{stage}.0"
        exchanges = [b for b in blocks_of("timm:hrnet_w18_small", path) if b.name.partition("#")[0] == path]
        assert [(b.kind, b.channels) for b in exchanges] == [("sum", w) for w in widths[:resolutions]]
        for i, block in enumerate(exchanges):
            finer = [f"fuse_layers.{i}.{j}.{i - j - 1}.0" for j in range(i)]
            coarser = [f"fuse_layers.{i}.{j}.0" for j in range(i + 1, resolutions)]
            assert [b.name for b in block.branches] == [*finer, f"branches.{i}.1.conv2", *coarser]


# ShuffleNet -----------------------------------------------------------------------------------------


def test_shufflenet_blocks() -> None:
    """Stage 2 of x1.0: 116 channels in two halves; a depthwise convolution is no aggregation of its own."""
    half = (ONE, THREE, ONE)
    first = meeting(
        "stage2.0",
        "concat",
        Way("branch1.2", 58, (THREE, ONE), stride=2),
        Way("branch2.5", 58, half, stride=2),
    )
    later = [meeting(f"stage2.{i}", "split", Way("identity", 58), Way("branch2.5", 58, half)) for i in (1, 2, 3)]
    check("torchvision:shufflenet_v2_x1_0", ("stage2",), [first, *later])


# What branches also tell ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "block", "fields"),
    [
        # A pooled or transformed pixel sees kernel 3; two 3x3 in a row see 5.
        ("torchvision:googlenet", "inception3a", [1, 3, 3, 3]),
        ("torchvision:inception_v3", "Mixed_5b", [1, 5, 5, 3]),
        # A 3x3 kernel at dilation 2 spans 5.
        ("timm:skresnet18", "layer1.0.conv1", [3, 5]),
        # 3x3 on features pooled by 1, 2, 4 and 7.
        ("recipe:scalenet50", "layer1.0", [3, 6, 12, 21]),
    ],
)
def test_receptive_fields(model: str, block: str, fields: list[int]) -> None:
    found = next(b for b in traced(model) if b.name == block)
    assert [branch.receptive_field for branch in found.branches] == [(n, n) for n in fields]


def test_flops_of_branches() -> None:
    """Multiply-adds of the convolutions and twice the elements for the batch norms, as fvcore counts.

    inception3a at 28x28 with 192 channels in: 1x1 to 64; 1x1 to 96 and 3x3 to 128; 1x1 to 16 and 3x3 to 32;
    pooling and 1x1 to 32.
    """
    pixels = 28 * 28
    expected = [
        pixels * (192 * 64 + 2 * 64),
        pixels * (192 * 96 + 2 * 96 + 9 * 96 * 128 + 2 * 128),
        pixels * (192 * 16 + 2 * 16 + 9 * 16 * 32 + 2 * 32),
        pixels * (192 * 32 + 2 * 32),
    ]
    found = next(b for b in traced("torchvision:googlenet") if b.name == "inception3a")
    assert [branch.flops for branch in found.branches] == expected


class Mesh(nn.Module):
    """Every node reads the one before it and the one above it."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.left = nn.ModuleList(nn.Linear(4, 4) for _ in range(side * side))
        self.above = nn.ModuleList(nn.Linear(4, 4) for _ in range(side * side))
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        row = [x] * self.side
        for i in range(self.side):
            left = x
            for j in range(self.side):
                left = self.left[i * self.side + j](left) + self.above[i * self.side + j](row[j])
                row[j] = left
        return self.last(left)


def test_blocks_without_end_in_one_another_are_told_from_the_last_aggregation() -> None:
    """In time that grows with the calls: of a mesh, branches back to the entry would hold them all again and again."""
    small = allocator.trace(Mesh(6), torch.zeros(2, 4))
    assert max(len(branch.calls) for block in small.blocks for branch in block.branches) > 50
    graph = allocator.trace(Mesh(20), torch.zeros(2, 4))
    branches = [branch for block in graph.blocks for branch in block.branches]
    assert len(graph.blocks) == 400
    assert {len(branch.calls) for branch in branches} == {1}
    assert all(branch.flops == 2 * 4 * 4 for branch in branches)
    assert graph.blocks[21].branches[0].name == "left.21"


class IntoZeros(nn.Module):
    """One branch writes what it computed into the middle of zeros, as packed sequences are padded again."""

    def __init__(self, made: str) -> None:
        super().__init__()
        self.made = made
        self.inner, self.outer, self.other = nn.Conv1d(4, 6, 3), nn.Conv1d(6, 6, 1), nn.Conv1d(4, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = (x.shape[0], self.outer.in_channels, x.shape[2])
        y = torch.zeros(size) if self.made == "zeros" else x.new_zeros(size)
        y[:, :, 1:-1] = self.inner(x)
        summed: torch.Tensor = self.outer(y) + self.other(x)
        return summed


@pytest.mark.parametrize("made", ["zeros", "new_zeros"])
def test_a_branch_that_writes_into_zeros_begins_where_its_numbers_come_from(made: str) -> None:
    (block,) = allocator.trace(IntoZeros(made).eval(), torch.zeros(1, 4, 8)).blocks
    assert block.entry == "the input"
    assert [(branch.name, branch.inner) for branch in block.branches] == [("outer", 6), ("other", 0)]


class Padded(nn.Module):
    """What is summed is written into zeros that the forward makes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = (nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.full((x.shape[0], 6, *x.shape[2:]), 0.0)
        y[:1] = self.a(x)[:1].relu()
        output: torch.Tensor = self.head(y + self.b(x))
        return output


def test_what_makes_numbers_of_nothing_is_no_call_of_a_branch() -> None:
    graph = allocator.trace(Padded(), torch.zeros(1, 3, 4, 4))
    calls = call_graph(graph.flow)
    assert [index for index, op in calls.nodes(data="op") if op is None] == [INPUT]
    assert [(block.kind, [branch.channels for branch in block.branches]) for block in graph.blocks] == [("sum", [6, 6])]
