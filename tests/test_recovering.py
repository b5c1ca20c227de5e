"""Recovering: the refit against other ways to solve it, the walk, and networks that come back whole."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from recovering_cases import drop
from subjects import untouched
from torch import Tensor, nn
from torch.nn import functional as F

import allocator
from allocator.recovering.moments import Products
from allocator.recovering.ridge import Ridge, refit
from allocator.recovering.rows import Layout, read
from allocator.recovering.targets import Part, gather, predicted
from allocator.recovering.walk import Stop, Walk
from allocator.tracing.inputs import Inputs


def combined(layer: Any, kept: int) -> None:
    """Make all outputs of a layer but the first linear combinations of these."""
    with torch.no_grad():
        others = len(layer.weight) - kept
        mix = torch.randn(others, kept, dtype=layer.weight.dtype)
        layer.weight[kept:] = torch.einsum("ok,k...->o...", mix, layer.weight[:kept])
        if layer.bias is not None:
            layer.bias[kept:] = mix @ layer.bias[:kept]


# The refit of one layer -----------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [True, False])
def test_the_solution_is_that_of_numpy_with_rows_for_the_ridge(offset: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 50, 7, generator=generator, dtype=torch.float64) + 2
    y = torch.randn(1, 50, 3, generator=generator, dtype=torch.float64)
    start = torch.randn(1, 3, 8, generator=generator, dtype=torch.float64)
    strength = 0.1
    gram = Products()
    parts = [Part(x[:, :20], y[:, :20]), Part(x[:, 20:], y[:, 20:])]
    lacks = gather(parts, start, anew=False, gram=gram)
    ridge = Ridge(gram, start, offset=offset)
    found = ridge.solve(start, lacks, strength)[0].numpy()

    centred = x[0] - x[0].mean(0) if offset else x[0]
    scale = (strength * centred.square().mean() * len(x[0])).sqrt().item()
    rows = np.hstack([x[0].numpy(), np.ones((50, 1))])
    old = start[0].numpy()
    if offset:  # which no row of the ridge pulls at
        left = np.vstack([rows, scale * np.eye(8)[:7]])
        right = np.vstack([y[0].numpy(), scale * old[:, :7].T])
        expected = np.linalg.lstsq(left, right, rcond=None)[0].T
    else:
        left = np.vstack([rows[:, :7], scale * np.eye(7)])
        right = np.vstack([y[0].numpy() - old[:, 7], scale * old[:, :7].T])
        expected = np.hstack([np.linalg.lstsq(left, right, rcond=None)[0].T, old[:, 7:]])
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    elsewhere = torch.randn(1, 3, 8, generator=generator, dtype=torch.float64)
    elsewhere[:, :, -1] = start[:, :, -1]
    again = ridge.solve(elsewhere, gather(parts, elsewhere, anew=False), strength)[0].numpy()
    np.testing.assert_allclose(again, expected, rtol=1e-9, atol=1e-12)


def test_a_layer_that_gains_nothing_on_rows_held_back_stays() -> None:
    generator = torch.Generator().manual_seed(0)

    def part(rows: int, noise: float) -> Part:
        x = torch.randn(1, rows, 20, generator=generator, dtype=torch.float64)
        y = x[:, :, :2] + noise * torch.randn(1, rows, 2, generator=generator, dtype=torch.float64)
        return Part(x, y)

    right = torch.zeros(1, 2, 21, dtype=torch.float64)
    right[0, 0, 0] = right[0, 1, 1] = 1
    parts = {False: [part(25, 1.0)], True: [part(1000, 0.0)]}  # 25 noisy rows for 20 unknowns can only do harm
    assert refit(parts.__getitem__, right, offset=True).solution is None
    found = refit(parts.__getitem__, right * 0.1, offset=True)
    assert found.solution is not None
    assert found.after < found.before


def test_what_an_activation_cuts_off_is_no_error() -> None:
    """With a ReLU behind, a fit need not reach the negative numbers, and reaches the others the better for it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 400, 3, generator=generator, dtype=torch.float64)
    y = 3 * x[:, :, :1] - 1 - 40 * (x[:, :, :1] < 0.3) * x[:, :, 1:2]
    ends = torch.zeros(1, 1, 1, dtype=torch.float64), torch.full((1, 1, 1), torch.inf, dtype=torch.float64)
    start = torch.zeros(1, 1, 4, dtype=torch.float64)

    def error(ends: Any) -> float:
        parts = {False: [Part(x[:, :300], y[:, :300], ends)], True: [Part(x[:, 300:], y[:, 300:], ends)]}
        solution = refit(parts.__getitem__, start, offset=True).solution
        assert solution is not None
        return float((predicted(x, solution).relu() - y.relu()).square().mean())

    assert error(ends) < 0.5 * error(None)


