"""The flow from a model to a smaller, proven one, room by room."""

from __future__ import annotations

from typing import Any

from torch import nn

from allocator.clock import Clock, Progress
from allocator.cost.fvcore import fvcore_flops
from allocator.errors import CostMismatchError
from allocator.fitting.fit import Fitted
from allocator.model_checks import check_model, without_reset
from allocator.pipeline.choice import budgets_of, choose
from allocator.pipeline.model import trace_model
from allocator.pipeline.timing import choose_in_time, measure_speed
from allocator.result import Result
from allocator.rewriting.lineage import remember
from allocator.rewriting.materialise import materialise, reset_parameters
from allocator.scoring.registry import Data, check_criterion, score
from allocator.settings import Limits, Settings
from allocator.verifying.certificate import certify, require


def run(
    model: nn.Module,
    limits: Limits,
    example_inputs: Any,
    settings: Settings,
    *,
    data: Data | None = None,
    weights: str = "keep",
    numeric: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """The whole flow; see `allocator.allocate`.

    Args:
        model: the trained network; not changed.
        limits: the budgets.
        example_inputs: as the caller gave them.
        settings: how neurons are chosen.
        data: what criteria may look at.
        weights: "keep" or "reset".
        numeric: compare weights and outputs too.
        seed: of the certificate's input.
        progress: called with the name of each stage.
    """
    check_model(model, values=True)
    clock = Clock(progress)
    with clock("trace"):
        graph = trace_model(model, example_inputs, settings)
    if limits.latency is not None:
        with clock("measure"):
            measure_speed(graph)
    with clock("score and plan"):
        notes = list(graph.notes)
        budgets = budgets_of(graph, limits)
        check_criterion(graph, settings.criterion)  # also where the budgets leave nothing to choose
        scores = None if budgets.met(graph.everything) else score(graph, settings.criterion, data)
        plan = choose if "latency" not in budgets.names else choose_in_time
        fitted = plan(graph, budgets, settings, scores)
        notes += fitted.notes
    with clock("rewrite"):
        small = materialise(model, fitted.allocation)
        remember(small, model, fitted.allocation)
    return _finish(small, fitted, notes, weights, numeric, seed, clock)


def _finish(
    small: nn.Module, fitted: Fitted, notes: list[str], weights: str, numeric: bool, seed: int, clock: Clock
) -> Result:
    """Prove and count what was rewritten."""
    graph, plan, allocation = fitted.graph, fitted.plan, fitted.allocation
    planned = graph.metric("flops").value(plan.kept)
    with clock("certificate"):
        made = certify(graph, plan.kept, fitted.maps, small, seed=seed, numeric=numeric)
        certificate = require(made, "the result")
    with clock("fvcore"):
        counted, uncounted = fvcore_flops(small, graph.inputs)
        if not graph.certain_flops(plan.kept) <= counted <= planned:
            raise CostMismatchError(
                f"fvcore counts {counted:,} FLOPs in the result, the cost model {planned:,}; please report the model"
            )
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
