"""A choice of neurons as an allocation: source indices per tensor, new values per attribute."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from allocator import adapters
from allocator.flow.facts import Attribute
from allocator.graph.blocks import describe_blocks
from allocator.graph.channel_graph import ChannelGraph
from allocator.modules import attribute_of, lies_within
from allocator.planning.plan import Plan
from allocator.rewriting.allocation import Allocation, architecture_hash
from allocator.rewriting.attributes import norms_without_tensors, standard_attributes
from allocator.rewriting.index_map import Maps, mapped_shape
from allocator.torch_private import ConvolutionBase

AttributeKey = tuple[str, str]
"""(path of a module, name of its attribute)."""


def describe(
    graph: ChannelGraph,
    plan: Plan,
    maps: Maps,
    mends: Collection[Attribute] = (),
    alone: Collection[AttributeKey] = (),
) -> Allocation:
    """A plan as an allocation, without what `complete` adds.

    Args:
        graph: the model's neurons.
        plan: the choice.
        maps: where each index comes from.
        mends: further attributes that follow the kept channels.
        alone: attributes that stay as they are, though a split has their value for its size.
    """
    kept, attributes, absent = describe_maps(graph, maps, graph.stays(plan.kept), mends, alone)
    return Allocation(
        kept=kept,
        attributes=attributes,
        absent=absent,
        renumbered=sorted(name for name in graph.facts.picks if name in kept),
        architecture=architecture_hash(graph.slots.shapes),
        policy=plan.policy,
        criterion=plan.criterion,
        scope=plan.scope,
        groups="width" if graph.options.groups == "width" else "whole",
        norms=graph.options.norms,
        input_shapes=[list(t.shape) for t in graph.inputs.tensors()],
    )


def complete(allocation: Allocation, graph: ChannelGraph, plan: Plan) -> Allocation:
    """With what the plan's budgets and the network's blocks come to."""
    costs: dict[str, dict[str, Any]] = {}
    for budget in plan.budgets.each:
        costs[budget.metric.name] = {"asked": float(budget.limit)}
    for name in ("flops", *costs):
        metric = graph.metric(name)
        before, after = metric.whole, metric.value(plan.kept)
        costs[name] = {"asked": None, **costs.get(name, {}), "before": before, "after": after}
    return replace(allocation, costs=costs, blocks=describe_blocks(graph.blocks, graph.stays(plan.kept)))


def describe_maps(
    graph: ChannelGraph,
    maps: Maps,
    stays: np.ndarray,
    mends: Collection[Attribute] = (),
    alone: Collection[AttributeKey] = (),
) -> tuple[dict[str, list[Any]], dict[str, dict[str, Any]], list[str]]:
    """What an allocation holds of index maps: source indices, attributes, and layers that are gone.

    Args:
        graph: the model's neurons.
        maps: where each index comes from.
        stays: (slots,) bool or int, of how many a slot is the source.
        mends, alone: as for `describe`.
    """
    shapes = {name: mapped_shape(graph.slots.shapes[name], dims) for name, dims in maps.items()}
    groups = {name: int(stays[slots].sum()) for name, slots in graph.facts.groups.items() if name in maps}
    absent: list[str] = []
    for layer, together in graph.optional.items():
        if shapes.get(f"{layer}.weight", (1,))[0] == 0:
            absent += together
    attributes = standard_attributes(graph.modules, graph.tensors, shapes, groups, absent)
    for path, name, value in (*_following(graph, stays, mends, alone), *_declared(graph, stays)):
        if not lies_within(path, absent):
            attributes.setdefault(path, {})[name] = value
    kept: dict[str, list[Any]] = {}
    for name, dims in maps.items():
        if not lies_within(name, absent):
            kept[name] = [None if dim is None else dim.tolist() for dim in dims]
    _add_rows(graph.modules, kept)
    return kept, attributes, absent


def _following(
    graph: ChannelGraph, stays: np.ndarray, mends: Collection[Attribute], alone: Collection[AttributeKey]
) -> Iterator[tuple[str, str, Any]]:
    """(module, attribute, new value) of attributes that are numbers of channels, which no tensor of theirs tells."""
    for path, name, label in norms_without_tensors(graph.flow):
        if (stays[label] != 1).any():
            yield path, name, int(stays[label].sum())
    for attribute in (*graph.facts.attributes, *mends):
        if (attribute.module, attribute.name) in alone:
            continue
        current = attribute_of(graph.modules[attribute.module], attribute.name)
        value = _attribute_value(current, [int(stays[piece].sum()) for piece in attribute.pieces])
        if value != (list(current) if isinstance(current, tuple) else current):
            yield attribute.module, attribute.name, value


def _attribute_value(current: Any, sizes: list[int]) -> Any:
    """One number where the attribute holds one and it still serves all parts, else one per part."""
    if isinstance(current, int) and len(set(sizes)) == 1:
        return sizes[0]
    return sizes


def _declared(graph: ChannelGraph, stays: np.ndarray) -> Iterator[tuple[str, str, Any]]:
    """(module, attribute, new value) of attributes that an adapter knows, where the value changes."""
    name_of = {id(tensor): name for name, tensor in graph.tensors.items()}

    def times(tensor: torch.Tensor, dim: int) -> np.ndarray:
        start = graph.slots.base[name_of[id(tensor)]][dim]
        return stays[start : start + tensor.shape[dim]]

    most = int(stays.max())
    for path, module, adapter in adapters.adapted(graph.modules):
        if adapter.sizes is None:
            continue
        whole = adapters.sizes_of(path, module, adapter)
        for name, value in adapters.sizes_of_many(path, module, adapter, times, most).items():
            if value != whole.get(name):
                yield path, name, list(value) if isinstance(value, tuple) else value


def _add_rows(modules: Mapping[str, nn.Module], kept: dict[str, list[Any]]) -> None:
    """Dim 1 of a grouped weight is written out as one row of columns per output that stays."""
    for path, module in modules.items():
        if not isinstance(module, ConvolutionBase) or module.groups == 1 or module.transposed:
            continue
        dims = kept.get(f"{path}.weight".lstrip("."))
        if dims is not None and dims[1] is not None:
            rows = module.weight.shape[0] if dims[0] is None else len(dims[0])
            dims[1] = [dims[1]] * rows
