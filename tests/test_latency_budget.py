"""Budgets of time, on devices whose clock is made up: what a forward takes there is known, and never measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from subjects import IMAGE, Nested, trained, untouched
from torch import nn

import allocator
from allocator import BudgetError, Latency
from allocator.pipeline import timing

FIXED = 20e-6
"""Seconds of a forward in which nothing is computed."""
Clock = Callable[[nn.Module], dict[str, float]]
"""Seconds in every layer of a network."""


def by_flops(model: nn.Module) -> dict[str, float]:
    """A device that takes 40 ns for every thousand FLOPs."""
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    analysis = FlopCountAnalysis(model.eval(), (IMAGE,))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    counts = analysis.by_module()
    return {path: 4e-11 * counts[path] for path, module in model.named_modules() if not list(module.children())}


def by_vectors(model: nn.Module) -> dict[str, float]:
    """A device that computes four output channels at a time: a layer of five takes as long as one of eight."""
    seconds = by_flops(model)
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            seconds[path] *= -(-module.out_channels // 4) * 4 / module.out_channels
    return seconds


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[[Clock], list[int]]:
    """Puts a clock in place; gives the list that grows by one for every network that is measured whole."""

    def install(clock: Clock) -> list[int]:
        measured: list[int] = []

        def latencies(models: Sequence[nn.Module], example_inputs: Any = None, **_: Any) -> list[Latency]:
            measured.append(len(models))
            seconds = [FIXED + sum(clock(model).values()) for model in models]
            return [Latency(each, 0.0, 100, 1, "a made-up device", ((1, 3, 16, 16),)) for each in seconds]

        monkeypatch.setattr(timing, "latencies", latencies)
        monkeypatch.setattr(timing, "module_seconds", lambda model, _: {"": FIXED, **clock(model)})
        return measured

    return install


def seconds(clock: Clock, model: nn.Module) -> float:
    return FIXED + sum(clock(model).values())


@pytest.mark.parametrize("clock", [by_flops, by_vectors])
@pytest.mark.parametrize("share", [80, 70, 50])
def test_a_plan_lands_where_it_was_asked_to(device: Any, clock: Clock, share: int) -> None:
    device(clock)
    model = trained(Nested())
    with untouched(model):
        result = allocator.allocate(model, latency=f"{share}%", example_inputs=IMAGE, criterion="magnitude")
    taken = seconds(clock, result.model) / seconds(clock, model)
    assert share / 100 - timing.BELOW - 0.03 <= taken <= share / 100 + timing.ABOVE
    assert result.certificate.ok


def test_prediction_stands_beside_measurement(device: Any) -> None:
    device(by_flops)
    model = trained(Nested())
    result = allocator.allocate(model, latency="70%", example_inputs=IMAGE, criterion="magnitude")
    cost = result.allocation.costs["latency"]
    before, after = (1e9 * seconds(by_flops, each) for each in (model, result.model))
    assert cost["measured_before"] == pytest.approx(before, abs=1)
    assert cost["measured_after"] == pytest.approx(after, abs=1)
    assert cost["before"] == pytest.approx(before, rel=1e-3)
    assert cost["asked"] == pytest.approx(0.7 * before, rel=1e-3)
    assert cost["predicted"] == pytest.approx(after, rel=0.02)  # its time is a sum of what was fitted
    said = (
        f"latency on a made-up device, threads 1: predicted {cost['predicted'] / 1e6:#,.3g} ms, "
        f"measured {after / 1e6:#,.3g} ms of {before / 1e6:#,.3g} ms ({after / before:.1%})"
    )
    assert said in result.notes
    facts = result.report().to_dict()
    assert said in facts["notes"]
    (budget,) = (budget for budget in facts["budgets"] if budget["metric"] == "latency")
    assert budget["after"] == pytest.approx(after, rel=1e-3)


def test_what_is_measured_decides_not_what_was_predicted(device: Any) -> None:
    """On a device that computes channels by fours a prediction is wrong at first, so that plans are made again."""
    measured = device(by_vectors)
    allocator.allocate(trained(Nested()), latency="60%", example_inputs=IMAGE, criterion="magnitude")
    assert measured[0] == 1
    assert set(measured[1:]) == {2}
    assert 1 <= len(measured) - 1 <= timing.ROUNDS


def test_a_device_that_nothing_makes_faster(device: Any) -> None:
    """Where no plan lands, the last tried stands for itself: the report says what was measured."""
    device(lambda model: {"stem": 1e-3})
    result = allocator.allocate(trained(Nested()), latency=1.0, example_inputs=IMAGE, criterion="magnitude")
    assert result.allocation.kept == {}
    with pytest.raises(BudgetError, match="ms cannot be met"):
        allocator.allocate(trained(Nested()), latency="50%", example_inputs=IMAGE, criterion="magnitude")


@pytest.mark.parametrize("asked", ["0.01ms", 1e-6, "1%"])
def test_a_time_that_cannot_be_met_says_what_can(device: Any, asked: Any) -> None:
    device(by_flops)
    model = trained(Nested())
    with (
        untouched(model),
        pytest.raises(BudgetError, match=r"ms cannot be met .* smallest that can be reached is .* ms"),
    ):
        allocator.allocate(model, latency=asked, example_inputs=IMAGE, criterion="magnitude")


def test_time_and_other_budgets_hold_together(device: Any) -> None:
    device(by_flops)
    model = trained(Nested())
    result = allocator.allocate(model, latency="80%", params="50%", example_inputs=IMAGE, criterion="magnitude")
    own = sum(parameter.numel() for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in result.model.parameters()) <= 0.5 * own
    assert seconds(by_flops, result.model) <= 0.81 * seconds(by_flops, model)


def test_the_same_clock_gives_the_same_choice(device: Any) -> None:
    device(by_vectors)
    kept = []
    for _ in range(2):
        torch.manual_seed(0)
        result = allocator.allocate(trained(Nested()), latency="70%", example_inputs=IMAGE, criterion="magnitude")
        kept.append(result.allocation.kept)
    assert kept[0] == kept[1]
