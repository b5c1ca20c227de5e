"""Budgets of time: modules are timed at several widths, a plan is made by what they took, and measured again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import nn

from allocator.cost.budget import Budgets
from allocator.cost.latency import Latency, latencies
from allocator.cost.speed import Sample, fit_speed, module_seconds, module_work
from allocator.errors import AllocatorWarning, BudgetError, NothingToAllocateError
from allocator.fitting.fit import Fitted
from allocator.graph.channel_graph import ChannelGraph
from allocator.logs import unwarned
from allocator.pipeline.choice import budgets_of, choose
from allocator.rewriting.materialise import materialise
from allocator.scoring.registry import score
from allocator.scoring.scores import Scores
from allocator.settings import Limits, Settings

WIDTHS = (75, 50, 30, 15)
"""Percent of the FLOPs at which modules are timed, beside the whole network."""
ROUNDS = 5
"""Plans that are measured until one lands."""
ABOVE, BELOW = 0.01, 0.03
"""How far from its budget a measured time may lie, as a share of the original's."""


def measure_speed(graph: ChannelGraph) -> None:
    """Time the model's modules at several widths; then its graph has the metric "latency".

    Raises:
        UnsupportedModelError, InputError, TraceError: as for `allocator.latency`.
    """
    samples = [_sample(graph, graph.everything, graph.model)]
    for fitted in _narrower(graph):
        samples.append(_sample(fitted.graph, fitted.plan.kept, materialise(graph.model, fitted.allocation)))
    (original,) = latencies([graph.model], graph.inputs)
    graph.speed = fit_speed(samples, original.seconds)


def _narrower(graph: ChannelGraph) -> Iterator[Fitted]:
    """Networks whose layers all have the same share of their channels, as far as there are any."""
    settings = Settings(criterion="random", policy="uniform")
    with unwarned(AllocatorWarning):
        for width in WIDTHS:
            try:
                yield choose(graph, budgets_of(graph, Limits(f"{width}%")), settings, score(graph, "random"))
            except (BudgetError, NothingToAllocateError):
                return


def _sample(graph: ChannelGraph, kept: np.ndarray, model: nn.Module) -> Sample:
    work = module_work(graph.flow, graph.metric("flops").terms, graph.unit_of_slot, kept)
    return Sample(work, module_seconds(model, graph.inputs))


def choose_in_time(graph: ChannelGraph, budgets: Budgets, settings: Settings, scores: Scores | None = None) -> Fitted:
    """As `choose`; what is predicted and what is measured differ, so plans are measured until one lands.

    Returns:
        Of the plans that were made, the slowest that meets the budget, else the fastest.
    """
    limit = budgets.limit("latency")
    planned, target = limit, limit / graph.metric("latency").whole
    found: list[tuple[float, Fitted]] = []
    for _ in range(ROUNDS):
        try:
            fitted = choose(graph, budgets.with_limit("latency", planned), settings, scores)
        except (BudgetError, NothingToAllocateError):
            if not found:
                raise
            break
        before, after = latencies([graph.model, materialise(graph.model, fitted.allocation)], graph.inputs)
        share = after.seconds / before.seconds
        found.append((share, _noted(fitted, limit, before, after)))
        if target - BELOW <= share <= target + ABOVE or fitted.plan.kept.all():
            break
        planned *= target / share
    return min(found, key=lambda each: (each[0] > target + ABOVE, abs(each[0] - target)))[1]


def _noted(fitted: Fitted, limit: float, before: Latency, after: Latency) -> Fitted:
    """With what was asked, and with the times that were measured beside the one that was predicted.

    What counts is the share: a machine may have slowed down since the budget was read.
    """
    metric = fitted.graph.metric("latency")
    predicted = metric.value(fitted.plan.kept)
    fitted.allocation.costs["latency"] |= {
        "asked": float(limit),
        "after": round(after.seconds / before.seconds * metric.whole),
        "predicted": predicted,
        "measured_before": round(1e9 * before.seconds),
        "measured_after": round(1e9 * after.seconds),
    }
    fitted.notes.append(
        f"latency on {before.device}, threads {before.threads}: predicted {metric.show(predicted)}, measured "
        f"{metric.show(1e9 * after.seconds)} of {metric.show(1e9 * before.seconds)} "
        f"({after.seconds / before.seconds:.1%})"
    )
    return fitted
