"""The ScaleNet recipe, held against the published figures and an independent forward."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.nn import functional as F

from allocator import recipes
from allocator.errors import AllocationMismatchError, FileError, InputError, UnknownNameError
from allocator.recipes.residual import DEPTHS, ResidualNet
from allocator.recipes.scalenet import (
    RATES,
    ScaleBlock,
    ScaleNet,
    read_rows,
    released_rows,
    scalenet,
    scalenet_seed,
    scalenet_small,
    scalenet_small_seed,
    write_rows,
)

# Parameters and fvcore FLOPs at 1x3x224x224, all operators and convolutions alone, of the authors' networks.
PUBLISHED = {
    "scalenet50-light": (23_631_912, 2_883_765_548, 2_859_427_840),
    "scalenet50": (31_483_618, 3_841_853_887, 3_816_324_352),
    "scalenet101": (54_792_390, 7_546_268_526, 7_509_049_600),
    "scalenet152": (77_220_070, 11_262_499_918, 11_209_903_616),
}
STAGE_TOTALS = {
    "scalenet50-light": (64, 128, 256, 512),
    "scalenet50": (88, 175, 349, 697),
    "scalenet101": (86, 171, 341, 682),
    "scalenet152": (90, 179, 358, 715),
}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm scales, shifts and running statistics away from their start; set eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.weight, 0.2, 1.5, generator=generator)
            nn.init.normal_(module.bias, std=0.3, generator=generator)
            nn.init.normal_(module.running_mean, std=0.3, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 2.0, generator=generator)
    return model.eval()


def oracle(state: Mapping[str, Tensor], x: Tensor, stem_pool: bool = True, stem_stride: int = 2) -> Tensor:
    """ScaleNet from its state_dict alone: pooling by unfolding, upsampling by indexing and by matrices."""

    def norm(y: Tensor, name: str) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        scale = state[f"{name}.weight"] / (var + 1e-5).sqrt()
        return y * scale[:, None, None] + (state[f"{name}.bias"] - mean * scale)[:, None, None]

    def pool(y: Tensor, rate: int) -> Tensor:
        for axis in (2, 3):
            window = min(rate, y.shape[axis])
            y = y.unfold(axis, window, window).amax(-1)
        return y

    def resize_matrix(old: int, new: int, nearest: bool) -> Tensor:
        if nearest:
            return torch.eye(old, dtype=x.dtype).repeat_interleave(new // old, dim=0)
        at = ((torch.arange(new, dtype=x.dtype) + 0.5) * old / new - 0.5).clamp(0, old - 1)
        return (1 - (at[:, None] - torch.arange(old, dtype=x.dtype)).abs()).clamp(min=0)

    def resize(y: Tensor, height: int, width: int) -> Tensor:
        nearest = height % y.shape[2] == 0 and width % y.shape[3] == 0
        down = resize_matrix(y.shape[2], height, nearest)
        across = resize_matrix(y.shape[3], width, nearest)
        return torch.einsum("hp,ncpq,wq->nchw", down, y, across)

    def conv(y: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        columns = F.unfold(y, weight.shape[2:], padding=weight.shape[2] // 2, stride=stride)
        height = (y.shape[2] - 1) // stride + 1
        return (weight.flatten(1) @ columns).unflatten(2, (height, -1))

    def block(y: Tensor, name: str, stride: int) -> Tensor:
        y = pool(y, stride)
        residual = y
        if f"{name}.downsample.0.weight" in state:
            residual = norm(conv(y, f"{name}.downsample.0"), f"{name}.downsample.1")
        z = norm(conv(y, f"{name}.conv1"), f"{name}.bn1").clamp(min=0)
        parts = [
            norm(resize(conv(pool(z, rate), f"{name}.conv2.{i}"), *z.shape[2:]), f"{name}.bn2.{i}")
            for i, rate in enumerate(RATES)
            if f"{name}.conv2.{i}.weight" in state
        ]
        z = conv(torch.cat(parts, 1).clamp(min=0), f"{name}.conv3")
        return (norm(z, f"{name}.bn3") + residual).clamp(min=0)

    y = norm(conv(x, "conv1", stem_stride), "bn1").clamp(min=0)
    if stem_pool:
        y = F.pad(y, (1, 1, 1, 1)).unfold(2, 3, 2).unfold(3, 3, 2).amax((-2, -1))
    blocks = sorted(
        {tuple(int(part) for part in key.removeprefix("layer").split(".")[:2]) for key in state if "layer" in key}
    )
    for stage, index in blocks:
        y = block(y, f"layer{stage}.{index}", 2 if stage > 1 and index == 0 else 1)
    return y.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def relative_difference(got: Tensor, wanted: Tensor) -> float:
    return float(((got - wanted).abs().max() / wanted.abs().max()).item())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters_and_flops(name: str) -> None:
    model = recipes.build(name).eval()
    parameters, flops, conv_flops = PUBLISHED[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    count = FlopCountAnalysis(model, torch.zeros(1, 3, 224, 224))
    count.unsupported_ops_warnings(False)
    assert count.total() == flops
    assert count.by_operator()["conv"] == conv_flops


@pytest.mark.parametrize("name", STAGE_TOTALS)
def test_released_blocks_have_the_stage_totals(name: str) -> None:
    depth = int(name.removeprefix("scalenet").removesuffix("-light"))
    wanted = [total for total, count in zip(STAGE_TOTALS[name], DEPTHS[depth]) for _ in range(count)]
    assert [sum(row[:-1]) for row in released_rows(name)] == wanted


@pytest.mark.parametrize("size", [(224, 224), (96, 160), (127, 65)])
def test_forward_agrees_with_an_independent_one(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = randomise(recipes.build("scalenet50-light", num_classes=7))
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        got, wanted = model(x), oracle(model.state_dict(), x)
    assert got.shape == (2, 7)
    assert relative_difference(got, wanted) < 1e-5


@pytest.mark.parametrize(("side", "stride"), [(32, 1), (48, 2), (64, 2), (33, 1)])
def test_small_forward_agrees_with_an_independent_one(side: int, stride: int) -> None:
    torch.manual_seed(0)
    model = randomise(scalenet_small_seed(side, blocks=(1, 2, 1))).double()
    x = torch.randn(2, 1, side, side, dtype=torch.float64)
    with torch.no_grad():
        got, wanted = model(x), oracle(model.state_dict(), x, stem_pool=False, stem_stride=stride)
    assert relative_difference(got, wanted) < 1e-9


def test_the_oracle_sees_a_wrong_weight() -> None:
    torch.manual_seed(0)
    model = randomise(scalenet_small_seed()).double()
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["layer2.0.conv2.3.weight"] = state["layer2.0.conv2.3.weight"].flip(0)
    with torch.no_grad():
        assert relative_difference(model(x), oracle(state, x, False, 1)) > 1e-4


def test_state_dict_keys_are_the_release_s() -> None:
    keys = list(scalenet(50, "scalenet50").state_dict())
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    layer1_2 = [key.removeprefix("layer1.2.") for key in keys if key.startswith("layer1.2.")]
    # Block layer1.2 is 59/26/0/3: scale 2 is absent and scale 3 keeps its index.
    assert set(layer1_2) == {
        *(f"{name}.weight" for name in ("conv1", "conv2.0", "conv2.1", "conv2.3", "conv3")),
        *(f"{name}.{leaf}" for name in ("bn1", "bn2.0", "bn2.1", "bn2.3", "bn3") for leaf in norm),
    }
    assert {key.split(".")[0] for key in keys} == {
        "conv1",
        "bn1",
        "layer1",
        "layer2",
        "layer3",
        "layer4",
        "fc",
    }
    projections = {key.removesuffix("0.weight") for key in keys if key.endswith("downsample.0.weight")}
    assert projections == {f"layer{stage}.0.downsample." for stage in (1, 2, 3, 4)}


def test_convolutions_are_3x3_but_where_one_pixel_is_left() -> None:
    kernels = {
        (block.side, i): conv.kernel_size
        for block in scalenet_seed(50).scale_blocks()
        for i, conv in enumerate(block.conv2)
        if isinstance(conv, nn.Conv2d)
    }
    wanted = {(side, i): (3, 3) for side in (56, 28, 14, 7) for i in range(4)} | {(7, 3): (1, 1)}
    assert kernels == wanted


def test_a_scale_can_be_taken_away_later() -> None:
    torch.manual_seed(0)
    model = randomise(scalenet_small_seed()).double()
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    assert isinstance(model, ScaleNet)
    block = model.scale_blocks()[1]
    with torch.no_grad():
        # The scales 1 to 3 give zeros after the concatenation, so taking them away changes nothing.
        for norm in list(block.bn2)[1:]:
            assert isinstance(norm, nn.BatchNorm2d)
            norm.weight.zero_()
            norm.bias.zero_()
        before = model(x)
        for i in (1, 2, 3):
            block.conv2[i] = block.bn2[i] = None  # type: ignore[assignment]
        block.conv3.weight = nn.Parameter(block.conv3.weight[:, :16].clone())
        after = model(x)
    assert relative_difference(after, before) < 1e-12
    assert model.rows()[1] == [16, 0, 0, 0, 16]
    assert "layer2.0.conv2.1.weight" not in model.state_dict()


def test_an_absent_scale_does_no_work() -> None:
    block = ScaleBlock(16, 8, (0, 4, 0, 0), side=14).eval()
    counts = FlopCountAnalysis(block, torch.zeros(1, 16, 14, 14)).by_operator()
    # One pooled 3x3 convolution at 7x7, the two 1x1 and the projection at 14x14; one nearest upsampling.
    conv = 7 * 7 * 9 * 8 * 4 + 14 * 14 * (16 * 8 + 4 * 32 + 16 * 32)
    assert counts["conv"] == conv
    assert counts["upsample_nearest2d"] == 4 * 14 * 14


def test_seed_with_other_neurons_per_scale() -> None:
    doubling = [row[:-1] for row in scalenet_seed(50, 30).rows()]
    assert [doubling[i] for i in (0, 3, 7, 13)] == [[30] * 4, [60] * 4, [120] * 4, [240] * 4]
    exact = scalenet_seed(50, (30, 59, 117, 235)).rows()
    assert [exact[i] for i in (0, 3, 7, 13)] == [
        [30] * 4 + [56],
        [59] * 4 + [28],
        [117] * 4 + [14],
        [235] * 4 + [7],
    ]


@pytest.mark.parametrize("depth", DEPTHS)
def test_seed_default_is_the_planes(depth: int) -> None:
    with torch.device("meta"):
        rows = scalenet_seed(depth).rows()
    assert len(rows) == sum(DEPTHS[depth])
    planes = [p for p, count in zip((64, 128, 256, 512), DEPTHS[depth]) for _ in range(count)]
    assert [row[:-1] for row in rows] == [[p] * 4 for p in planes]


def test_rows_round_trip_through_the_authors_json(tmp_path: Path) -> None:
    path = tmp_path / "structure.json"
    write_rows(path, scalenet(50, "scalenet50-light", num_classes=3))
    rows = json.loads(path.read_text())
    assert rows[0] == [30, 8, 10, 16, 56]
    assert rows[-1] == [77, 16, 184, 235, 7]
    assert read_rows(path) == released_rows("scalenet50-light")
    again = scalenet(50, str(path), num_classes=3)
    assert again.rows() == rows


def test_a_network_learns_in_train_mode() -> None:
    model = scalenet_small().train()
    model(torch.randn(4, 1, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("size", [1, 7, 32])
def test_images_smaller_than_the_rates(size: int) -> None:
    model = recipes.build("scalenet50-light", num_classes=5).eval()
    with torch.no_grad():
        out = model(torch.randn(1, 3, size, size))
    assert out.shape == (1, 5)
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], r"expected 16 rows, one per block \(3\+4\+6\+3\), got 15"),
        (
            lambda rows: [*rows[:4], [1, 2, 3, 28], *rows[5:]],
            r"block layer2\.1: expected 4 .* got \[1, 2, 3, 28\]",
        ),
        (
            lambda rows: [*rows[:4], [0, 0, 0, 0, 28], *rows[5:]],
            r"block layer2\.1: expected at least one neuron",
        ),
        (lambda rows: [*rows[:15], [-1, 5, 0, 0, 7]], r"block layer4\.2: .*got \[-1, 5, 0, 0, 7\]"),
    ],
)
def test_allocations_that_do_not_fit(change, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(AllocationMismatchError, match=message):
        scalenet(50, change(released_rows("scalenet50")))


@pytest.mark.parametrize("text", ["", "{", '{"rows": []}', "[]", "[[1, 2], 3]", "[[1.5, 2, 3, 4, 5]]"])
def test_files_that_are_no_allocation(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(FileError, match=r"bad\.json"):
        scalenet(50, path)
    with pytest.raises(FileError, match=r"missing\.json"):
        scalenet(50, tmp_path / "missing.json")


def test_unknown_names_and_depths() -> None:
    with pytest.raises(UnknownNameError, match="no recipe is called 'scalnet50'; did you mean scalenet50"):
        recipes.build("scalnet50")
    with pytest.raises(UnknownNameError, match="known: scalenet50-light"):
        recipes.build("qqq")
    with pytest.raises(UnknownNameError, match=r"no ScaleNet has 34 layers; there are 50, 101, 152 \(nearest: 50\)"):
        scalenet_seed(34)
    with pytest.raises(UnknownNameError, match="no released allocation is called 'scalenet77'"):
        scalenet(50, "scalenet77")


def test_seeds_that_make_no_sense() -> None:
    with pytest.raises(AllocationMismatchError, match="neurons per scale"):
        scalenet_seed(50, 0)
    with pytest.raises(AllocationMismatchError, match="neurons per scale"):
        scalenet_seed(50, (1, 2, 3))
    with pytest.raises(AllocationMismatchError, match="blocks and planes"):
        scalenet_small_seed(32, blocks=(1, 1))
    with pytest.raises(InputError, match="3 stages halve images of 3 pixels"):
        scalenet_small_seed(3)


def test_every_recipe_builds_by_name() -> None:
    for name in recipes.names():
        with torch.device("meta"):
            model = recipes.build(name.upper().replace("-", "_"))
        assert isinstance(model, ScaleNet if name.startswith("scalenet") else ResidualNet)
        assert model.fc.out_features == (10 if "small" in name else 1000)
