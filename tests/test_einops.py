"""Layers of einops keep the lengths of axes by name; the library itself need not be there for what it stands for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import allocator
from allocator import adapters
from allocator.adapters import Adapter

TOKENS = torch.zeros(1, 5, 24)


class Split(nn.Module):
    """(B, N, heads * width) to (B, heads, N, width); the lengths that are read are a copy of those that are shown."""

    def __init__(self, **lengths: int) -> None:
        super().__init__()
        self.lengths = lengths
        self.read = tuple(lengths.items())

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (dict(self.read)["h"], -1)).transpose(1, 2)


def read_anew(layer: Any) -> None:
    layer.read = tuple(layer.lengths.items())


class Attention(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(24, 24) for _ in range(4))
        self.split = layer

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        y: Tensor = self.out(((q * 6**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return y


def network(layer: Any) -> Any:
    torch.manual_seed(0)
    attention = Attention(layer)
    with torch.no_grad():
        for part in (attention.q, attention.k, attention.v):
            part.weight[6:12] *= 0.1
    return nn.Sequential(attention, nn.LayerNorm(24), nn.Linear(24, 5)).eval()


@pytest.fixture
def _own() -> Iterator[None]:
    adapters.register(Split, Adapter(rewritten=read_anew))
    yield
    adapters.unregister(Split)


@pytest.mark.usefixtures("_own")
def test_a_number_that_a_mapping_holds_by_name_follows_and_its_module_is_told() -> None:
    model = network(Split(h=4))
    result = allocator.allocate(model, "85%", example_inputs=TOKENS, criterion="magnitude")
    small: Any = result.model
    assert result.certificate.ok
    assert small[0].split.lengths == {"h": 3}
    assert result.allocation.attributes["0.split"] == {"lengths.h": 3}
    assert "'lengths.h' of Split follows the kept channels" in result.notes
    assert model[0].split.lengths == {"h": 4}
    assert small(torch.randn(3, 7, 24)).shape == (3, 7, 5)
    fresh: Any = allocator.apply(copy.deepcopy(model), result.allocation)
    assert fresh[0].split.read == (("h", 3),)


def test_heads_that_a_layer_of_einops_splits_go_whole() -> None:
    layers = pytest.importorskip("einops.layers.torch")
    model = network(layers.Rearrange("b n (h d) -> b h n d", h=4))
    result = allocator.allocate(model, "85%", example_inputs=TOKENS, criterion="magnitude")
    assert result.allocation.kept["0.q.weight"][0] == [*range(6), *range(12, 24)]
    small: Any = result.model
    assert repr(small[0].split) == "Rearrange('b n (h d) -> b h n d', h=3)"
    assert repr(model[0].split) == "Rearrange('b n (h d) -> b h n d', h=4)"
    again = pickle.loads(pickle.dumps(small))
    x = torch.randn(3, 7, 24)
    assert torch.equal(again(x), small(x))
