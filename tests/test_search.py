"""The search for a choice that meets all budgets, against trying everything on tiny problems."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import pytest

from allocator.cost.budget import Budget, Budgets
from allocator.cost.metric import Metric
from allocator.cost.terms import Term
from allocator.graph.channel_graph import ChannelGraph
from allocator.planning.problem import Problem
from allocator.planning.search import fill, keep_in_order, next_costs
from allocator.scoring.scores import Scores

NEURONS, SLOTS = 8, 24


@dataclass
class Tiny:
    """A problem of a few neurons whose costs can be counted by hand."""

    terms: list[list[Term]]
    unit_of_slot: np.ndarray
    limits: list[float]
    forced: np.ndarray
    gone: np.ndarray | None
    threshold: np.ndarray

    def problem(self, *, fills: bool) -> Problem:
        budgets = []
        for i, (terms, limit) in enumerate(zip(self.terms, self.limits, strict=True)):
            budgets.append(Budget(Metric(f"cost{i}", "units", terms, self.unit_of_slot, NEURONS), limit))
        nobody = cast(ChannelGraph, None)  # a search asks for costs alone
        scores = Scores("none", np.zeros(NEURONS))
        return Problem(nobody, scores, self.forced, Budgets(budgets), fills, gone=self.gone)

    @property
    def open(self) -> np.ndarray:
        """What may be kept at all."""
        return np.array([self.forced[i] or self.gone is None or not self.gone[i] for i in range(NEURONS)])

    def cost(self, terms: list[Term], kept: np.ndarray) -> float:
        total = 0.0
        for term in terms:
            product = term.factor
            for axis in term.axes:
                units = self.unit_of_slot[axis]
                product *= int((units < 0).sum() + kept[units[units >= 0]].sum())
            total += product
        return total

    def met(self, kept: np.ndarray) -> bool:
        return all(self.cost(terms, kept) <= limit for terms, limit in zip(self.terms, self.limits, strict=True))

    def with_neuron(self, kept: np.ndarray, unit: int) -> np.ndarray:
        more = kept.copy()
        more[unit] = True
        return more

    def order(self) -> list[int]:
        """Neurons that may go, by threshold and then by index."""
        return sorted(np.flatnonzero(~self.forced & self.open).tolist(), key=lambda unit: (self.threshold[unit], unit))

    def whole_steps(self) -> np.ndarray:
        """Of all choices that keep every neuron up to some threshold, the largest that meets the budgets."""
        best = self.forced
        for step in sorted(set(self.threshold[~self.forced].tolist())):
            kept = self.forced | (self.open & (self.threshold <= step))
            if self.met(kept):
                best = kept
        return best

    def one_by_one(self) -> np.ndarray:
        """Each neuron in order that still fits."""
        kept = self.forced.copy()
        for unit in self.order():
            more = self.with_neuron(kept, unit)
            if self.met(more):
                kept = more
        return kept


def draw(seed: int, budgets: int, degree: int) -> Tiny:
    random = np.random.default_rng([seed, budgets, degree])
    unit_of_slot = random.integers(-1, NEURONS, SLOTS)
    unit_of_slot[:NEURONS] = np.arange(NEURONS)
    terms: list[list[Term]] = []
    for _ in range(budgets):
        axes = [random.integers(0, SLOTS, random.integers(1, 9)) for _ in range(4)]
        terms.append([])
        for _ in range(4):
            picked = random.integers(0, len(axes), degree)
            terms[-1].append(Term(int(random.integers(1, 30)), tuple(axes[k] for k in picked)))
    threshold = random.integers(0, 5, NEURONS) / 4 if seed % 2 else random.random(NEURONS)
    forced = random.random(NEURONS) < 0.2
    gone = random.random(NEURONS) < 0.3 if seed % 3 == 2 else None
    tiny = Tiny(terms, unit_of_slot, [], forced, gone, threshold)
    for each in terms:
        low, high = tiny.cost(each, forced), tiny.cost(each, np.ones(NEURONS, dtype=bool))
        tiny.limits.append(int(low + random.random() * (high - low)))
    return tiny


def several(budgets: int, degree: int) -> list[Tiny]:
    return [draw(seed, budgets, degree) for seed in range(12)]


EVERY_SORT = [(budgets, degree) for budgets in (1, 2, 3) for degree in (1, 2, 3)]


@pytest.fixture(params=EVERY_SORT, ids=lambda sort: f"{sort[0]} budgets of {sort[1]} axes")
def tinies(request: pytest.FixtureRequest) -> list[Tiny]:
    return several(*request.param)


def test_tiny_problems_are_of_every_sort() -> None:
    """Something is forced or gone in some and nothing in others; some have ties; filling adds something in some."""
    tinies = [tiny for sort in EVERY_SORT for tiny in several(*sort)]
    assert {bool(tiny.forced.any()) for tiny in tinies} == {True, False}
    assert {tiny.gone is not None and bool((tiny.gone & tiny.forced).any()) for tiny in tinies} == {True, False}
    assert {len(set(tiny.threshold)) < NEURONS for tiny in tinies} == {True, False}
    filled = [bool((tiny.whole_steps() != tiny.one_by_one()).any()) for tiny in tinies]
    assert 10 < sum(filled) < len(tinies) - 10
    assert all(tiny.met(tiny.forced) for tiny in tinies)


def test_without_filling_the_largest_step_is_kept(tinies: list[Tiny]) -> None:
    for tiny in tinies:
        kept = keep_in_order(tiny.problem(fills=False), tiny.threshold)
        assert kept.tolist() == tiny.whole_steps().tolist()


def test_with_filling_every_neuron_in_order_that_fits_is_kept(tinies: list[Tiny]) -> None:
    for tiny in tinies:
        kept = keep_in_order(tiny.problem(fills=True), tiny.threshold)
        assert kept.tolist() == tiny.one_by_one().tolist()
        assert kept[tiny.forced].all()
        assert tiny.met(kept)
        assert not (kept & ~tiny.open).any()
        for unit in np.flatnonzero(~kept & tiny.open).tolist():
            assert not tiny.met(tiny.with_neuron(kept, unit)), "a further neuron would fit in all budgets"


def test_filling_starts_from_what_is_kept(tinies: list[Tiny]) -> None:
    """In the order that is given, whatever it is and whoever is in it."""
    for tiny in tinies:
        expected = tiny.forced.copy()
        for unit in range(NEURONS)[::-1]:
            more = tiny.with_neuron(expected, unit)
            if tiny.open[unit] and tiny.met(more):
                expected = more
        order = np.arange(NEURONS)[::-1]
        assert fill(tiny.problem(fills=True), order, tiny.forced.copy()).tolist() == expected.tolist()


@pytest.mark.parametrize("fills", [True, False])
def test_a_limit_at_the_largest_keeps_all_and_one_at_the_smallest_none(tinies: list[Tiny], fills: bool) -> None:
    everything = np.ones(NEURONS, dtype=bool)
    for tiny in tinies:
        wide = replace(tiny, limits=[tiny.cost(terms, everything) for terms in tiny.terms])
        assert keep_in_order(wide.problem(fills=fills), tiny.threshold).tolist() == tiny.open.tolist()
        assert next_costs(wide.problem(fills=fills), everything) == {}
        fixed = replace(tiny, forced=everything)
        assert keep_in_order(fixed.problem(fills=fills), tiny.threshold).all()
        dear = Term(1, (np.arange(NEURONS),))
        narrow = replace(tiny, terms=[[dear]], limits=[int(tiny.forced.sum())])
        assert keep_in_order(narrow.problem(fills=fills), tiny.threshold).tolist() == tiny.forced.tolist()


@pytest.mark.parametrize("fills", [True, False])
def test_thresholds_are_any_numbers(tinies: list[Tiny], fills: bool) -> None:
    """What counts is their order; what must stays first, however small a threshold is."""
    for tiny in tinies:
        kept = keep_in_order(tiny.problem(fills=fills), tiny.threshold)
        other = keep_in_order(tiny.problem(fills=fills), 50 * tiny.threshold - 40)
        assert other.tolist() == kept.tolist()


@pytest.mark.parametrize("degree", [1, 2])
def test_the_next_cost_is_of_the_cheapest_further_neuron(degree: int) -> None:
    for tiny in several(2, degree):
        kept = tiny.one_by_one()
        expected = {}
        for i, terms in enumerate(tiny.terms):
            units = np.flatnonzero(~kept & tiny.open).tolist()
            more = [tiny.cost(terms, tiny.with_neuron(kept, unit)) for unit in units]
            if more:
                expected[f"cost{i}"] = min(more) - tiny.cost(terms, kept)
        assert next_costs(tiny.problem(fills=True), kept) == expected
