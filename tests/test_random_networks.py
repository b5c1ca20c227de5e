"""The promises of the whole flow, held against networks that nobody wrote by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from random_checks import Case, check
from random_specs import specs
from torch import nn


@st.composite
def cases(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    """A random network and a random request."""
    return Case(
        draw(specs()),
        share=draw(st.integers(20, 95)) / 100,
        policy=draw(st.sampled_from(("per_block", "global", "uniform"))),
        scope=draw(st.sampled_from(("auto", "all", "auto", "all", "inner", "branches"))),
        groups=draw(st.sampled_from(("whole", "width"))),
        norms=draw(st.sampled_from(("exact", "exact", "exact", "loose"))),
        criterion=draw(st.sampled_from(("bn_scale", "magnitude"))),
        fill=draw(st.sampled_from((True, True, True, False))),
        exclude=draw(st.sampled_from(((), (), (), (), ("steps.1",), (nn.Linear,), ("head",)))),
        again=draw(st.integers(50, 95)) / 100,
    )


def _run(examples: int, number: int) -> Counter[str]:
    """Check that many random cases; the outcomes."""
    outcomes: Counter[str] = Counter()

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        print_blob=False,
    )
    @given(cases())
    def run(case: Case) -> None:
        outcomes[check(case)] += 1

    run()
    return outcomes


def test_forty_random_networks() -> None:
    outcomes = _run(40, 0)
    assert outcomes["result"] >= 20, outcomes


@pytest.mark.sweep
@pytest.mark.parametrize("number", range(1, 11))
def test_hundreds_of_random_networks(number: int) -> None:
    outcomes = _run(60, number)
    assert outcomes["result"] >= 30, outcomes
