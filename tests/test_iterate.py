"""Smaller step by step: budgets along a schedule, training in between, and what is left when something fails."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from subjects import IMAGE, Nested, trained, untouched
from torch import nn

import allocator
from allocator import BudgetError, InputError, IterationError


def nothing(model: nn.Module) -> None:
    """No training."""


def shift(model: nn.Module) -> None:
    """Training that can be recognised: every parameter grows by one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


@pytest.mark.parametrize("metric", ["flops", "params"])
def test_every_step_takes_the_same_factor_off(metric: str) -> None:
    model, asked = trained(Nested()), dict[str, Any](((metric, "40%"),))
    with untouched(model):
        done = allocator.iterate(model, steps=3, train=nothing, example_inputs=IMAGE, **asked)
    whole = allocator.trace(model, IMAGE).metric(metric).whole
    for number, step in enumerate(done.steps, start=1):
        cost = step.allocation.costs[metric]
        assert cost["asked"] == pytest.approx(whole * 0.4 ** (number / 3))
        assert cost["after"] <= cost["asked"]
        assert step.certificate.ok
    assert len(done.steps) == 3


def test_the_allocation_leads_from_the_original_to_the_last_network() -> None:
    model = trained(Nested())
    done = allocator.iterate(model, "40%", steps=3, train=nothing, example_inputs=IMAGE)
    again = allocator.apply(model, done.allocation)
    assert {n: p.tolist() for n, p in again.named_parameters()} == {
        n: p.tolist() for n, p in done.model.named_parameters()
    }
    assert allocator.verify(model, done.model, done.allocation, example_inputs=IMAGE).ok


@pytest.mark.filterwarnings("error::allocator.errors.UnmatchedPatternWarning")
def test_what_is_asked_of_a_layer_that_is_gone_is_asked_no_more() -> None:
    torch.manual_seed(0)
    model = allocator.build("recipe:scalenet-small-seed", planes=[4, 6], blocks=[1, 1], num_classes=5).eval()
    image = torch.zeros(1, 1, 32, 32)
    done = allocator.iterate(
        model, "35%", schedule=[0.85, 1], train=nothing, example_inputs=image, at_least=0, multiple=4
    )
    assert done.steps[0].allocation.absent


def test_training_between_steps_lasts() -> None:
    model = trained(Nested())
    done = allocator.iterate(model, "50%", schedule=[0.5, 1], train=shift, example_inputs=IMAGE)
    plain = allocator.apply(model, done.allocation)
    for (name, trained_), (_, untrained) in zip(done.model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(trained_, untrained + 2, msg=name)
    assert allocator.verify(model, done.model, done.allocation, example_inputs=IMAGE, numeric=False).ok


def test_what_was_reached_comes_back_with_the_error() -> None:
    model, calls = trained(Nested()), []

    def fails_at_the_third(small: nn.Module) -> None:
        calls.append(allocator.trace(small, IMAGE).flops)
        if len(calls) == 3:
            for parameter in small.parameters():
                parameter.data.fill_(math.nan)
            raise RuntimeError("out of memory")

    with (
        untouched(model),
        pytest.raises(IterationError, match="step 3 of 4: training raised RuntimeError: out of") as e,
    ):
        allocator.iterate(model, "40%", steps=4, train=fails_at_the_third, example_inputs=IMAGE)
    done = e.value.done
    assert isinstance(e.value.__cause__, RuntimeError)
    assert len(done.steps) == 2
    assert allocator.trace(done.model, IMAGE).flops == calls[1]
    assert all(torch.isfinite(parameter).all() for parameter in done.model.parameters())
    assert allocator.verify(model, done.model, done.allocation, example_inputs=IMAGE).ok


def test_a_step_that_cannot_be_made_comes_with_what_was_reached() -> None:
    def breaks(model: nn.Module) -> None:
        model.forward = None  # type: ignore[assignment]

    with pytest.raises(IterationError, match="step 2 of 2") as caught:
        allocator.iterate(trained(Nested()), "50%", steps=2, train=breaks, example_inputs=IMAGE)
    assert len(caught.value.done.steps) == 1


def test_nothing_was_reached_where_the_first_training_fails() -> None:
    def fails(model: nn.Module) -> None:
        raise ValueError("no data")

    with pytest.raises(IterationError, match="step 1 of 5: training raised ValueError: no data") as caught:
        allocator.iterate(trained(Nested()), "50%", train=fails, example_inputs=IMAGE)
    assert caught.value.done is None


NO_SCHEDULES = [[], [0.5], [0, 1], [0.7, 0.5, 1], [0.5, 0.5, 1], [0.5, 1.5], [math.nan, 1], [None, 1], "half", 5]


@pytest.mark.parametrize("schedule", NO_SCHEDULES)
def test_schedules_that_do_not_rise_to_the_budget(schedule: Any) -> None:
    with pytest.raises(InputError, match="does not rise to 1"):
        allocator.iterate(trained(Nested()), "50%", schedule=schedule, train=nothing, example_inputs=IMAGE)


@pytest.mark.parametrize("steps", [0, -1, 2.5, "3"])
def test_numbers_of_steps_that_are_none(steps: Any) -> None:
    with pytest.raises(InputError, match="whole number"):
        allocator.iterate(trained(Nested()), "50%", steps=steps, train=nothing, example_inputs=IMAGE)


def test_a_budget_that_cannot_be_met_is_said_before_anything_is_trained() -> None:
    trained_: list[nn.Module] = []
    with pytest.raises(BudgetError):
        allocator.iterate(trained(Nested()), 5, steps=2, train=trained_.append, example_inputs=IMAGE)
    with pytest.raises(BudgetError):  # the first step could be made
        allocator.iterate(trained(Nested()), "1%", steps=4, train=trained_.append, example_inputs=IMAGE)
    assert not trained_


@pytest.mark.parametrize(("at_least", "least"), [("50%", [16, 16]), ({"0": "90%"}, [29, 1])])
def test_shares_to_keep_are_of_the_original(at_least: Any, least: list[int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 5, 1))
    done = allocator.iterate(model, "30%", steps=4, train=nothing, at_least=at_least, example_inputs=IMAGE)
    for name, width in zip(("0.weight", "2.weight"), least, strict=True):
        assert len(done.model.get_parameter(name)) >= width


def test_training_that_gives_other_tensors_is_an_error() -> None:
    def another_head(model: nn.Module) -> None:
        model[2] = nn.Linear(model[2].in_features, 7)  # type: ignore[index, operator]

    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 4))
    with pytest.raises(IterationError, match=r"step 1 of 5: training gave the network other tensors \(2.bias"):
        allocator.iterate(model, "50%", train=another_head, example_inputs=torch.zeros(1, 6))
