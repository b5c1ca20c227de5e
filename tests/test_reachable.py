"""The smallest cost that was seen to work, against trying every figure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from allocator.errors import BudgetError, NothingToAllocateError
from allocator.fitting.reachable import smallest_reachable

Run = Callable[[float], int]


def runs(landings: list[int], planned: int, optimism: int, seen: list[int]) -> Run:
    """A run lands on the largest of `landings` that its figure allows.

    Below all of them it raises. A plan does not know that: it says that it can reach `planned`, and once it has been
    tried there, `optimism` more than was asked.
    """

    def run(figure: float) -> int:
        if figure < planned:
            raise BudgetError("", reachable=planned)
        place = bisect_right(landings, figure)
        if not place:
            raise BudgetError("", reachable=int(figure) + optimism) if optimism else NothingToAllocateError("")
        seen.append(landings[place - 1])
        return landings[place - 1]

    return run


@settings(deadline=None, max_examples=300)
@given(
    own=st.sampled_from([50, 97, 100, 1000, 30_000]),
    shares=st.lists(st.floats(0.02, 0.999), min_size=1, max_size=8),
    planned=st.floats(0.01, 1),
    optimism=st.sampled_from([0, 1, 7]),
    asked=st.floats(0.0, 1),
)
def test_it_is_the_smallest_to_within_a_hundredth(
    own: int, shares: list[float], planned: float, optimism: int, asked: float
) -> None:
    landings = sorted({max(int(own * share), 1) for share in shares} | {own})
    smallest, budget = landings[0], int(asked * landings[0])
    aimed = int(planned * smallest)
    assume(budget < aimed)
    seen: list[int] = []
    run = runs(landings, aimed, optimism, seen)

    found = smallest_reachable(BudgetError("", reachable=aimed), run, budget, own)

    assert found is not None
    assert found in landings
    assert found in seen or found == own
    assert smallest <= found <= smallest + max(own / 100, 1)


def test_a_plan_that_lands_where_it_aims_is_believed() -> None:
    tried: list[float] = []

    def run(figure: float) -> int:
        tried.append(figure)
        return int(figure)

    assert smallest_reachable(BudgetError("", reachable=60), run, 10, 100) == 60
    assert tried == [60]


def test_a_figure_is_followed_to_where_it_lands() -> None:
    def run(figure: float) -> int:
        steps = {60: 72, 72: 80, 80: 80}
        if figure not in steps:
            raise BudgetError("")
        return steps[int(figure)]

    assert smallest_reachable(BudgetError("", reachable=60), run, 59, 100) == 80


def test_figures_that_lead_to_one_another_end() -> None:
    """A run that lands lower than it aims, and from there where it came from."""
    steps = {60: 55, 55: 60}
    found = smallest_reachable(BudgetError("", reachable=60), lambda figure: steps[int(figure)], 59, 100)
    assert found in (55, 60)


def test_where_nothing_can_go_it_is_sought_from_the_models_own_down() -> None:
    landings = [40, 90, 99]
    seen: list[int] = []
    run = runs(landings, 0, 0, seen)
    assert smallest_reachable(NothingToAllocateError(""), run, 10, 100) == 40
    assert 40 in seen


def test_it_is_sought_from_one_less_than_the_models_own() -> None:
    tried: list[float] = []

    def run(figure: float) -> int:
        tried.append(figure)
        if figure < 99:
            raise NothingToAllocateError("")
        return int(figure)

    assert smallest_reachable(NothingToAllocateError(""), run, 10, 100) == 99
    assert tried[0] == 99, "at its own FLOPs nothing would go"


def test_where_nothing_can_go_at_any_budget_there_is_no_figure() -> None:
    def run(figure: float) -> int:
        raise NothingToAllocateError("")

    assert smallest_reachable(NothingToAllocateError(""), run, 10, 100) is None


def test_where_no_plan_runs_but_one_was_meant_to_it_is_the_models_own() -> None:
    def run(figure: float) -> int:
        raise BudgetError("", reachable=None)

    assert smallest_reachable(BudgetError("", reachable=60), run, 10, 100) == 100
