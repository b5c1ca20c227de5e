"""Random networks and requests by the hundred, with a tally: for the tests, and for a sweep of as long as one likes.

python tests/random_sweep.py --minutes 60 --first 1000 --report benchmarks/results/random_networks.md
"""

from __future__ import annotations

import argparse
import platform
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from random_checks import Case, check
from random_specs import for_examples, specs
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


def run_cases(examples: int, number: int, tally: Tally) -> Counter[str]:
    """Check that many random cases; their outcomes."""
    outcomes: Counter[str] = Counter()

    def count(case: Case) -> None:
        outcome = check(case)
        outcomes[outcome] += 1
        tally.add(case, outcome)

    for_examples(cases(), number, examples, count, shrink=True)
    return outcomes


_OUTCOMES = {
    "result": "the budget was met",
    "budget": "it could not be: `BudgetError`, and the smallest figure it names was met",
    "nothing": "no neuron can go: `NothingToAllocateError` with its reasons, at this budget and at the widest",
}


def report(tally: Tally, seconds: float, command: str, broken: list[str] | None = None) -> str:
    """The outcome of a sweep as a page; an example that broke a promise is none of its examples."""
    versions = [f"{name} {version(name)}" for name in ("torch", "fvcore", "hypothesis")]
    lines = [
        "# Random networks",
        "",
        f"Written by `{command}` on Python {platform.python_version()}, {', '.join(versions)}, one thread.",
        "",
        f"{tally.outcomes.total()} examples, {len(tally.networks)} different networks, kept every promise that "
        "`tests/random_checks.py` holds them against: in eval and in train mode, in batches of 1, 2 and 3, and in two "
        f"further sizes where the network takes them; {seconds:.0f} s.",
        *(["", f"{len(broken)} did not:", "", *(f"- {each}" for each in broken)] if broken else []),
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


def sweep(minutes: float, first: int, size: int = 10) -> tuple[Tally, list[str], float]:
    """Networks of one seed after the other for so long; what was checked, what broke, and the seconds it took."""
    tally, broken, start = Tally(), [], time.perf_counter()
    number = first
    while time.perf_counter() - start < 60 * minutes:
        try:
            run_cases(size, number, tally)
        except Exception as error:
            traceback.print_exc()
            broken.append(f"seed {number}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        number += 1
        print(f"{number - first} seeds, {tally.outcomes.total()} examples, {len(broken)} broken", flush=True)
    return tally, broken, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Check random networks for some time")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--first", type=int, default=1000, help="the first seed")
    parser.add_argument("--report", type=Path, help="write the page there")
    args = parser.parse_args()
    tally, broken, seconds = sweep(args.minutes, args.first)
    command = f"python tests/random_sweep.py --minutes {args.minutes:g} --first {args.first}"
    page = report(tally, seconds, command, broken)
    print(page)
    if args.report:
        args.report.write_text(page)


if __name__ == "__main__":
    main()
