"""Random networks and requests by the hundred, with a tally: for the tests, and for a sweep of as long as one likes.

python tests/random_sweep.py --examples 20000 --first 1000 --report build/random_networks.md
"""

from __future__ import annotations

import argparse
import platform
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from random_checks import Case, check
from random_networks import Spec
from random_specs import for_examples, specs
from torch import nn

from allocator.disk import write_atomically

BATCH = 200  # draws of one seed: the first is the simplest, and later ones vary the earlier


@st.composite
def cases(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    """A random network and a random request."""
    return Case(
        draw(specs()),
        share=draw(st.sampled_from((*range(60, 96, 5), 95, 90, 80, 70, 50, 40, 30, 20))) / 100,
        policy=draw(st.sampled_from(("per_block", "global", "uniform"))),
        scope=draw(st.sampled_from((*("auto", "all") * 4, "inner", "branches"))),
        groups=draw(st.sampled_from(("auto", "whole", "width"))),
        norms=draw(st.sampled_from(("exact", "exact", "exact", "loose"))),
        criterion=draw(st.sampled_from(("bn_scale", "magnitude"))),
        fill=draw(st.sampled_from((True, True, True, False))),
        exclude=draw(st.sampled_from(((), (), (), (), (), ("steps.1",), (nn.Linear,), ("head",)))),
        again=draw(st.integers(50, 95)) / 100,
    )


@dataclass
class Tally:
    """What was checked: outcomes, in how many different networks each kind of step occurs, and what broke."""

    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    networks: set[str] = field(default_factory=set)
    broken: list[str] = field(default_factory=list)

    def note(self, spec: Spec) -> bool:
        """Count a network; whether it is a new one."""
        known = repr(spec) in self.networks
        if not known:
            self.networks.add(repr(spec))
            self.kinds.update({step.kind for step in spec.steps})
        return not known


def run_cases(examples: int, number: int, tally: Tally) -> Counter[str]:
    """Check that many random cases; their outcomes."""
    outcomes: Counter[str] = Counter()

    def count(case: Case) -> None:
        outcome = check(case)
        outcomes[outcome] += 1
        tally.outcomes[outcome] += 1
        tally.note(case.spec)

    for_examples(cases(), number, examples, count, shrink=True)
    return outcomes


_OUTCOMES = {
    "result": "the budget was met",
    "budget": "it could not be: `BudgetError`, and the smallest figure it names was met",
    "unseen": "no output depends on what would go: refused, and with `certify=False` all but the numeric check held",
    "nothing": "no neuron can go: `NothingToAllocateError` with its reasons, at this budget and at the widest",
}


def report(tally: Tally, seconds: float, command: str, *, by_turns: bool = False) -> str:
    """The outcome of a sweep as a page; an example that broke a promise is none of its examples."""
    versions = [f"{name} {version(name)}" for name in ("torch", "fvcore", "hypothesis")]
    costly = " The four costly checks were made on a quarter of the examples each." if by_turns else ""
    lines = [
        "# Random networks",
        "",
        f"Written by `{command}` on Python {platform.python_version()}, {', '.join(versions)}, one thread.",
        "",
        f"{tally.outcomes.total()} examples, {len(tally.networks)} different networks, kept every promise that "
        "`tests/random_checks.py` holds them against: in eval and in train mode, in batches of 1, 2 and 3, and in two "
        f"further sizes where the network takes them; {seconds:.0f} s.{costly}",
        *(["", f"{len(tally.broken)} did not:", "", *(f"- {each}" for each in tally.broken)] if tally.broken else []),
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


class Sweep:
    """Networks of one seed after the other, each network once, until there are enough or time is up."""

    def __init__(self, examples: int, minutes: float, first: int, page: Path | None) -> None:
        self.examples, self.minutes, self.first, self.page = examples, minutes, first, page
        self.tally, self.start, self.written = Tally(), time.perf_counter(), 0.0

    def run(self) -> None:
        """Check, and write the page every minute."""
        number = self.first
        while not self._is_over():
            for_examples(cases(), number, BATCH, partial(self._check, number))
            number += 1
        self._write()

    def _is_over(self) -> bool:
        checked = self.tally.outcomes.total() + len(self.tally.broken)
        return checked >= self.examples or self._seconds() >= 60 * self.minutes

    def _seconds(self) -> float:
        return time.perf_counter() - self.start

    def _check(self, number: int, case: Case) -> None:
        """Hold a new network to its promises; what breaks one is noted, to be made smaller by hand."""
        if self._is_over() or not self.tally.note(case.spec):
            return
        try:
            self.tally.outcomes[check(case, by_turns=True)] += 1
        except Exception as error:
            traceback.print_exc()
            print(case, flush=True)
            said = str(error).splitlines()[0] if str(error) else ""
            self.tally.broken.append(f"seed {number}: {type(error).__name__}: {said} `{case}`")
        if self._seconds() - self.written > 60:
            self._write()

    def _write(self) -> None:
        self.written = self._seconds()
        command = f"python tests/random_sweep.py --examples {self.examples} --first {self.first}"
        command += f" --minutes {self.minutes:g}" if self.minutes < float("inf") else ""
        page = report(self.tally, self.written, command, by_turns=True)
        print(f"{self.tally.outcomes.total()} examples, {len(self.tally.broken)} broken", flush=True)
        if self.page:
            with write_atomically(self.page) as path:
                path.write_text(page)


def main() -> None:
    parser = argparse.ArgumentParser(description="Check random networks, as many as asked for, each one once")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end after so long")
    parser.add_argument("--first", type=int, default=1000, help="the first seed")
    parser.add_argument("--report", type=Path, help="write the page there, every minute")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    Sweep(args.examples, args.minutes, args.first, args.report).run()


if __name__ == "__main__":
    main()
