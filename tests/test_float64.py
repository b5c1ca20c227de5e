"""Forwards in float64: what they compute in another way, torch computes too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_graphs import Net
from torch import nn

from allocator.tracing.inputs import as_inputs
from allocator.verifying import float64

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


def test_a_depthwise_convolution_gives_a_channel_the_same_bits_beside_whatever_others() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 37, 7, 5, dtype=torch.float64), torch.randn(37, 1, 3, 3, dtype=torch.float64)
    kept = torch.tensor([0, 3, 4, 11, 20, 33, 36])
    sizes = ((1, 1), (1, 1), (1, 1))
    whole = float64._convolve(torch.conv2d, x, weight, None, *sizes, 37)
    part = float64._convolve(torch.conv2d, x[:, kept], weight[kept], None, *sizes, 7)
    assert torch.equal(part, whole[:, kept])


class Ordered(nn.Module):
    """Puts numbers in order by every function that does."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(x), 4) + 2 * torch.arange(len(x))[:, None]
        ordered = [*x.topk(len(x)), *torch.sort(x, descending=True), x.argsort(), x.argmax(), torch.argmin(x)]
        return [*ordered, torch.ops.torchvision.nms(boxes, x, 0.5)]


def ordered(x: torch.Tensor) -> list[torch.Tensor]:
    return float64.run_float64(Ordered(), as_inputs(x, Ordered()))


@pytest.mark.parametrize("level", [0.3, 1e-20, 7e8])
def test_the_last_bits_of_equal_numbers_do_not_order_them(level: float) -> None:
    pytest.importorskip("torchvision")
    equal = torch.full((40,), level, dtype=torch.float64)
    expected = ordered(equal)
    for seed in range(5):
        noise = torch.rand(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for found, right in zip(ordered(equal * (1 + 1e-14 * noise)), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-12, atol=0)


def test_numbers_that_differ_are_ordered_by_their_size() -> None:
    pytest.importorskip("torchvision")
    numbers = torch.tensor([0.5, 0.5 * (1 + 1e-8), -float("inf"), 0.0, float("inf"), 1.0], dtype=torch.float64)
    values, indices, *_, kept = ordered(numbers)
    assert indices.tolist() == kept.tolist() == [4, 5, 1, 0, 3, 2]
    torch.testing.assert_close(values, numbers[[4, 5, 1, 0, 3, 2]], rtol=1e-9, atol=0)


def test_whole_numbers_are_ordered_to_the_last_and_nothing_is_no_trouble() -> None:
    model: Any = Net(lambda m, x, n: [n.sort()[1], x.sort()[0], x.argsort()])
    numbers = torch.tensor([2**40 + 1, 2**40, 2**40 + 2])
    places, values, order = float64.run_float64(model, as_inputs((torch.zeros(0), numbers), model))
    assert places.tolist() == [1, 0, 2]
    assert values.shape == order.shape == (0,)


def test_weights_read_as_zero() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(2, 6)
    (result,) = float64.run_float64(layer, as_inputs(x, layer), zeroed={"weight": [(1, torch.tensor([1, 4]).numpy())]})
    with torch.no_grad():
        layer.weight[:, [1, 4]] = 0
        torch.testing.assert_close(result, layer.double()(x.double()), rtol=1e-12, atol=1e-12)


# What a forward leaves out ---------------------------------------------------------------------------


class Chooses(nn.Module):
    """Two layers, of whose numbers the second's are left out by what the input says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.one, self.two, self.how = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.one(x), self.two(x)
        always = (x[:, :1] == x[:, :1]) & (x[:, :1] < 1e9)
        if self.how == "where":
            return torch.where(always, first, second)
        if self.how == "write":
            return second.masked_fill_(always, 0.0) + first
        if self.how == "item":
            second[always.expand_as(second)] = 0.0
            return second + first
        return first + 0 * second.relu() if self.how == "zero" else first


@pytest.mark.parametrize(
    ("how", "seen"), [("where", True), ("zero", True), ("none", False), ("write", ValueError), ("item", ValueError)]
)
def test_numbers_that_a_forward_leaves_out_are_seen(how: str, seen: Any) -> None:
    """Where a weight is read as no number, what was chosen over it is none either; and nothing may be written over."""
    model, x = Chooses(how), torch.randn(2, 3)
    rows = {"two.weight": [(0, torch.tensor([1]).numpy())]}
    if seen is ValueError:
        with pytest.raises(ValueError, match="writes by truth values"):
            float64.run_float64(model, as_inputs(x, model), zeroed=rows, fill=float("nan"))
        return
    (found,) = float64.run_float64(model, as_inputs(x, model), zeroed=rows, fill=float("nan"))
    assert found.isnan().any(0).tolist() == [False, seen, False, False]
    (usual,) = float64.run_float64(model, as_inputs(x, model), zeroed=rows)
    assert not usual.isnan().any()


def test_a_float64_weight_that_is_read_as_zero_is_no_other_afterwards() -> None:
    layer, x = nn.Linear(6, 4).double(), torch.randn(2, 6)
    rows = {"weight": [(1, torch.tensor([1, 4]).numpy())]}
    before = layer.weight.detach().clone()
    (cut,) = float64.run_float64(layer, as_inputs(x, layer), zeroed=rows, written=())
    assert torch.equal(layer.weight, before)
    (whole,) = float64.run_float64(layer, as_inputs(x, layer), written=())
    assert not torch.equal(cut, whole)


def test_outputs_of_another_layout_are_numbers_beside_one_another() -> None:
    model: Any = Net(lambda m, x: m.first(x).relu().to_sparse(), first=nn.Linear(3, 4))
    x = torch.randn(2, 3)
    (found,) = float64.run_float64(model, as_inputs(x, model))
    torch.testing.assert_close(found, model.first.double()(x.double()).relu().detach())


def test_beside_whole_numbers_comes_what_they_were_made_of_and_nothing_later() -> None:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        largest = m.first(x).argmax(1)
        m.kept = x.exp()
        return largest

    model: Any = Net(run, first=nn.Linear(3, 4))
    x = torch.randn(2, 3)
    places, scores = float64.run_float64(model, as_inputs(x, model))
    expected = model.first.double()(x.double()).detach()
    torch.testing.assert_close(scores, expected)
    assert places.tolist() == expected.argmax(1).tolist()


def test_what_ends_the_process_at_no_number_is_not_called_with_one() -> None:
    """A certificate asks with NaN whether a weight is read; torchvision's kernel reads other memory for those."""
    ops = pytest.importorskip("torchvision.ops")

    def deformed(m: Any, x: torch.Tensor) -> torch.Tensor:
        return ops.deform_conv2d(x, m.where(x), m.layer.weight, padding=1)

    model: Any = Net(deformed, where=nn.Conv2d(4, 18, 3, padding=1), layer=nn.Conv2d(4, 4, 3))
    inputs = as_inputs(torch.randn(1, 4, 8, 8), model)
    assert float64.run_float64(model, inputs)[0].isfinite().all()
    with pytest.raises(ValueError, match="deform_conv2d is given NaN, at which it may end the process"):
        float64.run_float64(model, inputs, zeroed={"where.weight": [(0, np.array([3]))]}, fill=float("nan"))
