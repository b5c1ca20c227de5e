"""Where a rewritten forward does not fit: let an attribute follow, keep the parts of a split equal, or freeze."""

from __future__ import annotations

from allocator.errors import RewriteError
from allocator.fitting.attributes import follows
from allocator.fitting.mends import Mends
from allocator.fitting.scene import Scene, meant
from allocator.fitting.stays import stay
from allocator.fitting.ties import TIES, counted_by_one
from allocator.graph.build import rebuilt
from allocator.graph.channel_graph import ChannelGraph
from allocator.planning.plan import Plan
from allocator.verifying.structure import Mismatch


def repair(graph: ChannelGraph, plan: Plan, mismatch: Mismatch, mends: Mends, notes: list[str]) -> ChannelGraph:
    """Set an attribute, tie parts, or freeze; returns the graph to plan on.

    Args:
        graph: the neurons that were planned on.
        plan: what was chosen of them.
        mismatch: where the rewritten forward does not fit.
        mends: attributes that follow; changed in place.
        notes: what was done; added to.
    """
    op = mismatch.op
    if op is None:
        raise RewriteError(f"the rewritten forward does not fit: {mismatch}")
    place = mismatch.forward, op.index
    stopped_before = mends.judge(place)
    mends.retract(notes)
    if stopped_before:  # by what was tried: without it, the forward gets to where it did not fit
        return graph
    scene = Scene(graph, graph.flows[mismatch.forward], plan, mends)
    if follows(scene, op, mismatch.module, notes):  # also where a tie made a call before its own lose neurons
        return graph
    given_up = mends.ties_in_vain(place, notes)
    counted = counted_by_one(scene, op)
    if counted:
        kind = type(graph.modules[op.module]).__name__
        notes.append(f"of {kind}, neurons that one attribute counts go together, place by place: {mismatch.what}")
        return rebuilt(graph, graph.options.untying(given_up).tying(counted))
    for find, said in TIES.items():
        known = mends.apart | graph.options.tied
        pairs = next((each - known for each in find(scene, op, mismatch.what) if each - known), None)
        if pairs is not None:
            notes.append(f"neurons at {op} {said}: {mismatch.what}")
            mends.tied = (mismatch.forward, op.index), pairs, notes[-1]
            return rebuilt(graph, graph.options.untying(given_up).tying(pairs))
    if op.declared.splits and op.declared.sized and op.module not in graph.options.equal_parts:
        notes.append(f"the parts of {op} stay equal: {mismatch.what}")
        options = graph.options.equalising(meant(graph, op.module, graph.options.equal_parts))
    else:
        options = stay(scene, mismatch, op, notes)
    before = {place.module for place in graph.options.frozen} | graph.options.equal_parts
    mends.forget(meant(graph, op.module, before))
    mends.retract(notes)
    return rebuilt(graph, options.untying(given_up))
