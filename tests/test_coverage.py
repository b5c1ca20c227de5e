"""Networks of torchvision and timm go the whole way: a few in every run, all of them in turn in the full sweep."""

from __future__ import annotations

import datetime

import pytest

from benchmarks.coverage_models import names_of
from benchmarks.coverage_one import row

# Small, and each unlike the others: branches, whole groups, whole heads, a width that is computed, layers as lists.
FEW = ("timm:test_byobnet", "timm:test_convnext", "timm:test_vit", "timm:mobilenetv3_small_050")
PARTS = 20  # a full sweep of all networks takes this many nights


def check(name: str) -> None:
    """Traced, no operator without a rule, at the budget or the smallest figure there is, certified, trained."""
    found = row(name, "ours")
    assert "failed" not in found, found["failed"]
    assert found["unsupported"] == []
    assert found["achieved"] <= found["asked"]
    assert found["error"] <= 1e-9
    assert found["train_step"], found.get("train_error")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FEW)
def test_a_few_networks(name: str) -> None:
    check(name)


def _tonight() -> list[str]:
    names = [name for which in ("1", "2") for name in names_of(which)]
    return names[datetime.date.today().toordinal() % PARTS :: PARTS]


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
def test_a_part_of_all_networks() -> None:
    failed = {}
    for name in _tonight():
        try:
            check(name)
        except AssertionError as error:
            failed[name] = str(error)
    assert not failed
