"""Wider networks of layers that are odd in some way: exact, or refused and named; budgets, multiples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from subjects import IMAGE, Branches, trained, untouched
from test_widening import INITS, check_widened
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import allocator
from allocator import BudgetError, NothingToAllocateError
from allocator.cli import main

NUMBERS, TOKENS = torch.zeros(1, 6), torch.arange(10).reshape(2, 5)


class Made(nn.Module):
    """Layers by name, and a forward."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def vector(forward: Callable[[Any, Tensor], Tensor], width: int = 8, **layers: nn.Module) -> nn.Module:
    """A network of 6 numbers, 8 neurons, and 2 results."""
    return Made(forward, a=nn.Linear(6, 8), z=nn.Linear(width, 2), **layers)


def image(forward: Callable[[Any, Tensor], Tensor], width: int = 8, **layers: nn.Module) -> nn.Module:
    """A network of images, 8 channels, and 4 results."""
    return Made(forward, a=nn.Conv2d(3, 8, 3, padding=1), z=nn.Conv2d(width, 4, 1), **layers)


def squared(h: Tensor, *, unbiased: bool) -> Tensor:
    return h / (h.std(-1, keepdim=True, unbiased=unbiased) + 1e-3)


EXACT: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "twice the same convolution": (
        lambda: image(lambda s, x: s.z(s.b(s.b(s.a(x)).relu())), b=nn.Conv2d(8, 8, 3, padding=1)),
        IMAGE,
    ),
    "batch norm alone": (lambda: image(lambda s, x: s.z(s.b(s.a(x))), b=nn.BatchNorm2d(8, affine=False)), IMAGE),
    "a slope per channel": (lambda: image(lambda s, x: s.z(s.b(s.a(x))), b=nn.PReLU(8)), IMAGE),
    "channels as pixels": (lambda: image(lambda s, x: s.z(F.pixel_shuffle(s.a(x), 2)), width=2), IMAGE),
    "two per channel": (
        lambda: image(lambda s, x: s.z(s.b(s.a(x))), width=16, b=nn.Conv2d(8, 16, 3, groups=8)),
        IMAGE,
    ),
    "transposed, in groups": (
        lambda: image(lambda s, x: s.z(s.b(s.a(x))), b=nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)),
        IMAGE,
    ),
    "tokens": (
        lambda: Made(
            lambda s, x: s.z(s.b(s.a(x)).relu()),
            a=nn.Embedding(30, 8, padding_idx=0),
            b=nn.Linear(8, 8),
            z=nn.Linear(8, 2),
        ),
        TOKENS,
    ),
    "half of them gate": (lambda: vector(lambda s, x: s.z(F.glu(s.a(x))), width=4), NUMBERS),
    "over their deviation": (lambda: vector(lambda s, x: s.z(squared(s.a(x), unbiased=False))), NUMBERS),
    "a norm over two layers": (
        lambda: vector(
            lambda s, x: s.z(s.n(torch.cat([s.a(x), s.b(x)], 1))), width=12, b=nn.Linear(6, 4), n=nn.LayerNorm(12)
        ),
        NUMBERS,
    ),
    "mean of what comes out": (lambda: vector(lambda s, x: s.b(s.a(x).relu()).mean(-1), b=nn.Linear(8, 8)), NUMBERS),
    "one gate for all": (
        lambda: image(lambda s, x: (lambda h: s.z(h * s.b(h).sigmoid()))(s.a(x)), b=nn.Conv2d(8, 1, 1)),
        IMAGE,
    ),
}
INEXACT: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "a weight's length": (
        lambda: Made(
            lambda s, x: s.z(s.a(x)), a=nn.Conv2d(3, 8, 3), z=parametrizations.weight_norm(nn.Conv2d(8, 4, 1))
        ),
        IMAGE,
        r"a norm over the channels mixes them all \(_weight_norm_interface\).*remove_parametrizations.* undoes it",
    ),
    "their length": (
        lambda: vector(lambda s, x: s.z(F.normalize(s.a(x), dim=-1))),
        NUMBERS,
        r"a reduction runs over these channels \(linalg_vector_norm\)",
    ),
    "an unbiased deviation": (
        lambda: vector(lambda s, x: s.z(squared(s.a(x), unbiased=True))),
        NUMBERS,
        r"a norm over the channels mixes them all \(std\)",
    ),
    "the number of the largest": (
        lambda: Made(lambda s, x: s.z(s.a(x).max(-1)[1]), a=nn.Linear(6, 8), z=nn.Embedding(8, 2)),
        NUMBERS,
        r"a reduction runs over these channels \(max\)",
    ),
    "a norm over the input too": (
        lambda: vector(lambda s, x: s.z(s.n(torch.cat([s.a(x), x], 1))), width=14, n=nn.LayerNorm(14)),
        NUMBERS,
        r"an average is taken over them and over what stays \(8 neurons\)",
    ),
    "a shuffle across groups": (
        lambda: image(lambda s, x: s.z(s.b(F.channel_shuffle(s.a(x), 2))), b=nn.Conv2d(8, 8, 3, groups=2)),
        IMAGE,
        r"what is added would not stand where it belongs, as beside a shuffle \(2 neurons\)",
    ),
}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", EXACT)
def test_odd_layers_grow(name: str, init: Any) -> None:
    torch.manual_seed(0)
    make, inputs = EXACT[name]
    model = make().eval()
    with untouched(model):
        result = allocator.widen(model, factor=2, init=init, example_inputs=inputs)
    assert result.certificate.ok
    assert result.certificate.relative_error <= 1e-9  # type: ignore[operator]
    assert sum(p.numel() for p in result.model.parameters()) > 1.5 * sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        x = inputs if not inputs.is_floating_point() else torch.randn(inputs.shape)
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", INEXACT)
def test_what_would_be_inexact_is_named(name: str, init: Any) -> None:
    make, inputs, said = INEXACT[name]
    with pytest.raises(NothingToAllocateError, match=f"no neuron can be added to the model exactly: .*{said}"):
        allocator.widen(make().eval(), factor=2, init=init, example_inputs=inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("init", INITS)
def test_narrow_formats_are_shared_to_the_last_bit(dtype: torch.dtype, init: Any) -> None:
    model = (
        Made(lambda s, x: s.z(s.n(s.a(x))), a=nn.Linear(6, 8), n=nn.LayerNorm(8), z=nn.Linear(8, 4)).to(dtype).eval()
    )
    result = allocator.widen(model, factor=3, init=init, example_inputs=NUMBERS.to(dtype))
    assert result.certificate.ok
    assert result.certificate.relative_error <= 1e-9  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("init", INITS)
def test_complex_weights(dtype: torch.dtype, init: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, dtype=dtype), nn.Linear(8, 5, dtype=dtype), nn.Linear(5, 2, dtype=dtype))
    torch.view_as_real(model[1].weight.detach())[0, 0, 0] = -0.0  # type: ignore[operator]  # its sign is kept
    x = torch.randn(3, 6, dtype=dtype)
    result = allocator.widen(model.eval(), factor=3, init=init, example_inputs=x)
    wide: Any = result.model
    assert result.certificate.weights
    torch.testing.assert_close(wide(x), model(x), rtol=1e-4, atol=1e-5)
    assert wide[0].weight[8:].imag.abs().min() > 0
    assert wide[0].bias[8:].abs().min() > 0


