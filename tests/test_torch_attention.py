"""torch's own attention loses heads, though its forward takes them only as wide together as what it reads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx
import torch.nn.utils.prune
from torch import Tensor, nn

import allocator
from allocator.adapters import take_any_width
from allocator.adapters.torch_attention import AnyWidthAttention
from allocator.io.files import load_model, save_model

L, S, N, E, HEADS = 5, 7, 2, 12, 3


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.2, 0.6) if parameter.dim() == 1 else nn.init.normal_(parameter, std=0.3)
    return model.eval()


def of_any_width(module: nn.Module) -> nn.Module:
    other = copy.deepcopy(module)
    take_any_width(dict(other.named_modules()))
    return other


MASKS: dict[str, dict[str, Tensor]] = {
    "no mask": {},
    "where not to look": {"attn_mask": torch.arange(S) > torch.arange(L)[:, None] + 2},
    "added": {"attn_mask": torch.arange(L * S, dtype=torch.float64).view(L, S).sin()},
    "per head": {"attn_mask": torch.arange(N * HEADS * L * S, dtype=torch.float64).view(-1, L, S).cos()},
    "padding": {"key_padding_mask": torch.arange(S) >= torch.tensor([4, 6])[:, None]},
    "both": {
        "attn_mask": torch.arange(S) > torch.arange(L)[:, None] + 2,
        "key_padding_mask": torch.arange(S) >= torch.tensor([4, 6])[:, None],
    },
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"kdim": 4, "vdim": 6}, {"bias": False}, {"dropout": 0.5}], ids=str
)
def test_it_computes_what_torch_does(options: dict[str, Any], weights: dict[str, bool], mask: str) -> None:
    own = randomised(nn.MultiheadAttention(E, HEADS, **options)).double()
    other = of_any_width(own)
    assert (type(own), type(other)) == (nn.MultiheadAttention, AnyWidthAttention)
    shapes = [(L, N, E), (S, N, options.get("kdim", E)), (S, N, options.get("vdim", E))]
    given = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    if options.get("batch_first"):
        given = [each.transpose(0, 1) for each in given]
    for expected, found in zip(own(*given, **weights, **MASKS[mask]), other(*given, **weights, **MASKS[mask])):
        assert (expected is None) == (found is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_without_a_batch() -> None:
    own = randomised(nn.MultiheadAttention(E, HEADS)).double()
    x = torch.randn(L, E, dtype=torch.float64)
    for expected, found in zip(own(x, x, x), of_any_width(own)(x, x, x)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_causal_hint_needs_its_mask() -> None:
    x = torch.randn(L, N, E)
    with pytest.raises(RuntimeError, match="attn_mask"):
        of_any_width(nn.MultiheadAttention(E, HEADS))(x, x, x, is_causal=True)


class Looking(nn.Module):
    """Attention whose weights nobody looks at, though they are computed."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = self.last(x + self.attention(x, x, x)[0])
        return y


