"""Whether what a plan comes to runs: the structural check of the rewritten model, on meta tensors where that can be."""

from __future__ import annotations

from collections.abc import Collection

from allocator.flow.facts import Attribute
from allocator.graph.channel_graph import ChannelGraph
from allocator.planning.plan import Plan
from allocator.rewriting.allocation import Allocation
from allocator.rewriting.describe import describe
from allocator.rewriting.index_map import Maps, maps_of, take, take_on_meta
from allocator.rewriting.materialise import materialise
from allocator.verifying.structure import Mismatch, find_mismatch


def check_structure(graph: ChannelGraph, maps: Maps, allocation: Allocation) -> Mismatch | None:
    """Trace the rewritten model on meta tensors and compare; None where it is the image of the original."""
    on_meta = all(flow.trace.mode == "meta" for flow in graph.flows)
    small = materialise(graph.model, allocation, take_on_meta if on_meta else take)
    return find_mismatch(graph, maps, small, copied=on_meta)


def check_plan(graph: ChannelGraph, plan: Plan, mends: Collection[Attribute]) -> Mismatch | None:
    """As `check_structure`, of a plan with attributes that follow it."""
    maps = maps_of(graph, plan.kept)
    return check_structure(graph, maps, describe(graph, plan, maps, mends))
