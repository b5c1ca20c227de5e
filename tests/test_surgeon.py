"""The criterion that knows what a refit makes up for: against the quadratic that it stands for, worked out at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import allocator
from allocator.scoring import surgeon
from allocator.scoring.calibration import COVARIANCES, CURVATURE, GRADIENTS, collect
from allocator.scoring.surgeon import Reading

WIDTH, OUTPUTS = 6, 4


def spread(size: int, seed: int) -> np.ndarray:
    """(size, size) positive definite."""
    rows = np.random.default_rng(seed).normal(size=(3 * size, size))
    return rows.T @ rows / len(rows)


def least(covariance: np.ndarray, curvature: np.ndarray, weight: np.ndarray, gone: list[int]) -> float:
    """What is lost at least without some inputs, whatever the weights of the others become."""
    stay = [i for i in range(len(covariance)) if i not in gone]
    change = -weight.copy()
    change[:, stay] = weight[:, gone] @ covariance[np.ix_(gone, stay)] @ np.linalg.inv(covariance[np.ix_(stay, stay)])
    return float(np.trace(curvature @ change @ covariance @ change.T)) / 2


@pytest.fixture
def parts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    weight = np.random.default_rng(2).normal(size=(OUTPUTS, WIDTH))
    return spread(WIDTH, 0), spread(OUTPUTS, 1), weight


def reading(parts: tuple[np.ndarray, np.ndarray, np.ndarray], units: list[int]) -> Reading:
    covariance, curvature, weight = parts
    return Reading(np.array(units), np.linalg.inv(covariance), weight.T @ curvature @ weight)


def test_what_goes_in_turn_adds_up_to_what_is_lost_at_once(parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    found, gone, total = reading(parts, [0, 1, 2, 3, 4, -1]), [], 0.0
    for unit in (3, 0, 4):
        total += found.costs(5)[unit]
        found.drop(found.units == unit)
        gone.append(unit)
        assert total == pytest.approx(least(*parts, gone))
    assert found.units.tolist() == [1, 2, -1]


def test_inputs_of_one_neuron_do_not_make_up_for_one_another(parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    found = reading(parts, [0, 1, 1, 1, 2, -1])
    assert found.costs(3) == pytest.approx([least(*parts, gone) for gone in ([0], [1, 2, 3], [4])])
    found.drop(found.units == 1)
    assert found.costs(3)[0] == pytest.approx(least(*parts, [1, 2, 3, 0]) - least(*parts, [1, 2, 3]))


def twins() -> tuple[nn.Module, Tensor]:
    """Two hidden units that are the same, among five."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = model[0].weight[0], model[0].bias[0]
    return model, torch.randn(200, 6)


@pytest.mark.parametrize("steps", [100, 1])
def test_one_of_two_alike_can_go_and_then_the_other_counts(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    monkeypatch.setattr(surgeon, "STEPS", steps)
    model, x = twins()
    values = np.sort(allocator.score(allocator.trace(model, x[:1]), "surgeon", x).values[:2])
    assert values[0] < 0.05 * values[1]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 5, 3), nn.ConvTranspose2d(5, 4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


def test_curvature_is_that_of_the_gradients_of_what_a_layer_gives() -> None:
    torch.manual_seed(0)
    model, images, labels = Net().eval(), torch.randn(12, 3, 6, 6), torch.randint(3, (12,))
    graph = allocator.trace(model, images[:1])
    needs = (COVARIANCES, CURVATURE, GRADIENTS)
    found = collect(graph, [(images, labels)], needs, loss=F.cross_entropy).curvatures
    given: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        output.retain_grad()
        given[name] = output

    for name, module in model.named_children():
        module.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
    F.cross_entropy(model(images), labels, reduction="sum").backward()
    for name, read in (("second", 0), ("head", 1)):
        gradient = given[name].grad
        assert gradient is not None
        wide = gradient.transpose(0, 1).flatten(1)
        np.testing.assert_allclose(found[f"{name}.weight", read], (wide @ wide.T / 12).numpy(), rtol=1e-4, atol=1e-7)
    assert all(parameter.grad is not None for parameter in model.parameters())  # those of this test alone


def test_answers_are_drawn_alike_every_time_and_leave_random_numbers_alone() -> None:
    model, x = twins()
    graph = allocator.trace(model, x[:1])
    before = torch.get_rng_state()
    values, again = (allocator.score(graph, "surgeon", x).values for _ in range(2))
    np.testing.assert_array_equal(values, again)
    assert torch.equal(before, torch.get_rng_state())
    assert (values >= 0).all()


class Grouped(nn.Module):
    """Its first channels are read in groups, and nothing is known of what makes up for one there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=4)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


def test_what_no_layer_makes_up_for_costs_what_fisher_says() -> None:
    torch.manual_seed(0)
    model, images = Grouped().eval(), torch.randn(64, 3, 6, 6)
    graph = allocator.trace(model, images[:1], groups="width")
    fisher, found = (allocator.score(graph, name, images).values for name in ("fisher", "surgeon"))
    alone = np.isclose(found, 8 * fisher)  # of a sample, not of the mean of eight
    assert alone.any()
    assert (found > 0).all()
