"""Metrics: sums of products against brute force."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from allocator.cost.metric import Metric
from allocator.cost.terms import Term

SLOTS, NEURONS = 20, 7


@dataclass
class Drawn:
    """Random products over a few slots, some of which belong to no neuron, and what they come to."""

    terms: list[Term]
    unit_of_slot: np.ndarray

    @property
    def metric(self) -> Metric:
        return Metric("flops", "FLOPs", self.terms, self.unit_of_slot, NEURONS)

    def cost(self, kept: np.ndarray) -> int:
        """Counted slot by slot."""
        total = 0
        for term in self.terms:
            product = term.factor
            for axis in term.axes:
                count = 0
                for slot in axis.tolist():
                    unit = self.unit_of_slot[slot]
                    if unit < 0 or kept[unit]:
                        count += 1
                product *= count
            total += product
        return total


def draw(random: np.random.Generator, degree: int) -> Drawn:
    axes = [random.integers(0, SLOTS, random.integers(1, 9)) for _ in range(5)]
    terms = []
    for _ in range(6):
        picked = random.integers(0, len(axes), degree)
        terms.append(Term(int(random.integers(1, 50)), tuple(axes[k] for k in picked)))
    return Drawn(terms, random.integers(-1, NEURONS, SLOTS))


def choices(count: int = NEURONS) -> list[np.ndarray]:
    """Every choice of that many neurons."""
    return [np.array([number >> i & 1 for i in range(count)], dtype=bool) for number in range(2**count)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_a_value_is_counted_slot_by_slot(degree: int, seed: int) -> None:
    drawn = draw(np.random.default_rng([degree, seed]), degree)
    metric = drawn.metric
    assert metric.size == NEURONS
    for kept in choices():
        assert metric.value(kept) == drawn.cost(kept)
    assert metric.whole == drawn.cost(np.ones(NEURONS, dtype=bool))


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_costs_come_term_by_term(degree: int) -> None:
    random = np.random.default_rng(degree)
    drawn = draw(random, degree)
    kept = random.random(NEURONS) > 0.4
    alone = [Drawn([term], drawn.unit_of_slot).cost(kept) for term in drawn.terms]
    assert drawn.metric.per_term(kept).tolist() == alone


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_a_further_neuron_never_makes_it_less(degree: int) -> None:
    random = np.random.default_rng(degree)
    for _ in range(20):
        drawn = draw(random, degree)
        metric, kept = drawn.metric, np.zeros(NEURONS, dtype=bool)
        last = metric.value(kept)
        for unit in random.permutation(NEURONS):
            kept[unit] = True
            assert metric.value(kept) >= last
            last = metric.value(kept)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_a_neuron_or_a_bundle_of_them_adds_the_difference(degree: int) -> None:
    """A bundle may hold neurons that are kept already; `kept` itself stays as it was."""
    random = np.random.default_rng(degree)
    for _ in range(30):
        drawn = draw(random, degree)
        metric, kept = drawn.metric, random.random(NEURONS) > 0.5
        before = kept.copy()
        for size in range(1, NEURONS + 1):
            bundle = random.permutation(NEURONS)[:size]
            together = kept.copy()
            together[bundle] = True
            assert metric.added(kept, bundle) == drawn.cost(together) - drawn.cost(kept)
        unit = int(random.integers(NEURONS))
        assert metric.added(kept, unit) == metric.added(kept, np.array([unit]))
        assert (kept == before).all()


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_what_each_neuron_adds(degree: int) -> None:
    """Exact up to two axes. A neuron on three axes of one term costs more than the sum over pairs of them."""
    random = np.random.default_rng(degree)
    missed = 0
    for _ in range(40):
        drawn = draw(random, degree)
        metric, kept = drawn.metric, random.random(NEURONS) > 0.5
        each = metric.added_each(kept)
        for unit in np.flatnonzero(~kept):
            more = kept.copy()
            more[unit] = True
            exact = drawn.cost(more) - drawn.cost(kept)
            assert each[unit] <= exact
            missed += each[unit] < exact
    assert missed == 0 or degree == 3


def test_a_neuron_that_lies_on_two_axes_of_a_layer_counts_on_both() -> None:
    """A convolution within a stream of 3 channels, of which one is no neuron's."""
    axis = np.array([0, 1, 2])
    metric = Metric("flops", "FLOPs", [Term(10, (axis, axis))], np.array([-1, 0, 1]), 2)
    none, first = np.array([False, False]), np.array([True, False])
    assert metric.value(none) == 10 * 1 * 1
    assert metric.added_each(none).tolist() == [10 * (2 * 2 - 1 * 1)] * 2
    assert metric.added_each(first)[1] == 10 * (3 * 3 - 2 * 2)
    assert metric.added(none, np.array([0, 1])) == 10 * (3 * 3 - 1 * 1)


def test_a_printed_count_is_rounded_as_a_whole() -> None:
    axis = np.arange(1, 11)
    model = Metric("flops", "FLOPs", [Term(2 * 1234, (axis,), printed=True)], np.arange(-1, 10), 10)
    everything = np.ones(10, dtype=bool)
    assert model.value(everything) == 24_680 // 2
    assert model.value(np.arange(10) < 7) == 17_280 // 2  # 2 * 1234 * 7 + 1 = 17 277
    assert model.added_each(np.arange(10) < 7)[9] == 1234


def test_no_calls_cost_nothing() -> None:
    assert Metric("flops", "FLOPs", [], np.zeros(0, dtype=int), 0).value(np.zeros(0, dtype=bool)) == 0
    empty = Metric("flops", "FLOPs", [], np.array([-1, 0, 1]), 2)
    assert empty.whole == 0
    assert empty.added_each(np.zeros(2, dtype=bool)).tolist() == [0, 0]
