"""The flow from a model to a smaller, proven one, room by room."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from allocator.clock import Clock, Progress
from allocator.cost.budget import Budgets, parse_budgets
from allocator.cost.fvcore import fvcore_flops
from allocator.errors import (
    BudgetError,
    BudgetNotBindingWarning,
    CostMismatchError,
    InputError,
    NothingToAllocateError,
    TraceError,
    ValueDependentTraceWarning,
    warn,
)
from allocator.fitting.fit import Fitted, fit
from allocator.fitting.reachable import smallest_reachable
from allocator.flow.options import Options
from allocator.graph.build import build_graph
from allocator.graph.channel_graph import ChannelGraph
from allocator.model_checks import check_model, unmatched, without_reset
from allocator.planning.plan import Plan, make_plan, unmet
from allocator.result import Result
from allocator.rewriting.lineage import remember
from allocator.rewriting.materialise import materialise, reset_parameters
from allocator.scoring.registry import AUTO, NO_BATCH_NORM, candidates, say_fallback, score
from allocator.scoring.scores import Scores
from allocator.settings import Settings
from allocator.tracing.inputs import Inputs, as_inputs, infer_inputs
from allocator.verifying.certificate import certify, require


def run(
    model: nn.Module,
    asked: Mapping[str, float | str],
    example_inputs: Any,
    settings: Settings,
    *,
    weights: str = "keep",
    numeric: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """The whole flow; see `allocator.allocate`.

    Args:
        model: the trained network; not changed.
        asked: budgets by the names of their metrics.
        example_inputs: as the caller gave them.
        settings: how neurons are chosen.
        weights: "keep" or "reset".
        numeric: compare weights and outputs too.
        seed: of the certificate's input.
        progress: called with the name of each stage.
    """
    check_model(model, values=True)
    clock = Clock(progress)
    with clock("trace"):
        graph = trace_model(model, example_inputs, settings)
    with clock("score and plan"):
        notes = list(graph.notes)
        fitted = choose(graph, budgets_of(graph, asked), settings)
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
        flops_asked=allocation.flops_asked,
        flops_before=graph.flops,
        flops_after=planned,
        next_cost=plan.next_cost,
        uncounted=uncounted,
        notes=notes,
        timings=clock.seconds,
    )


# Trace ----------------------------------------------------------------------------------------------


def trace_model(model: nn.Module, example_inputs: Any, settings: Settings) -> ChannelGraph:
    """The channel graph of a model; raises as `allocator.trace` does."""
    settings = settings.checked()
    inputs = as_inputs(example_inputs, model)
    options = Options(groups=settings.groups, norms=settings.norms, exclude=tuple(settings.exclude))
    try:
        graph = build_graph(model, inputs, options)
    except TraceError as error:
        raise _input_error(model, inputs, error) or error from error.__cause__
    _check_dtypes(graph)
    graph.notes += unmatched(model, options.exclude)
    if graph.flow.trace.mode == "real":
        message = "the forward needs values: the trace holds for inputs that take the same path"
        warn(message, ValueDependentTraceWarning)
        graph.notes.append(message)
    return graph


def _input_error(model: nn.Module, inputs: Inputs, error: TraceError) -> InputError | None:
    """If the model runs with inputs inferred from itself, the caller's are to blame."""
    if inputs.assumed:
        return None
    try:
        usual = infer_inputs(model)
        build_graph(model, usual)
    except (InputError, TraceError):
        return None
    return InputError(f"example_inputs do not fit: {error}; the model runs with {usual.describe()}")


def _check_dtypes(graph: ChannelGraph) -> None:
    """Tensors without values may be multiplied whatever their dtypes; real ones may not."""
    values = graph.flow.trace.values
    for op in graph.flow.trace.ops:
        if not op.declared.multiplies:
            continue
        a, b = (values[op.inputs()[i]].dtype for i in op.declared.multiplies)
        if a != b:
            raise InputError(
                f"example_inputs do not fit: {op} gets {a} from {graph.inputs.describe()}, its weight is {b}; "
                f"convert one of them, for example example_inputs.to({b})"
            )


# Score and plan -------------------------------------------------------------------------------------


def budgets_of(graph: ChannelGraph, asked: Mapping[str, float | str]) -> Budgets:
    """Read budgets by the names of their metrics.

    Raises:
        BudgetError: one is no positive number.
        NothingToAllocateError: the model has nothing of what is limited.
    """
    metrics = {name: graph.metric(name) for name in asked}
    for name, metric in metrics.items():
        if not metric.whole:
            model, inputs = type(graph.model).__name__, graph.inputs.describe()
            what = "operator that fvcore counts FLOPs for" if name == "flops" else metric.unit
            raise NothingToAllocateError(f"{model} has no {what}, with {inputs}")
    return parse_budgets(asked, metrics)


