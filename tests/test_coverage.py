"""Networks of torchvision and timm go the whole way: a few in every run, all of them in turn in the full sweep."""

from __future__ import annotations

import datetime

import pytest

from benchmarks.coverage_models import names_of
from benchmarks.coverage_one import row
from benchmarks.coverage_report import fell, high

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
    assert 0 < found["floor"] <= found["achieved"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FEW)
def test_a_few_networks(name: str) -> None:
    check(name)


def test_what_got_worse_is_said() -> None:
    before = {"train_step": True, "share": 0.9, "floor": 0.1}
    for now, said in {
        (("share", 0.9),): [],
        (("share", 0.5), ("floor", 0.3)): [
            "share was 90.0 %, and is 50.0 %",
            "floor was 10.0 %, and is 30.0 %",
        ],
        (("train_step", False), ("failed", "BudgetError")): ["went all the way before, and now: BudgetError"],
        (("smallest", 0.7), ("asked", 0.7)): ["70.0 % is the smallest budget that can be met, and 60 % could"],
    }.items():
        assert fell({"ours": before}, {"ours": {**before, **dict(now)}}) == said
    assert fell({"ours": {"failed": "x"}}, {"ours": before}) == fell({}, {"ours": before}) == []


def test_where_much_can_go_and_much_stays_the_page_says_why() -> None:
    whole = {"blocks": {}, "share": 0.93, "criterion": "magnitude", "achieved": 0.6, "error": 0.0, "train_step": True}
    ours = {**whole, "seconds": 1.0, "memory": 0, "floor": 0.546, "reasons": [["an output of the model", 10]]}
    rows = [{"model": "mine", "ours": ours}, {"model": "low", "ours": {**ours, "floor": 0.2}}]
    (_, _, line, *_) = high(rows)
    assert line.startswith("- mine (93 % can go, floor 54.6 %): not looked into yet")
    assert line.endswith("channels that stay: an output of the model (10 channels).")


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
