"""The smallest inputs that a model takes in the same steps: outputs are compared on these in a fraction of the time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from allocator.flow.facts import Facts
from allocator.flow.follow import RuleError, run_rules
from allocator.graph.channel_graph import ChannelGraph
from allocator.tracing.calls import Trace
from allocator.tracing.inputs import Inputs
from allocator.tracing.record import ForwardError, record

SIDES = (64, 96, 128, 192, 256, 384, 512)
"""Tried in turn for the shortest side of an input; networks halve sides up to five times."""
STEP = 32
"""Sides are multiples of it, since many networks take no others."""
WORTH = 200_000
"""FLOPs per call of a forward below which it is so short that a smaller one saves less than it takes to find."""


def smaller_inputs(graph: ChannelGraph) -> Inputs | None:
    """Inputs with fewer pixels, or samples, on which the model makes the same calls with the same channels.

    Every side that is longer than one anywhere in the forward still is, so that kernels still see neighbours.

    Args:
        graph: the model's neurons, as traced.

    Returns:
        None where the forward needs values, is short already, or does otherwise at every smaller size.
    """
    trace, inputs = graph.flow.trace, graph.inputs
    sides = [side for tensor in inputs.tensors() for side in _sides(tensor)]
    if trace.mode != "meta" or graph.flops < WORTH * len(trace.ops) or not sides:
        return None
    for side in SIDES:
        if 2 * side > min(sides):
            break
        fewer = inputs.map(partial(_narrowed, ratio=side / min(sides)))
        try:
            other = record(graph.model, fewer)
            if _same_steps(graph, trace, other) and _same_channels(graph, other):
                return fewer
        except (ForwardError, RuleError):
            continue
    return None


def _sides(tensor: torch.Tensor) -> Sequence[int]:
    """Height and width of an image, or what a volume or a signal has; none of anything else."""
    return tensor.shape[2:] if tensor.is_floating_point() and tensor.dim() > 2 else ()


def _narrowed(tensor: torch.Tensor, ratio: float) -> torch.Tensor:
    for dim, side in enumerate(_sides(tensor), start=2):
        tensor = tensor.narrow(dim, 0, math.ceil(side * ratio / STEP) * STEP)
    return tensor


def _same_steps(graph: ChannelGraph, trace: Trace, other: Trace) -> bool:
    """Whether two forwards make the same calls on the same tensors, and differ in sides without channels alone."""
    if len(trace.ops) != len(other.ops) or len(trace.values) != len(other.values) or trace.outputs != other.outputs:
        return False
    for a, b in zip(trace.ops, other.ops, strict=True):
        if (a.target, a.module, a.reads, a.outputs) != (b.target, b.module, b.reads, b.outputs):
            return False
    for i, (one, two) in enumerate(zip(trace.values, other.values, strict=True)):
        if one.name != two.name or len(one.shape) != len(two.shape):
            return False
        for side, shorter, label in zip(one.shape, two.shape, graph.flow.labels(i), strict=True):
            if side != shorter and (label is not None or side < shorter or shorter == 1):
                return False
    return True


def _same_channels(graph: ChannelGraph, other: Trace) -> bool:
    """Whether another forward's tensors hold the same channels in the same order, whatever a size decides in it."""
    flow = run_rules(other, graph.slots, Facts(), graph.flow.options)
    for i in range(len(other.values)):
        for one, two in zip(graph.flow.labels(i), flow.labels(i), strict=True):
            if one is not two and not (one is not None and two is not None and np.array_equal(one, two)):
                return False
    return True
