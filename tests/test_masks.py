"""Channels that a mask among the buffers closes: they go first, and are proven all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import allocator
from allocator.verifying.float64 import Draw

EVERY_OTHER = torch.arange(16).view(1, -1, 1, 1) % 2
MASKED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "numbers": lambda m, y: y * m.mask,
    "truth values that fill": lambda m, y: y.masked_fill(m.closed, 0),
    "truth values that choose": lambda m, y: torch.where(m.closed, torch.zeros_like(y), y),
    "truth values that multiply": lambda m, y: y * ~m.closed,
}


class Masked(nn.Module):
    def __init__(self, masked: Callable[[Any, Tensor], Tensor], scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.register_buffer("mask", EVERY_OTHER.float())
        self.register_buffer("closed", EVERY_OTHER == 0)
        self.masked = masked
        with torch.no_grad():
            self.first.weight[::2] *= scale

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.masked(self, self.first(x).relu()))


@pytest.mark.parametrize("kind", MASKED)
def test_closed_channels_go_and_are_shown(kind: str) -> None:
    result = allocator.allocate(Masked(MASKED[kind], 0.01), "50%", example_inputs=torch.zeros(1, 3, 8, 8))
    assert result.allocation.kept["first.weight"][0] == list(range(1, 16, 2))
    assert result.certificate.ok
    assert result.certificate.drawn


def test_a_mask_that_is_cut_wrongly_shows() -> None:
    """Where others than its own go from a mask, the certificate fails, though all of them are closed."""
    model = Masked(MASKED["numbers"], 0.01)
    result = allocator.allocate(model, "50%", example_inputs=torch.zeros(1, 3, 8, 8))
    result.model.get_buffer("mask")[0, 3] = 0
    assert not allocator.verify(model, result.model, result.allocation, example_inputs=torch.zeros(1, 3, 8, 8)).ok


def test_what_is_closed_is_opened_where_weights_are_drawn_and_nothing_else() -> None:
    model = Masked(MASKED["numbers"], 1.0)
    model.get_buffer("mask").mul_(0.5)
    drawn = Draw(allocator.trace(model, torch.zeros(1, 3, 8, 8)), 0)
    assert torch.equal(drawn("mask", model.get_buffer("mask")).flatten(), torch.tensor([1.0, 0.5] * 8))
