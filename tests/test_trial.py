"""With data, the criterion is the one whose network is nearest to the original, worked out here a second time."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from subjects import untouched
from torch import Tensor, nn
from torch.nn import functional as F

import allocator
from allocator.pipeline import recovered, trial
from allocator.recovering.samples import Samples
from allocator.scoring import registry, surgeon

IMAGE = torch.zeros(1, 3, 12, 12)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(48, 3, 12, 12, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Three convolutions with batch norms of many scales, of which many channels hardly matter."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in ((3, 12), (12, 16), (16, 12)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def net(seed: int) -> Net:
    torch.manual_seed(seed)
    model = Net().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.exponential_()
            module.running_var.uniform_(0.3, 3)  # type: ignore[union-attr]
    return model


@torch.no_grad()
def distance(model: nn.Module, small: nn.Module, images: Tensor) -> float:
    """In nats, the geometric mean of as cut, at most one, and with the statistics of the images."""
    again = copy.deepcopy(small).eval()
    for module in again.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum, module.training = None, True
    for start in range(0, len(images), 16):
        again(images[start : start + 16])
    answers = F.log_softmax(model(images).double(), 1)
    as_cut, after = (
        float(F.kl_div(F.log_softmax(each(images).double(), 1), answers, log_target=True, reduction="batchmean"))
        for each in (small, again.eval())
    )
    return float((min(as_cut, 1.0) * after) ** 0.5)


@pytest.mark.parametrize("seed", range(4))
def test_the_nearest_is_taken(images: Tensor, seed: int) -> None:
    model = net(seed)
    with untouched(model):
        found = allocator.allocate(model, "50%", example_inputs=IMAGE, data=images)
    said = next(note for note in found.notes if "by trial" in note)
    figures = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.e+-]+)(?:,|\)$)", said)}
    assert list(figures) == sorted(trial.CANDIDATES, key=lambda name: figures[name])
    for name in trial.CANDIDATES:
        alone = allocator.allocate(model, "50%", example_inputs=IMAGE, data=images, criterion=name)
        assert not any("by trial" in note for note in alone.notes)
        if name == found.allocation.criterion:
            assert alone.allocation.kept == found.allocation.kept
        # Statistics are of seven eighths of the images there, and of all here.
        assert figures[name] == pytest.approx(distance(model, alone.model, images), rel=0.15), name
    assert found.allocation.criterion == min(figures, key=lambda name: figures[name])


def test_answers_that_are_of_no_use_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cut, one is twice as far off as the other, both beyond use: what they begin training with decides."""
    apart = iter([(4.0, 0.1), (2.0, 0.2), (0.5, math.inf)])
    monkeypatch.setattr(trial, "distances", lambda *_: next(apart))
    monkeypatch.setattr(trial, "take_statistics", lambda *_: ["running_mean"])
    found = [trial._distance(net(0), net(0), Samples((), (), 0, 0)) for _ in range(3)]
    assert found == pytest.approx([0.1**0.5, 0.2**0.5, math.inf])


def test_not_the_same_one_suits_every_network(images: Tensor) -> None:
    taken = {
        allocator.allocate(net(s), "50%", example_inputs=IMAGE, data=images).allocation.criterion for s in range(4)
    }
    assert len(taken) > 1


def test_a_single_input_can_only_be_looked_at(images: Tensor) -> None:
    found = allocator.allocate(net(0), "50%", example_inputs=IMAGE, data=images[:1])
    assert found.allocation.criterion == trial.CANDIDATES[0]
    assert not any("by trial" in note for note in found.notes)


@pytest.mark.parametrize("seed", range(2))
def test_of_those_that_are_recovered_the_nearest_is_taken(images: Tensor, seed: int) -> None:
    model = net(seed)
    with untouched(model):
        found = allocator.allocate(model, "50%", example_inputs=IMAGE, data=images, recover=True)
    alone = {
        name: allocator.allocate(model, "50%", example_inputs=IMAGE, data=images, recover=True, criterion=name)
        for name in recovered.CANDIDATES
    }
    after = {name: result.recovery.after for name, result in alone.items() if result.recovery is not None}
    nearest = min(after, key=lambda name: after[name])
    assert found.allocation.criterion == nearest
    assert found.allocation.kept == alone[nearest].allocation.kept
    (said,) = (note for note in found.notes if "by trial" in note)
    figures = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.e+-]+)(?:,|\)$)", said)}
    assert figures == pytest.approx(after, rel=0.01)


