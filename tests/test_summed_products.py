"""Sums of products over channels, which are matrix products written by hand: attention of graphs, learned weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import allocator

NODES = torch.zeros(7, 6)


class Weighed(nn.Module):
    """Every head weighs a node by a learned vector over its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(6, 24), nn.Linear(24, 3)
        self.weight = nn.Parameter(torch.randn(1, 2, 12))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x).view(len(x), 2, -1)
        shares = (y * self.weight).sum(-1).softmax(0)
        out: Tensor = self.out((y * shares.unsqueeze(-1)).flatten(1))
        return out


class Compared(nn.Module):
    """Neighbours are weighed by the products of their queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = *(nn.Linear(6, 24) for _ in range(3)), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        shares = (self.query(x) * self.key(x.roll(1, 0))).sum(-1, keepdim=True).sigmoid()
        out: Tensor = self.out(self.value(x) * shares)
        return out


class Normed(nn.Module):
    """What is multiplied by itself is a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(6, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        out: Tensor = self.out(y / (1 + (y * y).sum(-1, keepdim=True)))
        return out


class ByExponents(nn.Module):
    """Weights that are not zero where the parameter is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(6, 24), nn.Linear(24, 3)
        self.weight = nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        out: Tensor = self.out(y) * (y * self.weight.exp()).sum(-1, keepdim=True)
        return out


@pytest.mark.parametrize(("kind", "layers"), [(Weighed, ["inner"]), (Compared, ["query", "key", "value"])])
def test_channels_go_of_which_products_are_summed(kind: type[nn.Module], layers: list[str]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    result = allocator.allocate(model, "50%", example_inputs=NODES)
    assert result.certificate.ok
    small: Any = result.model
    assert all(small.get_submodule(layer).out_features < 24 for layer in layers)
    assert result.graph.share() > 0.7
    small.train()(torch.randn(9, 6)).sum().backward()


@pytest.mark.parametrize(
    ("kind", "why"), [(Normed, "a norm over the channels"), (ByExponents, "a reduction runs over these channels")]
)
def test_channels_of_norms_and_of_weights_that_are_computed_stay(kind: type[nn.Module], why: str) -> None:
    with pytest.raises(allocator.NothingToAllocateError, match=why):
        allocator.allocate(kind().eval(), "50%", example_inputs=NODES)
