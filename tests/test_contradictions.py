"""Requests that contradict themselves, and scores and data that cannot be: each says what was found, and what to do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from subjects import IMAGE, Nested, trained, untouched
from torch import Tensor, nn
from torch.nn import functional as F

import allocator
from allocator import BudgetError, CriterionError, DataError, NothingToAllocateError, UnknownNameError

IMAGES = torch.randn(16, *IMAGE.shape[1:], generator=torch.Generator().manual_seed(0))


def allocate(model: Any, flops: Any = "60%", **options: Any) -> allocator.Result:
    return allocator.allocate(model, flops, example_inputs=IMAGE, **options)


# ------------------------------------------------------------------------------------ budgets and floors


@pytest.mark.parametrize(
    ("budgets", "options", "named"),
    [
        ({"flops": "30%"}, {"at_least": "90%"}, ["FLOPs cannot be met", "at_least='90%'"]),
        ({"params": 90}, {"at_least": {"inner*": 9}}, ["90 parameters cannot be met", "at_least={'inner*': 9}"]),
        ({"flops": "15%"}, {"multiple": 8}, ["FLOPs cannot be met", "multiple=8"]),
        ({"flops": "20%"}, {"multiple": 4, "at_least": 8, "scope": "inner"}, ["'inner'", "at_least=8", "multiple=4"]),
        ({"flops": "90%", "params": 9}, {}, ["9 parameters cannot be met", "'auto'"]),
        ({"flops": 9, "params": 8, "activations": "99%"}, {}, ["9 FLOPs and 8 parameters cannot be met"]),
        ({"flops": 9, "params": "99%"}, {"at_least": 2}, ["9 FLOPs cannot be met", "at_least=2"]),
    ],
)
def test_budgets_that_floors_contradict_are_named_with_them(
    budgets: dict[str, Any], options: dict[str, Any], named: list[str]
) -> None:
    model = trained(Nested())
    with untouched(model), pytest.raises(BudgetError) as caught:
        allocator.allocate(model, **budgets, example_inputs=IMAGE, **options)
    said = str(caught.value)
    assert all(each in said for each in named), said
    assert "the smallest that can be reached is" in said


def test_what_can_be_met_beside_a_floor_can_be_met() -> None:
    model = trained(Nested())
    with pytest.raises(BudgetError) as caught:
        allocate(model, "10%", at_least="80%", multiple=2)
    assert caught.value.reachable is not None
    result = allocate(model, caught.value.reachable, at_least="80%", multiple=2)
    assert result.flops_after == caught.value.reachable


# --------------------------------------------------------------------------------------------- scores


def _bad(graph: allocator.ChannelGraph) -> dict[str, tuple[Any, str]]:
    shape = (10, 12, 3, 3)
    return {
        "too few": (np.ones(graph.size - 1), rf"have shape \({graph.size - 1},\), expected \({graph.size},\)"),
        "too many": (np.ones(graph.size + 1), rf"have shape \({graph.size + 1},\), expected \({graph.size},\)"),
        "two dims": (np.ones((graph.size, 1)), rf"shape \({graph.size}, 1\), expected \({graph.size},\)"),
        "infinite": (np.full(graph.size, math.inf), "infinite"),
        "words": (["good"] * graph.size, "no criterion 'good'"),
        "a parameter's": (
            {"inner.weight": torch.ones(10, 12)},
            rf"the scores of inner.weight have shape \(10, 12\), expected \({shape[0]}, {shape[1]}, 3, 3\)",
        ),
        "no parameter's": ({"iner.weight": torch.ones(shape)}, "scores for 'iner.weight'.*did you mean 'inner.weight'"),
        "not numbers": ({"inner.bias": ["a"] * 10}, "the scores of inner.bias are not an array of numbers"),
    }


BAD = list(_bad(allocator.trace(trained(Nested()), IMAGE)))


@pytest.mark.filterwarnings("ignore::allocator.BudgetNotBindingWarning")
@pytest.mark.parametrize("flops", ["60%", "100%", "150%"])
@pytest.mark.parametrize("kind", BAD)
def test_scores_that_do_not_fit_are_refused_whatever_the_budget(kind: str, flops: str) -> None:
    model = trained(Nested())
    given, said = _bad(allocator.trace(model, IMAGE))[kind]
    with untouched(model), pytest.raises((CriterionError, UnknownNameError), match=said):
        allocate(model, flops, criterion=given)


@pytest.mark.filterwarnings("ignore::allocator.BudgetNotBindingWarning")
@pytest.mark.parametrize("flops", ["60%", "150%"])
def test_scores_of_another_graph_are_refused_by_a_plan(flops: str) -> None:
    graph = allocator.trace(trained(Nested()), IMAGE)
    with pytest.raises(CriterionError, match=rf"have shape \(3,\), expected \({graph.size},\)"):
        allocator.plan(graph, allocator.Scores("mine", np.ones(3)), flops)


@pytest.mark.filterwarnings("ignore::allocator.BudgetNotBindingWarning")
@pytest.mark.parametrize("flops", ["60%", "150%"])
def test_a_criterion_that_there_is_not_is_refused_whatever_the_budget(flops: str) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'fisher'"):
        allocate(trained(Nested()), flops, criterion="fischer", data=IMAGES)


def test_scores_that_are_all_missing_leave_nothing() -> None:
    graph = allocator.trace(trained(Nested()), IMAGE)
    with pytest.raises(NothingToAllocateError, match=f"{graph.size} neurons have no score under criterion 'own'"):
        allocate(trained(Nested()), criterion=np.full(graph.size, math.nan))


# ----------------------------------------------------------------------------------------------- data


class Detached(nn.Module):
    """Its answers have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained(Nested())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).detach()


