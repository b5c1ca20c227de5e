"""Layers that nobody trains, at the ends of a network: no channel of an image is lost beside them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

import allocator

IMAGE = torch.rand(1, 3, 8, 8)
TO_LIGHT = torch.tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])


class MeanShift(nn.Conv2d):
    """As super-resolution networks have it: a scale and an offset per colour, written as a convolution."""

    def __init__(self, sign: int, *, trained: bool = False, weight: torch.Tensor | None = None) -> None:
        super().__init__(3, 3, 1)
        self.weight.data = (torch.eye(3) if weight is None else weight).view(3, 3, 1, 1)
        self.bias = nn.Parameter(sign * torch.tensor([0.45, 0.44, 0.40]))
        self.requires_grad_(trained)


class Colours(nn.Module):
    """Other colours by a matrix that is a buffer."""

    matrix: torch.Tensor

    def __init__(self, *, einsum: bool = False) -> None:
        super().__init__()
        self.register_buffer("matrix", TO_LIGHT.clone())
        self.einsum = einsum

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.einsum:
            return torch.einsum("bchw,dc->bdhw", x, self.matrix)
        return functional.conv2d(x, self.matrix[:, :, None, None])


class WrittenDown(nn.Module):
    """The same by numbers in the forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, torch.tensor([[0.3, 0.6, 0.1], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])[:, :, None, None])


class Enlarged(nn.Module):
    """A small super-resolution network between two layers."""

    def __init__(self, first: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.head, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.tail = nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(16, 3, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.head(self.first(x))
        return self.last(self.tail(x + self.body(x).relu()))


ENDS: dict[str, Callable[[int], nn.Module]] = {
    "frozen": MeanShift,
    "frozen, no scale": lambda sign: MeanShift(sign, weight=TO_LIGHT),
    "by its values": lambda sign: MeanShift(sign, trained=True),
    "several in a row": lambda sign: nn.Sequential(MeanShift(sign), Colours(), nn.Hardtanh(-9, 9), MeanShift(sign)),
    "a buffer": lambda _: Colours(),
    "a buffer in einsum": lambda _: Colours(einsum=True),
    "numbers": lambda _: WrittenDown(),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ENDS)
def test_no_channel_of_an_image_is_lost_beside_a_fixed_layer(kind: str, frozen: bool) -> None:
    model = Enlarged(ENDS[kind](-1), ENDS[kind](1))
    if frozen:
        model.requires_grad_(False)  # as for inference: nothing in it is learned any more, and all but the ends may go
    result = allocator.allocate(model, "10%", example_inputs=IMAGE, at_least=0, scope="all")
    small = result.model
    assert isinstance(small, Enlarged)
    assert small.head.in_channels == 3
    assert small.tail[2].out_channels == 3
    for each in (small.first, small.last):
        assert {name: t.shape for name, t in each.state_dict().items()} == {
            name: t.shape for name, t in ENDS[kind](1).state_dict().items()
        }
    assert small.head.out_channels < 16
    assert small(IMAGE).shape == (1, 3, 16, 16)


def test_a_learned_layer_at_an_end_may_lose_what_it_reads() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 16, 3), nn.Conv2d(16, 3, 1), nn.Conv2d(3, 3, 1))
    graph = allocator.trace(model, IMAGE)
    assert graph.size == 3 + 16 + 3


def test_a_frozen_layer_between_learned_ones_keeps_its_neurons_free() -> None:
    middle = nn.Conv2d(4, 4, 1).requires_grad_(False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), middle, nn.Conv2d(4, 8, 3), nn.Conv2d(8, 2, 1))
    assert allocator.trace(model, IMAGE).size == 4 + 4 + 8


def test_a_frozen_backbone_stays_free() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1)).requires_grad_(False)
    model = nn.Sequential(backbone, nn.Conv2d(16, 16, 1).requires_grad_(False))
    assert allocator.trace(model, IMAGE).size == 16 + 16


class Gated(nn.Module):
    """A gate that lets all through at first: its weight begins as zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        nn.init.zeros_(self.gate.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.out(self.value(x) * functional.logsigmoid(self.gate(x)))
        return output


def test_a_layer_that_begins_as_zeros_is_no_map_of_channels() -> None:
    graph = allocator.trace(Gated(), torch.zeros(2, 8))
    assert graph.size == 8
    assert not graph.unsupported


def test_what_stays_says_why() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), MeanShift(1))
    with pytest.raises(allocator.errors.NothingToAllocateError, match="a fixed layer at an end of the network"):
        allocator.allocate(model, "50%", example_inputs=IMAGE)
