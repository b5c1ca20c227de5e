"""The flow from a model to a smaller, proven one, room by room."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from allocator.clock import Clock, Progress
from allocator.cost.fvcore import fvcore_flops
from allocator.cost.judge import products_by_the_trace, products_by_torch
from allocator.errors import CostMismatchError, TraceError, first_line
from allocator.fitting.fit import Fitted
from allocator.graph.channel_graph import ChannelGraph
from allocator.model_checks import check_model, without_reset
from allocator.pipeline.choice import budgets_of, choose, settled
from allocator.pipeline.model import trace_model
from allocator.pipeline.timing import choose_in_time, measure_speed
from allocator.pipeline.trial import suitable_scores
from allocator.result import Result
from allocator.rewriting.lineage import remember
from allocator.rewriting.materialise import materialise, reset_parameters
from allocator.scoring.registry import Data, check_criterion
from allocator.settings import Certify, Limits, Settings, check_certify
from allocator.tracing.inputs import device_of
from allocator.tracing.value_sized import value_sized
from allocator.verifying.certificate import Certificate, certify, require


def run(
    model: nn.Module,
    limits: Limits,
    example_inputs: Any,
    settings: Settings,
    *,
    data: Data | None = None,
    weights: str = "keep",
    numeric: Certify = "small",
    seed: int = 0,
    progress: Progress | None = None,
    stored: Mapping[str, torch.Tensor] | None = None,
) -> Result:
    """The whole flow; see `allocator.allocate`.

    Args:
        model: the trained network; not changed.
        limits: the budgets.
        example_inputs: as the caller gave them.
        settings: how neurons are chosen.
        data: what criteria may look at.
        weights: "keep" or "reset".
        numeric: compare weights and outputs too, at which size.
        seed: of the certificate's input.
        progress: called with the name of each stage.
        stored: the values of a model that lies on the meta device, by name, to rank neurons by; what comes back lies
            there too.
    """
    check_certify(numeric)
    model = check_model(model, values=stored is None)
    clock = Clock(progress)
    with clock("trace"):
        graph = trace_model(model, example_inputs, settings, None if data is None else data.loader)
    if limits.latency is not None:
        with clock("measure"):
            measure_speed(graph)
    with clock("score and plan"):
        graph, budgets = settled(graph, budgets_of(graph, limits), settings)
        notes = list(graph.notes)
        check_criterion(graph, settings.criterion)  # also where the budgets leave nothing to choose
        scores = None
        if not budgets.met(graph.everything):
            scores, tried = suitable_scores(graph, budgets, settings, data, stored)
            notes += tried
        plan = choose if "latency" not in budgets.names else choose_in_time
        fitted = plan(graph, budgets, settings, scores)
        notes += [*fitted.notes, *_floors(fitted, settings), fitted.graph.forwards.holds()]
    with clock("rewrite"):
        small = materialise(model, fitted.allocation)
        remember(small, model, fitted.allocation)

    def prove() -> Certificate:
        return certify(fitted.graph, fitted.plan.kept, fitted.maps, small, seed=seed, numeric=numeric)

    return finish(small, fitted, notes, weights, prove, clock)


def _floors(fitted: Fitted, settings: Settings) -> list[str]:
    """What every layer keeps at least where the caller left it open."""
    problem = fitted.plan.problem
    if problem is None or problem.widths.at_least == settings.at_least:
        return []
    but = ", but those that a block can do without" if fitted.graph.optional else ""
    return [f"every layer keeps at least {problem.widths.at_least} of its channels{but} (at_least=0: any number)"]


SHORT = 200_000_000
"""FLOPs of a forward below which its numbers take no longer than doing without them."""


def _count(graph: ChannelGraph, kept: np.ndarray, small: nn.Module, planned: int, notes: list[str]) -> dict[str, int]:
    """Hold the planned FLOPs against fvcore's count; where it cannot count or overlooks a part, against torch's too.

    Args:
        graph, kept: the original's neurons, and which of them `small` has.
        small: the rewritten model.
        planned: its FLOPs by the cost model.
        notes: added to where fvcore does not have the last word.

    Returns:
        What fvcore does not count, with the number of calls.
    """
    written = graph.flow.trace.written()
    if planned >= SHORT and _sizes_alone_count(graph):
        with contextlib.suppress(TraceError):
            counted, uncounted = fvcore_flops(small, graph.inputs, written, computed=False)
            if counted == planned:
                return uncounted
    try:
        counted, uncounted = fvcore_flops(small, graph.inputs, written)
    except TraceError as error:
        failed: Exception | None = error
        said, uncounted = f"fvcore cannot count the result ({first_line(error)})", {}
    else:
        if graph.certain_flops(kept) <= counted <= planned:
            return uncounted
        said = f"fvcore counts {counted:,} FLOPs in the result, the cost model {planned:,}"
        failed = CostMismatchError(f"{said}; please report the model") if counted > planned else None
    products = products_by_the_trace(graph.flow, graph.unit_of_slot, kept)
    try:
        by_torch = products_by_torch(small, graph.inputs, on_meta=graph.flow.trace.mode == "meta")
    except Exception:  # whatever the model's own code raises
        by_torch = -1
    if isinstance(failed, CostMismatchError) or products != by_torch:
        raise failed or CostMismatchError(f"{said}; please report the model")
    notes.append(
        f"{said}; the figures are the cost model's, whose {products:,} multiply-adds torch's own counter finds too"
    )
    return uncounted


def _sizes_alone_count(graph: ChannelGraph) -> bool:
    """Whether no size in the forward depends on a number, as one that ran without any shows."""
    trace = graph.flow.trace
    return trace.mode == "meta" and not value_sized(trace) and device_of(graph.model).type == "cpu"


def finish(
    small: nn.Module, fitted: Fitted, notes: list[str], weights: str, prove: Callable[[], Certificate], clock: Clock
) -> Result:
    """Prove and count what was rewritten.

    Args:
        small: the rewritten model.
        fitted: the plan that it was rewritten by.
        notes: what was assumed, set or frozen so far; added to.
        weights: "keep" or "reset".
        prove: makes the certificate.
        clock: of the stages.
    """
    graph, plan, allocation = fitted.graph, fitted.plan, fitted.allocation
    planned = graph.metric("flops").value(plan.kept)
    with clock("certificate"):
        certificate = require(prove(), "the result", graph.flow.trace.drawn(seeded=True))
    with clock("fvcore"):
        uncounted = _count(graph, plan.kept, small, planned, notes)
    if weights == "reset":
        reset_parameters(small)
        notes.append(f"weights were reset after the certificate was made{without_reset(small)}")
    return Result(
        model=small,
        allocation=allocation,
        certificate=certificate,
        graph=graph,
        plan=plan,
        flops_asked=allocation.flops_asked,
        flops_before=graph.flops,
        flops_after=planned,
        next_cost=plan.next_costs.get(plan.budgets.first.metric.name),
        uncounted=uncounted,
        notes=notes,
        timings=clock.seconds,
    )
