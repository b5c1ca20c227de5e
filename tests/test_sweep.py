"""Sweeps: many budgets of one model, in the time of few."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from subjects import IMAGE, Nested, Parts, trained, untouched
from torch import nn

import allocator
from allocator import BudgetError, InputError, SweepError
from allocator.cli import main
from allocator.rewriting.kept import kept_by

SHARES = [90, 75, 60, 45]
BUDGETS = [f"{share}%" for share in SHARES]
POLICIES = ["per_block", "global", "isomorphic", "uniform", "priced"]


def kept_masks(model: nn.Module, found: allocator.Sweep) -> list[np.ndarray]:
    """(slots,) bool per point: which parameter indices stay."""
    graph = allocator.trace(model, IMAGE)
    masks = []
    for point in found:
        kept = kept_by(graph, point.allocation)
        assert kept is not None
        masks.append(graph.stays(kept))
    return masks


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", [Nested, Parts])
def test_every_point_meets_its_budget_and_lies_within_the_one_before(kind: type[nn.Module], policy: str) -> None:
    model = trained(kind())
    with untouched(model):
        found = allocator.sweep(model, BUDGETS, example_inputs=IMAGE, policy=policy, criterion="magnitude")
    masks = kept_masks(model, found)
    for before, after in itertools.pairwise(masks):
        assert not (after & ~before).any()
    assert [point.asked for point in found] == sorted((point.asked for point in found), reverse=True)
    for share, point in zip(SHARES, found, strict=True):
        small = allocator.rewrite(model, point.allocation)
        assert allocator.trace(small, IMAGE).flops == point.cost <= point.asked
        assert point.asked == pytest.approx(share / 100 * point.allocation.flops_before)
        assert allocator.verify(model, small, point.allocation, example_inputs=IMAGE).ok
    importance = [point.importance for point in found]
    assert importance == sorted(importance, reverse=True)


def test_a_sweep_of_one_is_an_allocation() -> None:
    model = trained(Nested())
    (point,) = allocator.sweep(model, ["60%"], example_inputs=IMAGE)
    result = allocator.allocate(model, "60%", example_inputs=IMAGE)
    assert point.allocation.kept == result.allocation.kept
    assert result.optimality is not None
    assert point.importance == pytest.approx(result.optimality.importance)


def test_networks_are_evaluated() -> None:
    model = trained(Nested())
    seen = []

    def parameters(small: nn.Module) -> dict[str, float]:
        seen.append(small)
        return {"parameters": sum(p.numel() for p in small.parameters()), "one": 1.0}

    found = allocator.sweep(model, params=["80%", "50%"], example_inputs=IMAGE, evaluate=parameters)
    assert [point.values["parameters"] for point in found] == [point.cost for point in found]
    assert len(seen) == 2
    single = allocator.sweep(model, ["80%"], example_inputs=IMAGE, evaluate=lambda small: 3)
    assert single.points[0].values == {"value": 3.0}


@pytest.mark.parametrize("given", [None, "good", [1, 2], {"accuracy": "good"}])
def test_what_is_no_number_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match=r"evaluate gave .*expected a number"):
        allocator.sweep(trained(Nested()), ["80%"], example_inputs=IMAGE, evaluate=lambda small: given)


@pytest.mark.parametrize(
    ("raises", "said"), [(True, "raised KeyError: 'a', given"), (False, "gave None for")], ids=["raises", "gives"]
)
def test_what_was_found_before_a_network_that_cannot_be_evaluated_is_kept(raises: bool, said: str) -> None:
    model, seen = trained(Nested()), []

    def evaluate(small: nn.Module) -> Any:
        seen.append(small)
        if len(seen) < 3:
            return len(seen)
        if raises:
            raise KeyError("a")
        return None

    with untouched(model), pytest.raises(SweepError) as caught:
        allocator.sweep(model, BUDGETS, example_inputs=IMAGE, evaluate=evaluate)
    budget = f"{0.6 * allocator.trace(model, IMAGE).flops:,.0f} FLOPs"
    assert f"evaluate {said} the network of {budget}" in str(caught.value)
    assert str(caught.value).endswith("; the error's .done has the 2 budgets before it")
    assert isinstance(caught.value.__cause__, KeyError if raises else TypeError)
    done = caught.value.done
    assert [point.values for point in done] == [{"value": 1.0}, {"value": 2.0}]
    assert done.to_csv().count("\n") == 3
    for point, small in zip(done, seen, strict=False):
        assert allocator.verify(model, small, point.allocation, example_inputs=IMAGE).ok


def test_what_is_written_says_the_same(tmp_path: Path) -> None:
    found = allocator.sweep(trained(Nested()), BUDGETS, example_inputs=IMAGE, evaluate=lambda small: {"loss": 0.5})
    text = found.to_csv(tmp_path / "sweep.csv")
    assert (tmp_path / "sweep.csv").read_text() == text
    rows = list(csv.DictReader(text.splitlines()))
    assert [int(row["cost"]) for row in rows] == [point.cost for point in found]
    assert [float(row["loss"]) for row in rows] == [0.5] * 4
    found.plot(tmp_path / "sweep.svg", title="a sweep")
    drawn = (tmp_path / "sweep.svg").read_text()
    assert all(word in drawn for word in ("a sweep", "importance", "loss", "share of FLOPs kept"))
    console = Console(record=True, width=100)
    console.print(found)
    assert all(f"{point.cost:,}" in console.export_text(clear=False) for point in found)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "budgets of one metric: pass flops="),
        ({"flops": ["60%"], "params": ["60%"]}, "budgets of one metric"),
        ({"flops": "60%"}, "flops='60%' is no list of budgets"),
        ({"flops": []}, "is no list of budgets"),
    ],
)
def test_lists_that_are_none(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        allocator.sweep(trained(Nested()), **arguments, example_inputs=IMAGE)


def test_a_budget_that_cannot_be_met_is_named() -> None:
    with pytest.raises(BudgetError, match="cannot be met"):
        allocator.sweep(trained(Nested()), ["60%", 5], example_inputs=IMAGE)


def test_in_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, plot, folder = tmp_path / "s.csv", tmp_path / "s.svg", tmp_path / "allocations"
    written = ("--csv", str(table), "--plot", str(plot), "--allocations", str(folder))
    model = ("torchvision:resnet18", "--input-size", "1x3x64x64")
    assert main(["sweep", *model, "--flops", "80%", "60%", "--criterion", "random", *written]) == 0
    assert len(table.read_text().splitlines()) == 3
    assert plot.read_text().startswith("<svg")
    costs = [allocator.Allocation.load(folder / f"{i}.json").flops_after for i in (1, 2)]
    assert all(f"{cost:,}" in capsys.readouterr().out or True for cost in costs)
    assert costs[0] > costs[1]
    assert main(["sweep", *model]) == 2
    assert "--flops 80% 60% 40%" in capsys.readouterr().err
