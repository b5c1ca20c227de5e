"""The public functions: the whole flow in one call, and its stages one by one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from allocator.clock import Clock, Progress, without_collection
from allocator.cost.fvcore import fvcore_flops
from allocator.errors import (
    BudgetError,
    BudgetNotBindingWarning,
    CostMismatchError,
    InputError,
    NothingToAllocateError,
    TraceError,
    UnknownNameError,
    ValueDependentTraceWarning,
    warn,
)
from allocator.fitting.fit import Settled, compare_models, settle
from allocator.flow.options import Options
from allocator.graph.blocks import describe_blocks
from allocator.graph.build import build_graph
from allocator.graph.channel_graph import ChannelGraph
from allocator.model_checks import check_model, unmatched, without_reset
from allocator.planning.search import Plan, make_plan, parse_budget, smallest_reachable, unmet
from allocator.reporting.result_report import Report
from allocator.rewriting.allocation import Allocation
from allocator.rewriting.kept import kept_by
from allocator.rewriting.lineage import remember
from allocator.rewriting.materialise import check_fits, materialise, reset_parameters
from allocator.rewriting.rewrite import rewrite as rewrite_model
from allocator.scoring.criteria import AUTO, NO_BATCH_NORM, Scores, candidates, say_fallback
from allocator.scoring.criteria import score as score_graph
from allocator.tracing.inputs import Inputs, as_inputs, infer_inputs, inputs_like
from allocator.verifying.certificate import Certificate, compare_outputs, names_and_shapes_match, require, weights_match


@dataclass
class Result:
    """What `allocate` gives.

    Attributes:
        model: the smaller network; same classes, same parameter names.
        allocation: which neurons it kept, as data.
        certificate: proof that it is the original minus the others.
        graph: the original's neurons and blocks.
        flops_asked, flops_before, flops_after: FLOPs as fvcore counts them.
        next_cost: FLOPs of the cheapest further neuron, None if all are kept.
        uncounted: operators that fvcore does not count, with the number of their calls.
        notes: what was assumed, set or frozen on the way.
        timings: seconds per stage.
    """

    model: nn.Module
    allocation: Allocation
    certificate: Certificate
    graph: ChannelGraph
    flops_asked: float
    flops_before: int
    flops_after: int
    next_cost: int | None
    uncounted: dict[str, int]
    notes: list[str]
    timings: dict[str, float] = field(default_factory=dict)

    def report(self) -> Report:
        """A table of blocks and branches before and after: printable with rich, `to_dict()` for machines."""
        return Report(self)


def allocate(
    model: nn.Module,
    flops: float | str,
    *,
    example_inputs: Any = None,
    policy: str = "per_block",
    criterion: str = "auto",
    scope: str = "auto",
    fill: bool = True,
    groups: str = "whole",
    norms: str = "exact",
    exclude: Sequence[str | type] = (),
    weights: str = "keep",
    certify: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Make a smaller network under a FLOPs budget, and prove it.

    Args:
        model: the trained network; not changed. It is measured and proven in eval mode.
        flops: the budget as fvcore counts it (one multiply-add is one FLOP), or a share such as "60%".
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; None to infer one image.
        policy: "per_block", "global" or "uniform"; see `plan`.
        criterion: what ranks neurons: "bn_scale", "magnitude", "random", or "auto" for bn_scale where batch norms
            rank enough of them to meet the budget, else magnitude, which is warned of and noted.
        scope: "branches" (neurons that enter a concatenation or a grouped convolution), "inner" (all but
            residual streams), "all", or "auto" for the narrowest of them that can meet the budget.
        fill: spend the rest of the budget on the next best neurons.
        groups: "whole" drops whole groups of grouped convolutions, "width" narrows all groups alike.
        norms: "exact" keeps channels under a norm over channels (of a group norm, whole groups may go), "loose" lets
            them go.
        exclude: name patterns (`"layer1.*"`) or module classes that stay as they are.
        weights: "keep", or "reset" to train the result from scratch.
        certify: compare weights and float64 outputs too; the structural check always runs.
        seed: of the certificate's input.
        progress: called with the name of each stage.

    Raises:
        BudgetError: the budget is no positive number, or cannot be met; says what can.
        NothingToAllocateError: no neuron can be removed; says why.
        CriterionError: the criterion has nothing to rank this model by.
        UnsupportedModelError, InputError, TraceError: the model cannot be traced; says what to pass instead.
        CertificateError, CostMismatchError: the result failed its own checks, and is not returned.
    """
    _check_choice("weights", weights, ("keep", "reset"))
    check_model(model, values=True)
    clock = Clock(progress)
    with without_collection():
        with clock("trace"):
            graph = _trace(model, example_inputs, groups, norms, exclude)
        with clock("score and plan"):
            budget = _budget(flops, graph)
            notes = list(graph.notes)
            settled = _settle(graph, criterion, budget, policy, scope, fill)
            notes += settled.notes
        with clock("rewrite"):
            small = materialise(model, settled.allocation)
            remember(small, model, settled.allocation)
    return _finish(model, small, settled, notes, weights, certify, seed, clock)


