"""How near a plan comes to the best: shares of importance, the bound beside them, and what is said without one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_bound import IMAGE, Joined, best_of_all, chain, problem

import allocator
from allocator.planning import optimality as judged
from allocator.planning.optimality import Optimality, optimality
from allocator.planning.policies.registry import POLICIES
from allocator.planning.problem import Problem
from allocator.scoring.scores import Scores


@pytest.fixture
def asked() -> Problem:
    return problem(allocator.trace(chain(2, 4, 3, 4), IMAGE), 0.5, seed=4)


def test_what_is_kept_is_a_share_and_the_best_lies_between_it_and_the_bound(asked: Problem) -> None:
    whole = float(asked.scores.values.sum())
    for policy in ("priced", "uniform"):
        kept = POLICIES[policy](asked)
        found = optimality(asked, kept)
        assert found is not None
        assert found.bound is not None
        assert found.gap is not None
        assert found.importance == pytest.approx(float(asked.scores.values[kept].sum()) / whole)
        assert found.importance <= best_of_all(asked) / whole + 1e-12 <= found.bound + 2e-12 <= 1 + 2e-12
        assert found.gap == pytest.approx(1 - found.importance / found.bound, abs=1e-12)


def test_scores_without_a_sum_have_no_share(asked: Problem) -> None:
    size = asked.graph.size
    for values in (np.zeros(size), -np.ones(size), np.full(size, np.nan)):
        assert optimality(replace(asked, scores=Scores("own", values)), asked.forced) is None


def test_everything_is_kept_where_nothing_has_to_go() -> None:
    graph = allocator.trace(Joined(), IMAGE)
    wide = problem(graph, 1.0, seed=0)
    found = optimality(wide, graph.everything)
    assert found is not None
    assert (found.importance, found.bound, found.gap) == pytest.approx((1.0, 1.0, 0.0))


def test_where_no_bound_is_known_that_is_said(asked: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judged, "upper_bound", lambda problem: None)
    found = optimality(asked, POLICIES["global"](asked))
    assert found is not None
    assert (found.bound, found.gap) == (None, None)
    assert str(found) == f"importance kept {found.importance:.3%}; no bound is known"


def test_what_is_said_of_a_gap() -> None:
    assert str(Optimality(0.9, 0.96)) == "importance kept 90.000%; no plan keeps more than 96.000%: gap 6.25%"
    assert Optimality(0.9, 0.9 - 1e-15).gap == 0.0
    assert Optimality(0.0, 0.0).gap == 0.0


def test_a_plan_knows_its_own() -> None:
    graph = allocator.trace(chain(2, 4, 3, 4), IMAGE)
    result = allocator.allocate(graph.model, "60%", example_inputs=IMAGE, criterion="magnitude")
    assert result.plan.problem is not None
    assert result.plan.optimality() == optimality(result.plan.problem, result.plan.kept) == result.optimality
    with pytest.warns(allocator.BudgetNotBindingWarning):
        free = allocator.allocate(graph.model, "100%", example_inputs=IMAGE)
    assert free.plan.optimality() is None
