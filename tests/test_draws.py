"""Forwards that draw random numbers in eval mode: their results are proven with the same numbers in both networks."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from subjects import IMAGE
from torch import Tensor, distributions, nn
from torch.nn import functional as F

import allocator
from allocator.verifying.alike import Alike

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
    "rand to out": lambda y: y + torch.rand(y.shape, out=torch.empty(y.shape)),
    "native_dropout": lambda y: torch.native_dropout(y, 0.5, True)[0],
    "an overload": lambda y: y + torch.ops.aten.rand_like.default(y),
    "randint": lambda y: y * torch.randint(0, 5, (1, y.shape[1], 1, 1)),
    "poisson": lambda y: y * torch.poisson(torch.ones_like(y)),
    "Normal": lambda y: distributions.Normal(y, F.softplus(y) + 0.1).rsample(),
    "Laplace": lambda y: distributions.Laplace(y, 1.0).sample(),
    "Bernoulli": lambda y: y * distributions.Bernoulli(logits=y).sample(),
    "Gumbel": lambda y: distributions.Gumbel(y, 1.0).rsample(),
    "RelaxedBernoulli": lambda y: y * distributions.RelaxedBernoulli(torch.tensor(1.0), logits=y).rsample(),
    "StudentT": lambda y: y + distributions.StudentT(torch.full_like(y, 3.0)).rsample(),
    "LogNormal": lambda y: y * distributions.LogNormal(torch.zeros_like(y), 0.1).rsample(),
    "Gumbel of pixels": lambda y: y * F.gumbel_softmax(y, dim=-1),
    "Categorical of others": lambda y: y * (1 + distributions.Categorical(torch.ones(5)).sample((1,))),
    "and a permutation": lambda y: (y + torch.rand_like(y))[torch.randperm(len(y))],
}


OF_DISTRIBUTIONS = (
    *("Normal", "Laplace", "Bernoulli", "Gumbel", "RelaxedBernoulli", "StudentT", "LogNormal"),
    "Categorical of others",
)
ASKS_VALUES = "_is_all_true" not in inspect.getsource(distributions.Distribution)  # as torch 2.6 does


@pytest.mark.parametrize("what", DRAWS)
def test_a_forward_that_draws_is_proven(what: str) -> None:
    if ASKS_VALUES and what in OF_DISTRIBUTIONS:
        pytest.skip("this torch asks for the values that its distributions are given, so that their channels stay")
    torch.manual_seed(0)
    model, state = Noisy(DRAWS[what]).eval(), torch.get_rng_state()
    result: Any = allocator.allocate(model, "50%", example_inputs=IMAGE, criterion="random")
    assert torch.equal(torch.get_rng_state(), state)
    assert result.model.one.out_channels < 16
    assert result.certificate.ok
    assert result.certificate.effect > 1e-6
    said = r"the forward draws random numbers \(\w+(, \w+)*\), fewer in a smaller network: outputs that differ are"
    assert any(re.match(said, note) for note in result.notes)


@pytest.mark.parametrize("what", ["rand", "an overload", "native_dropout"])
def test_beside_other_threads_random_states_are_left_alone_too(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    model, state = Noisy(DRAWS[what]).eval(), torch.get_rng_state()
    allocator.allocate(model, "50%", example_inputs=IMAGE, criterion="random")
    assert torch.equal(torch.get_rng_state(), state)


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


def _by_a_new_one(y: Tensor) -> Tensor:
    return y * torch.randn(1, y.shape[1], 1, 1, generator=torch.Generator().manual_seed(3))


def _dropped(y: Tensor) -> Tensor:
    torch.manual_seed(0)
    return F.dropout(y)


def _from_a_state(y: Tensor) -> Tensor:
    torch.set_rng_state(torch.Generator().manual_seed(5).get_state())
    return y + torch.rand_like(y)


@pytest.mark.parametrize("between", [_seeded, _by_a_generator, _by_a_new_one, _dropped, _from_a_state])
def test_numbers_that_the_forward_seeds_are_its_own(between: Callable[[Tensor], Tensor]) -> None:
    model, state = Noisy(between).eval(), GENERATOR.get_state()
    result: Any = allocator.allocate(model, "50%", example_inputs=IMAGE, criterion="random")
    assert torch.equal(GENERATOR.get_state(), state)
    assert (result.model.one.out_channels, result.certificate.ok) == (16, True)
    assert result.model.two.out_channels < 24
    said = r"the forward draws from a generator that it seeds or holds \(\w+\): channels that meet these numbers stay"
    assert any(re.match(said, note) for note in result.notes)
    why = allocator.trace(model, IMAGE).why()
    assert any("are others where they are fewer: draw them into a buffer" in line for line in why)


class Holding(Noisy):
    """A generator as an attribute, for numbers that do not hang on the channels."""

    def __init__(self) -> None:
        super().__init__(lambda y: y * torch.randn(1, 1, *y.shape[2:], generator=self.generator))
        self.generator = torch.Generator().manual_seed(7)


def _of_pixels(y: Tensor) -> Tensor:
    y = F.dropout(y)
    torch.manual_seed(1)
    return y * torch.randn(1, 1, *y.shape[2:])


@pytest.mark.parametrize("make", [Holding, lambda: Noisy(_of_pixels)])
def test_as_many_seeded_numbers_in_both_are_proven(make: Callable[[], Noisy]) -> None:
    model = make().eval()
    result: Any = allocator.allocate(model, "50%", example_inputs=IMAGE, criterion="random")
    assert result.model.one.out_channels < 16
    assert result.certificate.ok
    if isinstance(model, Holding):
        assert torch.equal(model.generator.get_state(), torch.Generator().manual_seed(7).get_state())


def _seed_of_channels(y: Tensor) -> Tensor:
    torch.manual_seed(y.shape[1])
    return y * torch.randn(1)


def _after_others(y: Tensor) -> Tensor:
    torch.manual_seed(0)
    torch.randn(y.shape[1])
    return y * torch.randn(1)


def _from_one_generator(y: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    torch.randn(y.shape[1], generator=generator)
    return y * torch.randn(1, generator=generator)


@pytest.mark.parametrize("between", [_seed_of_channels, _after_others, _from_one_generator])
def test_a_seeded_number_that_hangs_on_the_channels_never_passes(between: Callable[[Tensor], Tensor]) -> None:
    model = Noisy(between).eval()
    said = r"FAILED.*a generator that it seeds or holds \(randn\), and what.*draw these numbers once, into a buffer"
    with pytest.raises(allocator.CertificateError, match=said):
        allocator.allocate(model, "50%", example_inputs=IMAGE, criterion="random")


def _truncated(y: Tensor) -> Tensor:
    """Which draws nothing without values."""
    return y + nn.init.trunc_normal_(torch.empty_like(y))


def _standardised(y: Tensor) -> Tensor:
    z = torch.randn(1, 1, 8, 8)
    return y + F.interpolate((z - z.mean()) / z.std(), size=y.shape[-2:])


def _inverted(y: Tensor) -> Tensor:
    return y + torch.linalg.inv(torch.randn(4, 4)).abs().clamp(max=1).mean()


@pytest.mark.parametrize("between", [_standardised, _inverted, _truncated])
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


PROBABLE = torch.tensor([0.0, 0.1, 0.9, 1.0])
WIDE = PROBABLE.double()


def _to(function: Callable[..., Tensor], *given: Any) -> Tensor:
    out = torch.empty(0)
    function(*given, out=out)
    return out


ALIKE: dict[str, tuple[Callable[[], Tensor], list[float]]] = {
    "rand": (lambda: torch.rand(2, dtype=torch.float64), [0.75] * 2),
    "rand to out": (lambda: _to(torch.rand, (2,)), [0.75] * 2),
    "randint": (lambda: torch.randint(2, 10, (2,)), [8.0] * 2),
    "randint_like": (lambda: torch.randint_like(torch.zeros(2), 10), [7.0] * 2),
    "random_": (lambda: torch.zeros(2).random_(), [1.0] * 2),
    "random_ between": (lambda: torch.zeros(2).random_(-4, 4), [2.0] * 2),
    "normal": (lambda: torch.normal(1.0, 2.0, (2,)), [2.5] * 2),
    "normal of tensors": (lambda: torch.normal(PROBABLE, PROBABLE), [0.0, 0.175, 1.575, 1.75]),
    "normal_": (lambda: torch.zeros(2).normal_(std=2), [1.5] * 2),
    "uniform_": (lambda: torch.zeros(2).uniform_(-4, to=4), [2.0] * 2),
    "bernoulli": (lambda: torch.bernoulli(PROBABLE), [0.0, 0.0, 1.0, 1.0]),
    "bernoulli of a number": (lambda: torch.bernoulli(torch.zeros(2), 0.1), [1.0] * 2),
    "bernoulli_": (lambda: torch.zeros(4).bernoulli_(PROBABLE), [0.0, 0.0, 1.0, 1.0]),
    "exponential_": (lambda: torch.zeros(2).exponential_(), [1.0] * 2),
    "normal to out": (lambda: _to(torch.normal, PROBABLE, PROBABLE), [0.0, 0.175, 1.575, 1.75]),
    "normal of a size to out": (lambda: _to(torch.normal, 1.0, 2.0, (2,)), [2.5] * 2),
    "bernoulli to out": (lambda: _to(torch.bernoulli, PROBABLE), [0.0, 0.0, 1.0, 1.0]),
    "rrelu_": (lambda: F.rrelu_(torch.tensor([-8.0, 4.0]), 0.25, 0.75, training=True), [-4.0, 4.0]),
    "rrelu": (lambda: F.rrelu(torch.tensor([-8.0, 4.0]), 0.25, 0.75, training=True), [-4.0, 4.0]),
    "dropout": (lambda: F.dropout(WIDE, 0.9), [0.0, 1.0, 9.0, 10.0]),
    "native_dropout": (lambda: torch.native_dropout(PROBABLE, 0.9, True)[0], [0.0, 1.0, 9.0, 10.0]),
    "all dropped": (lambda: torch.native_dropout(PROBABLE, 1.0, True)[0], [0.0] * 4),
    "poisson": (lambda: torch.poisson(3 * PROBABLE), [0.0, 1.0, 3.0, 3.0]),
    "binomial": (lambda: torch.binomial(torch.full((4,), 5.0), PROBABLE), [0.0, 0.0, 4.0, 5.0]),
    "shares": (lambda: torch.distributions.Dirichlet(torch.tensor([1.0, 3.0])).sample(), [0.25, 0.75]),
    "gamma": (lambda: torch.distributions.Gamma(torch.tensor([1.0, 3.0]), 2.0).sample(), [0.5, 1.5]),
}


@pytest.mark.parametrize("what", ALIKE)
def test_what_stands_in_could_have_been_drawn(what: str) -> None:
    make, expected = ALIKE[what]
    drawn = make()
    alike = Alike()
    with torch.random.fork_rng(devices=[]), alike.drawing():
        state = torch.get_rng_state()
        made = make()
        assert torch.equal(torch.get_rng_state(), state)
    assert alike.stood_in == 1
    torch.testing.assert_close(made, torch.tensor(expected), check_dtype=False)
    assert (made.dtype, made.shape) == (drawn.dtype, drawn.shape)


def test_what_is_seeded_is_drawn() -> None:
    alike = Alike()
    with torch.random.fork_rng(devices=[]), alike.drawing():
        one = torch.rand(2, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        other = torch.rand(2)
    assert torch.equal(one, other)
    assert alike.stood_in == 0