def _finish(
    model: nn.Module,
    small: nn.Module,
    settled: Settled,
    notes: list[str],
    weights: str,
    certify: bool,
    seed: int,
    clock: Clock,
) -> Result:
    graph, plan, allocation = settled.graph, settled.plan, settled.allocation
    with clock("certificate"):
        certificate = require(_certificate(model, small, graph, plan.kept, seed, certify), "the result")
    with clock("fvcore"):
        counted, uncounted = fvcore_flops(small, graph.inputs)
        if not graph.certain_flops(plan.kept) <= counted <= plan.flops:
            raise CostMismatchError(
                f"fvcore counts {counted:,} FLOPs in the result, the cost model {plan.flops:,}; please report the model"
            )
    if weights == "reset":
        reset_parameters(small)
        notes.append(f"weights were reset after the certificate was made{without_reset(small)}")
    return Result(
        model=small,
        allocation=allocation,
        certificate=certificate,
        graph=graph,
        flops_asked=plan.asked,
        flops_before=graph.flops,
        flops_after=plan.flops,
        next_cost=plan.next_cost,
        uncounted=uncounted,
        notes=notes,
        timings=clock.seconds,
    )


def trace(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    groups: str = "whole",
    norms: str = "exact",
    exclude: Sequence[str | type] = (),
) -> ChannelGraph:
    """Find a model's neurons, blocks and cost, without running or copying its weights.

    Args:
        model, example_inputs, groups, norms, exclude: as for `allocate`.

    Raises:
        UnsupportedModelError: not a plain module; says what to pass instead.
        InputError: the inputs don't fit the model.
        TraceError: the model's forward raised.
    """
    return _trace(check_model(model), example_inputs, groups, norms, exclude)


def _trace(
    model: nn.Module, example_inputs: Any, groups: str, norms: str, exclude: Sequence[str | type]
) -> ChannelGraph:
    _check_choice("groups", groups, ("whole", "width"))
    _check_choice("norms", norms, ("exact", "loose"))
    inputs = as_inputs(example_inputs, model)
    options = Options(groups=groups, norms=norms, exclude=_as_patterns(exclude))
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


def score(graph: ChannelGraph, criterion: str = "auto") -> Scores:
    """Rank the neurons of a traced model; see `allocate` for the criteria."""
    return score_graph(graph, criterion)


