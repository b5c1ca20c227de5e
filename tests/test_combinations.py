"""Every pair of options' values keeps every promise: on random networks, and on the reference set at small images."""

from __future__ import annotations

import functools
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from combinations import FACTORS, Request, check, covering
from random_networks import Spec, build, convert
from random_specs import for_examples, specs
from reference_set import REFERENCE_SET, randomised
from torch import nn

ROWS = covering()
ON_REFERENCE_SET = [
    (name, i) for turn, name in enumerate(REFERENCE_SET) for i in range(turn, len(ROWS), len(REFERENCE_SET))
]
"""Every request on one of the networks, in turn; (name, index of the request)."""
SIDES = {"torchvision:inception_v3": 96, "timm:inception_v4": 96}


@dataclass
class Tally:
    """What requests came to, by network."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    """Of the whole sweep; written to the file that COMBINATIONS_REPORT names."""
    total, start = Tally(), time.perf_counter()
    yield total
    path = os.environ.get("COMBINATIONS_REPORT")
    if path:
        Path(path).write_text(_report(total, time.perf_counter() - start))


def test_every_pair_of_values_is_in_a_request() -> None:
    for one, other in combinations(FACTORS, 2):
        pairs = {(getattr(row, one), getattr(row, other)) for row in ROWS}
        assert len(pairs) == len(FACTORS[one]) * len(FACTORS[other])
    assert sorted(i for _, i in ON_REFERENCE_SET) == list(range(len(ROWS)))


def on_random_networks(request: Request, number: int, examples: int) -> Counter[str]:
    """Check a request on so many random networks, of which the first is the simplest that there is; the outcomes."""
    outcomes: Counter[str] = Counter()

    def count(spec: Spec) -> None:
        x = torch.randn(1, *spec.shape, generator=torch.Generator().manual_seed(11))
        outcomes[check(build(spec), convert(x, spec.numbers), request)] += 1

    for_examples(specs(), number, examples, count)
    return outcomes


@pytest.mark.parametrize("part", range(4))
def test_requests_on_random_networks(part: int) -> None:
    """One network each, beside the simplest."""
    outcomes: Counter[str] = Counter()
    for number in range(part, len(ROWS), 4):
        outcomes += on_random_networks(ROWS[number], number, 2)
    assert outcomes["result"] >= outcomes.total() / 8, outcomes


@pytest.mark.sweep
@pytest.mark.parametrize("number", range(len(ROWS)), ids=[f"{row}" for row in ROWS])
def test_every_request_on_more_random_networks(number: int, tally: Tally) -> None:
    for more in range(3):
        for outcome, count in on_random_networks(ROWS[number], 1000 * (more + 1) + number, 3).items():
            tally.outcomes["random networks", outcome] += count


@functools.lru_cache(maxsize=1)
def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    side = SIDES.get(name, 64)
    return randomised(name), torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(11))


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "i"), ON_REFERENCE_SET, ids=[f"{name} {ROWS[i]}" for name, i in ON_REFERENCE_SET])
def test_every_request_on_the_reference_set(name: str, i: int, tally: Tally) -> None:
    tally.outcomes[name, check(*network(name), ROWS[i])] += 1


_OUTCOMES = {
    "result": "budgets met",
    "unseen": "met, by what no output depends on",
    "budget": "cannot be met, and says what can",
    "nothing": "nothing can go",
}


def _report(tally: Tally, seconds: float) -> str:
    """The outcome of a sweep as a page; a request that broke a promise is in none of its rows."""
    versions = [f"{name} {version(name)}" for name in ("torch", "fvcore", "allpairspy", "hypothesis")]
    lines = [
        "# Combinations of options",
        "",
        "Written by `COMBINATIONS_REPORT=FILE pytest -m sweep tests/test_combinations.py` on Python "
        f"{platform.python_version()}, {', '.join(versions)}, one thread; {seconds:.0f} s.",
        "",
        f"{len(ROWS)} requests hold every pair of the values below; each was made of one of the reference set's "
        f"networks, and of random ones. {tally.outcomes.total()} allocations kept every promise that "
        "`tests/combinations.py` holds them against: budgets by fvcore's and torch's count, indices, widths, floors, "
        "the certificate, weights bit for bit, the same choice twice, a round trip through a file, the bound, and the "
        "caller's model as it was.",
        "",
        "| option | values |",
        "|---|---|",
        *(f"| {name} | {', '.join(_value(value) for value in values)} |" for name, values in FACTORS.items()),
        "",
        f"| network | {' | '.join(_OUTCOMES.values())} |",
        "|---|" + "---|" * len(_OUTCOMES),
    ]
    for name in dict.fromkeys(name for name, _ in tally.outcomes):
        lines.append(f"| {name} | {' | '.join(str(tally.outcomes[name, outcome]) for outcome in _OUTCOMES)} |")
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    return " with ".join(value) if isinstance(value, tuple) else str(value)
