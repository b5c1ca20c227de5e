"""The flow from a model to a wider, proven one: the same rooms, the other way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from allocator.arguments import is_real
from allocator.clock import Clock, Progress
from allocator.cost.budget import Budget, Budgets
from allocator.cost.metric import Metric
from allocator.errors import BudgetError, InputError, NothingToAllocateError, as_given, plural
from allocator.fitting.fit import fit
from allocator.graph.blocks import Block
from allocator.graph.channel_graph import ALL, SCOPES, ChannelGraph
from allocator.graph.even import EvenNeurons
from allocator.graph.selection import UNMATCHED
from allocator.model_checks import check_model
from allocator.pipeline.choice import budgets_of
from allocator.pipeline.model import trace_model
from allocator.pipeline.run import finish
from allocator.planning.plan import Plan
from allocator.planning.widths import WIDEST, Layers, cheapest_next, tied, widest_within
from allocator.result import Result
from allocator.rewriting.added import Filling
from allocator.rewriting.allocation import Allocation
from allocator.rewriting.index_map import length
from allocator.rewriting.lineage import remember
from allocator.rewriting.materialise import materialise
from allocator.settings import Certify, Limits, Settings, check_certify
from allocator.verifying.certificate import Certificate
from allocator.verifying.growth import certify_growth

Widths = Callable[[Layers], tuple[np.ndarray, Budgets | None]]
"""How wide a network becomes: (layers,) how many neurons to add to each, and the budgets, if there are any."""
_NO_REASONS = (
    "excluded by the caller",
    "not included by the caller",
    "an output of the model",
    "rows of an embedding are read by their index",
    "meets a dim that must keep its size (convolution)",
    "meets a dim that must keep its size (linear)",
)
"""What the caller asked for, what the network gives, and what reads its input."""
_MOST_REASONS = 5


def widen_model(
    model: nn.Module,
    widths: Widths,
    example_inputs: Any,
    settings: Settings,
    *,
    init: str = "zero",
    weights: str = "keep",
    numeric: Certify = "small",
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """See `allocator.widen`.

    Args:
        model: the network; not changed.
        widths: how wide it becomes.
        example_inputs: as the caller gave them.
        settings: which layers may grow, and what their widths are multiples of.
        init: what added neurons are filled with.
        weights: "keep" or "reset".
        numeric: compare weights and outputs too, at which size.
        seed: of what is drawn.
        progress: called with the name of each stage.
    """
    check_certify(numeric)
    model = check_model(model, values=True)
    clock = Clock(progress)
    with clock("trace"):
        traced = trace_model(model, example_inputs, settings, growing=True)
    with clock("plan"):
        planner = _Planner(settings, widths, init)
        fitted = fit(traced, planner, planner.hold)
        graph, maps = fitted.graph, fitted.maps
        notes = [*traced.notes, *fitted.notes]
        notes += [f"not widened, as it would not be exact: {why}" for why in planner.why_not(graph)[:_MOST_REASONS]]
        notes += planner.as_they_were
    with clock("rewrite"):
        reads = {name: [graph.reads[label] for label in graph.slots.labels(name)] for name in maps}
        filling = Filling.by(init, seed, maps, reads, EvenNeurons.of(graph).slots(graph))
        fitted.allocation = replace(fitted.allocation, added=filling.to_dict())
        if not planner.has_budget:
            fitted.allocation.costs["flops"]["asked"] = None
        wide = materialise(model, fitted.allocation)
        remember(wide, model, fitted.allocation)

    def prove() -> Certificate:
        return certify_growth(graph, maps, wide, filling, seed=seed, numeric=numeric)

    return finish(wide, fitted, notes, weights, prove, clock)


def has_room_to_grow(model: nn.Module, limits: Limits, example_inputs: Any, settings: Settings) -> bool:
    """Whether all budgets are above the model's own figures.

    Raises:
        InputError: a budget of time, which is not known of wider layers than there are.
    """
    if limits.latency is not None:
        raise InputError(
            "grow=True goes with budgets that are counted, not with latency: how long wider layers take was never "
            "measured; pass flops or params, for example"
        )
    budgets = budgets_of(trace_model(check_model(model), example_inputs, settings), limits)
    return all(budget.limit > budget.metric.whole for budget in budgets.each)


def by_factor(factor: Any) -> Widths:
    """Every layer so many times as wide.

    Raises:
        InputError: no number from 1 on.
    """
    if not is_real(factor) or not factor < math.inf:
        raise InputError(f"factor={as_given(factor)} is no number such as 1.5")
    if factor > WIDEST:
        raise InputError(f"factor={as_given(factor)} is more than {WIDEST:.0f}, the most that layers are widened by")
    if factor < 1:
        raise InputError(
            f"factor={as_given(factor)} would make layers narrower: pass 1.5, for example; allocate takes neurons away"
        )
    times = float(factor)

    def widths(layers: Layers) -> tuple[np.ndarray, None]:
        more = layers.evenly(times)
        if not more.any():
            first = min(layers.each, key=lambda layer: layer.least_factor)
            which = "what an average is taken over" if first.together else "the layer that needs least"
            raise NothingToAllocateError(
                f"factor={as_given(factor)} adds nothing to any layer: {which} has {len(first.units)} neurons, and "
                f"{math.ceil(first.least_factor * 1000) / 1000:g} adds {first.first} to it"
            )
        return more, None

    return widths


def by_budgets(limits: Limits) -> Widths:
    """As many neurons as budgets allow, every layer the same factor, what is left one by one.

    Raises:
        BudgetError: no number, the model's own or less, or less than the cheapest neuron more.
    """

    def widths(layers: Layers) -> tuple[np.ndarray, Budgets]:
        budgets = budgets_of(layers.graph, limits)
        for budget in budgets.unmet(layers.graph.everything):
            metric = budget.metric
            raise BudgetError(
                f"{metric.show(budget.limit)} are below the model's own {metric.show(metric.whole)}: widen adds "
                f"neurons, allocate(model, {metric.name}=...) takes some away",
                asked=budget.limit,
                reachable=metric.whole,
            )
        more = widest_within(layers, budgets)
        if not more.any():
            tightest = min(budgets.each, key=lambda each: each.limit - _least(layers, each.metric))
            metric, reachable = tightest.metric, _least(layers, tightest.metric)
            raise BudgetError(
                f"{metric.show(tightest.limit)} leave no room for another neuron beside the model's own "
                f"{metric.show(metric.whole)}: the least that adds one is {metric.show(reachable)}",
                asked=tightest.limit,
                reachable=reachable,
            )
        return more, budgets

    return widths


def _least(layers: Layers, metric: Metric) -> int:
    """The least cost with anything added."""
    return metric.whole + (cheapest_next(layers, metric, np.zeros(len(layers.each), dtype=np.int64)) or 0)


def by_allocation(allocation: Allocation) -> Widths:
    """Every layer as wide as an allocation leaves the layer of this name."""
    target: dict[tuple[str, int], int] = {}
    for name, dims in allocation.kept.items():
        target.update({(name, dim): length(kept) for dim, kept in enumerate(dims) if kept is not None})

    def widths(layers: Layers) -> tuple[np.ndarray, None]:
        more = np.zeros(len(layers.each), dtype=np.int64)
        narrower, uneven = [], []
        for i, (name, dim, channels, layer) in enumerate(layers):
            wanted, width = target.get((name, dim), channels), len(layer.units)
            more[i] = round(width * wanted / channels) - width
            if wanted < channels:
                narrower.append(f"{name} has {channels} channels, and {wanted} there")
            elif more[i] != layer.nearest(int(more[i])):
                uneven.append(f"{name} can have {channels + layer.first * channels // width}, and has {wanted} there")
        if uneven and not narrower:
            raise InputError(
                f"layers cannot be as wide as in the allocation ({'; '.join(uneven[:3])}): under a norm over channels "
                "there are equally many of each"
            )
        if narrower:
            raise InputError(
                f"the allocation makes layers narrower than they are ({'; '.join(narrower[:3])}): widen only adds, "
                "apply(model, allocation) and allocate take away"
            )
        if not more.any():
            raise NothingToAllocateError(
                "no layer is wider in the allocation: its layers are as narrow, or none of them is the model's"
            )
        return more, None

    return widths


def by_branches(neurons: int | str) -> Widths:
    """Every branch of a block the same number of channels: this one, or a share of the block's widest branch.

    Raises:
        InputError: neither a number above zero nor a share; fewer than some branch has; nothing that it adds to.
    """
    share = _share(neurons)

    def widths(layers: Layers) -> tuple[np.ndarray, None]:
        graph, more = layers.graph, np.zeros(len(layers.each), dtype=np.int64)
        wider = []
        for block in _competing(graph):
            widest = max(branch.channels for branch in block.branches)
            wanted = neurons if isinstance(neurons, int) else math.ceil(share * widest)
            if wanted > WIDEST * widest:
                raise InputError(
                    f"neurons={as_given(neurons)} are more than {WIDEST:.0f} times the {widest} of {block.name}"
                )
            for branch in block.branches:
                units = graph.units(branch.label)
                own = [i for i, layer in enumerate(layers.each) if np.isin(layer.units, units).any()]
                if own and branch.channels > wanted:
                    wider.append(f"{block.name}.{branch.name} has {branch.channels}")
                for i in own:  # a layer whose parts are branches grows as they do
                    width = len(layers.each[i].units)
                    asked = round(width * wanted / branch.channels) - width
                    more[i] = max(more[i], layers.each[i].nearest(asked))
        if wider:
            raise InputError(
                f"neurons={as_given(neurons)} are fewer than branches have ({'; '.join(wider[:3])}): pass more, or a "
                "share of each block's widest branch, such as '100%'"
            )
        if not more.any():
            raise NothingToAllocateError(f"neurons={as_given(neurons)} adds to no branch: {_no_branches(graph)}")
        return more, None

    return widths


def _competing(graph: ChannelGraph) -> list[Block]:
    """Blocks whose branches have neurons of their own; where there are none, those whose branches are added up."""
    for kinds in (("concat", "split"), ("sum",)):
        blocks = [block for block in graph.blocks if block.kind in kinds]
        if blocks:
            return blocks
    return []


def _share(neurons: int | str) -> float:
    """A share as a number; 0 where it is a number of neurons that was given."""
    if isinstance(neurons, int) and not isinstance(neurons, bool) and neurons > 0:
        return 0.0
    text = neurons.strip() if isinstance(neurons, str) else ""
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = 0.0
    if not text.endswith("%") or not 0 < share < math.inf:
        raise InputError(f"neurons={as_given(neurons)} is neither a number of neurons nor a share such as '100%'")
    return share


def _no_branches(graph: ChannelGraph) -> str:
    if not _competing(graph):
        return "the model has no block in which branches meet; widen makes all layers wider"
    return "all branches have as many, or cannot grow exactly; widen makes all layers wider"


class _Planner:
    """Plans a wider network, in which single neurons may be held to what they are.

    These are ones whose copies would not stand where they belong, as where a tensor is cut between two channels that a
    shuffle keeps together.
    """

    def __init__(self, settings: Settings, widths: Widths, init: str) -> None:
        self.settings, self.widths, self.init = settings, widths, init
        self.has_budget = False
        self.as_they_were: list[str] = []  # what could have been added to, and was not
        self.held = np.zeros(0, dtype=np.int64)  # slots, as a repair may change what a neuron is

    def hold(self, slots: np.ndarray) -> bool:
        """Add nothing to the neurons of these slots; whether there are any that were not held."""
        fresh = np.setdiff1d(slots, self.held)
        self.held = np.append(self.held, fresh)
        return bool(len(fresh))

    def why_not(self, graph: ChannelGraph) -> list[str]:
        """What can't be added to without changing what is computed, a line per reason."""
        held = len(np.unique(graph.units(self.held)))
        places = f"what is added would not stand where it belongs, as beside a shuffle ({plural(held, 'neuron')})"
        return [*_why_not(graph, self.init), *([places] if held else [])]

    def __call__(self, graph: ChannelGraph) -> Plan:
        held = np.append(graph.units(self.held), np.flatnonzero(_uncopied(graph, self.init)))
        layers = Layers.of(graph, self.settings.scope, held, self.settings.multiple)
        if not layers.each:
            reasons = [*self.why_not(graph), *(_no_multiple(self.settings.multiple, *s) for s in layers.stuck)]
            reasons = [*_out_of_reach(graph, self.settings.scope), *(reasons or _nothing_left(graph))]
            listed = "; ".join(reasons[:_MOST_REASONS])
            raise NothingToAllocateError(f"no neuron can be added to the model exactly: {listed}", reasons=reasons)
        metric = graph.metric("flops")
        more, asked = self.widths(layers)
        self.has_budget = asked is not None
        times = layers.times(more)
        budgets = asked or Budgets([Budget(metric, metric.value(times))])
        following = {each.metric.name: cheapest_next(layers, each.metric, more) for each in budgets.each}
        costs = {name: cost for name, cost in following.items() if cost is not None}
        self.as_they_were = _not_repeated(layers, more)
        self.as_they_were += [_no_multiple(self.settings.multiple, *stuck) for stuck in layers.stuck[:_MOST_REASONS]]
        return Plan(times, budgets, self.settings.scope, "even", "none", costs)


