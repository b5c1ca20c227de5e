"""A certificate that compared nothing does not pass, and one that compared what is zero by nature does not fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_graphs import net
from torch import Tensor, nn
from torch.nn import functional as F

import allocator
from allocator.errors import CertificateError
from allocator.verifying.difference import difference, noise_floors

IMAGE = torch.rand(1, 3, 8, 8) + 0.1


def layers() -> dict[str, Any]:
    torch.manual_seed(0)
    return {"one": nn.Conv2d(3, 16, 3, padding=1), "two": nn.Conv2d(16, 16, 3, padding=1), "head": nn.Linear(16, 5)}


def forward(m: Any, x: Tensor) -> Tensor:
    y = m.one(x).relu()
    result: Tensor = m.head(m.two(m.hidden(y)).relu().mean((2, 3)))
    return result


def allocate(run: Callable[..., Any], hidden: Callable[[Tensor], Tensor] = lambda y: y, x: Tensor = IMAGE) -> Any:
    model = net(run, hidden=hidden, **layers())
    return allocator.allocate(model, "60%", example_inputs=x, criterion="magnitude")


def untraced(y: Tensor) -> Tensor:
    """A number made from a channel count in a way that no trace sees: the numbers alone can tell."""
    return y * float(16 / (np.zeros(1) + y.shape[1])[0]) ** (y.shape[1] != 16)


HIDDEN: dict[str, Callable[..., Any]] = {
    "NaN on noise": lambda m, x: forward(m, x.log()),
    "a huge output": lambda m, x: torch.cat([y := forward(m, x), torch.full_like(y, -1e12)], 1),
    "a huge row": lambda m, x: torch.stack([forward(m, x), torch.full((1, 5), 1e14).to(x)], 2),
    "imaginary parts": lambda m, x: torch.complex(torch.zeros_like(y := forward(m, x)), y),
    "an argmax": lambda m, x: forward(m, x).argmax(1),
    "a threshold": lambda m, x: forward(m, x) > 0.1,
    "rounded to whole numbers": lambda m, x: (forward(m, x) * 3).round().long(),
    "a clamp": lambda m, x: torch.cat([forward(m, x), forward(m, x).clamp(max=-1e6)], 1),
}


@pytest.fixture
def unfollowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers in calls are not compared, so that the structural check passes what it would not."""
    monkeypatch.setattr("allocator.verifying.structure._compare_numbers", lambda *_, **__: None)


@pytest.mark.usefixtures("unfollowed")
@pytest.mark.parametrize("output", HIDDEN)
def test_outputs_that_hide_a_mistake_do_not_pass(output: str) -> None:
    with pytest.raises(CertificateError, match="FAILED: every index accounted for, weights the original's bit for bit"):
        allocate(HIDDEN[output], untraced)


@pytest.mark.parametrize("output", HIDDEN)
def test_the_same_outputs_pass_without_one(output: str) -> None:
    found = allocate(HIDDEN[output]).certificate
    assert found.ok
    assert found.effect > 1e-6
    assert found.compared > 0


NUMBERS: dict[str, Callable[[int], Tensor]] = {
    "asarray": lambda n: torch.asarray([16 / n]),
    "from_numpy": lambda n: torch.from_numpy(np.full(1, 16 / n)),
    "a legacy constructor": lambda n: torch.FloatTensor([16 / n]),
    "a numpy scalar": lambda n: torch.tensor(np.float32(16) / np.float32(n)),
    "many": lambda n: torch.from_numpy(np.full((8, 8), 16 / n)),
}


@pytest.mark.parametrize("make", NUMBERS)
def test_numbers_made_from_a_channel_count_are_followed(make: str) -> None:
    result = allocate(forward, lambda y: y * NUMBERS[make](y.shape[1]).to(y))
    assert result.certificate.ok
    assert result.model.one.out_channels == 16 > result.model.two.out_channels
    assert any(note.startswith("the neurons at") for note in result.notes)


@pytest.mark.parametrize(
    "output",
    [
        lambda y: F.instance_norm(y).mean((2, 3)).sum(1),
        lambda y: (y - y.mean((2, 3), keepdim=True)).sum((2, 3)),
        lambda y: F.layer_norm(y.flatten(1), [1024]).mean(1),
        lambda y: y.mean((2, 3)) - y.flatten(2).mean(2),
    ],
)
def test_outputs_that_are_zero_by_nature_raise_no_false_alarm(output: Callable[[Tensor], Tensor]) -> None:
    found = allocate(lambda m, x: (m.head((y := m.two(m.one(x).relu())).mean((2, 3))), output(y))).certificate
    assert found.ok
    assert found.outputs == 2