# What a layer reads ---------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (4, 7, 6)),
    "square": (lambda: nn.Linear(6, 6), (4, 6)),
    "pointwise": (lambda: nn.Conv2d(6, 4, 1), (3, 6, 5, 4)),
    "kernel": (lambda: nn.Conv2d(6, 4, (3, 5), padding=(1, 2)), (3, 6, 7, 8)),
    "stride and dilation": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=2, dilation=2), (3, 6, 9, 8)),
    "same": (lambda: nn.Conv2d(6, 4, 3, padding="same", dilation=2), (3, 6, 9, 8)),
    "groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), (3, 6, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6), (3, 6, 6, 6)),
    "circular": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), (3, 6, 6, 6)),
    "1-d": (lambda: nn.Conv1d(6, 4, 5, stride=2, padding=1), (3, 6, 20)),
    "3-d": (lambda: nn.Conv3d(6, 4, 3, padding=1), (2, 6, 4, 5, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), (3, 6, 5, 4)),
    "transposed groups": (lambda: nn.ConvTranspose2d(6, 8, (2, 3), stride=(2, 1), groups=2, dilation=2), (3, 6, 5, 4)),
}


def first_stop(model: nn.Module, x: Tensor, weight: str) -> tuple[Walk, Stop]:
    walk = Walk(model, Inputs((x,)), {weight: False}, after=True)
    before = walk.advance()
    assert before is not None
    assert before.result is None
    stop = walk.advance()
    assert stop is before
    return walk, stop


class Lingering(Walk):
    """Whose thread is alive for a while after its last word, as on a machine with much to do."""

    let_go = threading.Event()

    def _run(self, *args: Any) -> None:
        super()._run(*args)
        self.let_go.wait()

    def close(self) -> None:
        self.let_go.set()
        super().close()


