"""From a plan to an allocation that runs: trace the result, repair what does not fit, plan again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from allocator import adapters
from allocator.errors import NothingToAllocateError, RewriteError, first_line
from allocator.fitting.check import check_structure
from allocator.fitting.mends import Mends
from allocator.fitting.repair import repair
from allocator.graph.build import elsewhere, without_forward
from allocator.graph.channel_graph import ChannelGraph
from allocator.planning.plan import Plan
from allocator.rewriting.allocation import Allocation
from allocator.rewriting.describe import AttributeKey, complete, describe
from allocator.rewriting.index_map import Maps, maps_of, take_buffers
from allocator.rewriting.materialise import materialise
from allocator.verifying.structure import Mismatch, find_mismatch

MAX_ROUNDS = 48  # of which a class of modules that does not fit takes two
Planner = Callable[[ChannelGraph], Plan]
Hold = Callable[[np.ndarray], bool]
"""Told of slots that stand in other places than they should: whether the next plan is another for that."""


@dataclass
class Fitted:
    """A plan whose rewritten forward was traced and found to be the image of the original.

    Attributes:
        graph: the neurons, with those frozen that did not fit.
        plan: the choice.
        maps: where each index of the smaller network's tensors comes from.
        allocation: the choice as data.
        notes: what had to be frozen or set on the way.
    """

    graph: ChannelGraph
    plan: Plan
    maps: Maps
    allocation: Allocation
    notes: list[str]


def fit(graph: ChannelGraph, planner: Planner, hold: Hold | None = None) -> Fitted:
    """Plan, trace the rewritten model on meta tensors, repair, until the structural check passes.

    Where the forward no longer fits, a module attribute that equals the old size is set to the new one for
    all modules of that class; failing that, the parts of a split are made equal; failing that, the neurons
    at the operator are frozen, and the plan is made again. Both are done in that module alone, and in all of
    its class where a second one of them does not fit.

    Args:
        graph: the model's neurons.
        planner: chooses neurons of a graph, of this one or of one in which fewer can go.
        hold: of a planner that can leave single neurons as they are; asked before anything is repaired.

    Raises:
        RewriteError: no plan was found that runs.
    """
    graph = elsewhere(graph)
    mends = Mends(counted=graph.counted)
    notes: list[str] = []
    mismatch: Mismatch | None = None
    rounds = 0
    while rounds < MAX_ROUNDS:
        try:
            plan = planner(graph)
        except NothingToAllocateError as error:
            error.reasons[:0] = notes
            raise
        maps = maps_of(graph, plan.kept)
        allocation = describe(graph, plan, maps, mends.attributes())
        mismatch = check_structure(graph, maps, allocation)
        if mismatch is None:
            allocation = complete(_leave_alone(graph, plan, maps, mends, allocation), graph, plan)
            return Fitted(graph, plan, maps, with_configuration(graph, maps, allocation, notes), notes)
        if hold is None or not hold(mismatch.misplaced):
            graph, rounds = _repair(graph, plan, mismatch, mends, notes), rounds + 1
    raise RewriteError(
        f"the rewritten forward did not fit after {MAX_ROUNDS} plans; the last time at {mismatch}: "
        "exclude this module with exclude=[...], or register an adapter for its class (docs/extending.md)"
    )


def _repair(graph: ChannelGraph, plan: Plan, mismatch: Mismatch, mends: Mends, notes: list[str]) -> ChannelGraph:
    """As `repair`; in another mode or size than the example's, a forward that cannot fit is left out, and said so."""
    which = mismatch.forward
    if not which:
        return repair(graph, plan, mismatch, mends, notes)
    again = find_mismatch(graph, {}, graph.model)
    if again is not None and again.forward == which:
        return without_forward(graph, which, f"the original itself does not repeat its calls: {again}")
    try:
        return repair(graph, plan, mismatch, mends, notes)
    except RewriteError as error:
        return without_forward(graph, which, first_line(error))


def with_configuration(graph: ChannelGraph, maps: Maps, allocation: Allocation, notes: list[str]) -> Allocation:
    """Let what a library builds the model from follow, as far as the forward still fits; `notes` says where it cannot.

    A model of a library that is not known gets a note if it can be built from a configuration.
    """
    adapter = adapters.find(graph.model)
    if not allocation.kept:
        return allocation
    configured = None
    if adapter is not None and adapter.configuration is not None:
        configured = adapter.configuration(materialise(graph.model, allocation, take_buffers))
    if configured is None:
        if hasattr(graph.model, "save_pretrained") and hasattr(graph.model, "from_pretrained"):
            notes.append(_BY_ITS_CONFIGURATION)
        return allocation
    notes += [configured.note] if configured.note else []
    if not configured.values:
        return allocation
    attributes = dict(allocation.attributes)
    for path, values in configured.values.items():
        attributes[path] = {**attributes.get(path, {}), **values}
    followed = replace(allocation, attributes=attributes)
    mismatch = check_structure(graph, maps, followed)
    if mismatch is None:
        return followed
    notes.append(f"the configuration stays as it was, since the forward reads it: {mismatch}")
    return allocation


_BY_ITS_CONFIGURATION = (
    "from_pretrained of the model's own library builds it by its configuration, which does not know widths "
    "that differ from layer to layer: write the result with allocator.save, and read it with allocator.load"
)


def _leave_alone(graph: ChannelGraph, plan: Plan, maps: Maps, mends: Mends, allocation: Allocation) -> Allocation:
    """Of the attributes that have the size of a split's parts, change only those that the forward needs changed."""
    doubtful: dict[tuple[str, str], set[AttributeKey]] = {}
    for attribute in graph.facts.attributes:
        if not attribute.declared and attribute.name in allocation.attributes.get(attribute.module, {}):
            kind = type(graph.modules[attribute.module]).__name__, attribute.name
            doubtful.setdefault(kind, set()).add((attribute.module, attribute.name))
    alone: set[AttributeKey] = set()
    for keys in doubtful.values():
        other = describe(graph, plan, maps, mends.attributes(), alone | keys)
        if check_structure(graph, maps, other) is None:
            allocation, alone = other, alone | keys
    return allocation