@pytest.mark.parametrize("batch", [5, 48])
def test_criteria_do_not_see_what_is_held_back_to_judge_by(images: Tensor, batch: int) -> None:
    seen: set[int] = set()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        assert len(output) == len(target)
        seen.update(target.tolist())
        return F.cross_entropy(output, target % 5)

    data = list(zip(images.split(batch), torch.arange(len(images)).split(batch), strict=True))
    found = allocator.allocate(net(0), "50%", data=data, loss=loss, recover="least_squares")
    assert found.recovery is not None
    assert (found.recovery.inputs, found.recovery.held) == (len(seen), len(images) - len(seen))
    assert found.recovery.held > 0
    assert found.graph.inputs.tensors()[0].shape == images[:1].shape  # the size of the data


def test_the_second_is_taken_too(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever it is: here the other way round."""
    found = []
    for order in (recovered.CANDIDATES, recovered.CANDIDATES[::-1]):
        monkeypatch.setattr(recovered, "CANDIDATES", order)
        made = allocator.allocate(net(0), "50%", example_inputs=IMAGE, data=images, recover=True)
        found.append(made.allocation.criterion)
    assert found[0] == found[1]


def test_matrices_that_are_too_large_are_not_made(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgeon, "MOST", 0)
    found = allocator.allocate(net(0), "50%", example_inputs=IMAGE, data=images, recover=True)
    assert found.allocation.criterion == "fisher"
    assert not any("by trial" in note for note in found.notes)


@pytest.mark.parametrize("recover", [False, True])
def test_scores_of_ones_own_are_tried_against_nothing(images: Tensor, recover: bool) -> None:
    """An array compared with a word is an array."""
    model = net(0)
    scores = np.random.default_rng(0).random(allocator.trace(model, IMAGE).size)
    found = allocator.allocate(model, "50%", example_inputs=IMAGE, data=images, criterion=scores, recover=recover)
    alone = allocator.allocate(model, "50%", example_inputs=IMAGE, criterion=scores)
    assert found.allocation.kept == alone.allocation.kept
    assert not any("by trial" in note for note in found.notes)


def test_data_that_can_be_read_once_only(images: Tensor) -> None:
    def once() -> Iterator[Tensor]:
        yield from images.split(16)

    found, again = (
        allocator.allocate(net(1), "50%", example_inputs=IMAGE, data=data) for data in (once(), images.split(16))
    )
    assert found.allocation == again.allocation


def test_a_criterion_that_leads_to_no_network_is_left_out(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(graph: allocator.ChannelGraph, *_: object) -> np.ndarray:
        return np.full(graph.size, np.nan)

    monkeypatch.setitem(registry.CRITERIA, "none", registry.Criterion("none", none))
    monkeypatch.setattr(trial, "CANDIDATES", ("none", "magnitude"))
    found = allocator.allocate(net(0), "60%", example_inputs=IMAGE, data=images)
    assert found.allocation.criterion == "magnitude"
    assert not any("none" in note for note in found.notes)


def test_a_sweep_takes_what_suits_its_smallest_budget(images: Tensor) -> None:
    model = net(2)
    points = allocator.sweep(model, ["80%", "50%"], example_inputs=IMAGE, data=images).points
    smallest = allocator.allocate(model, "50%", example_inputs=IMAGE, data=images, certify=False)
    assert {point.allocation.criterion for point in points} == {smallest.allocation.criterion}


@pytest.mark.parametrize("recover", [False, True])
def test_nothing_keeps_the_weights_once_the_caller_lets_go_of_them(images: Tensor, recover: bool) -> None:
    def alive() -> int:
        gc.collect()
        return sum(type(each) is nn.Parameter for each in gc.get_objects())

    before = alive()
    allocator.allocate(net(2), "60%", example_inputs=IMAGE, data=images, recover=recover, certify=False)
    assert alive() == before


@pytest.mark.parametrize("recover", [False, True])
@pytest.mark.parametrize("how", ["data", "detach", "no_grad"])
def test_weights_that_a_forward_writes_stay_the_callers(how: str, recover: bool) -> None:
    class Decays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                weight = self.first.weight
                {"data": weight.data, "detach": weight.detach(), "no_grad": weight}[how].mul_(0.99)
            y: torch.Tensor = self.last(self.second(self.first(x).relu()).relu().mean((2, 3)))
            return y

    model = Decays().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    allocator.allocate(model, flops="60%", data=torch.randn(32, 3, 16, 16), recover=recover)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    result = allocator.allocate(model, flops="60%", example_inputs=torch.randn(1, 3, 16, 16))
    made = {name: tensor.clone() for name, tensor in result.model.state_dict().items()}
    allocator.recover(result, torch.randn(32, 3, 16, 16))
    if not recover:
        with contextlib.suppress(allocator.BudgetError):  # so small a network need not get faster
            allocator.allocate(model, latency="90%", example_inputs=torch.randn(1, 3, 16, 16))
        allocator.latency(model, torch.randn(1, 3, 16, 16), seconds=0.01)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, made[name]) for name, tensor in result.model.state_dict().items())