def _out_of_reach(graph: ChannelGraph, scope: str) -> list[str]:
    """What the caller's options leave out: a line per option."""
    notes = [note for note in graph.notes if UNMATCHED in note]
    wider = int((graph.scope_of > SCOPES.get(scope, ALL)).sum())
    if wider:
        notes.append(f"{plural(wider, 'neuron')} can only be added to in a wider scope than {scope!r}")
    return notes


def _nothing_left(graph: ChannelGraph) -> list[str]:
    """Why there is nothing to add to where no neuron of a layer would be inexact."""
    if any(reason.endswith("by the caller") for *_, reason in graph.facts.frozen):
        return ["what exclude and include leave is written by others too, or read by nothing inside it"]
    return graph.why() or ["it has no layer whose outputs are read inside it"]


def _not_repeated(layers: Layers, more: np.ndarray) -> list[str]:
    """What is there once, as there are equally many of each and another of each was not asked for."""
    once = [each for each, added in zip(layers, more.tolist(), strict=True) if each[3].together and not added]
    if not once:
        return []
    names = [name for name, *_ in once]
    others = f" and {len(names) - 1} more" if names[1:] else ""
    return [
        f"as wide as they were: {sum(len(layer.units) for *_, layer in once):,} neurons that a norm averages over "
        f"({names[0]}{others}), which grow to whole multiples only, from factor={once[0][3].least_factor:g} on"
    ]


