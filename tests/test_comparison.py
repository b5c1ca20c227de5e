"""How outputs are compared, number by number, against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_graphs import graph_of, random_choice, shrunk
from torch import Tensor, nn
from torch.nn import functional as F

from allocator.errors import CertificateError
from allocator.verifying.certificate import Certificate
from allocator.verifying.comparison import ENOUGH, SHOWS, TOLERANCE, TOLERANCES, Comparison, compare_outputs
from allocator.verifying.difference import KIND, ROUNDING, Difference, difference, noise_floors

INF, NAN = float("inf"), float("nan")


def wide(numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# One number beside another --------------------------------------------------------------------------


def test_what_was_compared_is_counted() -> None:
    reference, result = [wide([1.0, NAN, INF, 2.0]), wide([NAN, NAN]), wide([])], [wide([1.0, NAN, INF, 2.0])]
    found = difference(reference, [*result, wide([NAN, NAN]), wide([])])
    assert found == Difference(0.0, (0.75, 0.0, 1.0), 3)
    assert difference(reference, result) == Difference(INF, (), 0), "outputs are missing"


def test_patterns_may_be_passed_over() -> None:
    a, b = [wide([4.0, INF, NAN, 1.0, INF])], [wide([3.0, 1.0, 1.0, NAN, -INF])]
    assert difference(a, b).worst == INF
    assert difference(a, b, patterns=False).worst == 0.25
    assert difference([wide([NAN])], [wide([1.0])], patterns=False).worst == 0.0


def test_what_is_not_finite_is_no_scale() -> None:
    for other in (INF, -INF, NAN):
        found = difference([wide([0.01, 0.02, other])], [wide([0.01, 0.03, other])])
        assert found.worst == pytest.approx(0.5)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_of_another_kind_is_measured_by_its_own_largest(transposed: bool) -> None:
    """Scores beside coordinates, in rows or in columns."""
    a = wide([[1000.0, 500.0, 800.0], [0.5, 0.25, 0.125]])
    b = a.clone()
    b[1, 2] += 0.05
    c = a.clone()
    c[0, 1] += 0.05
    a, b, c = (t.t() if transposed else t for t in (a, b, c))
    assert difference([a], [b]).worst == pytest.approx(0.05 / 0.5)
    assert difference([a], [c]).worst == pytest.approx(0.05 / 1000)
    alone = a.reshape(-1)
    assert difference([alone], [b.reshape(-1)]).worst == pytest.approx(0.05 / 0.125), "each is a row of its own"


@pytest.mark.parametrize(("own", "scale"), [(KIND * 1000, 1000.0), (KIND * 1000 * 0.99, KIND * 1000 * 0.99)])
def test_a_row_is_of_another_kind_below_a_thousandth(own: float, scale: float) -> None:
    a = wide([[1000.0, 1000.0], [own, own / 2]])
    b = a.clone()
    b[1, 1] += 0.01
    assert difference([a], [b]).worst == pytest.approx(0.01 / scale)


def test_floors_are_scales_that_no_number_goes_below() -> None:
    a, b = [wide([1e-12, 2e-12]), wide([4.0])], [wide([2e-12, 2e-12]), wide([3.0])]
    assert difference(a, b).worst == pytest.approx(0.5)
    floors = [wide([1e-8, 1e-8]), wide([8.0])]
    assert difference(a, b, floors).worst == pytest.approx(1 / 8)
    assert difference(a[:1], b[:1], floors[:1]).worst == pytest.approx(1e-4)
    assert difference([wide([0.0])], [wide([1e-3])]).worst > 1e300, "anything is much beside nothing"


def test_noise_floors_are_by_how_much_a_nudge_moves_an_output() -> None:
    reference = [wide([[0.0, 0.0], [3.0, 3.0]]), wide([])]
    nudged = [
        [wide([[1e-16, -3e-16], [3.0 + 1e-10, 3.0]]), wide([])],
        [wide([[2e-16, NAN], [3.0, 3.0 - 4e-10]]), wide([])],
        [wide([[5.0, 5.0], [5.0, 5.0]])],  # other outputs say nothing
        [wide([5.0]), wide([])],
    ]
    rows, nothing = noise_floors(reference, nudged, 1e-9)
    expected = wide([[2e-16, 3e-16], [1e-10, 4e-10]])
    moved = torch.minimum(expected.amax(0, keepdim=True), expected.amax(1, keepdim=True))
    torch.testing.assert_close(rows, moved * ROUNDING / 1e-9, rtol=1e-5, atol=0)
    assert nothing.shape == (0,)


# What a comparison shows ----------------------------------------------------------------------------

SEEN = Comparison(error=1e-15, effect=0.5, outputs=2, shares=(1.0, 0.5), compared=30)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_an_effect_shows_from_ten_times_the_tolerance_on(dtype: str) -> None:
    least = SHOWS * TOLERANCES[dtype]
    seen = replace(SEEN, dtype=dtype)
    assert replace(seen, effect=least).shows
    assert not replace(seen, effect=0.99 * least).shows
    assert replace(seen, effect=0.0, unread=True).shows, "there is none to be seen"
    assert not replace(seen, effect=NAN).shows


def test_every_output_has_to_be_compared_somewhere() -> None:
    assert replace(SEEN, shares=(1.0, ENOUGH)).shows
    assert not replace(SEEN, shares=(1.0, 0.99 * ENOUGH)).shows
    assert not replace(SEEN, shares=()).shows
    assert not replace(SEEN, shares=(0.0,), unread=True).shows


def test_two_inputs_together() -> None:
    other = Comparison(error=1e-3, effect=0.1, outputs=2, drawn=True, shares=(0.25, 0.75), compared=12)
    both = SEEN.on_another_input(other, 0.2)
    assert both == Comparison(1e-3, 0.2, 2, True, (1.0, 0.75), 42)
    assert other.on_another_input(SEEN, 0.2) == both
    missing = replace(other, error=INF, shares=(), drawn=False)
    assert SEEN.on_another_input(missing, 0.5) == replace(SEEN, error=INF, shares=(), compared=42)


# What a certificate says ----------------------------------------------------------------------------


def test_a_verdict_says_no_more_than_was_seen() -> None:
    right = Certificate(True, 1e-15, True, 0, ((1, 3, 8, 8),), 1, True, 0.5)
    parts = ["every index accounted for", "weights the original's bit for bit", "float64 outputs within 1.0e-15"]
    assert str(right) == f"passed: {', '.join(parts)}"
    assert str(replace(right, unread=True)) == f"passed: {', '.join(parts)}, none of them reads the dropped neurons"
    lost = "but none of them was seen to depend on the"
    assert str(replace(right, shown=False)) == f"NOT SHOWN: {', '.join(parts)}, {lost} dropped neurons"
    parts[0] += ", both ways"
    assert str(replace(right, widens=True)) == f"passed: {', '.join(parts)}"
    assert str(replace(right, widens=True, shown=False)) == f"NOT SHOWN: {', '.join(parts)}, {lost} added neurons"
    after = "; structure proven, weights refitted on 7 inputs"
    assert str(replace(right, refitted=7, compared_shapes=((1, 3, 8, 8),))).endswith(f"1.0e-15{after}")


# Inputs that a forward refuses -----------------------------------------------------------------------


class Classes(nn.Module):
    """Takes whole numbers from 0 to 3 as floats, and none else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(F.one_hot(x.long(), 4).float()).relu())
        return y


def test_inputs_that_a_forward_refuses_are_passed_over_for_those_that_were_given() -> None:
    model = Classes()
    graph = graph_of(model, torch.tensor([3.0, 1.0, 0.0, 2.0, 3.0, 1.0]))
    with pytest.raises(RuntimeError, match="non-negative"):
        model(graph.inputs.noise(0, torch.device("cpu"), torch.float32).args[0])
    kept = random_choice(graph, 0)
    maps, small = shrunk(graph, kept)
    found = compare_outputs(graph, kept, maps, small, seed=0)
    assert found.error < TOLERANCE
    assert found.shows


def test_a_forward_that_takes_nothing_says_what_it_raised() -> None:
    class Broken(Classes):
        asked = False

        def forward(self, x: Tensor) -> Tensor:
            if self.asked:
                raise RuntimeError("no more today")
            return super().forward(x)

    graph = graph_of(Broken(), torch.tensor([3.0, 1.0]))
    kept = random_choice(graph, 0)
    maps, small = shrunk(graph, kept)
    model: Any = graph.model
    model.asked = True
    with pytest.raises(CertificateError, match="no more today"):
        compare_outputs(graph, kept, maps, small, seed=0)