class WritesOver(nn.Module):
    """Writes over what the gradient of a layer needs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).sigmoid()
        z = self.second(y)
        return (z + self.third(y.mul_(2))).mean((2, 3))


class Dead(nn.Module):
    """A branch that no answer depends on, beside one layer that only it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.answer, self.first, self.second = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.second(self.first(x))
        return self.answer(x).mean((2, 3))


def test_answers_without_a_gradient_are_refused() -> None:
    model = Detached().eval()
    with untouched(model), pytest.raises(DataError, match=r"was detached from the weights \(.detach\(\)"):
        allocate(model, data=IMAGES)
    plain = trained(Nested())
    with untouched(plain), pytest.raises(DataError, match="the loss has no gradient"):
        allocate(plain, data=[(IMAGES, IMAGES)], loss=lambda output, target: output.detach().mean())
    tp = pytest.importorskip("torch_pruning")
    with untouched(model), pytest.raises(DataError, match="the loss has no gradient"):
        allocate(model, data=IMAGES, criterion=tp.importance.GroupTaylorImportance())


def test_a_gradient_that_cannot_be_taken_names_what_needs_none() -> None:
    model = WritesOver().eval()
    with untouched(model), pytest.raises(CriterionError, match=r"modified by an inplace operation.*group_norm"):
        allocate(model, data=IMAGES)
    assert allocate(model).certificate.ok


def test_neurons_that_no_answer_depends_on_cost_nothing() -> None:
    model = Dead().eval()
    graph = allocator.trace(model, IMAGE)
    with pytest.warns(allocator.UninformativeScoresWarning, match="are 0"):
        assert allocator.score(graph, "fisher", IMAGES).values.tolist() == [0.0] * graph.size


@pytest.mark.parametrize("criterion", ["activation", "reconstruction", "fisher", "surgeon"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_data_that_are_not_finite_are_refused(criterion: str, number: float) -> None:
    model, images = trained(Nested()), IMAGES.clone()
    images[3, 0, 2, 2] = number
    with (
        untouched(model),
        pytest.raises(DataError, match=r"(reads is not finite|the loss is \S+, as .*): check the data"),
    ):
        allocate(model, criterion=criterion, data=[IMAGES, images])


def test_weights_that_overflow_are_seen_in_the_data_pass() -> None:
    model = trained(Nested())
    with torch.no_grad():
        model.inner.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(DataError, match="and the model's weights"):
        allocate(model, criterion="activation", data=IMAGES)


def test_a_loss_by_labels_of_the_wrong_size_is_an_error_of_the_data() -> None:
    with pytest.raises(DataError, match="the loss raised ValueError: Expected input batch_size"):
        allocate(trained(Nested()), data=[(IMAGES, torch.zeros(3).long())], loss=F.cross_entropy)


# ------------------------------------------------------------------------------------- entries of parameters


def test_an_entry_that_lies_on_two_dims_of_a_neuron_counts_once() -> None:
    """Within a stream a layer reads and writes the same neurons."""

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.within, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x + self.within(x).relu())

    graph = allocator.trace(Stream().eval(), IMAGE)
    entries = torch.rand(4, 4, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    found = allocator.score(graph, {"within.weight": entries}).values
    square = entries[:, :, 0, 0].numpy()
    units = graph.unit_of_slot[graph.slots.labels("within.weight")[0]]
    expected = square.sum(0) + square.sum(1) - np.diag(square)
    np.testing.assert_allclose(found[units], expected)


def test_importances_of_torch_pruning_where_a_neuron_holds_several_channels() -> None:
    """Groups of a convolution go whole: a score is the mean of those of its channels."""
    tp = pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1, groups=4), nn.ReLU(), nn.Conv2d(12, 2, 1)).eval()
    graph = allocator.trace(model, IMAGE)
    assert graph.size == 4
    importance = tp.importance.GroupMagnitudeImportance(group_reduction="first", normalizer=None, p=2)
    values = allocator.score(graph, importance).values
    by_channel = model[0].weight.detach().square().flatten(1).sum(1).view(4, 2).mean(1)
    np.testing.assert_allclose(values, by_channel.numpy(), rtol=1e-5)
    result = allocate(model, "60%", criterion=importance)
    assert result.certificate.ok