def _no_multiple(multiple: int, name: str, neurons: int) -> str:
    return f"as wide as it was: no number added to the {neurons} neurons of {name} makes it a multiple of {multiple}"


def _uncopied(graph: ChannelGraph, init: str) -> np.ndarray:
    """(neurons,) bool: those that one weight writes and reads, where what is added has to be copies."""
    both = tied(graph)
    return both if init == "copy" else both & EvenNeurons.of(graph).grows


def _why_not(graph: ChannelGraph, init: str) -> list[str]:
    """What can't be added to without changing what is computed: a line per reason, that with most channels first."""
    channels: dict[str, int] = {}
    modules: dict[str, list[str]] = {}
    written = np.zeros(graph.slots.total, dtype=bool)
    for label, _ in graph.facts.written:
        written[label] = True
    for label, module, reason in graph.facts.frozen:
        if written[label].any() and not reason.startswith(_NO_REASONS):  # else positions or pixels, which nobody widens
            channels[reason] = channels.get(reason, 0) + len(label)
            modules.setdefault(reason, []).append(module)
    lines = []
    for reason in sorted(channels, key=lambda each: -channels[each]):
        first, *others = dict.fromkeys(modules[reason])
        more = f" and {len(others)} more" if others else ""
        lines.append(f"{reason} in {first or 'the model'}{more} ({channels[reason]:,} channels)")
    fixed = int(EvenNeurons.of(graph).fixed.sum())
    if fixed:
        lines.insert(0, f"an average is taken over them and over what stays ({plural(fixed, 'neuron')})")
    both = int(_uncopied(graph, init).sum())
    if both:
        hint = "" if _uncopied(graph, "zero").any() else "; init='zero' can"
        lines.insert(0, f"one weight writes and reads them, so that no copy can share it ({both:,}{hint})")
    return lines