@pytest.mark.timeout(20)
def test_a_forward_at_its_end_is_not_waited_for_once_more() -> None:
    walk = Lingering(nn.Linear(3, 2).eval(), Inputs((torch.zeros(1, 3),)), {}, after=False)
    assert walk.advance() is None
    assert walk.advance() is None
    assert walk.output.shape == (1, 2)
    walk.close()


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_weights_are_what_the_layer_gives(name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer: Any = make().double().eval()
    walk, stop = first_stop(layer, torch.randn(shape, dtype=torch.float64), "weight")
    assert stop.result is not None
    windowed = stop.operator.declared.window is not None
    count = math.prod(stop.sizes[2:]) if windowed else stop.sizes[0]
    positions = torch.randperm(count)[: max(count // 2, 1)].sort().values
    layout = Layout.of(stop, layer.weight)
    matrices = layout.matrices(layer.weight)
    assert torch.equal(layout.parameter(matrices), layer.weight)
    x = read(stop, positions, stop.sizes, torch.float64)
    given = (x @ matrices.transpose(1, 2)).transpose(0, 1).flatten(1) + layer.bias
    if windowed:
        expected = stop.result.flatten(2)[:, :, positions].transpose(1, 2).flatten(0, 1)
    else:
        expected = stop.result[positions]
    torch.testing.assert_close(given, expected)
    walk.close()


def test_a_walk_that_is_left_ends() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    walk, _ = first_stop(model, torch.zeros(2, 3), "0.weight")
    walk.close()
    assert not walk._thread.is_alive()
    assert walk.output is None


# Networks that come back whole ----------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value, self.out = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        value = self.value(x)
        return self.out((x @ x.transpose(1, 2) / 12).softmax(-1) @ value)


class Stream(nn.Module):
    """A residual block whose two branches lose channels apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.body, self.norm = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(x + self.norm(self.body(x)))


WHOLE: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 5)), "0", (6,)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 5, 3)), "0", (3, 8, 8)),
    "strided": (lambda: nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 5, 3, 2, bias=False)), "0", (3, 9, 9)),
    "transposed": (lambda: nn.Sequential(nn.Conv2d(3, 12, 1), nn.ConvTranspose2d(12, 5, 2, 2)), "0", (3, 6, 6)),
    "batch norms": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 12, 1), nn.Conv2d(12, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 5, 1)
        ),
        "0",
        (3, 8, 8),
    ),
    "attention": (Attention, "value", (7, 12)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_channels_that_the_others_tell_are_not_missed(name: str) -> None:
    make, first, shape = WHOLE[name]
    torch.manual_seed(0)
    model = make().double().eval()
    combined(model.get_submodule(first), 4)
    data = torch.randn(160, *shape, dtype=torch.float64)
    result = drop(model, data[:1], f"{first}.weight", 4)
    assert result.model.get_parameter(f"{first}.weight").shape[0] == 4
    fresh = torch.randn(20, *shape, dtype=torch.float64)
    with untouched(model), untouched(result.model):
        recovered = allocator.recover(result, data, "least_squares")
    with torch.no_grad():
        expected, cut, given = (each(fresh) for each in (model, result.model, recovered.model))
    assert (cut - expected).abs().max() > 1e-2
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6)


def test_a_stream_is_asked_for_what_its_shortcut_lacks() -> None:
    """The error of a shortcut that lost what cannot be told is made good by the branch beside it."""
    torch.manual_seed(0)
    model = Stream().eval()
    data = torch.randn(200, 3, 8, 8)
    result = allocator.allocate(model, "70%", example_inputs=data[:1])
    recovery = allocator.recover(result, data, "least_squares").recovery
    assert recovery is not None
    layers = {layer.name: layer for layer in recovery.layers}
    assert list(layers) == ["first.weight", "body.weight", "head.weight"]
    body = layers["body.weight"]
    assert body.before is not None
    assert body.after is not None
    assert body.after < body.before
    assert "norm.running_mean" in recovery.tensors


class Deep(nn.Module):
    """Convolutions of all kinds in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(inplace=True),
            nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU6(inplace=True),
            nn.Conv2d(24, 24, 1),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, padding=1, groups=4),
            nn.SiLU(),
            nn.ConvTranspose2d(24, 24, 2, stride=2),
            nn.ReLU(),
        )
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.body(x).mean((2, 3))))