class Unlooked(Looking):
    """Attention that is not asked for its weights."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = self.last(x + self.attention(x, x, x, need_weights=False)[0])
        return y


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)


def heads(model: nn.Module) -> list[int]:
    return [module.num_heads for module in model.modules() if isinstance(module, nn.MultiheadAttention)]


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (Looking, [(2, 6, 8)]),
        (encoder, [(2, 6, 16)]),
        (lambda: nn.Transformer(16, 4, 1, 1, 32), [(6, 2, 16), (5, 2, 16)]),
    ],
    ids=["attention alone", "encoder", "encoder and decoder"],
)
def test_heads_go(make: Any, shapes: list[tuple[int, ...]]) -> None:
    model = randomised(make())
    inputs = tuple(torch.randn(shape) for shape in shapes)
    before = {name: type(module) for name, module in model.named_modules()}
    result = allocator.allocate(model, "50%", example_inputs=inputs)
    assert result.certificate.ok
    assert min(heads(result.model)) < 4
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert [name for name, _ in result.model.named_parameters()] == [name for name, _ in model.named_parameters()]
    with torch.no_grad():  # in eval mode, where torch's fused kernels would take over, and in train mode
        expected = result.model(*inputs)
        grads = [p.requires_grad_(True) for p in result.model.parameters()]
    torch.testing.assert_close(result.model(*inputs), expected)
    result.model.train()(*inputs).sum().backward()
    assert all(p.grad is not None for p in grads)


def test_padding_in_an_encoder_that_lost_heads() -> None:
    result = allocator.allocate(randomised(encoder()), "50%", example_inputs=torch.randn(2, 6, 16))
    x, padding = torch.randn(2, 6, 16), torch.arange(6) >= torch.tensor([4, 6])[:, None]
    with torch.no_grad():
        whole = result.model(x, src_key_padding_mask=padding)
        alone = result.model(x[:1, :4])
    torch.testing.assert_close(whole[:1, :4], alone)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_with_keys_of_its_own_it_loses_heads_with_its_stream_alone(options: dict[str, bool]) -> None:
    """Its width is that of what it reads, in its own checks."""
    result = allocator.allocate(randomised(Looking(**options)), "90%", example_inputs=torch.randn(1, 6, 8))
    assert result.certificate.ok
    attention: Any = result.model.get_submodule("attention")
    assert type(attention) is nn.MultiheadAttention
    assert attention.embed_dim == attention.out_proj.in_features == 4 * attention.num_heads
    result.model.train()(torch.randn(2, 5, 8)).sum().backward()


@pytest.mark.parametrize("compiled", [torch.fx.symbolic_trace, torch.jit.script])
@pytest.mark.parametrize("weights", [True, False])
def test_what_takes_torchs_attention_takes_what_is_left_of_it(compiled: Any, weights: bool) -> None:
    model = randomised(Looking() if weights else Unlooked())
    small = allocator.allocate(model, "60%", example_inputs=torch.randn(2, 6, 8)).model
    assert min(heads(small)) < 4
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(small)(x), small(x))


def computed(name: str) -> Looking:
    """Attention with a projection that something else computes."""
    model = Looking()
    attention = model.attention
    if name == "weight norm":
        torch.nn.utils.parametrizations.weight_norm(attention.out_proj)
    elif name == "old weight norm":
        torch.nn.utils.weight_norm(attention, "in_proj_weight")
    else:
        torch.nn.utils.prune.l1_unstructured(attention, "in_proj_weight", 0.3)
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", ["weight norm", "old weight norm", "pruned"])
def test_with_computed_projections_it_keeps_its_heads(name: str) -> None:
    result = allocator.allocate(randomised(computed(name)), "90%", example_inputs=torch.randn(1, 6, 8))
    assert (heads(result.model), result.certificate.ok) == ([4], True)
    assert type(result.model.get_submodule("attention")) is nn.MultiheadAttention


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files(suffix: str, tmp_path: Path) -> None:
    model = randomised(encoder())
    x = torch.randn(1, 6, 16)
    result = allocator.allocate(model, "50%", example_inputs=x)
    path = tmp_path / f"small{suffix}"
    if suffix == ".pt":
        save_model(result.model, path)
        loaded = load_model(path)  # by the list of classes that may be built
    else:
        allocator.save(result, path)
        loaded = allocator.load(path, model=model)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(x), result.model(x))


def test_torchvision_vision_transformer() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = randomised(torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10))
    result = allocator.allocate(model, "50%", example_inputs=torch.zeros(1, 3, 32, 32))
    assert result.certificate.ok
    assert min(heads(result.model)) < 4


class Compiled(nn.Module):
    """Its forward compiles a part of itself, as `flex_attention` does wherever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.read = nn.Linear(6, 24), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        @torch.compile(backend="eager", fullgraph=True)
        def gate(y: torch.Tensor) -> torch.Tensor:
            return y * torch.sigmoid(y)

        y: torch.Tensor = torch.compile(self.read, backend="eager", fullgraph=True)(gate(self.write(x)))
        return y


def test_what_a_forward_compiles_is_followed_and_proven_as_it_is_written() -> None:
    torch.manual_seed(0)
    model = Compiled().eval()
    result = allocator.allocate(model, "60%", example_inputs=torch.zeros(1, 9, 6), criterion="magnitude")
    small: Any = result.model
    assert result.certificate.ok
    assert small.write.out_features < 24
    assert torch.compile.__module__ == "torch"  # and no longer what stood in its place
    assert torch.compile(model.read, backend="eager") is not model.read


class OfNoHead(nn.Module):
    """Queries that share keys of no head, as where a cut leaves nothing of what a number says where keys begin."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 32)

    def forward(self, x: Tensor) -> Tensor:
        q = self.layer(x).unflatten(-1, (4, 8)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q[:, :0], q[:, :0], enable_gqa=True)


def test_keys_of_no_head_are_an_error_and_not_the_end_of_the_process() -> None:
    with pytest.raises(allocator.InputError, match=r"queries share keys of shape \[2, 0, 5, 8\]"):
        allocator.trace(OfNoHead(), torch.randn(2, 5, 8))
