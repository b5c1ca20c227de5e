"""Budgets read, and a plan that meets them and runs."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from allocator.cost.budget import Budgets, parse_budgets
from allocator.errors import BudgetError, BudgetNotBindingWarning, NothingToAllocateError, warn
from allocator.fitting.fit import Fitted, fit
from allocator.fitting.reachable import smallest_reachable
from allocator.graph.build import with_narrower_groups
from allocator.graph.channel_graph import ChannelGraph
from allocator.planning.plan import Plan, make_plan
from allocator.planning.problem import Widths
from allocator.planning.unmet import has_groups, unmet
from allocator.scoring.registry import score
from allocator.scoring.scores import Scores
from allocator.settings import BUDGETS, Limits, Settings


def budgets_of(graph: ChannelGraph, limits: Limits) -> Budgets:
    """Read budgets.

    Raises:
        BudgetError: one is no positive number.
        NothingToAllocateError: the model has nothing of what is limited.
    """
    given = limits.given()
    if not given:
        raise BudgetError(f"no budget is given: pass flops='60%', or one of {', '.join(BUDGETS)}")
    metrics = {name: graph.metric(name) for name in given}
    for name, metric in metrics.items():
        if not metric.whole:
            model, inputs = type(graph.model).__name__, graph.inputs.describe()
            what = "operator that fvcore counts FLOPs for" if name == "flops" else metric.unit
            raise NothingToAllocateError(f"{model} has no {what}, with {inputs}{_unseen(graph)}")
    return parse_budgets(given, metrics)


def _unseen(graph: ChannelGraph) -> str:
    """Why nothing of a forward was seen that has operators, "" where that can't be told."""
    if not graph.flow.trace.outputs:
        return f"; {_NO_OUTPUT}"
    return f"; {_NOT_REACHED}" if any(op.declared.multiplies for op in graph.flow.trace.ops) else ""


_NOT_REACHED = (
    "none of the convolutions and matrix products that were seen is followed to what the forward returns: do in torch "
    "what is done in numpy or plain Python, and return what is computed, not what was kept from before"
)
_NO_OUTPUT = (
    "what its forward returns holds no tensor: return tensors, alone or in lists, tuples, dicts or attributes of "
    "objects"
)


def settled(graph: ChannelGraph, budgets: Budgets, settings: Settings) -> tuple[ChannelGraph, Budgets]:
    """The graph to plan on, and its budgets: where it is left to us, one whose groups get narrower if that is needed.

    Args:
        graph: the model's neurons, by whole groups of convolutions.
        budgets: what may be kept at most.
        settings: how neurons are chosen.
    """
    if graph.options.groups != "auto" or not has_groups(graph) or budgets.met(graph.everything):
        return graph, budgets
    whole = _unmet(graph, budgets, settings)
    if whole is None:
        return graph, budgets
    narrower = with_narrower_groups(graph)
    narrowed = counted_on(narrower, graph, budgets)
    least = _unmet(narrower, narrowed, settings)
    if least is not None and whole <= least:
        return graph, budgets
    narrower.notes.append(_NARROWER)
    return narrower, narrowed


_NARROWER = "groups of convolutions get narrower, all of a layer alike, since whole ones cannot meet the budget"


def _unmet(graph: ChannelGraph, budgets: Budgets, settings: Settings) -> float | None:
    """The least that a plan can come to, where none meets the budgets."""
    try:
        _planned(graph, budgets, settings, score(graph, "random"))
    except BudgetError as error:
        return error.reachable
    except NothingToAllocateError:
        return math.inf
    return None


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
    if scores is not None:
        scores.by_slot(graph)  # that there is one per neuron
    if gone is None and budgets.met(graph.everything):
        return _keep_everything(graph, budgets, settings)
    scores = score(graph, settings.criterion) if scores is None else scores
    attempt = _attempt(graph, settings, scores, gone)
    try:
        return attempt(budgets)
    except (BudgetError, NothingToAllocateError) as error:
        raise _what_can_be_met(graph, budgets, settings, attempt, error) from None


def _keep_everything(graph: ChannelGraph, budgets: Budgets, settings: Settings) -> Fitted:
    first = budgets.first
    warn(
        f"the budget of {first.metric.show(first.limit)} is not below the model's own "
        f"{first.metric.show(first.metric.whole)}: nothing is dropped",
        BudgetNotBindingWarning,
    )

    def planner(current: ChannelGraph) -> Plan:
        return Plan(current.everything, counted_on(current, graph, budgets), "none", settings.policy, "none", {})

    return fit(graph, planner)


def counted_on(current: ChannelGraph, graph: ChannelGraph, budgets: Budgets) -> Budgets:
    """The same budgets of a graph of the same model: what a neuron is may have changed since, and so what it costs."""
    current.speed = graph.speed
    return budgets.on({name: current.metric(name) for name in budgets.names})


def _attempt(
    graph: ChannelGraph, settings: Settings, scores: Scores, gone: np.ndarray | None
) -> Callable[[Budgets], Fitted]:
    """Planning and fitting by these scores, as a function of the budgets."""

    def planner(current: ChannelGraph, budgets: Budgets) -> Plan:
        on_current = counted_on(current, graph, budgets)
        try:  # scores are projected again, since neurons may be others
            return _planned(current, on_current, settings, scores.on(graph, current), gone)
        except BudgetError as error:
            raise error.because(current.why()) from None

    return lambda budgets: fit(graph, lambda current: planner(current, budgets))


def _planned(
    graph: ChannelGraph, budgets: Budgets, settings: Settings, scores: Scores, gone: np.ndarray | None = None
) -> Plan:
    return make_plan(
        graph,
        scores,
        budgets,
        policy=settings.policy,
        scope=settings.scope,
        fill=settings.fill,
        widths=Widths(settings.at_least, settings.multiple),
        gone=gone,
    )


def _what_can_be_met(
    graph: ChannelGraph,
    budgets: Budgets,
    settings: Settings,
    attempt: Callable[[Budgets], Fitted],
    error: BudgetError | NothingToAllocateError,
) -> BudgetError | NothingToAllocateError:
    """The error with the smallest figure that was seen to work."""
    if len(budgets.each) > 1:  # which of them could be met depends on the others
        return error
    first = budgets.first

    def landing(limit: float) -> int:
        plan = attempt(budgets.with_limit(first.metric.name, limit)).plan
        return plan.budgets.first.metric.value(plan.kept)

    figure = smallest_reachable(error, landing, first.limit, first.metric.whole)
    widths = Widths(settings.at_least, settings.multiple)
    return error if figure is None else unmet(graph, [first], settings.scope, widths, [figure]).because(error.reasons)
