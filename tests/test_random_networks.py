"""The promises of the whole flow, held against networks that nobody wrote by hand."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
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
        share=draw(st.sampled_from((*range(60, 96, 5), 95, 90, 80, 70, 50, 40, 30, 20))) / 100,
        policy=draw(st.sampled_from(("per_block", "global", "uniform"))),
        scope=draw(st.sampled_from((*("auto", "all") * 4, "inner", "branches"))),
        groups=draw(st.sampled_from(("whole", "width"))),
        norms=draw(st.sampled_from(("exact", "exact", "exact", "loose"))),
        criterion=draw(st.sampled_from(("bn_scale", "magnitude"))),
        fill=draw(st.sampled_from((True, True, True, False))),
        exclude=draw(st.sampled_from(((), (), (), (), (), ("steps.1",), (nn.Linear,), ("head",)))),
        again=draw(st.integers(50, 95)) / 100,
    )


@dataclass
class Tally:
    """What was checked: outcomes, and in how many different networks each kind of step occurs."""

    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    networks: set[str] = field(default_factory=set)

    def add(self, case: Case, outcome: str) -> None:
        self.outcomes[outcome] += 1
        if repr(case.spec) not in self.networks:
            self.networks.add(repr(case.spec))
            self.kinds.update({step.kind for step in case.spec.steps})


def _run(examples: int, number: int, tally: Tally) -> Counter[str]:
    """Check that many random cases; their outcomes."""
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
        outcome = check(case)
        outcomes[outcome] += 1
        tally.add(case, outcome)

    run()
    return outcomes


def _varied(outcomes: Counter[str]) -> bool:
    """At a budget that cannot be met all is held at the smallest that can; where nothing can go, little is."""
    examples = outcomes.total()
    return outcomes["result"] >= examples / 6 and outcomes["nothing"] <= examples / 2


def test_forty_random_networks() -> None:
    outcomes = _run(40, 0, Tally())
    assert _varied(outcomes), outcomes


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    """Of all parts of the sweep; written to the file that RANDOM_NETWORKS_REPORT names."""
    total, start = Tally(), time.perf_counter()
    yield total
    path = os.environ.get("RANDOM_NETWORKS_REPORT")
    if path:
        Path(path).write_text(_report(total, time.perf_counter() - start))


@pytest.mark.sweep
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", range(1, 11))
def test_hundreds_of_random_networks(number: int, tally: Tally) -> None:
    outcomes = _run(60, number, tally)
    assert _varied(outcomes), outcomes


_OUTCOMES = {
    "result": "the budget was met",
    "budget": "it could not be: `BudgetError`, and the smallest figure it names was met",
    "nothing": "no neuron can go: `NothingToAllocateError` with its reasons, at this budget and at the widest",
}


def _report(tally: Tally, seconds: float) -> str:
    """The outcome of a sweep as a page; an example that broke a promise is none of its examples."""
    versions = [f"{name} {version(name)}" for name in ("torch", "fvcore", "hypothesis")]
    command = "RANDOM_NETWORKS_REPORT=FILE pytest -m sweep tests/test_random_networks.py"
    lines = [
        "# Random networks",
        "",
        f"Written by `{command}` on Python {platform.python_version()}, {', '.join(versions)}, one thread.",
        "",
        f"{tally.outcomes.total()} examples, {len(tally.networks)} different networks, kept every promise that "
        f"`tests/random_checks.py` holds them against; {seconds:.0f} s.",
        "",
        "| outcome | examples |",
        "|---|---|",
        *(f"| {meaning} | {tally.outcomes[name]} |" for name, meaning in _OUTCOMES.items()),
        "",
        "| step | networks with it |",
        "|---|---|",
        *(f"| {kind} | {count} |" for kind, count in tally.kinds.most_common()),
    ]
    return "\n".join(lines) + "\n"
