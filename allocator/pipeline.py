"""The flow from a model to a smaller, proven one, room by room."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    UnmatchedPatternWarning,
    ValueDependentTraceWarning,
    warn,
)
from allocator.fitting.fit import Fitted, fit
from allocator.fitting.reachable import smallest_reachable
from allocator.flow.options import Options
from allocator.graph.build import build_graph
from allocator.graph.channel_graph import ChannelGraph
from allocator.graph.selection import as_items, unmatched
from allocator.model_checks import check_model, without_reset
from allocator.planning.plan import Plan, make_plan, unmet
from allocator.planning.problem import Widths
from allocator.result import Result
from allocator.rewriting.lineage import remember
from allocator.rewriting.materialise import materialise, reset_parameters
from allocator.scoring.registry import Data, score
from allocator.scoring.scores import Scores
from allocator.settings import Settings
from allocator.tracing.inputs import Inputs, as_inputs, infer_inputs
from allocator.verifying.certificate import certify, require


def run(
    model: nn.Module,
    asked: Mapping[str, float | str | None],
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
        asked: budgets by the names of their metrics.
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
    with clock("score and plan"):
        notes = list(graph.notes)
        budgets = budgets_of(graph, asked)
        scores = None if budgets.met(graph.everything) else score(graph, settings.criterion, data)
        fitted = choose(graph, budgets, settings, scores)
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
    options = options_of(settings)
    try:
        graph = build_graph(model, inputs, options)
    except TraceError as error:
        raise _input_error(model, inputs, error) or error from error.__cause__
    _check_dtypes(graph)
    for name in ("exclude", "include", "same"):
        for note in unmatched(model, name, getattr(options, name)):
            warn(note, UnmatchedPatternWarning)
            graph.notes.append(note)
    if graph.flow.trace.mode == "real":
        message = "the forward needs values: the trace holds for inputs that take the same path"
        warn(message, ValueDependentTraceWarning)
        graph.notes.append(message)
    return graph


def options_of(settings: Settings) -> Options:
    """How channels are followed, of all that is set."""
    return Options(
        groups=settings.groups,
        norms=settings.norms,
        exclude=as_items(settings.exclude),
        include=as_items(settings.include),
        same=as_items(settings.same),
    )


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


def budgets_of(graph: ChannelGraph, asked: Mapping[str, float | str | None]) -> Budgets:
    """Read budgets by the names of their metrics.

    Raises:
        BudgetError: one is no positive number.
        NothingToAllocateError: the model has nothing of what is limited.
    """
    given = {name: figure for name, figure in asked.items() if figure is not None}
    if not given:
        raise BudgetError(f"no budget is given: pass flops='60%', or one of {', '.join(asked)}")
    metrics = {name: graph.metric(name) for name in given}
    for name, metric in metrics.items():
        if not metric.whole:
            model, inputs = type(graph.model).__name__, graph.inputs.describe()
            what = "operator that fvcore counts FLOPs for" if name == "flops" else metric.unit
            raise NothingToAllocateError(f"{model} has no {what}, with {inputs}")
    return parse_budgets(given, metrics)


def choose(
    graph: ChannelGraph,
    budgets: Budgets,
    settings: Settings,
    scores: Scores | None = None,
    *,
    gone: np.ndarray | None = None,
) -> Fitted:
    """A plan that runs.

    Args:
        graph: the model's neurons.
        budgets: what may be kept at most.
        settings: how neurons are chosen.
        scores: their importance; None to rank them by the settings' criterion.
        gone: (slots,) bool, what is not kept in any case.

    Raises:
        BudgetError, NothingToAllocateError: as for `allocator.allocate`.
    """
    if gone is None and budgets.met(graph.everything):
        return _keep_everything(graph, budgets, settings)
    scores = score(graph, settings.criterion) if scores is None else scores
    scores.by_slot(graph)  # that there is one per neuron
    attempt = _attempt(graph, settings, scores, gone)
    try:
        return attempt(budgets)
    except (BudgetError, NothingToAllocateError) as error:
        raise _what_can_be_met(graph, budgets, settings.scope, attempt, error) from None


def _keep_everything(graph: ChannelGraph, budgets: Budgets, settings: Settings) -> Fitted:
    first = budgets.first
    warn(
        f"the budget of {first.limit:,.0f} {first.metric.unit} is not below the model's own {first.metric.whole:,}: "
        "nothing is dropped",
        BudgetNotBindingWarning,
    )
    whole = Plan(graph.everything, budgets, "none", settings.policy, "none", None)
    return fit(graph, lambda _: whole)


def _attempt(
    graph: ChannelGraph, settings: Settings, scores: Scores, gone: np.ndarray | None
) -> Callable[[Budgets], Fitted]:
    """Planning and fitting by these scores, as a function of the budgets."""

    def planner(current: ChannelGraph, budgets: Budgets) -> Plan:
        # A repair may have changed what a neuron is: the scores are projected again, and costs are counted again.
        return make_plan(
            current,
            scores.on(graph, current),
            budgets.on({name: current.metric(name) for name in budgets.names}),
            policy=settings.policy,
            scope=settings.scope,
            fill=settings.fill,
            widths=Widths(settings.at_least, settings.multiple),
            gone=gone,
        )

    return lambda budgets: fit(graph, lambda current: planner(current, budgets))


def _what_can_be_met(
    graph: ChannelGraph,
    budgets: Budgets,
    scope: str,
    attempt: Callable[[Budgets], Fitted],
    error: BudgetError | NothingToAllocateError,
) -> BudgetError | NothingToAllocateError:
    """The error with the smallest figure that was seen to work."""
    if len(budgets.each) > 1:  # which of them could be met depends on the others
        return error
    first = budgets.first

    def landing(limit: float) -> int:
        plan = attempt(budgets.with_first(limit)).plan
        return plan.budgets.first.metric.value(plan.kept)

    figure = smallest_reachable(error, landing, first.limit, first.metric.whole)
    return error if figure is None else unmet(first, scope, figure)
