"""Budgets: how limits are read, and when one or several of them are met."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import allocator
from allocator import BudgetError
from allocator.cost.budget import Budget, Budgets, parse_budgets, parse_limit
from allocator.cost.metric import Metric
from allocator.cost.terms import Term

NEURONS = 5
CHOICES = [np.array([number >> i & 1 for i in range(NEURONS)], dtype=bool) for number in range(2**NEURONS)]


def metric(name: str, factor: int, degree: int, fixed: int = 0) -> Metric:
    """`factor` times the `degree`-th power of the number of kept neurons and `fixed` further slots."""
    unit_of_slot = np.concatenate([np.arange(NEURONS), np.full(fixed, -1)])
    axis = np.arange(NEURONS + fixed)
    return Metric(name, name.upper(), [Term(factor, (axis,) * degree)], unit_of_slot, NEURONS)


AREA = metric("area", 3, 2, fixed=1)  # 3, 12, 27, 48, 75, 108
WIDTH = metric("width", 10, 1)  # 0, 10, 20, 30, 40, 50


def first(count: int) -> np.ndarray:
    return np.arange(NEURONS) < count


@pytest.mark.parametrize("area", [2, 3, 27, 47.5, 48, 108, 1000])
@pytest.mark.parametrize("width", [0.5, 10, 29, 30, 31, 50])
def test_budgets_are_met_together_or_not_at_all(area: float, width: float) -> None:
    budgets = Budgets([Budget(AREA, area), Budget(WIDTH, width)])
    for kept in CHOICES:
        count = int(kept.sum())
        costs = {"area": 3 * (count + 1) ** 2, "width": 10 * count}
        exceeded = [name for name, limit in (("area", area), ("width", width)) if costs[name] > limit]
        assert [budget.metric.name for budget in budgets.unmet(kept)] == exceeded
        assert budgets.met(kept) == (not exceeded)
        assert budgets.used(kept) == max(costs["area"] / area, costs["width"] / width)
        assert [budget.left(kept) for budget in budgets.each] == [area - costs["area"], width - costs["width"]]


def test_what_is_exactly_at_its_limit_is_met() -> None:
    assert Budgets([Budget(WIDTH, 30)]).met(first(3))
    assert not Budgets([Budget(WIDTH, math.nextafter(30, 0))]).met(first(3))


def test_the_first_leads() -> None:
    budgets = Budgets([Budget(WIDTH, 30), Budget(AREA, 50)])
    assert budgets.first.metric is WIDTH
    assert budgets.names == ["width", "area"]
    other = budgets.with_limit("width", 20)
    assert [(budget.metric.name, budget.limit) for budget in other.each] == [("width", 20), ("area", 50)]
    assert budgets.first.limit == 30


def test_limits_hold_on_metrics_of_another_graph() -> None:
    wider = {"area": metric("area", 3, 2, fixed=4), "width": metric("width", 11, 1), "depth": metric("depth", 1, 1)}
    budgets = Budgets([Budget(WIDTH, 30), Budget(AREA, 80)]).on(wider)
    assert [(budget.metric, budget.limit) for budget in budgets.each] == [(wider["width"], 30), (wider["area"], 80)]
    assert budgets.met(first(1))
    assert [budget.metric.name for budget in budgets.unmet(first(2))] == ["area"]  # 3 * 6 ** 2
    assert budgets.names == ["width", "area"]


@pytest.mark.parametrize(
    ("asked", "limit"),
    [
        (12, 12),
        (1.5, 1.5),
        (np.int64(7), 7),
        (np.float32(2.5), 2.5),
        ("4.2e3", 4200),
        ("1.5k", 1500),
        ("2 M", 2e6),
        ("0.003m", 3000),
        ("4.2G", 4.2e9),
        ("1b", 1e9),
        ("0.5T", 5e11),
        ("12,345", 12_345),
        ("1_000", 1000),
        (" 12 ", 12),
        ("60%", 120),
        (" 60 % ", 120),
        ("0.5%", 1),
        ("1e2%", 200),
        ("250%", 500),
    ],
)
def test_a_number_or_a_share_of_the_models_own(asked: Any, limit: float) -> None:
    assert parse_limit("params", asked, metric("parameters", 40, 1)) == pytest.approx(limit, rel=1e-12)


@pytest.mark.parametrize(
    "asked", ["half", "%", "", "G", "4.2X", "60k%", "60%%", "%60", "6 0", None, [1], {}, 1j, np.ones(2)]
)
def test_what_is_no_number_says_what_to_pass(asked: Any) -> None:
    said = r"^params=.* is not a number: pass PARAMETERS such as 10e6 or '10M', or a share such as '60%'$"
    with pytest.raises(BudgetError, match=said) as caught:
        parse_limit("params", asked, metric("parameters", 40, 1))
    assert (caught.value.asked, caught.value.reachable) == (None, None)


@pytest.mark.parametrize("asked", [0, -1, "0%", "-5%", "-0", math.nan, "nan", math.inf, "-inf", "1e999", "1e308%"])
def test_what_is_not_positive_and_finite_names_the_models_own(asked: Any) -> None:
    said = r"^params=.* must be positive and finite; the model's own is 12,345 PARAMETERS$"
    with pytest.raises(BudgetError, match=said):
        parse_limit("params", asked, metric("parameters", 2469, 1))


@pytest.mark.parametrize(("asked", "share"), [(0.6, "60%"), ("0.25", "25%"), (0.999, "99.9%"), (0.004, "0.4%")])
def test_a_share_without_its_sign_is_asked_about(asked: Any, share: str) -> None:
    said = rf"^params=.* is {float(asked):g} PARAMETERS out of 12,345: did you mean '{share}'\?$"
    with pytest.raises(BudgetError, match=said):
        parse_limit("params", asked, metric("parameters", 2469, 1))
    assert parse_limit("params", asked, Metric("one", "PARAMETERS", [Term(1, ())], np.zeros(0, int), 0)) == float(
        asked
    ), "there is but one"
    assert parse_limit("params", "0.004%", metric("parameters", 2469, 1)) == pytest.approx(0.4938)


def test_a_number_larger_than_any_float() -> None:
    with pytest.raises(BudgetError, match=r"is not a number"):
        parse_limit("params", 10**400, metric("parameters", 40, 1))


def test_budgets_are_read_by_the_names_of_their_metrics() -> None:
    """In the order in which they are asked for, each share of its own metric."""
    metrics = {"area": AREA, "width": WIDTH, "depth": metric("depth", 1, 1)}
    budgets = parse_budgets({"width": "60%", "area": "50%"}, metrics)
    assert [(budget.metric, budget.limit) for budget in budgets.each] == [(WIDTH, 30), (AREA, 54)]
    with pytest.raises(BudgetError, match=r"area='-5%' must be positive and finite; the model's own is 108 AREA"):
        parse_budgets({"width": 3, "area": "-5%"}, metrics)


def test_a_number_that_may_be_meant_as_a_share_is_asked_about() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    with pytest.raises(allocator.BudgetError, match="if a share is meant, write '50%'"):
        allocator.allocate(model, flops=50, example_inputs=torch.zeros(1, 3, 16, 16))
    with pytest.raises(allocator.BudgetError) as refused:
        allocator.allocate(model, flops=500, example_inputs=torch.zeros(1, 3, 16, 16))
    assert "share" not in str(refused.value)
