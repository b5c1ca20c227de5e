"""Which block a call belongs to, how blocks lie within one another, and which layers a branch has."""

from __future__ import annotations

from collections.abc import Sequence

from allocator.graph.blocks import Block
from allocator.reporting.facts import Layer

Place = tuple[int, int]
"""(block, branch) as indices."""

TOP: Place = (-1, -1)


def places(blocks: Sequence[Block]) -> tuple[dict[int, Place], list[Place | None]]:
    """The innermost branch that each call lies in, and the innermost branch that each block lies in.

    The groups of a convolution are one call: it belongs to the first of them.
    """
    branches = []
    for i, block in enumerate(blocks):
        if block.kind != "groups":
            branches += [(i, j, branch.calls) for j, branch in enumerate(block.branches)]
    owner: dict[int, Place] = {}
    # The longest first: an inner branch has fewer calls, and comes after those around it.
    for i, j, calls in sorted(branches, key=lambda item: -len(item[2])):
        for call in calls:
            owner[call] = (i, j)
    parents = [owner.get(block.call) for block in blocks]
    owner.update({block.call: (i, 0) for i, block in enumerate(blocks) if block.kind == "groups"})
    return owner, parents


def lanes(
    layers: Sequence[tuple[int, Layer]],
    blocks: Sequence[Block],
    owner: dict[int, Place],
    parents: Sequence[Place | None],
) -> dict[Place, list[Layer | int]]:
    """Per branch, and at the top, its layers and the indices of the blocks within, as they run.

    Args:
        layers: with the indices of their calls.
        blocks: of the graph.
        owner, parents: from `places`.
    """
    events: list[tuple[int, Place, Layer | int]] = [(call, owner.get(call, TOP), layer) for call, layer in layers]
    for i, (block, parent) in enumerate(zip(blocks, parents, strict=True)):
        events.append((block.call, parent or TOP, i))
    found: dict[Place, list[Layer | int]] = {}
    for _, place, item in sorted(events, key=lambda event: event[0]):
        found.setdefault(place, []).append(item)
    return found