# Budgets and multiples --------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["params", "activations", "peak_activations"])
def test_every_counted_budget_is_exact(budget: str) -> None:
    model = trained()
    asked: dict[str, Any] = {budget: "150%"}
    result = allocator.widen(model, **asked, example_inputs=IMAGE)
    check_widened(model, result, IMAGE)
    before, after = (allocator.trace(each, IMAGE).metric(budget).whole for each in (model, result.model))
    figures = result.allocation.costs[budget]
    assert (figures["before"], figures["after"], figures["asked"]) == (before, after, 1.5 * before)
    assert result.next_cost is not None
    assert after <= 1.5 * before < after + result.next_cost


def test_several_budgets_hold_at_once() -> None:
    model = trained()
    result = allocator.widen(model, flops="300%", params="150%", example_inputs=IMAGE)
    alone = allocator.widen(model, params="150%", example_inputs=IMAGE)
    assert [tuple(p.shape) for p in result.model.parameters()] == [tuple(p.shape) for p in alone.model.parameters()]
    with pytest.raises(
        BudgetError, match=r"parameters are below the model's own .*allocate\(model, params=...\) takes"
    ):
        allocator.widen(model, flops="150%", params="90%", example_inputs=IMAGE)
    with pytest.raises(
        BudgetError, match=r"leave no room for another neuron .* the least that adds one is .* parameters"
    ):
        allocator.widen(model, flops="150%", params="100%", example_inputs=IMAGE)
    with pytest.raises(allocator.InputError, match="params and factor given: pass one of them"):
        allocator.widen(model, params="150%", factor=2, example_inputs=IMAGE)


@pytest.mark.parametrize("asked", [{"flops": "170%"}, {"factor": 1.4}])
def test_widths_that_change_are_multiples(asked: dict[str, Any]) -> None:
    model = trained()
    result = allocator.widen(model, **asked, multiple=6, example_inputs=IMAGE)
    check_widened(model, result, IMAGE, at_most=1.7 * result.flops_before if "flops" in asked else None)
    wide: Any = result.model
    own = (model.stem.out_channels, model.narrow.out_channels, model.wide.out_channels)
    widths = (wide.stem.out_channels, wide.narrow.out_channels, wide.wide.out_channels)
    assert widths != own
    assert all(n == before or n % 6 == 0 for n, before in zip(widths, own, strict=True))


def test_a_stream_is_repeated_until_it_is_a_multiple() -> None:
    model = Made(lambda s, x: s.z(s.n(s.a(x))), a=nn.Linear(6, 8), n=nn.LayerNorm(8), z=nn.Linear(8, 4)).eval()
    wide: Any = allocator.widen(model, factor=7, multiple=12, example_inputs=NUMBERS).model
    assert wide.a.out_features == 48
    with pytest.raises(
        NothingToAllocateError, match="what an average is taken over has 8 neurons, and 3 adds 16 to it"
    ):
        allocator.widen(model, factor=2, multiple=12, example_inputs=NUMBERS)


def test_the_command_line_takes_the_same(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--input-size", "1x1x32x32", "-q", "-o", str(tmp_path / "wide.safetensors"), "--force")
    assert main(["widen", "recipe:resnet-small", *size, "--params", "200%", "--multiple", "4", "--json"]) == 0
    assert '"params"' in capsys.readouterr().out
    wide: Any = allocator.load(tmp_path / "wide.safetensors")
    assert 1.8 < sum(p.numel() for p in wide.parameters()) / 33_090 <= 2
    assert main(["widen", "recipe:resnet-small", *size, "--neurons", "100%", "--multiple", "4"]) == 2
    assert main(["widen", "recipe:resnet-small", *size, "--params", "200%", "--factor", "2"]) == 2


def test_a_branch_network_twice_in_memory_of_its_own() -> None:
    """Sharing weights with the original would be training it."""
    model = trained(Branches())
    result = allocator.widen(model, factor=2, example_inputs=IMAGE)
    own = {p.data_ptr() for p in model.parameters()}
    assert own.isdisjoint({p.data_ptr() for p in result.model.parameters()})
