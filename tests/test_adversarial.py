"""Forwards that do what a trace may get wrong: a result is right in every mode and size, or refused with a reason."""

from __future__ import annotations

import pytest
from adversarial import CONDITIONS, MIDDLES, outcome

PAIRS = [(middle, condition) for middle in MIDDLES for condition in CONDITIONS]


@pytest.mark.parametrize(("middle", "condition"), PAIRS[::19])
def test_some_adversarial_forwards(middle: str, condition: str) -> None:
    assert outcome(middle, condition) in ("right", "refused")


@pytest.mark.sweep
@pytest.mark.parametrize(("middle", "condition"), PAIRS)
def test_all_adversarial_forwards(middle: str, condition: str) -> None:
    assert outcome(middle, condition) in ("right", "refused")