@pytest.mark.parametrize(
    "output", [lambda y: y * 0, lambda y: torch.full_like(y, torch.nan), lambda y: y.sign().abs() + 1]
)
def test_outputs_that_show_nothing_are_refused_as_such(output: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(
        CertificateError, match=r"was not shown to be .*: NOT SHOWN: .*; pass example_inputs .*certify="
    ):
        allocate(lambda m, x: output(forward(m, x)))


# Other dtypes ---------------------------------------------------------------------------------------


class Integers(nn.Module):
    """A linear layer whose weight is of whole numbers, each row with a scale."""

    def __init__(self, i: int, o: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("q", torch.randint(0, 127, (o, i)).to(dtype))
        self.register_buffer("scale", torch.rand(o, 1) / 127)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.get_buffer("q").to(x.dtype) * self.get_buffer("scale").to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_weights_of_whole_numbers_are_certified(dtype: torch.dtype) -> None:
    model = nn.Sequential(Integers(16, 64, dtype), nn.ReLU(), Integers(64, 4, dtype))
    found = allocator.allocate(model, "50%", example_inputs=torch.randn(1, 16), criterion="magnitude").certificate
    assert found.ok
    assert found.effect is not None
    assert found.effect > 1e-3


def _asserts(x: Tensor) -> Tensor:
    assert x.dtype == torch.float32
    assert torch.result_type(x, 1.0) == torch.float32
    return x.float() + torch.zeros(1, dtype=x.dtype)


def test_a_forward_that_asserts_float32_is_computed_in_float64() -> None:
    found = allocate(lambda m, x: forward(m, _asserts(x))).certificate
    assert found.dtype == "float64"
    assert found.relative_error < 1e-12


def _refuses(x: Tensor) -> Tensor:
    if x.element_size() > 4:
        raise TypeError("no float64 here")
    return x


def test_a_forward_that_refuses_float64_is_compared_in_float32() -> None:
    found = allocate(lambda m, x: forward(m, _refuses(x))).certificate
    assert found.ok
    assert (found.dtype, found.tolerance) == ("float32", 1e-4)
    assert "float32 outputs within" in str(found)
    assert found.to_dict()["tolerance"] == 1e-4


@pytest.mark.usefixtures("unfollowed")
def test_a_mistake_is_seen_in_float32_too() -> None:
    with pytest.raises(CertificateError, match="float32 outputs within"):
        allocate(lambda m, x: forward(m, _refuses(x)), untraced)


def test_a_forward_that_refuses_every_dtype_is_said_to() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        if not x.is_meta and isinstance(x, Tensor) and torch.is_grad_enabled() is False and m.seen.append(1) is None:
            raise TypeError("not today")
        return forward(m, x)

    model = net(run, hidden=lambda y: y, seen=[], **layers())
    with pytest.raises(CertificateError, match="TypeError in float64: not today and TypeError in float32: not today"):
        allocator.allocate(model, "60%", example_inputs=IMAGE, criterion="magnitude")


# Scales ---------------------------------------------------------------------------------------------


def test_a_row_of_small_numbers_is_measured_by_its_own_largest() -> None:
    a = torch.tensor([[1e12, 2e12], [1.0, 2.0]], dtype=torch.float64)
    b = a + torch.tensor([[0.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    assert difference([a], [b]).worst == 0.25
    assert difference([a[1:]], [b[1:]]).worst == 0.25
    near = torch.tensor([[1.0, 1e-2]], dtype=torch.float64)
    assert difference([near], [near + 1e-3]).worst == pytest.approx(1e-3), "of one kind"


def test_what_is_nan_in_both_is_not_counted() -> None:
    a = torch.tensor([[1.0, torch.nan], [torch.inf, 2.0]], dtype=torch.float64)
    found = difference([a, a[:0]], [a, a[:0]])
    assert (found.worst, found.shares, found.compared) == (0.0, (0.75, 1.0), 3)
    assert difference([a], [a.nan_to_num(1.0)]).worst == float("inf")
    assert difference([a], [a.nan_to_num(1.0)], patterns=False).worst == 0.0


def test_rounding_is_what_a_nudge_moves() -> None:
    zero, one = torch.full((2, 3), 1e-17, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    floors = noise_floors([zero, one], [[-zero, one * (1 + 1e-12)]], 1e-9)
    assert difference([zero, one], [-zero, one], floors).worst <= 1e-9
    assert difference([zero, one], [zero + 1e-3, one], floors).worst > 1
    assert difference([zero, one], [zero, one + 1e-3], floors).worst > 1e-9
