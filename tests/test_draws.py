"""Forwards that draw random numbers in eval mode: their results are proven with the same numbers in both networks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from subjects import IMAGE
from torch import Tensor, nn
from torch.nn import functional as F

import allocator
from allocator.verifying import float64

pytestmark = pytest.mark.filterwarnings("error::allocator.AllocatorWarning")


class Noisy(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 24, 3)
        self.head, self.between = nn.Linear(24, 5), between

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) to (n, 5)."""
        y = self.two(self.between(self.norm(self.one(x)))).relu()
        return self.head(y.mean((2, 3)))


class Attention(nn.Module):
    """Attention that drops in eval mode too, as where `self.training` was forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, 16) to (n, t, 4)."""
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, -1, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
        return self.head(self.out(y.transpose(1, 2).reshape(n, t, -1)).relu())


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "randn_like": lambda y: y + 0.1 * torch.randn_like(y),
    "rand": lambda y: y * torch.rand(y.shape),
    "randn": lambda y: y + torch.randn(1, y.shape[1], 1, 1),
    "dropout": lambda y: F.dropout(y, training=True),
    "dropout in place": lambda y: F.dropout(y, 0.9, inplace=True),
    "dropout2d": lambda y: F.dropout2d(y),
    "alpha_dropout": lambda y: F.alpha_dropout(y, training=True),
    "normal_": lambda y: y + torch.empty_like(y).normal_(1, 2),
    "uniform_": lambda y: y + y.new_empty(y.shape).uniform_(-2, -1),
    "normal": lambda y: torch.normal(y, 2.0),
    "bernoulli": lambda y: y * torch.bernoulli(y.sigmoid()),
    "bernoulli_": lambda y: y * torch.empty_like(y).bernoulli_(0.2),
    "rrelu": lambda y: F.rrelu(y, training=True),
    "rrelu_": lambda y: F.rrelu_(y.clone(), training=True),
    "and a permutation": lambda y: (y + torch.rand_like(y))[torch.randperm(len(y))],
}


@pytest.mark.parametrize("what", DRAWS)
def test_a_forward_that_draws_is_proven(what: str) -> None:
    torch.manual_seed(0)
    model, state = Noisy(DRAWS[what]).eval(), torch.get_rng_state()
    result: Any = allocator.allocate(model, "50%", example_inputs=IMAGE, criterion="random")
    assert torch.equal(torch.get_rng_state(), state)
    assert result.model.one.out_channels < 16
    assert result.certificate.ok
    assert result.certificate.effect > 1e-6
    said = r"the forward draws random numbers \(\w+(, \w+)*\), fewer in a smaller network: outputs that differ are"
    assert any(re.match(said, note) for note in result.notes)


def test_what_is_wrong_is_still_seen() -> None:
    model = Noisy(DRAWS["randn_like"]).eval()
    result: Any = allocator.allocate(model, "50%", example_inputs=IMAGE, criterion="random")
    with torch.no_grad():
        result.model.two.weight[0, 0] += 0.1
    found = allocator.verify(model, result.model, result.allocation, example_inputs=IMAGE)
    assert found.relative_error is not None
    assert found.relative_error > 1e-6
    assert not found.ok


GENERATOR = torch.Generator().manual_seed(0)


