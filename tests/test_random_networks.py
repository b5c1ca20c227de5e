"""The promises of the whole flow, held against networks that nobody wrote by hand."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from random_sweep import Tally, report, run_cases


def _varied(outcomes: Counter[str]) -> bool:
    """At a budget that cannot be met all is held at the smallest that can; where nothing can go, little is."""
    examples = outcomes.total()
    return outcomes["result"] >= examples / 6 and outcomes["nothing"] <= examples / 2


def test_forty_random_networks() -> None:
    outcomes = run_cases(40, 0, Tally())
    assert _varied(outcomes), outcomes


_COMMAND = "RANDOM_NETWORKS_REPORT=FILE pytest -m sweep tests/test_random_networks.py"


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    """Of all parts of the sweep; written to the file that RANDOM_NETWORKS_REPORT names."""
    total, start = Tally(), time.perf_counter()
    yield total
    path = os.environ.get("RANDOM_NETWORKS_REPORT")
    if path:
        Path(path).write_text(report(total, time.perf_counter() - start, _COMMAND))


@pytest.mark.sweep
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", range(1, 11))
def test_hundreds_of_random_networks(number: int, tally: Tally) -> None:
    outcomes = run_cases(60, number, tally)
    assert _varied(outcomes), outcomes
