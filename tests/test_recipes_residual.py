"""ResNet, SE-ResNet, ResNeXt and Res2Net, held against torchvision's and timm's networks with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from fvcore.nn import FlopCountAnalysis
from torch import nn

import allocator
from allocator import recipes
from allocator.errors import AllocationMismatchError, FileError, InputError, UnknownNameError
from allocator.recipes.res2net import ScalesBottleneck, res2net, res2net_small
from allocator.recipes.residual import ResidualNet, Widths
from allocator.recipes.resnet import resnet, resnet_small, resnet_small_seed, se_resnet, se_resnet_small
from allocator.recipes.resnext import resnext, resnext_small
from allocator.reporting.pictures import Panel, draw_shares

Make = Callable[..., nn.Module]


def vision(name: str) -> nn.Module:
    return torchvision.models.get_model(name, weights=None)


# recipe -> (how to build it, the library's own network).
STANDARD: dict[str, tuple[Make, Make]] = {
    "resnet50": (lambda: recipes.build("resnet50"), lambda: vision("resnet50")),
    "resnet101": (lambda: recipes.build("resnet101"), lambda: vision("resnet101")),
    "se-resnet50": (lambda: recipes.build("se-resnet50"), lambda: timm.create_model("seresnet50")),
    "se-resnet101": (lambda: recipes.build("se_resnet101"), lambda: timm.create_model("seresnet101")),
    "resnext50": (lambda: recipes.build("resnext50"), lambda: vision("resnext50_32x4d")),
    "resnext101": (lambda: recipes.build("resnext101"), lambda: timm.create_model("resnext101_32x4d")),
    "res2net50": (lambda: recipes.build("res2net50"), lambda: timm.create_model("res2net50_26w_4s")),
    "res2net101": (lambda: recipes.build("res2net101"), lambda: timm.create_model("res2net101_26w_4s")),
    "resnet50-seed": (lambda: recipes.build("resnet50-seed"), lambda: vision("wide_resnet50_2")),
    "resnext101-seed": (lambda: recipes.build("resnext101-seed"), lambda: vision("resnext101_64x4d")),
    "resnext101-width-seed": (lambda: recipes.build("resnext101-width-seed"), lambda: vision("resnext101_32x8d")),
    "res2net50 of 8 scales": (lambda: res2net(50, scales=8), lambda: timm.create_model("res2net50_26w_8s")),
}
# fvcore FLOPs at 224x224 and parameters of the libraries' 50-layer networks, as stated elsewhere too.
STATED = {
    "resnet50": (25_557_032, 4_111_512_576),
    "resnext50": (25_028_904, 4_259_381_248),
    "se-resnet50": (28_088_024, 4_114_027_520),
    "res2net50": (25_699_120, 4_280_481_824),
}
WEIGHED = ["resnet50", "se-resnet50", "resnext50", "res2net50", "res2net101"]
SEEDS = ["resnet{}", "se-resnet{}", "resnext{}", "resnext{}-width", "res2net{}"]
SMALL: dict[str, tuple[str, Callable[..., ResidualNet], dict[str, Any]]] = {
    "resnet": ("resnet-small-seed", resnet_small, {"policy": "global"}),
    "se-resnet": ("se-resnet-small-seed", se_resnet_small, {"policy": "global"}),
    "resnext groups": ("resnext-small-seed", resnext_small, {"policy": "global"}),
    "resnext width": ("resnext-small-seed", resnext_small, {"groups": "width", "policy": "global"}),
    "res2net": ("res2net-small-seed", res2net_small, {"scope": "inner"}),
}


def randomise(model: nn.Module) -> nn.Module:
    """Draw all norms' scales and statistics, in place, and set eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.weight, 0.2, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def by_fvcore(model: nn.Module) -> int:
    counter = FlopCountAnalysis(model.eval(), torch.zeros(1, 3, 224, 224))
    return int(counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total())


