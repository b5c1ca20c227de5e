"""Members that no forward of a trace runs, and that a result has to work with all the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import allocator

IMAGE = torch.zeros(1, 3, 8, 8)
Forward = Callable[[Any, Tensor, Any], Tensor]


class Chooses(nn.Module):
    """Two convolutions and a third, with parts of which a forward takes some by its argument or its data."""

    def __init__(self, forward: Forward, **parts: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor, which: Any = 0) -> Any:
        return self.run(self, x, which)


def conv(a: int, b: int, side: int = 3) -> nn.Conv2d:
    return nn.Conv2d(a, b, side, padding=side // 2)


def body(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.second(m.first(x).relu()).relu()
    return y


def _in_layers(m: Any, x: Tensor, which: Any) -> Tensor:
    y = m.first(x).relu()
    for layer in m.layers[: which + 1]:
        y = y + layer(y).relu()
    return m.second(y)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[Any, Tensor]]] = {
    "heads by task": (
        lambda: Chooses(
            lambda m, x, which: m.heads[which or "one"](body(m, x).mean((2, 3))),
            heads=nn.ModuleDict(
                {"one": nn.Linear(12, 5), "two": nn.Linear(12, 7), "three": nn.Sequential(nn.Linear(12, 4), nn.ReLU())}
            ),
        ),
        {"two": IMAGE, "three": IMAGE},
    ),
    "norms by domain": (
        lambda: Chooses(
            lambda m, x, which: m.second(m.norms[which](m.first(x)).relu()),
            norms=nn.ModuleList([nn.BatchNorm2d(16) for _ in range(3)]),
        ),
        {1: IMAGE, 2: IMAGE},
    ),
    "scales by domain": (
        lambda: Chooses(
            lambda m, x, which: m.second(m.first(x).relu() * m.scales[which].view(1, -1, 1, 1)),
            scales=nn.ParameterList([nn.Parameter(torch.rand(16)) for _ in range(3)]),
        ),
        {1: IMAGE, 2: IMAGE},
    ),
    "stems by side": (
        lambda: Chooses(
            lambda m, x, which: m.second(m.stems[str(x.shape[-1])](x).relu()),
            stems=nn.ModuleDict({"8": conv(3, 16), "10": conv(3, 16, 5)}),
        ),
        {0: torch.zeros(1, 3, 10, 10)},
    ),
    "one of two attributes": (
        lambda: Chooses(lambda m, x, which: (m.two if which else m.one)(body(m, x)), one=conv(12, 4), two=conv(12, 6)),
        {1: IMAGE},
    ),
    "more layers": (
        lambda: Chooses(_in_layers, layers=nn.ModuleList([conv(16, 16) for _ in range(4)])),
        {1: IMAGE, 3: IMAGE},
    ),
}


def cut(model: nn.Module, kept: dict[str, list[Any]]) -> nn.Module:
    """The original in float64 without all that belongs to a dropped neuron."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for dim, stays in enumerate(kept.get(name, ())):
                gone = [] if stays is None else sorted(set(range(parameter.shape[dim])) - set(stays))
                parameter.index_fill_(dim, torch.tensor(gone, dtype=torch.long), 0)
    return model


@pytest.mark.parametrize("case", CASES)
def test_a_result_works_with_what_no_forward_ran(case: str) -> None:
    make, others = CASES[case]
    model = make().eval()
    result = allocator.allocate(model, "60%", example_inputs=IMAGE)
    kept = result.allocation.kept["first.weight" if case != "stems by side" else "stems.8.weight"][0]
    assert kept is not None
    assert len(kept) < 16
    assert any("in place of" in note for note in result.notes)
    whole, small = cut(model, result.allocation.kept), copy.deepcopy(result.model).double()
    for which, like in others.items():
        x = torch.randn(like.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(whole(x, which), small(x, which), rtol=0, atol=1e-9)


def test_members_that_do_not_fit_stay_and_are_named() -> None:
    stems = nn.ModuleDict({"colour": conv(3, 16), "depth": conv(1, 16)})
    model = Chooses(lambda m, x, which: m.second(m.stems[which or "colour"](x).relu()), stems=stems)
    result = allocator.allocate(model, "60%", example_inputs=IMAGE)
    assert "no forward reads first.bias, first.weight, stems.depth.bias and 1 more, which stay" in result.notes[-1]
    assert result.model.get_parameter("stems.depth.weight").shape == (16, 1, 3, 3)
    assert list(stems) == ["colour", "depth"]


def test_of_many_each_stands_in_for_another_in_as_few_forwards_as_there_can_be() -> None:
    """A list of layers of which half run asks for one further forward."""
    model = Chooses(
        lambda m, x, which: _in_layers(m, x, which or 7), layers=nn.ModuleList([conv(16, 16) for _ in range(16)])
    )
    notes = allocator.allocate(model, "60%", example_inputs=IMAGE).notes[-1]
    assert "and with layers.8 in place of layers.0, layers.9 in place of layers.1, " in notes
    assert "layers.10 in place of layers.2 and 5 more" in notes
