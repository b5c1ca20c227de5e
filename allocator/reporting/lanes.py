"""Which block a call belongs to, how blocks lie within one another, and what a branch does, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allocator.flow.flow import Flow
from allocator.graph.blocks import Block, is_convolution
from allocator.graph.channel_graph import ChannelGraph
from allocator.reporting.facts import Layer
from allocator.reporting.words import size
from allocator.tracing.calls import Op

Place = tuple[int, int]
"""(block, branch) as indices."""

TOP: Place = (-1, -1)


def places(blocks: Sequence[Block]) -> tuple[dict[int, Place], list[Place | None]]:
    """The innermost branch that each call lies in, and the innermost branch that each block lies in.

    The groups of a convolution are one call: it belongs to the first of them.
    """
    branches = [
        (len(branch.calls), (i, j))
        for i, block in enumerate(blocks)
        for j, branch in enumerate(block.branches)
        if block.kind != "groups"
    ]
    owner: dict[int, Place] = {}
    for _, (i, j) in sorted(branches, key=lambda item: -item[0]):
        for call in blocks[i].branches[j].calls:
            owner[call] = (i, j)
    parents = [owner.get(block.call) for block in blocks]
    owner.update({block.call: (i, 0) for i, block in enumerate(blocks) if block.kind == "groups"})
    return owner, parents


def lanes(
    graph: ChannelGraph, owner: dict[int, Place], parents: Sequence[Place | None], kept: np.ndarray
) -> dict[Place, list[Layer | int]]:
    """Per branch, and at the top, its layers and the indices of the blocks within, as they run."""
    stays = graph.stays(kept)
    events: list[tuple[int, Place, Layer | int]] = []
    for op in graph.flow.trace.ops:
        what = _what(graph.flow, op)
        if what is not None:
            channels = _channels(graph.flow, op, stays)
            events.append((op.index, owner.get(op.index, TOP), Layer(op.module, what, *channels)))
    for i, (block, parent) in enumerate(zip(graph.blocks, parents, strict=True)):
        events.append((block.call, parent or TOP, i))
    found: dict[Place, list[Layer | int]] = {}
    for _, place, item in sorted(events, key=lambda event: event[0]):
        found.setdefault(place, []).append(item)
    return found


def _what(flow: Flow, op: Op) -> str | None:
    """A few words for calls that are worth drawing; None for the others."""
    drawn = op.declared.drawn_as
    if not is_convolution(op):
        return drawn or None
    said = f"{drawn} {size(flow.shape(op.inputs()[1])[2:])}"
    if op.arg("transposed"):
        said = f"transposed {said}"
    stride = max(op.arg("stride"), default=1)
    if stride > 1:
        said += f" / {stride}"
    if op.arg("groups") > 1:
        said += f", {op.arg('groups')} groups"
    return said


def _channels(flow: Flow, op: Op, stays: np.ndarray) -> tuple[int, int]:
    """Channels that a call gives, before and after."""
    value = op.outputs[0]
    shape, labels = flow.shape(value), flow.labels(value)
    dim = 1 if len(shape) >= 4 or (len(shape) == 3 and is_convolution(op)) else len(shape) - 1
    label = labels[dim]
    before = int(shape[dim])
    return before, before if label is None else int(stays[label].sum())