def check_same_outputs(name: str) -> None:
    ours, theirs = (make() for make in STANDARD[name])
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        got, wanted = ours.eval()(x), theirs(x)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", STANDARD)
def test_the_standard_network_has_the_library_s_names_parameters_and_flops(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = (make() for make in STANDARD[name])
    shapes = [{key: tensor.shape for key, tensor in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    x = torch.zeros(1, 3, 224, 224, device="meta")
    assert allocator.trace(ours, x).flops == allocator.trace(theirs, x).flops


@pytest.mark.parametrize("name", STATED)
def test_the_standard_network_has_the_stated_parameters_and_flops(name: str) -> None:
    model = recipes.build(name)
    assert (parameters(model), by_fvcore(model)) == STATED[name]


@pytest.mark.parametrize("name", WEIGHED)
def test_with_the_library_s_weights_outputs_are_the_library_s(name: str) -> None:
    check_same_outputs(name)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in STANDARD if name not in WEIGHED])
def test_with_the_library_s_weights_outputs_are_the_library_s_too(name: str) -> None:
    check_same_outputs(name)


def check_seed(pattern: str, depth: int) -> None:
    """At the standard network's FLOPs: the budget is used, and a fresh build loads the result."""
    standard = pattern.format(depth).removesuffix("-width")
    with torch.device("meta"):
        budget = allocator.trace(recipes.build(standard)).flops
    seed = randomise(recipes.build(f"{pattern.format(depth)}-seed"))
    kwargs = {"groups": "width"} if pattern.endswith("-width") else {}
    result = allocator.allocate(seed, flops=budget, certify="res2net" in pattern, **kwargs)  # type: ignore[arg-type]
    assert 0.995 * budget <= result.flops_after <= budget
    assert result.certificate.ok
    assert isinstance(result.model, ResidualNet)
    with torch.device("meta"):
        fresh = recipes.build(standard, widths=result.model.widths())
    fresh.load_state_dict(result.model.state_dict(), assign=True)


@pytest.mark.parametrize("pattern", SEEDS)
def test_a_seed_of_50_layers_is_allocated_to_the_standard_network_s_flops(pattern: str) -> None:
    check_seed(pattern, 50)


@pytest.mark.sweep
@pytest.mark.parametrize("pattern", SEEDS)
def test_a_seed_of_101_layers_is_allocated_to_the_standard_network_s_flops(pattern: str) -> None:
    check_seed(pattern, 101)


def test_one_seed_of_101_layers() -> None:
    check_seed("resnext{}", 101)


@pytest.mark.parametrize("name", SMALL)
def test_a_small_seed_learns_uneven_widths_and_is_rebuilt_from_them(name: str, tmp_path: Path) -> None:
    recipe, build, options = SMALL[name]
    seed = randomise(recipes.build(recipe, blocks=(2, 1, 1)))
    assert isinstance(seed, ResidualNet)
    result = allocator.allocate(seed, flops="50%", **options)
    small = result.model
    assert isinstance(small, ResidualNet)
    assert 0.99 * result.flops_asked <= result.flops_after <= result.flops_asked
    source, held = result.notes
    assert source == "input 1x1x32x32, from the model's input_size"
    assert held.startswith("held against the original in eval mode with 1x1x32x32 and")

    small.widths().save(tmp_path / "widths.json")
    widths = Widths.load(tmp_path / "widths.json")
    fresh = build(widths, blocks=(2, 1, 1))
    fresh.load_state_dict(small.state_dict())
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), small.eval()(x))

    kept = [np.array(row) / np.array(whole) for row, whole in zip(widths.rows, seed.widths().rows, strict=True)]
    assert len({tuple(row) for row in kept}) > 1
    seed_parts = seed.parts()
    draw_shares([Panel(name, small.parts(), seed_parts)], tmp_path / "shares.png")
    assert (tmp_path / "shares.png").stat().st_size > 5000


def rows_of(model: nn.Module) -> list[list[int]]:
    assert isinstance(model, ResidualNet)
    return [list(row) for row in model.widths().rows]


def test_whole_groups_change_the_cardinality_and_nothing_else() -> None:
    seed = randomise(recipes.build("resnext-small-seed"))
    rows = rows_of(allocator.allocate(seed, flops="50%", policy="global").model)
    assert [row[1:] for row in rows] == [[2, 2], [4, 4], [8, 8]]
    assert len({row[0] for row in rows}) > 1


def test_groups_that_narrow_do_so_on_both_sides() -> None:
    """What a group gives belongs to the branch as much as what it reads."""
    seed = randomise(recipes.build("resnext-small-seed"))
    result = allocator.allocate(seed, flops="60%", groups="width", scope="branches", criterion="bn_scale")
    for (groups, read, given), whole in zip(rows_of(result.model), rows_of(seed), strict=True):
        assert groups == 16
        assert read < whole[1]
        assert given < whole[2]


def test_scales_of_a_block_compete_and_are_named() -> None:
    torch.manual_seed(1)
    seed = randomise(recipes.build("res2net-small-seed"))
    block = seed.get_submodule("layer1.0")
    assert isinstance(block, ScalesBottleneck)
    with torch.no_grad():
        for i, norm in enumerate(block.bns):
            assert isinstance(norm, nn.BatchNorm2d)
            norm.weight.fill_((1.5, 0.1, 0.1)[i])
    small = allocator.allocate(seed, flops="75%", scope="branches", criterion="bn_scale").model
    assert isinstance(small, ResidualNet)
    parts = small.parts()["layer1.0"]
    assert list(parts) == ["scale 1", "scale 2", "scale 3", "not convolved"]
    assert parts["scale 1"] == 6
    assert (parts["scale 2"], parts["scale 3"]) == (1, 1)