def _seeded(y: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return y * torch.randn(1, y.shape[1], 1, 1)


def _by_a_generator(y: Tensor) -> Tensor:
    return y + torch.empty_like(y).normal_(generator=GENERATOR)


@pytest.mark.parametrize("between", [_seeded, _by_a_generator])
def test_numbers_that_the_forward_seeds_are_its_own(between: Callable[[Tensor], Tensor]) -> None:
    model = Noisy(between).eval()
    with pytest.raises(allocator.CertificateError, match="FAILED"):
        allocator.allocate(model, "50%", example_inputs=IMAGE, criterion="random")


def _standardised(y: Tensor) -> Tensor:
    z = torch.randn(1, 1, 8, 8)
    return y + F.interpolate((z - z.mean()) / z.std(), size=y.shape[-2:])


def _inverted(y: Tensor) -> Tensor:
    return y + torch.linalg.inv(torch.randn(4, 4)).abs().clamp(max=1).mean()


@pytest.mark.parametrize("between", [_standardised, _inverted])
def test_as_many_numbers_in_both_are_drawn(between: Callable[[Tensor], Tensor]) -> None:
    model = Noisy(between).eval()
    assert allocator.allocate(model, "50%", example_inputs=IMAGE, criterion="random").certificate.ok


def test_attention_that_drops_in_eval_mode_is_proven() -> None:
    torch.manual_seed(0)
    x = torch.zeros(1, 6, 16)
    result: Any = allocator.allocate(Attention().eval(), "60%", example_inputs=x, criterion="random")
    assert result.model.qkv.out_features < 48
    assert result.certificate.ok


def test_a_forward_that_draws_in_train_mode_alone_is_not_said_to() -> None:
    model = nn.Sequential(nn.Linear(6, 32), nn.Dropout(), nn.RReLU(), nn.Linear(32, 4)).eval()
    result = allocator.allocate(model, "60%", example_inputs=torch.zeros(1, 6))
    assert not any("random numbers" in note for note in result.notes)


def _alike(name: str) -> Callable[..., Tensor]:
    found = float64._alike(name)
    assert found is not None
    return found


def _to(function: Callable[..., Tensor], *given: Any) -> Tensor:
    out = torch.empty(0)
    function(*given, out=out)
    return out


def _written(function: Callable[..., Tensor], tensor: Tensor, *given: Any) -> Tensor:
    function(tensor, *given)
    return tensor


PROBABLE = torch.tensor([0.0, 0.1, 0.9, 1.0])
ALIKE: dict[str, tuple[Callable[[], Tensor], list[float]]] = {
    "rand": (lambda: _alike("rand")(2, dtype=torch.float64), [0.75] * 2),
    "normal": (lambda: _alike("normal")(1.0, 2.0, (2,)), [2.5] * 2),
    "normal of tensors": (lambda: _alike("normal")(PROBABLE, PROBABLE), [0.0, 0.175, 1.575, 1.75]),
    "normal_": (lambda: _alike("normal_")(torch.zeros(2), std=2), [1.5] * 2),
    "uniform_": (lambda: _alike("uniform_")(torch.zeros(2), -4, to=4), [2.0] * 2),
    "bernoulli": (lambda: _alike("bernoulli")(PROBABLE), [0.0, 0.0, 1.0, 1.0]),
    "bernoulli of a number": (lambda: _alike("bernoulli")(torch.zeros(2), 0.5), [1.0] * 2),
    "bernoulli_": (lambda: _alike("bernoulli_")(torch.zeros(4), PROBABLE), [0.0, 0.0, 1.0, 1.0]),
    "exponential_": (lambda: _alike("exponential_")(torch.zeros(2)), [1.0] * 2),
    "normal to out": (lambda: _to(_alike("normal"), PROBABLE, PROBABLE), [0.0, 0.175, 1.575, 1.75]),
    "normal of a size to out": (lambda: _to(_alike("normal"), 1.0, 2.0, (2,)), [2.5] * 2),
    "bernoulli to out": (lambda: _to(_alike("bernoulli"), PROBABLE), [0.0, 0.0, 1.0, 1.0]),
    "rrelu_": (lambda: _written(_alike("rrelu_"), torch.tensor([-8.0, 4.0]), 0.25, 0.75), [-4.0, 4.0]),
    "rrelu": (lambda: _alike("rrelu")(torch.tensor([-8.0, 4.0]), 0.25, 0.75), [-4.0, 4.0]),
}


@pytest.mark.parametrize("what", ALIKE)
def test_what_stands_in_could_have_been_drawn(what: str) -> None:
    state = torch.get_rng_state()
    make, expected = ALIKE[what]
    torch.testing.assert_close(make(), torch.tensor(expected), check_dtype=False)
    assert torch.equal(torch.get_rng_state(), state)