def plan(
    graph: ChannelGraph,
    scores: Scores | None = None,
    flops: float | str = "50%",
    policy: str = "per_block",
    *,
    scope: str = "auto",
    fill: bool = True,
) -> Allocation:
    """Choose the neurons to keep under a budget, and check that the rewritten forward fits.

    Args:
        graph: from `trace`.
        scores: from `score`; None for the criterion that `allocate` would take.
        flops: the budget, or a share such as "60%".
        policy: "per_block" (one width multiplier, the best in each block; branches compete), "global" (one
            ranking) or "uniform" (every branch the same share).
        scope, fill: as for `allocate`.

    Raises:
        BudgetError, NothingToAllocateError: as for `allocate`.
    """
    budget = _budget(flops, graph)
    criterion = "auto" if scores is None else scores.criterion
    return _settle(graph, criterion, budget, policy, scope, fill, scores).allocation


def rewrite(model: nn.Module, allocation: Allocation, weights: str = "keep") -> nn.Module:
    """Copy `model` with only the neurons that the allocation keeps.

    Args:
        model: the network that the allocation was made for, or a fresh build of it; not changed.
        allocation: what to keep.
        weights: "keep", or "reset" to train from scratch.

    Raises:
        AllocationMismatchError: the allocation was made for another architecture.
    """
    _check_choice("weights", weights, ("keep", "reset"))
    return rewrite_model(model, allocation, weights)


def apply(model: nn.Module, allocation: Allocation | str | Path, weights: str = "keep") -> nn.Module:
    """`rewrite` with an allocation that may also be the path of its file: `.json`, or a saved result.

    Raises:
        FileError: the file cannot be read.
        AllocationMismatchError: the allocation was made for another architecture.
    """
    from allocator.io.files import load_allocation

    if not isinstance(allocation, Allocation):
        allocation = load_allocation(allocation)
    return rewrite(model, allocation, weights)


def verify(
    model: nn.Module,
    small: nn.Module,
    allocation: Allocation | str | Path,
    *,
    example_inputs: Any = None,
    numeric: bool = True,
    seed: int = 0,
) -> Certificate:
    """Check that `small` is `model` minus the neurons that the allocation drops.

    Args:
        model: the original network.
        small: the rewritten one.
        allocation: what it should have kept.
        example_inputs: as for `allocate`; None for one tensor of the size that the allocation was made for.
        numeric: compare weights and float64 outputs too. A model that was trained since fails both; with
            False, whether its structure still is the original's can be asked alone.
        seed: of the input they are compared on.

    Returns:
        The certificate; its `ok` says whether all checks passed.

    Raises:
        AllocationMismatchError: the allocation was made for another architecture.
    """
    if not isinstance(allocation, Allocation):
        allocation = Allocation.load(allocation)
    values = numeric and not allocation.parts
    check_fits(check_model(model, values=values), allocation)
    check_model(small, values=values)
    if allocation.parts:
        return _verify_parts(model, small, allocation, example_inputs, numeric, seed)
    if example_inputs is None:
        example_inputs = inputs_like(allocation.input_shapes, model)
    graph = trace(model, example_inputs, groups=allocation.groups, norms=allocation.norms)
    kept = kept_by(graph, allocation)
    if kept is None or not names_and_shapes_match(graph, kept, small) or compare_models(graph, kept, small):
        return Certificate(False, None, graph.options.norms == "exact", seed, _input_shapes(graph), 0)
    return _certificate(model, small, graph, kept, seed, numeric)


def _verify_parts(
    model: nn.Module, small: nn.Module, whole: Allocation, example_inputs: Any, numeric: bool, seed: int
) -> Certificate:
    """One allocation after the other, since what a neuron is may change on the way (groups that became one)."""
    parts = [Allocation.from_dict(part) for part in whole.parts]
    composed = functools.reduce(Allocation.compose, parts)
    certificates = []
    for i, part in enumerate(parts):
        following = rewrite(model, part) if i < len(parts) - 1 else small
        made = verify(model, following, part, example_inputs=example_inputs, numeric=numeric, seed=seed)
        certificates.append(made)
        model = following
    same = (composed.kept, composed.attributes, composed.absent) == (whole.kept, whole.attributes, whole.absent)
    worst = max(certificates, key=lambda made: (not made.ok, made.relative_error or 0.0))
    structural = same and all(made.structural for made in certificates)
    return replace(worst, structural=structural, exact=all(made.exact for made in certificates))


