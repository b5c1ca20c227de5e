"""Around wider networks: seeds, the original's shape again, budgets above, MorphNet's loop, transformers, the shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from subjects import IMAGE, Branches, Nested, trained, untouched, vision_transformer
from test_widening import INITS, added_neurons, check_widened, same_bits
from torch import Tensor, nn

import allocator
from allocator import BudgetNotBindingWarning, InputError, NothingToAllocateError, UnknownNameError
from allocator.cli import main

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))


# Seeds ------------------------------------------------------------------------------------------------


def widths(result: allocator.Result) -> list[list[int]]:
    """Per block, channels of its branches."""
    return [[branch["after"] for branch in block["branches"]] for block in result.allocation.blocks]


def test_each_branch_of_a_seed_has_as_many_neurons() -> None:
    model = trained()
    for neurons, expected in (("100%", 32), ("150%", 48), (40, 40)):
        result = allocator.seed(model, neurons, example_inputs=IMAGE)
        assert widths(result) == [[expected, expected]]
        assert result.model.stem.out_channels == 16  # type: ignore[union-attr]
        check_widened(model, result, IMAGE)


def test_a_seed_is_reset_to_train_from_scratch() -> None:
    result = allocator.seed(trained(), 64, weights="reset", example_inputs=IMAGE)
    assert result.certificate.ok
    wide: Any = result.model
    assert wide.norm.weight.eq(1).all()
    assert wide.wide.weight[:, -1].any()


class Resolutions(nn.Module):
    """Two streams, at two resolutions, that are added to one another: no branch has neurons of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 10, 3, stride=2, padding=1)
        self.up, self.down = nn.Conv2d(10, 6, 1), nn.Conv2d(6, 10, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        fine, coarse = self.fine(x).relu(), self.coarse(x).relu()
        up = nn.functional.interpolate(self.up(coarse), scale_factor=2)
        added, down = (fine + up).relu(), (coarse + self.down(fine)).relu()
        return self.head(torch.cat([added.mean((2, 3)), down.mean((2, 3))], 1))


def test_streams_of_a_seed_have_as_many_neurons() -> None:
    model = trained(Resolutions())
    result = allocator.seed(model, 12, example_inputs=IMAGE)
    wide: Any = result.model
    assert [wide.fine.out_channels, wide.coarse.out_channels, wide.head.in_features] == [12, 12, 24]
    check_widened(model, result, IMAGE)


@pytest.mark.parametrize(
    ("neurons", "error", "message"),
    [
        (20, InputError, r"neurons=20 are fewer than branches have \(model.wide has 32\)"),
        ("many", InputError, "neurons='many' is neither a number of neurons nor a share such as '100%'"),
        (0, InputError, "neurons=0 is neither"),
        ("-5%", InputError, "neurons='-5%' is neither"),
        ("inf%", InputError, "neurons='inf%' is neither"),
        (10**30, InputError, "neurons=10+ are more than 1024 times the 32 of model"),
    ],
)
def test_a_seed_has_no_fewer_neurons(neurons: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        allocator.seed(trained(), neurons, example_inputs=IMAGE)


def test_a_network_without_branches_has_no_seed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    with pytest.raises(NothingToAllocateError, match="has no block in which branches meet; widen makes all layers"):
        allocator.seed(model, example_inputs=IMAGE)


# The original's shape again ---------------------------------------------------------------------------


@pytest.mark.parametrize("dropped", ["zero", "original"])
@pytest.mark.parametrize("make", [Branches, Nested])
def test_a_smaller_network_in_the_originals_shape(make: type[nn.Module], dropped: Any) -> None:
    model = trained(make())
    result = allocator.allocate(model, flops="50%", example_inputs=IMAGE)
    with torch.no_grad():
        for parameter in result.model.parameters():
            parameter.add_(0.01)  # as if trained
    with untouched(model), untouched(result.model):
        restored = allocator.restore(result, dropped)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in restored.state_dict().items()} == shapes
    with torch.no_grad():
        torch.testing.assert_close(restored(IMAGES), result.model(IMAGES))
    gone = torch.tensor(
        [i not in (result.allocation.kept["head.weight"][1] or []) for i in range(shapes["head.weight"][1])]
    )
    assert gone.any()
    assert not restored.head.weight[:, gone].any()  # type: ignore[union-attr,index]
    again = allocator.allocate(restored, flops="50%", example_inputs=IMAGE, criterion="magnitude", at_least=0)
    assert again.certificate.ok


def test_what_was_dropped_comes_back_unread() -> None:
    model = trained()
    result = allocator.allocate(model, flops="50%", example_inputs=IMAGE)
    restored = allocator.restore(result, "original")
    assert torch.equal(restored.stem.weight, model.stem.weight)  # type: ignore[union-attr,arg-type]
    assert not torch.equal(restored.wide.weight, model.wide.weight)  # type: ignore[union-attr,arg-type]


class Tied(nn.Module):
    """One weight gives the tokens' vectors and the answers, beside layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.up, self.down = nn.Embedding(30, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x)
        y: Tensor = self.head(tokens + self.down(self.up(tokens).relu()))
        return y


def test_no_copy_shares_a_weight_that_writes_too() -> None:
    model, tokens = trained(Tied()), torch.randint(0, 30, (2, 5))
    result = allocator.widen(model, factor=1.5, init="copy", example_inputs=tokens)
    wide: Any = result.model
    assert (wide.up.in_features, wide.up.out_features) == (8, 24)
    assert any("one weight writes and reads them" in note and "(8; init=" in note for note in result.notes)
    with torch.no_grad():
        torch.testing.assert_close(wide(tokens), model(tokens))
    with pytest.raises(NothingToAllocateError, match="one weight writes and reads them, so that no copy can share it"):
        allocator.widen(model, factor=1.5, init="copy", include=["tokens", "down"], example_inputs=tokens)
    assert allocator.widen(model, factor=1.5, include=["tokens", "down"], example_inputs=tokens).certificate.ok


class Numbered(nn.Module):
    """Channels that a buffer names by number, the last first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 4, 3)
        self.register_buffer("order", torch.arange(11, -1, -1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.first(x)[:, self.order])
        return y


@pytest.mark.parametrize("dropped", ["zero", "original"])
def test_numbers_of_channels_are_the_originals_again(dropped: Any) -> None:
    model = trained(Numbered())
    result = allocator.allocate(model, flops="50%", example_inputs=IMAGE)
    assert len(result.model.get_buffer("order")) < 12
    restored = allocator.restore(result, dropped)
    assert torch.equal(restored.get_buffer("order"), model.get_buffer("order"))
    with torch.no_grad():
        torch.testing.assert_close(restored(IMAGES), result.model(IMAGES))


class Divided(nn.Module):
    """What one layer gives by what another gives."""

    def __init__(self) -> None:
        super().__init__()
        self.above, self.below, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.above(x) / self.below(x))
        return y


