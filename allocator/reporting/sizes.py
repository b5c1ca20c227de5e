"""Parameters and activations as a function of the kept neurons, beside the FLOPs that `cost` counts."""

from __future__ import annotations

import math

import numpy as np
from torch import nn

from allocator.cost.flops import Term
from allocator.flow.flow import Flow
from allocator.graph.channel_graph import ChannelGraph, kept_of
from allocator.modules import tensor_names
from allocator.reporting.facts import Totals
from allocator.tracing.record import Op

_PRODUCTS = frozenset({"convolution", "_convolution", "mkldnn_convolution", "addmm", "mm", "bmm", "linear"})
_WHOLE = frozenset({"matmul", "rmatmul", "einsum"})


def totals(graph: ChannelGraph, kept: np.ndarray) -> Totals:
    """What the network costs when the neurons with `kept` true stay."""
    return Totals(graph.cost.flops(kept), parameters(graph, kept), activations(graph, kept))


def parameters(graph: ChannelGraph, kept: np.ndarray) -> int:
    """Numbers in all parameters, each counted once; a layer that is left without neurons has none."""
    left = kept_of(graph, kept)
    count: dict[int, int] = {}
    for name, tensor in tensor_names(graph.model).items():
        if isinstance(tensor, nn.Parameter):
            dims = left.get(name, [None] * tensor.dim())
            count[id(tensor)] = math.prod(n if d is None else len(d) for n, d in zip(tensor.shape, dims, strict=True))
    return sum(count.values())


def activations(graph: ChannelGraph, kept: np.ndarray) -> int:
    """Numbers that convolutions and matrix products write in one forward, as fvcore counts them."""
    stays = np.append(kept, True)[graph.unit_of_slot]
    written = _written(graph.flow, graph.cost.terms)
    return sum(_elements(graph.flow, value, stays) for value in written)


def _written(flow: Flow, terms: list[Term]) -> list[int]:
    """Values that counted convolutions and products give; of a call counted as a whole, its last."""
    ops = flow.trace.ops
    last: dict[int, Op] = {id(op.call): op for op in ops if op.call is not None and op.call.name in _WHOLE}
    found: dict[int, None] = {}
    for term in terms:
        op = ops[term.op]
        if op.call is not None and op.call.name in _WHOLE:
            found[last[id(op.call)].outputs[0]] = None
        elif op.name in _PRODUCTS:
            found[op.outputs[0]] = None
    return list(found)


def _elements(flow: Flow, value: int, stays: np.ndarray) -> int:
    sizes = zip(flow.shape(value), flow.labels(value), strict=True)
    return math.prod(n if label is None else int(stays[label].sum()) for n, label in sizes)