def _budget(flops: float | str, graph: ChannelGraph) -> float:
    if not graph.flops:
        name, inputs = type(graph.model).__name__, graph.inputs.describe()
        raise NothingToAllocateError(f"{name} has no operator that fvcore counts FLOPs for, with {inputs}")
    return parse_budget(flops, graph.flops)


def _settle(
    graph: ChannelGraph,
    criterion: str,
    budget: float,
    policy: str,
    scope: str,
    fill: bool,
    scores: Scores | None = None,
) -> Settled:
    """A plan that runs, by the named criterion or by the first that "auto" can meet the budget with."""
    names = candidates(graph, criterion)
    if budget >= graph.flops:
        warn(
            f"the budget of {budget:,.0f} FLOPs is not below the model's own {graph.flops:,}: nothing is dropped",
            BudgetNotBindingWarning,
        )
        everything = np.ones(graph.size, dtype=bool)
        whole = Plan(everything, budget, graph.flops, "none", policy, names[0], None)
        settled = settle(graph.model, graph, lambda _: whole)
    else:
        settled = _settle_by(graph, names, budget, policy, scope, fill, scores)
        if criterion == AUTO and settled.plan.criterion == "magnitude":
            unmet_by = f"ranked by batch norms alone, the model does not come down to {budget:,.0f} FLOPs"
            settled.notes.append(say_fallback(unmet_by if len(names) > 1 else NO_BATCH_NORM))
    settled.allocation.blocks = describe_blocks(settled.graph.blocks, settled.graph.stays(settled.plan.kept))
    return settled


def _settle_by(
    graph: ChannelGraph, names: Sequence[str], budget: float, policy: str, scope: str, fill: bool, scores: Scores | None
) -> Settled:
    """The first of these criteria that meets the budget; where none does, the error says what any can reach."""

    def run(name: str, flops: float) -> Settled:
        ranking = scores or score_graph(graph, name)

        def planner(current: ChannelGraph) -> Plan:
            ranked = ranking if current is graph else score_graph(current, name)
            return make_plan(current, ranked, flops, policy=policy, scope=scope, fill=fill)

        return settle(graph.model, graph, planner)

    failed: dict[str, BudgetError | NothingToAllocateError] = {}
    for name in names:
        try:
            return run(name, budget)
        except (BudgetError, NothingToAllocateError) as error:
            failed[name] = error

    def smallest(name: str) -> int | None:
        return smallest_reachable(failed[name], lambda flops: run(name, flops).plan.flops, budget, graph.flops)

    figures = [figure for name in names if (figure := smallest(name)) is not None]
    if not figures:
        raise failed[names[-1]]
    raise unmet(budget, scope, min(figures), graph.flops)


def _certificate(
    model: nn.Module, small: nn.Module, graph: ChannelGraph, kept: np.ndarray, seed: int, numeric: bool
) -> Certificate:
    """Of a model that passed the structural check."""
    exact, shapes = graph.options.norms == "exact", _input_shapes(graph)
    if not numeric:
        return Certificate(True, None, exact, seed, shapes, 0)
    same = weights_match(model, small, graph, kept)
    found = compare_outputs(model, small, graph, kept, seed)
    return Certificate(True, found.error, exact, seed, shapes, found.outputs, same, found.effect, found.drawn)


def _input_shapes(graph: ChannelGraph) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(t.shape) for t in graph.inputs.tensors())


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


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UnknownNameError(f"no {name} {value!r} (there are {', '.join(choices)})")


def _as_patterns(exclude: Sequence[str | type] | str | type) -> tuple[str | type, ...]:
    return (exclude,) if isinstance(exclude, (str, type)) else tuple(exclude)