def test_where_zeros_are_divided_by_the_error_says_what_else_there_is() -> None:
    result = allocator.allocate(trained(Divided()), flops="50%", example_inputs=IMAGE)
    with pytest.raises(allocator.CertificateError, match="zeros may be what it divides by: try dropped='original'"):
        allocator.restore(result)
    restored = allocator.restore(result, "original")
    with torch.no_grad():
        torch.testing.assert_close(restored(IMAGES), result.model(IMAGES), rtol=1e-3, atol=1e-3)


def test_a_wider_network_has_nothing_to_recover() -> None:
    wide = allocator.widen(trained(), factor=1.5, example_inputs=IMAGE)
    with pytest.raises(InputError, match=r"this result is wider than its original .* there is nothing to recover"):
        allocator.recover(wide, torch.randn(16, *IMAGE.shape[1:]))


def test_what_cannot_be_restored() -> None:
    model = trained()
    wide = allocator.widen(model, factor=1.5, example_inputs=IMAGE)
    with pytest.raises(InputError, match="wider than its original"):
        allocator.restore(wide)
    small = allocator.allocate(model, flops="50%", example_inputs=IMAGE)
    with pytest.raises(UnknownNameError, match="no dropped 'ones'"):
        allocator.restore(small, "ones")  # type: ignore[arg-type]
    mixed = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3)).eval()
    loose = allocator.allocate(mixed, params="60%", norms="loose", example_inputs=torch.zeros(1, 6))
    with pytest.raises(InputError, match='norms="loose": under its norms, zeros would change what is computed'):
        allocator.restore(loose)


