"""A smaller network in the original's shape again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from allocator.errors import InputError
from allocator.graph.channel_graph import ChannelGraph
from allocator.model_checks import check_model
from allocator.modules import skeleton, tensor_names
from allocator.result import Result
from allocator.rewriting.index_map import maps_of
from allocator.settings import Certify, check_certify
from allocator.verifying.certificate import certificate_of, require, weights_match


def restore_model(result: Result, dropped: str, *, numeric: Certify, seed: int) -> nn.Module:
    """See `allocator.restore`."""
    check_certify(numeric)
    graph, small = result.graph, check_model(result.model)
    if result.allocation.widens:
        raise InputError(
            "this result is wider than its original: allocate takes neurons away, restore brings them back"
        )
    if not graph.exact:
        raise InputError(
            'this result was made with norms="loose": under its norms, zeros would change what is computed'
        )
    maps, found = maps_of(graph, result.plan.kept), tensor_names(small)

    def put(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in graph.slots.shapes:  # no parameter or buffer
            return tensor.detach().clone()
        if name in graph.facts.picks:  # numbers of channels, of which the smaller network counts fewer
            return tensor.detach().clone()
        own, dims = found.get(name), maps.get(name)
        if own is not None and dims is None:
            return own.detach().clone()
        whole = _without_readers(graph, name, tensor) if dropped == "original" else _nothing(name, tensor)
        if own is not None and dims is not None:
            sizes = zip(tensor.shape, dims, strict=True)
            places = [np.arange(n) if index_map is None else index_map.source for n, index_map in sizes]
            whole[tuple(torch.as_tensor(index, device=whole.device) for index in np.ix_(*places))] = own.detach()
        return whole

    restored = skeleton(graph.model, put)
    kept = result.plan.kept
    made = certificate_of(
        replace(graph, model=restored), kept, maps, small, weights_match, seed=seed, numeric=numeric, widens=True
    )
    other = "; zeros may be what it divides by: try dropped='original'" if dropped == "zero" else ""
    require(made, f"the network in the original's shape (dropped={dropped!r}{other})")
    return restored


def _nothing(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Zeros; ones for a variance, which is divided by."""
    return torch.ones_like(tensor.detach()) if name.endswith("running_var") else torch.zeros_like(tensor.detach())


def _without_readers(graph: ChannelGraph, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose indices that read a neuron which can be dropped are zero."""
    whole = tensor.detach().clone()
    for dim, label in enumerate(graph.slots.labels(name)):
        reads = graph.reads[label] & (graph.unit_of_slot[label] >= 0)
        if reads.any():
            whole.index_fill_(dim, torch.as_tensor(np.flatnonzero(reads), device=whole.device), 0)
    return whole
