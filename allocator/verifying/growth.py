"""Proof that a wider network is the original with more neurons, and computes the same.

Both ways: every call of the wider forward is the image of the original's, and, as the wider network is traced too, the
original is what is left of it without the neurons that were added. The second is the check of an allocation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from allocator.graph.build import build_graph
from allocator.graph.channel_graph import ChannelGraph
from allocator.graph.even import EvenNeurons
from allocator.modules import tensor_names
from allocator.rewriting.added import Filling, Places, added_where, first_places
from allocator.rewriting.allocation import Allocation
from allocator.rewriting.index_map import IndexMap, Maps, maps_of
from allocator.rewriting.kept import times_by
from allocator.settings import Certify
from allocator.verifying.certificate import (
    Certificate,
    certificate_of,
    names_and_shapes_match,
    no_certificate,
    same_bits,
)
from allocator.verifying.float64 import part_of
from allocator.verifying.structure import find_mismatch


def certify_growth(
    graph: ChannelGraph, maps: Maps, wide: nn.Module, filling: Filling, *, seed: int = 0, numeric: Certify = "small"
) -> Certificate:
    """The certificate of a wider model that passed the structural check as the image of the original.

    Args:
        graph: the original's neurons.
        maps: where each index of the wider model's tensors comes from.
        wide: the wider model.
        filling: what was added.
        seed: of the input that the two are compared on.
        numeric: compare weights and float64 outputs too, at which size, as for `certify`.
    """
    even = EvenNeurons.of(graph)
    if not even.keeps_averages(_times(graph, maps)):
        return no_certificate(graph, seed)
    options = replace(graph.options, include=(), exclude=(), same=())  # modules of the original are none of this one
    back = build_graph(wide, graph.inputs, options, graph.forwards.of(wide))
    kept = _originals(back, maps)
    if kept is None:
        return no_certificate(graph, seed)
    back_maps = maps_of(back, kept)
    if find_mismatch(back, back_maps, graph.model) is not None:
        return no_certificate(graph, seed)

    averaged = added_where(maps, even.slots(graph))

    def same_weights(_: ChannelGraph, back_maps: Maps, __: nn.Module) -> bool:
        return _weights_match(graph, back_maps, maps, wide, filling, averaged)

    return certificate_of(
        back,
        kept,
        back_maps,
        graph.model,
        same_weights,
        seed=seed,
        numeric=numeric,
        widens=True,
        copies=_copies(maps, averaged),
    )


def verify_growth(
    graph: ChannelGraph, allocation: Allocation, wide: nn.Module, *, seed: int = 0, numeric: Certify = "small"
) -> Certificate:
    """The certificate of any model that is said to be what an allocation which adds neurons leads to.

    Args:
        graph: the original's neurons.
        allocation: what should have been added.
        wide: the wider model.
        seed, numeric: as for `certify_growth`.
    """
    times, filling = times_by(graph, allocation), Filling.of(allocation.added)
    if times is None or filling is None:
        return no_certificate(graph, seed)
    maps = maps_of(graph, times)
    if not names_and_shapes_match(graph, maps, wide) or find_mismatch(graph, maps, wide) is not None:
        return no_certificate(graph, seed)
    return certify_growth(graph, maps, wide, filling, seed=seed, numeric=numeric)


def _times(graph: ChannelGraph, maps: Maps) -> np.ndarray:
    """(neurons,) how many of each there are in the wider network."""
    times = np.ones(graph.size, dtype=np.int64)
    for name, dims in maps.items():
        for start, size, index_map in zip(graph.slots.base[name], graph.slots.shapes[name], dims, strict=True):
            if index_map is not None:
                units = graph.unit_of_slot[start : start + size]
                times[units[units >= 0]] = np.bincount(index_map.source, minlength=size)[units >= 0]
    return times


def _copies(maps: Maps, averaged: Mapping[str, Sequence[Places | None]]) -> Maps:
    """Per tensor of the wider network, which index holds what each holds: of what averages are taken over, the first.

    So weights that are drawn keep the averages as well.
    """
    copies: Maps = {}
    for name, dims in averaged.items():
        copies[name] = [None] * len(dims)
        for dim, (index_map, places) in enumerate(zip(maps[name], dims, strict=True)):
            if index_map is not None and places:
                holds = np.arange(len(index_map))
                holds[places] = first_places(index_map.source)[index_map.source[places]]
                copies[name][dim] = IndexMap.of(holds)
    return copies


def _originals(back: ChannelGraph, maps: Maps) -> np.ndarray | None:
    """(neurons,) bool: those of the wider network that are the original's; None where one is so in part."""
    stays = np.ones(back.slots.total, dtype=bool)
    for name, dims in maps.items():
        for start, index_map in zip(back.slots.base[name], dims, strict=True):
            if index_map is not None:
                stays[start + index_map.added] = False
    free = back.unit_of_slot >= 0
    count = np.bincount(back.unit_of_slot[free], minlength=back.size)
    left = np.bincount(back.unit_of_slot[free], weights=stays[free], minlength=back.size)
    if ((left != 0) & (left != count)).any() or not stays[~free].all():
        return None
    return left > 0


def _weights_match(
    graph: ChannelGraph,
    back_maps: Maps,
    maps: Maps,
    wide: nn.Module,
    filling: Filling,
    averaged: Mapping[str, Sequence[Places | None]],
) -> bool:
    """Whether the wider network without what was added has the original's tensors, bit for bit.

    And whether what was added changes nothing: that its readers are zero, or the shares of copies add up.
    """
    found = tensor_names(wide)
    for name, tensor in graph.tensors.items():
        own = found[name].detach()
        dims = maps.get(name)
        if dims is not None:
            sources = [None if index_map is None else index_map.source for index_map in dims]
            own = filling.undo(name, own, sources)
            if not filling.is_neutral(name, own, sources, averaged.get(name)):
                return False
            own = part_of(own, back_maps.get(name, ()))
        if not same_bits(tensor.detach(), own):
            return False
    return True
