"""A number made of one layer's width keeps that layer alone, wherever the number is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fitting_cases import fitted, outputs_kept, planner
from small_graphs import graph_of
from torch import Tensor, nn
from torch.nn import functional as F

import allocator
from allocator.fitting import counted
from allocator.fitting.fit import Fitted, fit

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


# Several layers and several numbers -----------------------------------------------------------------


class Row(nn.Module):
    """Layers one after the other, whose results are scaled by what a test says of all widths so far."""

    def __init__(self, layers: int, scales: dict[int, Callable[[list[int]], float]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        for i in range(layers):
            self.add_module(f"layer{i}", nn.Linear(12 if i else 4, 12 if i < layers - 1 else 3))
        self.layers, self.scales = layers, scales

    def forward(self, x: Tensor) -> Tensor:
        widths: list[int] = []
        for i in range(self.layers):
            x = self.get_submodule(f"layer{i}")(x)
            widths.append(x.shape[1])
            x = x * self.scales[i](widths) if i in self.scales else x.relu()
        return x


def row(layers: int, scales: dict[int, Callable[[list[int]], float]], drop: Sequence[int]) -> Fitted:
    """A fit in which these layers lose two neurons each."""
    return fitted(Row(layers, scales), {f"layer{i}": [3, 7] for i in drop}, torch.zeros(2, 4))


def whole(found: Fitted, layers: int) -> list[int]:
    """Layers that keep all."""
    return [i for i in range(layers - 1) if outputs_kept(found, f"layer{i}") == 12]


@pytest.fixture(name="checks")
def _checks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The checks of plans of which only some layers are cut."""
    seen: list[Any] = []
    own = counted.check_plan

    def noting(*args: Any) -> Any:
        seen.append(args)
        return own(*args)

    monkeypatch.setattr(counted, "check_plan", noting)
    return seen


@pytest.mark.parametrize("asked", [0, 1, 4, 6])
def test_of_many_layers_the_one_that_a_number_counts_stays(asked: int, checks: list[Any]) -> None:
    found = row(9, {8: lambda widths: widths[asked] ** -0.5}, range(8))
    assert whole(found, 9) == [asked]
    assert len(checks) == 6, "a half and the other for each of three digits"
    (note,) = found.notes
    assert note.startswith(f"the neurons at aten.linear.default in layer{asked} stay, which aten.mul.Tensor in the")


def test_layers_that_lose_nothing_are_not_asked_about(checks: list[Any]) -> None:
    found = row(9, {8: lambda widths: widths[3] ** -0.5}, (1, 3))
    assert whole(found, 9) == [0, 2, 3, 4, 5, 6, 7]
    assert len(checks) == 2


def test_of_several_numbers_all_layers_are_found_at_once(checks: list[Any]) -> None:
    scales: dict[int, Callable[[list[int]], float]] = {
        4: lambda widths: widths[1] ** -0.5,
        6: lambda widths: widths[2] ** -0.5,
        8: lambda widths: widths[5] ** -0.5,
    }
    found = row(9, scales, range(8))
    assert whole(found, 9) == [1, 2, 5]
    assert [note.partition(" stay, which ")[0] for note in found.notes] == [
        f"the neurons at aten.linear.default in layer{i}" for i in (1, 2, 5)
    ]
    assert len(checks) <= 8
    assert {place.module for place in found.graph.options.frozen} == {"layer1", "layer2", "layer5"}


def test_of_a_sum_of_widths_each_layer_stays() -> None:
    found = row(9, {8: lambda widths: float(widths[1] + widths[2] + widths[6])}, range(8))
    assert whole(found, 9) == [1, 2, 6]
    (note,) = found.notes
    assert "layer1 and aten.linear.default in layer2 and aten.linear.default in layer6 stay, which" in note


def test_layers_that_make_a_difference_together_alone_stay_together() -> None:
    found = row(5, {4: lambda widths: float(widths[2] < 12 and widths[3] < 12)}, range(4))
    assert whole(found, 5) == [2, 3]


def test_a_number_of_its_own_width_keeps_the_neurons_at_the_call_and_is_said_so() -> None:
    found = row(5, {2: lambda widths: widths[2] ** -0.5}, range(4))
    assert whole(found, 5) == [2]
    (note,) = found.notes
    assert note.startswith("the neurons at aten.mul.Tensor in the model stay: has the number")


def test_what_a_call_was_found_to_hang_on_is_remembered(checks: list[Any]) -> None:
    model = Row(9, {8: lambda widths: widths[3] ** -0.5}).eval()
    graph = graph_of(model, torch.zeros(2, 4))
    drop = {f"layer{i}": [3, 7] for i in range(8)}
    first = fit(graph, planner(drop))
    needed = len(checks)
    second = fit(graph, planner(drop))
    assert len(checks) == needed + 1
    assert first.notes == second.notes
    other = fit(graph, planner({f"layer{i}": [3, 7] for i in range(8) if i != 3}))
    assert other.notes == []


def test_what_is_remembered_is_asked_again_where_another_layer_is_to_blame() -> None:
    """A number of the smaller of two widths, of which another plan cuts the other."""
    model = Row(9, {8: lambda widths: float(min(widths[1], widths[6]))}).eval()
    graph = graph_of(model, torch.zeros(2, 4))
    every = {f"layer{i}": [3, 7] for i in range(8)}
    first = fit(graph, planner({**every, "layer6": []}))
    second = fit(graph, planner({**every, "layer1": []}))
    third = fit(graph, planner({**every, "layer1": [3], "layer6": [3, 7]}))
    assert [whole(found, 9) for found in (first, second)] == [[1, 6], [1, 6]]
    assert whole(third, 9) == [1, 6]


def test_other_forwards_are_not_looked_at_for_a_number(checks: list[Any]) -> None:
    found = row(9, {8: lambda widths: widths[3] ** -0.5}, range(8))
    assert len(found.graph.flows) > 1
    assert {len(graph.flows) for graph, *_ in checks} == {1}


def test_a_number_in_train_mode_keeps_the_layer_that_it_counts() -> None:
    class Trained(Row):
        layer0: nn.Linear
        layer1: nn.Linear
        layer2: nn.Linear

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer0(x)
            z: Tensor = self.layer2(self.layer1(y).relu())
            return z * y.shape[1] ** -0.5 if self.training else z

    found = fitted(Trained(3, {}), {"layer0": [3], "layer1": [4]}, torch.zeros(2, 4))
    assert whole(found, 3) == [0]
    assert "layer0 stay, which aten.mul.Tensor in the model counts" in found.notes[0]
