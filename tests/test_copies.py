"""Modules with a way of their own to be copied: copies take what stands in for their tensors all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import allocator

IMAGE = torch.zeros(1, 3, 8, 8)


class Plain(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.first, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 12, 3, padding=1)
        self.last = nn.Conv2d(12, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.second(self.first(x).relu()).relu())


class BuiltAnew(Plain):
    def __deepcopy__(self, memo: Any) -> BuiltAnew:
        new = BuiltAnew(self.width)
        new.load_state_dict(self.state_dict())
        return new


class InSlots(Plain):
    __slots__ = ("activation",)

    def __init__(self) -> None:
        super().__init__()
        self.activation = torch.relu

    def forward(self, x: Tensor) -> Any:
        return self.last(self.activation(self.second(self.activation(self.first(x)))))


class NotPickled(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.activation = lambda x: x.relu()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "activation"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, activation=lambda x: x.relu())


class Refusing(Plain):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("not to be copied")


@pytest.mark.parametrize("kind", [BuiltAnew, InSlots, NotPickled, Refusing])
def test_a_network_is_copied_by_its_parts(kind: type[Plain]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    state = torch.get_rng_state()
    result = allocator.allocate(model, "60%", example_inputs=IMAGE)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(result.model) is kind
    assert len(result.model.get_parameter("first.weight")) < 16
    assert result.model(torch.randn(2, 3, 8, 8)).shape == (2, 4, 8, 8)
    again = allocator.allocate(result.model, "80%", example_inputs=IMAGE)
    assert again.certificate.ok