@pytest.fixture
def deep() -> nn.Module:
    torch.manual_seed(0)
    model = Deep()
    images = torch.randn(64, 3, 10, 10)
    for _ in range(20):
        model(images)
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(96, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def test_every_kind_of_layer_is_refitted_once(deep: nn.Module, images: Tensor, monkeypatch: Any) -> None:
    result = allocator.allocate(deep, "50%", example_inputs=images[:1])
    runs: Counter[int] = Counter()
    plain = F.conv2d

    def counted(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        runs[x.shape[0]] += 1
        return plain(x, weight, *rest)

    monkeypatch.setattr(F, "conv2d", counted)
    with untouched(deep), untouched(result.model):
        recovered = allocator.recover(result, images, "least_squares")
    recovery = recovered.recovery
    assert recovery is not None
    assert [layer.name for layer in recovery.layers] == [
        *(f"body.{i}.weight" for i in (0, 3, 6, 8, 10)),
        "head.weight",
    ]
    assert all(layer.after <= layer.before for layer in recovery.layers if layer.after and layer.before)
    assert recovery.after < 0.5 * recovery.before
    assert (recovery.inputs, recovery.held) == (80, 16)
    # Six parts of 16 inputs go through two networks of four such layers, and the one that is held back through the
    # original, and the smaller one before and after, for the comparison. One input shows whether a forward writes.
    assert runs == {16: 6 * 2 * 4 + 3 * 4, 1: 4}


def test_it_says_what_it_did(deep: nn.Module, images: Tensor) -> None:
    said: list[str] = []
    result = allocator.allocate(deep, "50%", data=images, recover=True, example_inputs=images[:1], progress=said.append)
    recovery = result.recovery
    assert recovery is not None
    assert set(recovery.tried) == {"none", "batch_norm", "least_squares", "least_squares + batch_norm"}
    assert recovery.after == min(recovery.tried.values()) == recovery.tried[recovery.method]
    assert "recover" in result.timings
    assert any(line.startswith("refitting: body.3.weight") for line in said)
    assert any("recovery: " in note for note in result.notes)
    assert result.report().to_dict()["certificate"]["refitted"] == recovery.inputs


def test_the_same_again_and_in_the_mode_it_came_in(deep: nn.Module, images: Tensor) -> None:
    deep.train()
    result = allocator.allocate(deep, "50%", example_inputs=images[:1])
    assert result.model.training
    batches = [(part, torch.zeros(len(part))) for part in images.split(7)]
    once, again = (allocator.recover(result, data) for data in (images, batches))
    assert once.model.training
    for (name, a), (_, b) in zip(once.model.state_dict().items(), again.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_folding_moves_offsets_alone(deep: nn.Module, images: Tensor) -> None:
    result = allocator.allocate(deep, "50%", example_inputs=images[:1])
    recovered = allocator.recover(result, images, "fold")
    assert recovered.recovery is not None
    assert recovered.recovery.after < recovered.recovery.before
    for name, parameter in result.model.named_parameters():
        if parameter.dim() > 1:
            assert torch.equal(parameter, recovered.model.get_parameter(name)), name


def test_constants_fold_exactly() -> None:
    """A dropped channel that never varies leaves nothing behind once its constant is in the readers' bias."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).double().eval()
    with torch.no_grad():
        model[0].weight[5:], model[0].bias[5:] = 0, torch.tensor([1.0, -2.0, 3.0])
    data = torch.randn(64, 6, dtype=torch.float64)
    recovered = allocator.recover(drop(model, data[:1], "0.weight", 5), data, "fold")
    fresh = torch.randn(9, 6, dtype=torch.float64)
    torch.testing.assert_close(recovered.model(fresh), model(fresh), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padding", [0, 1])
def test_folding_says_where_padding_is_in_the_way(padding: int) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, padding=padding)).double().eval()
    with torch.no_grad():
        model[0].weight[5:], model[0].bias[5:] = 0, torch.tensor([1.0, -2.0, 3.0])
    data = torch.randn(64, 3, 8, 8, dtype=torch.float64)
    recovered = allocator.recover(drop(model, data[:1], "0.weight", 5), data, "fold")
    assert recovered.recovery is not None
    notes = [layer.note for layer in recovered.recovery.layers]
    off = (recovered.model(data) - model(data)).abs().amax((0, 1)).detach()
    if padding:
        assert notes == ["", "a constant is not exact where it reads padding"]
        assert off[0, 0] > 0.1
    else:
        assert notes == ["", ""]
        assert off.max() < 1e-9


def test_distilling_goes_on_where_least_squares_ends(deep: nn.Module, images: Tensor) -> None:
    deep.requires_grad_(False)
    deep.get_parameter("head.weight").mul_(300)  # so that answers differ
    result = allocator.allocate(deep, "40%", example_inputs=images[:1])
    with untouched(deep), untouched(result.model):
        fitted, trained = (allocator.recover(result, images, method) for method in ("least_squares", "distil"))
    assert fitted.recovery is not None
    assert trained.recovery is not None
    assert trained.recovery.after <= fitted.recovery.after
    with torch.no_grad():
        wanted = deep(images).log_softmax(1)
        near, nearer = (
            F.kl_div(each.model(images).log_softmax(1), wanted, log_target=True, reduction="batchmean")
            for each in (fitted, trained)
        )
    assert nearer < near
    assert all(each.grad is None for each in trained.model.parameters())