def choose(graph: ChannelGraph, budgets: Budgets, settings: Settings, scores: Scores | None = None) -> Fitted:
    """A plan that runs, by the named criterion or by the first that "auto" can meet the budgets with.

    Args:
        graph: the model's neurons.
        budgets: what may be kept at most.
        settings: how neurons are chosen.
        scores: their importance; None to rank them by the settings' criterion.

    Raises:
        BudgetError, NothingToAllocateError: as for `allocator.allocate`.
    """
    everything = np.ones(graph.size, dtype=bool)
    if budgets.met(everything):
        return _keep_everything(graph, everything, budgets, settings)
    if scores is not None:
        return _first_that_meets(graph, budgets, settings, [scores])
    if not isinstance(settings.criterion, str):
        return _first_that_meets(graph, budgets, settings, [score(graph, settings.criterion)])
    names = candidates(graph, settings.criterion)
    fitted = _first_that_meets(graph, budgets, settings, names)
    if settings.criterion == AUTO and fitted.plan.criterion == "magnitude":
        limit = f"{budgets.first.limit:,.0f} {budgets.first.metric.unit}"
        unmet_by = f"ranked by batch norms alone, the model does not come down to {limit}"
        fitted.notes.append(say_fallback(unmet_by if len(names) > 1 else NO_BATCH_NORM))
    return fitted


def _keep_everything(graph: ChannelGraph, everything: np.ndarray, budgets: Budgets, settings: Settings) -> Fitted:
    first = budgets.first
    warn(
        f"the budget of {first.limit:,.0f} {first.metric.unit} is not below the model's own {first.metric.whole:,}: "
        "nothing is dropped",
        BudgetNotBindingWarning,
    )
    criterion = candidates(graph, settings.criterion)[0] if isinstance(settings.criterion, str) else "none"
    whole = Plan(everything, budgets, "none", settings.policy, criterion, None)
    return fit(graph, lambda _: whole)


def _first_that_meets(
    graph: ChannelGraph, budgets: Budgets, settings: Settings, rankings: Sequence[str | Scores]
) -> Fitted:
    """By the first ranking that meets the budgets; where none does, the error says what any can reach."""
    failed: list[tuple[Callable[[Budgets], Fitted], BudgetError | NothingToAllocateError]] = []
    for ranking in rankings:
        scores = ranking if isinstance(ranking, Scores) else score(graph, ranking)
        attempt = _attempt(graph, settings, scores)
        try:
            return attempt(budgets)
        except (BudgetError, NothingToAllocateError) as error:
            failed.append((attempt, error))
    raise _what_can_be_met(graph, budgets, settings.scope, failed)


def _attempt(graph: ChannelGraph, settings: Settings, scores: Scores) -> Callable[[Budgets], Fitted]:
    """Planning and fitting by these scores, as a function of the budgets."""
    by_slot = scores.by_slot(graph)

    def planner(current: ChannelGraph, budgets: Budgets) -> Plan:
        # A repair may have changed what a neuron is: the scores are projected again, and costs are counted again.
        ranked = scores if current is graph else Scores(scores.criterion, by_slot.on(current), by_slot)
        return make_plan(
            current,
            ranked,
            budgets.on({name: current.metric(name) for name in budgets.names}),
            policy=settings.policy,
            scope=settings.scope,
            fill=settings.fill,
        )

    return lambda budgets: fit(graph, lambda current: planner(current, budgets))


def _what_can_be_met(
    graph: ChannelGraph,
    budgets: Budgets,
    scope: str,
    failed: Sequence[tuple[Callable[[Budgets], Fitted], BudgetError | NothingToAllocateError]],
) -> BudgetError | NothingToAllocateError:
    """The error with the smallest figure that was seen to work."""
    if len(budgets.each) > 1:  # which of them could be met depends on the others
        return failed[-1][1]
    first = budgets.first
    figures = []
    for attempt, error in failed:

        def landing(limit: float, attempt: Callable[[Budgets], Fitted] = attempt) -> int:
            plan = attempt(budgets.with_first(limit)).plan
            return plan.budgets.first.metric.value(plan.kept)

        figure = smallest_reachable(error, landing, first.limit, first.metric.whole)
        if figure is not None:
            figures.append(figure)
    if not figures:
        return failed[-1][1]
    return unmet(first, scope, min(figures))
