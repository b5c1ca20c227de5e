"""The layers that can be refitted, in the order of the forward, and those that can't, with the reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from allocator.flow.labels import FROZEN
from allocator.graph.channel_graph import ChannelGraph
from allocator.recovering.after import After, what_follows
from allocator.tracing.calls import Op, Trace


@dataclass(frozen=True)
class Reader:
    """A convolution or matrix product by a parameter.

    Attributes:
        weight: name of the parameter.
        bias: name of what is added to every output, or None.
        mean: name of the running mean that is taken off every output right after, or None; it can stand for a bias.
        outputs: slots of the channels that it gives; None where they all stay.
        after: what follows right away.
    """

    weight: str
    bias: str | None
    mean: str | None
    outputs: np.ndarray | None
    after: After

    @property
    def offset(self) -> str | None:
        """Name of the vector that a constant can go into, or None."""
        return self.bias or self.mean

    @property
    def tensors(self) -> list[str]:
        """Names of what a refit may change."""
        return [self.weight, *([] if self.offset is None else [self.offset])]


def readers_of(graph: ChannelGraph) -> tuple[dict[str, Reader], dict[str, str]]:
    """By its weight, every layer that can be refitted; and by name every weight that reads neurons and can't be, why.

    Args:
        graph: the original's neurons.
    """
    trace = graph.flow.trace
    found: dict[str, Reader] = {}
    for op in trace.ops:
        reader = _reader(graph, trace, op)
        if reader is not None:
            found.setdefault(reader.weight, reader)
    calls = _calls_by_weight(trace)
    left = {name: "the forward computes with it in a way of its own" for name in _reading(graph) if name not in found}
    for name, reader in list(found.items()):
        of_bias = calls[reader.bias or name]
        if calls[name] > 1 or of_bias > 1:
            del found[name]
            left[name] = f"{calls[name]} calls share it" if calls[name] > 1 else f"{of_bias} calls share its bias"
        elif reader.mean is not None and calls[reader.mean] > 1:
            found[name] = replace(reader, mean=None)
    return found, left


def _reading(graph: ChannelGraph) -> list[str]:
    """Names of the parameters along which activations are summed, in the model's order."""
    reads = np.zeros(graph.slots.total, dtype=bool)
    for label in graph.facts.read:
        reads[label] = True
    reads[FROZEN] = False
    return [name for name in graph.slots.shapes if any(reads[label].any() for label in graph.slots.labels(name))]


def _reader(graph: ChannelGraph, trace: Trace, op: Op) -> Reader | None:
    """The reader that a call is, where it multiplies an activation by a parameter."""
    name = _weight(trace, op)
    if name is None:
        return None
    multiplied = {op.inputs()[place] for place in op.declared.multiplies}
    added = [trace.values[i].name for i in op.inputs() if i not in multiplied and len(trace.values[i].shape) == 1]
    bias = next((each for each in added if each is not None), None)
    channels = -1 if op.declared.window is None else 1
    after = what_follows(trace, op, trace.values[op.outputs[0]].shape[channels])
    mean = after.norm[2] if after.norm and bias is None else None
    return Reader(name, bias, mean, graph.flow.labels(op.outputs[0])[channels], after)


def _weight(trace: Trace, op: Op) -> str | None:
    if op.declared.read_dim is None or not op.declared.multiplies:
        return None
    x, weight = (op.inputs()[place] for place in op.declared.multiplies)
    value = trace.values[weight]
    if value.name is None and value.base is not None:
        base = trace.values[value.base]
        value = base if sorted(base.shape) == sorted(value.shape) else value  # a transposed view, and no part of it
    return value.name if trace.values[x].name is None else None


def _calls_by_weight(trace: Trace) -> Counter[str]:
    """How many calls read a parameter, in whatever way, views of it included."""
    count: Counter[str] = Counter()
    for op in trace.ops:
        if op.operator.gives_views or op.operator.lists_views:
            continue
        names = {trace.values[trace.root(i)].name for i in op.inputs()}
        count.update(name for name in names if name is not None)
    return count
