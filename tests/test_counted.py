"""A number made of one layer's width keeps that layer alone, wherever the number is used."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import allocator

Run = Callable[[Any, Tensor, Tensor], Tensor]
SCALES: dict[str, Run] = {
    "a logarithm": lambda m, y, out: out * math.log(y.shape[1]),
    "a table": lambda m, y, out: out * {16: 1.0}.get(y.shape[1], 3.0),
    "words": lambda m, y, out: out * float(f"{y.shape[1]}"),
    "a tensor": lambda m, y, out: out * torch.full((), y.shape[1], dtype=out.dtype).log(),
    "numbers in a weight": lambda m, y, out: out / m.first.bias.numel(),
    "a share of the parameters": lambda m, y, out: out * (sum(p.numel() for p in m.first.parameters()) / 448),
}


class Scaled(nn.Module):
    """Three convolutions, the last of whose results are scaled."""

    def __init__(self, scale: Run) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.last = nn.Conv2d(12, 4, 3, padding=1)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        return self.scale(self, y, self.last(self.second(y).relu()))


@pytest.mark.parametrize("scale", SCALES)
def test_a_number_keeps_the_layer_that_it_counts(scale: str) -> None:
    result = allocator.allocate(Scaled(SCALES[scale]), "60%", example_inputs=torch.zeros(1, 3, 8, 8))
    assert len(result.model.get_parameter("first.weight")) == 16
    assert len(result.model.get_parameter("second.weight")) < 12
    said = next(note for note in result.notes if "counts" in note)
    assert said.startswith("the neurons at aten.convolution.default in first stay, which aten.")


class Equalised(nn.Conv2d):
    """A weight that is scaled by how many numbers an output is made of (Karras et al., 2018)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * (2 / self.weight[0].numel()) ** 0.5, self.bias, padding=1)


def test_a_scale_by_inputs_keeps_no_outputs() -> None:
    layers = nn.Conv2d(3, 16, 3, padding=1), Equalised(16, 12, 3), nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(8, 4, 3)
    result = allocator.allocate(nn.Sequential(*layers), "60%", example_inputs=torch.zeros(1, 3, 8, 8))
    widths = [len(result.model.get_parameter(f"{i}.weight")) for i in range(4)]
    assert widths[0] == 16
    assert widths[1] < 12


def test_layers_of_a_class_are_kept_together_once_a_second_is() -> None:
    """So that many of them do not ask for a plan each."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *(Equalised(8, 8, 3) for _ in range(6)), nn.Conv2d(8, 12, 3))
    model.append(nn.Conv2d(12, 4, 3))
    result = allocator.allocate(model, "90%", example_inputs=torch.zeros(1, 3, 12, 12))
    assert sum("counts" in note for note in result.notes) <= 3
    assert len(result.model.get_parameter("7.weight")) < 12