# Budgets above the model's own ------------------------------------------------------------------------


def test_a_budget_above_the_models_own_widens_it_where_that_is_asked_for() -> None:
    model = trained()
    result = allocator.allocate(model, flops="150%", grow=True, example_inputs=IMAGE)
    check_widened(model, result, IMAGE, at_most=1.5 * result.flops_before)
    small = allocator.allocate(model, flops="50%", grow=True, example_inputs=IMAGE)
    assert small.flops_after < small.flops_before
    with pytest.warns(BudgetNotBindingWarning):
        allocator.allocate(model, flops="150%", example_inputs=IMAGE)
    several = allocator.allocate(model, params="150%", activations="200%", grow=True, example_inputs=IMAGE)
    assert sum(p.numel() for p in several.model.parameters()) <= 1.5 * sum(p.numel() for p in model.parameters())
    with pytest.raises(InputError, match="budgets that are counted, not with latency: how long wider layers take was"):
        allocator.allocate(model, latency="150%", grow=True, example_inputs=IMAGE)


def test_smaller_by_importance_and_wider_again() -> None:
    model = trained(Nested())
    asked: list[int] = []

    def train(network: nn.Module) -> None:
        asked.append(allocator.trace(network, IMAGE).flops)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.01)

    own = allocator.trace(model, IMAGE).flops
    with untouched(model):
        done = allocator.iterate(model, flops="100%", grow=0.6, steps=2, train=train, example_inputs=IMAGE)
    assert len(asked) == 2
    assert all(0.95 * own < flops <= own for flops in asked)
    assert len(done.steps) == 4
    assert all(step.certificate.ok for step in done.steps)
    assert [step.allocation.widens for step in done.steps] == [False, True, False, True]
    shapes = {name: tensor.shape for name, tensor in allocator.apply(model, done.allocation).state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in done.model.state_dict().items()}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"flops": "100%", "grow": 1.2}, "grow=1.2 is no share between 0 and 1, such as 0.7"),
        ({"flops": "100%", "grow": True}, "grow"),
        ({"params": "100%", "grow": 0.7}, "with grow the budget is one of flops, not params"),
    ],
)
def test_a_loop_needs_a_share_and_flops(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        allocator.iterate(trained(), **asked, train=lambda network: None, example_inputs=IMAGE)


# Transformers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
def test_attention_grows_by_whole_heads(init: Any) -> None:
    model = vision_transformer(1)
    result = allocator.widen(model, factor=1.5, init=init, example_inputs=IMAGE)
    check_widened(model, result, IMAGE)
    block: Any = result.model.get_submodule("blocks.0")
    assert (block.attn.num_heads, block.attn.qkv.out_features, block.mlp.fc1.out_features) == (6, 144, 192)
    assert block.attn.qkv.in_features == 32
    assert any("32 neurons that a norm averages over (patch_embed.proj.weight)" in note for note in result.notes)


def maxvit(heads: int = 2) -> nn.Module:
    """One head in the first stage, several in the second; windows, then a grid, with tables of relative positions."""
    maxxvit = pytest.importorskip("timm.models.maxxvit")
    torch.manual_seed(0)
    attention = maxxvit.MaxxVitTransformerCfg(dim_head=32, window_size=(2, 2))
    sizes = {"embed_dim": (32, 32 * heads), "depths": (1, 1), "block_type": ("M", "M"), "stem_width": (16, 16)}
    return maxxvit.MaxxVit(maxxvit.MaxxVitCfg(**sizes, transformer_cfg=attention), img_size=64, num_classes=5).eval()


def test_a_network_with_one_head_here_and_several_there_comes_back() -> None:
    model, x = maxvit(), torch.zeros(1, 3, 64, 64)
    wide = allocator.widen(model, factor=2, certify=False, example_inputs=x)
    worth = np.where(added_neurons(wide, allocator.trace(wide.model, x, norms="loose")), 0.0, 1.0)
    own: Any = {"flops": wide.flops_before, "params": sum(p.numel() for p in model.parameters())}
    how: Any = {"criterion": worth, "policy": "global", "norms": "loose", "certify": False, "example_inputs": x}
    assert same_bits(allocator.allocate(wide.model, **own, **how).model, model)


def test_of_several_heads_some_go_where_one_stays() -> None:
    """That a view of one head takes no other width says nothing of several; nor are positions neurons on a grid."""
    wide = allocator.widen(maxvit(4), factor=2, certify=False, example_inputs=torch.zeros(1, 3, 64, 64)).model
    graph = allocator.trace(wide, torch.zeros(1, 3, 64, 64))
    for name in ("stages.1.blocks.0.attn_block.attn.qkv.weight", "stages.1.blocks.0.attn_grid.attn.qkv.weight"):
        assert len(np.unique(graph.unit_of_slot[graph.slots.labels(name)[0]])) == 8  # keys and values of four
    result = allocator.allocate(wide, flops="25%", example_inputs=torch.zeros(1, 3, 64, 64))
    assert result.certificate.ok
    modules = dict(result.model.named_modules())
    heads = [modules[f"stages.{n}.blocks.0.attn_{kind}.attn"].num_heads for n in (0, 1) for kind in ("block", "grid")]
    assert heads[:2] == [1, 1]
    assert heads[2:] == [2, 2]


def test_what_follows_an_attention_grows_though_its_heads_cannot() -> None:
    """torch's own attention holds its width to that of the stream, and says so before it does anything."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
    model = torchvision.models.VisionTransformer(**sizes, num_classes=6).eval()
    nn.init.normal_(model.heads.head.weight)
    result = allocator.widen(model, factor=1.5, example_inputs=IMAGE)
    assert result.certificate.ok
    with torch.no_grad():
        torch.testing.assert_close(result.model(IMAGES), model(IMAGES), rtol=1e-3, atol=1e-5)
    layers: Any = result.model.get_submodule("encoder.layers")
    assert [layer.mlp[0].out_features for layer in layers] == [96, 96]


@pytest.mark.parametrize("init", INITS)
def test_a_language_model(init: Any) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.arange(9).reshape(1, 9)
    result = allocator.widen(model, factor=1.5, init=init, example_inputs=tokens)
    assert result.certificate.ok
    assert result.certificate.widens
    assert (result.certificate.relative_error or 0) <= 1e-9
    layer: Any = result.model.get_submodule("model.layers.0")
    assert layer.mlp.gate_proj.out_features == 72
    assert (layer.self_attn.q_proj.out_features, layer.self_attn.k_proj.out_features) == (48, 24)
    with torch.no_grad():
        torch.testing.assert_close(result.model(tokens).logits, model(tokens).logits, rtol=1e-3, atol=1e-5)


# In a shell -------------------------------------------------------------------------------------------


def test_the_command_line_speaks_of_what_is_wider(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = str(tmp_path / "wide.safetensors")
    model = ("recipe:resnet-small", "--input-size", "1x1x32x32", "-q")
    assert main(["widen", *model, "--factor", "1.2", "-o", wide]) == 0
    assert main(["verify", "recipe:resnet-small", wide]) == 0
    assert "verdict    the original with neurons that change nothing" in capsys.readouterr().out
    assert main(["widen", *model, "--flops", "50%"]) == 1
    assert "widen adds neurons, allocator-cli allocate MODEL --flops ... takes some away" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["widen", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "the wider model: .pt" in said
    assert "budgets above its own (150%, for example)" in said


def test_the_command_line_widens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide, allocation = tmp_path / "wide.safetensors", tmp_path / "wide.json"
    size = ("--input-size", "1x1x32x32", "--json", "-q")
    arguments = ["widen", "recipe:resnet-small", *size, "-o", str(wide), "--allocation", str(allocation)]
    assert main([*arguments, "--flops", "150%"]) == 0
    flops = json.loads(capsys.readouterr().out)["flops"]
    assert flops["before"] < flops["after"] <= 1.5 * flops["before"]
    assert main(["verify", "recipe:resnet-small", str(wide), str(allocation), *size]) == 0
    assert '"widens": true' in capsys.readouterr().out
    seed = ["widen", "recipe:scalenet-small-seed", "--neurons", "200%", "-q", "-o", str(tmp_path / "seed.pt")]
    assert main([*seed, "--no-certificate"]) == 0
    for wrong in ((), ("--flops", "150%", "--factor", "2"), ("--neurons", "100%", "--scope", "inner")):
        assert main([*arguments, "--force", *wrong]) == 2
