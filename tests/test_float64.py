"""Forwards in float64: what they compute in another way, torch computes too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from allocator import float64
from allocator.inputs import as_inputs

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(7, 5, 3), (1, 7, 12, 11)),
    "bias, stride, dilation": (lambda: nn.Conv2d(7, 5, (3, 5), (2, 1), (1, 2), 2), (2, 7, 13, 15)),
    "padding by name": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (1, 4, 9, 9)),
    "other padding": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (1, 4, 9, 9)),
    "groups": (lambda: nn.Conv2d(8, 6, 3, groups=2), (1, 8, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(7, 7, 3, groups=7), (2, 7, 9, 8)),
    "depthwise, bias, stride, padding": (lambda: nn.Conv2d(6, 6, (3, 5), (2, 3), (1, 2), groups=6), (2, 6, 9, 12)),
    "depthwise, dilation": (lambda: nn.Conv2d(6, 6, (3, 2), 1, (2, 0), (2, 3), groups=6, bias=False), (1, 6, 9, 12)),
    "depthwise, as large as the input": (lambda: nn.Conv2d(6, 6, 7, 2, groups=6), (1, 6, 7, 7)),
    "depthwise, padding by name": (lambda: nn.Conv2d(6, 6, 3, padding="same", groups=6), (1, 6, 9, 9)),
    "depthwise, more outputs": (lambda: nn.Conv2d(6, 12, 3, groups=6), (1, 6, 9, 9)),
    "depthwise, 1-D": (lambda: nn.Conv1d(6, 6, 4, 3, 2, 2, groups=6), (1, 6, 20)),
    "depthwise, 3-D": (lambda: nn.Conv3d(4, 4, (2, 3, 2), (2, 1, 2), (1, 0, 1), groups=4), (1, 4, 5, 6, 7)),
    "depthwise, without a batch": (lambda: nn.Conv2d(6, 6, 3, groups=6), (6, 9, 9)),
    "without a batch": (lambda: nn.Conv2d(7, 5, 3), (7, 12, 11)),
    "1-D": (lambda: nn.Conv1d(7, 5, 3), (1, 7, 30)),
    "3-D": (lambda: nn.Conv3d(5, 4, 3), (1, 5, 6, 6, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_convolution_in_slices_is_a_convolution(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    expected = make().double()
    expected.load_state_dict(layer.state_dict())
    calls: list[Any] = []
    inner = float64._convolve

    def counted(*args: Any) -> Any:
        calls.append(args)
        return inner(*args)

    monkeypatch.setattr(float64, "_convolve", counted)
    monkeypatch.setattr(float64, "COLUMNS", 1024)
    (result,) = float64.run_float64(layer, as_inputs(x, layer))
    assert len(calls) == 1
    with torch.no_grad():
        torch.testing.assert_close(result, expected(x.double()), rtol=1e-12, atol=1e-12)


def test_weights_read_as_zero() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(2, 6)
    (result,) = float64.run_float64(layer, as_inputs(x, layer), zeroed={"weight": [(1, torch.tensor([1, 4]).numpy())]})
    with torch.no_grad():
        layer.weight[:, [1, 4]] = 0
        torch.testing.assert_close(result, layer.double()(x.double()), rtol=1e-12, atol=1e-12)
