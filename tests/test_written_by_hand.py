"""Products written by hand, triangles, blocks and gradients: what is read and written in other ways than by layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_exchange import cut
from torch import Tensor, nn
from torch.nn import functional as F

import allocator

TOKENS = torch.zeros(2, 6, 10)
IMAGE = torch.zeros(2, 3, 8, 8)


class Runs(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 4)


def layers() -> dict[str, nn.Module | nn.Parameter]:
    return {"one": nn.Linear(10, 16), "two": nn.Linear(16, 24), "three": nn.Linear(24, 4)}


def convolutions() -> dict[str, nn.Module | nn.Parameter]:
    return {f"{i}": nn.Conv2d(a, b, 3, padding=1) for i, (a, b) in enumerate([(3, 16), (16, 12), (12, 2)])}


def _force(m: Any, x: Tensor) -> Tensor:
    """The gradient of an energy, as potentials of molecules give it."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(_in_layers(m, x).sum(), x, create_graph=m.training)
    return force


def _in_layers(m: Any, x: Tensor) -> Tensor:
    for i in "012":
        x = F.silu(m.get_submodule(i)(x))
    return x


def _score(m: Any, x: Tensor) -> Tensor:
    return torch.func.grad(lambda z: m.three(F.gelu(m.two(m.one(z).tanh()))).sum())(x)


def _attends(m: Any, x: Tensor) -> Tensor:
    """Each token to all, with products that are summed by hand."""
    q, k, v = m.one(x), m.other(x), m.two(m.one(x))
    return m.three((q.unsqueeze(2) * k.unsqueeze(1)).sum(-1).softmax(-1) @ v)


def _steps(m: Any, x: Tensor) -> Tensor:
    """A state of four numbers per channel, whose size is written down."""
    u = m.one(x)
    h, out = torch.zeros(len(x), u.shape[-1], 4, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = h * m.decay.sigmoid() + u[:, t, :, None] * m.into(x[:, t])[:, None]
        out.append((h * m.back(x[:, t])[:, None]).sum(-1))
    return m.three(m.two(torch.stack(out, 1)).relu())


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "a product with a weight": (
        lambda: Runs(
            lambda m, x: (m.one(x).relu().unsqueeze(-2) * m.w).sum(-1), one=nn.Linear(10, 16), w=weight(4, 16)
        ),
        TOKENS,
        "one.weight",
    ),
    "attention": (lambda: Runs(_attends, other=nn.Linear(10, 16), **layers()), TOKENS, "other.weight"),
    "a state": (
        lambda: Runs(_steps, into=nn.Linear(10, 4), back=nn.Linear(10, 4), decay=weight(16, 4), **layers()),
        TOKENS,
        "one.weight",
    ),
    "a lower triangle": (
        lambda: Runs(lambda m, x: m.three(m.two(m.one(x).relu() @ m.w.tril())), w=weight(16, 16), **layers()),
        TOKENS,
        "w",
    ),
    "a symmetric weight": (
        lambda: Runs(
            lambda m, x: m.three(m.two(m.one(x).relu() @ (m.w.triu() + m.w.triu(1).T))), w=weight(16, 16), **layers()
        ),
        TOKENS,
        "w",
    ),
    "blocks": (
        lambda: Runs(
            lambda m, x: m.three(m.one(x).relu() @ torch.block_diag(m.a, m.b)),
            a=weight(6, 10),
            b=weight(10, 14),
            **layers(),
        ),
        TOKENS,
        "a",
    ),
    "a bilinear layer": (
        lambda: Runs(
            lambda m, x: m.three(m.both(m.one(x).relu(), m.other(x).relu()).relu()),
            **{**layers(), "both": nn.Bilinear(16, 8, 24), "other": nn.Linear(10, 8)},
        ),
        TOKENS,
        "both.weight",
    ),
    "forces": (lambda: Runs(_force, **convolutions()), IMAGE, "0.weight"),
    "scores": (lambda: Runs(_score, **layers()), TOKENS, "two.weight"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_followed(case: str) -> None:
    make, x, name = CASES[case]
    torch.manual_seed(0)
    model = make().eval()
    result = allocator.allocate(model, "70%", example_inputs=x)
    assert name in result.allocation.kept
    whole, small = cut(model, result.allocation.kept), result.model.double()
    for training in (False, True):
        given = torch.randn(*x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        expected, found = (each.train(training)(given) for each in (whole, small))
        assert torch.allclose(expected, found, rtol=0, atol=1e-9 * float(expected.abs().max()))


def test_a_size_that_is_written_down_keeps_its_own_dim_alone() -> None:
    result = allocator.allocate(CASES["a state"][0]().eval(), "70%", example_inputs=TOKENS)
    assert len(result.model.get_parameter("one.weight")) < 16
    assert len(result.model.get_parameter("into.weight")) == 4


def test_a_norm_written_by_hand_stays_a_norm() -> None:
    """The square of a tensor, summed, is no product of two."""
    parts = layers()
    model = Runs(lambda m, x: m.three((y := m.two(m.one(x))) / ((y * y).sum(-1, keepdim=True) + 1).sqrt()), **parts)
    kept = allocator.allocate(model.eval(), "70%", example_inputs=TOKENS).allocation.kept
    assert "one.weight" in kept
    assert kept["two.weight"][0] is None
