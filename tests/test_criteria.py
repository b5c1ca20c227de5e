"""The criterion that is taken where none is named: batch norms where they rank what has to go, else magnitude."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from subjects import IMAGE, Branches, trained, untouched
from torch import Tensor, nn
from torch.nn import functional as F

import allocator
from allocator import CriterionFallbackWarning


class HalfNormed(nn.Module):
    """A stem with a batch norm, then two wide convolutions without: most of the cost has no scale to rank it by."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.wide, self.head = nn.Conv2d(8, 64, 3, padding=1), nn.Conv2d(64, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.wide(F.relu(self.norm(self.stem(x))))))


def test_batch_norms_that_rank_the_neurons_are_taken_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = allocator.allocate(trained(), "60%", example_inputs=IMAGE)
    named = allocator.allocate(trained(), "60%", example_inputs=IMAGE, criterion="bn_scale")
    assert result.allocation.criterion == "bn_scale"
    assert result.allocation.kept == named.allocation.kept
    assert not any("magnitude" in note for note in result.notes)


def test_without_batch_norms_magnitude_is_taken_and_said() -> None:
    torch.manual_seed(0)
    model: Any = Branches(norm=False).eval()
    said = "no batch norm scales a neuron that can be removed: neurons are ranked by magnitude"
    with untouched(model), pytest.warns(CriterionFallbackWarning, match=said):
        result = allocator.allocate(model, "60%", example_inputs=IMAGE)
    named = allocator.allocate(model, "60%", example_inputs=IMAGE, criterion="magnitude")
    assert result.allocation.criterion == "magnitude"
    assert result.allocation.kept == named.allocation.kept
    assert any(said in note for note in result.notes)
    assert not any(said in note for note in named.notes)
    graph = allocator.trace(model, IMAGE)
    with pytest.warns(CriterionFallbackWarning, match=said):
        scores = allocator.score(graph)
    assert scores.criterion == "magnitude"
    assert allocator.plan(graph, scores, "60%").kept == result.allocation.kept


def test_a_budget_that_batch_norms_alone_cannot_meet_is_met_by_magnitude() -> None:
    torch.manual_seed(0)
    model = trained(HalfNormed())
    with pytest.raises(allocator.BudgetError) as caught:
        allocator.allocate(model, "5%", example_inputs=IMAGE, criterion="bn_scale")
    assert caught.value.reachable is not None
    with pytest.warns(CriterionFallbackWarning, match="ranked by batch norms alone, the model does not come down to"):
        result = allocator.allocate(model, "5%", example_inputs=IMAGE)
    assert result.allocation.criterion == "magnitude"
    assert result.certificate.ok
    assert result.flops_after <= result.flops_asked < caught.value.reachable
    graph = allocator.trace(model, IMAGE)
    with pytest.warns(CriterionFallbackWarning):
        assert allocator.plan(graph, flops="5%").kept == result.allocation.kept
    loose = allocator.allocate(model, float(caught.value.reachable), example_inputs=IMAGE)
    assert loose.allocation.criterion == "bn_scale"


def test_a_budget_that_no_criterion_meets_says_what_one_can_reach() -> None:
    model = trained(HalfNormed())
    with pytest.raises(allocator.BudgetError) as caught:
        allocator.allocate(model, 100, example_inputs=IMAGE)
    with pytest.warns(CriterionFallbackWarning):
        result = allocator.allocate(model, float(caught.value.reachable or 0), example_inputs=IMAGE)
    assert result.flops_after == caught.value.reachable


class Rates(nn.Module):
    """Hidden neurons that a vector writes, as the frequencies of a rotary embedding are written."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.linspace(-1.2, 1.1, 12))
        self.read = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(F.relu(x @ self.rates[None]))


def test_neurons_that_a_vector_writes_are_ranked_by_its_numbers() -> None:
    model: Any = Rates().eval()
    result = allocator.allocate(model, "60%", example_inputs=torch.randn(3, 1), criterion="magnitude")
    small: Any = result.model
    largest = model.rates.detach().abs().argsort(descending=True)[: len(small.rates)].sort().values
    assert 2 < len(small.rates) < 12
    assert torch.equal(small.rates, model.rates[largest])


def test_a_scale_counts_by_its_size_whatever_its_sign() -> None:
    model: Any = trained(Branches())
    before = allocator.allocate(model, "60%", example_inputs=IMAGE, scope="all")
    with torch.no_grad():
        for norm in (model.norm, model.narrow_norm, model.wide_norm):
            norm.weight[1::2].neg_()
    assert allocator.allocate(model, "60%", example_inputs=IMAGE, scope="all").allocation.kept == before.allocation.kept