def test_an_allocated_res2net_can_be_allocated_again() -> None:
    seed = randomise(recipes.build("res2net-small-seed", blocks=(1, 2), planes=(8, 16)))
    once = allocator.allocate(seed, flops="60%", scope="inner")
    again = allocator.allocate(once.model, flops="60%", scope="inner")
    assert 0.98 * again.flops_asked <= again.flops_after
    assert again.certificate.ok
    assert len(set(rows_of(again.model)[0])) > 2


def test_torchvision_s_attributes_are_not_needed() -> None:
    """Widths are read from the layers: a part may be made narrower by hand and the forward follows."""
    block = ScalesBottleneck(8, [3, 1, 2, 4, 5], 16, 2, True).eval()
    assert block.row() == [3, 1, 2, 4, 5]
    assert block(torch.zeros(1, 8, 6, 6)).shape == (1, 16, 3, 3)
    # 4 + 5 from the convolutions, 2 that are pooled alone.
    assert block.conv3.in_channels == 11


@pytest.mark.parametrize("name", [name for name in recipes.names() if "small" in name])
@pytest.mark.parametrize("side", [32, 64])
def test_small_networks_learn(name: str, side: int) -> None:
    model = recipes.build(name, image_side=side, num_classes=4, in_channels=3).train()
    out = model(torch.randn(2, 3, side, side))
    assert out.shape == (2, 4)
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["resnet", "se-resnet", "resnext", "res2net"])
def test_small_seeds_have_more_than_the_small_networks(name: str) -> None:
    flops = [allocator.trace(recipes.build(f"{name}-small{end}")).flops for end in ("", "-seed")]
    assert 1.5 * flops[0] < flops[1]


EVEN = [[64, 64]] * 3 + [[128, 128]] * 4 + [[256, 256]] * 6 + [[512, 512]] * 3
SCALES = [[26] * 7] * 16


@pytest.mark.parametrize(
    ("build", "widths", "message"),
    [
        (resnet, Widths(EVEN[:-1]), r"expected 16 rows, one per block \(3\+4\+6\+3\), got 15"),
        (
            resnet,
            Widths([*EVEN[:4], [0, 5], *EVEN[5:]]),
            r"block layer2\.1: expected whole numbers above 0, got \[0, 5",
        ),
        (resnet, Widths([*EVEN[:15], [5]]), r"block layer4\.2: expected 2 numbers, got \[5\] \(channels before"),
        (se_resnet, Widths(EVEN), r"block layer1\.0: expected 3 numbers, got \[64, 64\] .*squeeze"),
        (resnext, Widths(EVEN), r"block layer1\.0: expected 3 numbers, got \[64, 64\] \(groups"),
        (res2net, Widths(EVEN), r"block layer1\.0: expected 2s - 1 numbers for s scales"),
        (
            res2net,
            Widths([*SCALES[:1], [26, 9, 26, 26, 26, 26, 26], *SCALES[2:]]),
            r"block layer1\.1: expected convolutions that give \[9, 26\] channels",
        ),
        (resnet, Widths(EVEN, [256, 512, 1024]), "expected widths of 4 stages, got 3"),
        (resnet, Widths(EVEN, stem=0), "expected stem and stages of at least one channel, got 0"),
    ],
)
def test_widths_that_do_not_fit(build: Callable[..., ResidualNet], widths: Widths, message: str) -> None:
    with pytest.raises(AllocationMismatchError, match=message):
        build(50, widths)


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [[1, 2]]}', '{"rows": [["a"]], "stages": [1], "stem": 1}'])
def test_files_that_hold_no_widths(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(FileError, match=r"bad\.json"):
        resnet(50, path)
    with pytest.raises(FileError, match=r"missing\.json"):
        recipes.build("resnet50", widths=str(tmp_path / "missing.json"))


def test_shapes_that_make_no_sense() -> None:
    with pytest.raises(UnknownNameError, match=r"no Res2Net has 34 layers; there are 50, 101, 152 \(nearest: 50\)"):
        res2net(34)
    with pytest.raises(InputError, match="3 stages halve images of 2 pixels to nothing"):
        resnet_small_seed(image_side=2)
    with pytest.raises(AllocationMismatchError, match="blocks and planes"):
        resnet_small(blocks=(1, 1))


def test_pictures_that_cannot_be_drawn(tmp_path: Path) -> None:
    path = tmp_path / "shares.png"
    with pytest.raises(InputError, match="nothing to draw"):
        draw_shares([Panel("empty", {})], path)
    with pytest.raises(InputError, match="9 parts are more than the 8"):
        draw_shares([Panel("many", {"layer1.0": {str(i): 1 for i in range(9)}})], path)
    with pytest.raises(InputError, match="seed of panel 'other' has other blocks"):
        draw_shares([Panel("other", {"layer1.0": {"a": 1}}, {"layer2.0": {"a": 1}})], path)
    assert not path.exists()
