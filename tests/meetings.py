"""Aggregation blocks as they are stated by hand, and how what was found is held against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from allocator import Block, Branch

Kernels = tuple[tuple[int, ...], ...]

ONE, THREE, FIVE = (1, 1), (3, 3), (5, 5)


class Way(NamedTuple):
    """One branch as stated by hand; None where the architecture doesn't tell."""

    name: str
    channels: int
    kernels: Kernels = ()
    stride: float = 1
    scale: float | None = 1
    dilation: int = 1


@dataclass(frozen=True)
class Meeting:
    """One block as stated by hand."""

    name: str
    kind: str
    channels: int
    branches: tuple[Way, ...]


def meeting(name: str, kind: str, *branches: Way) -> Meeting:
    """A block whose channels follow from its branches'."""
    each = [branch.channels for branch in branches]
    channels = sum(each) if kind in ("concat", "split", "groups") else each[0]
    return Meeting(name, kind, channels, branches)


def way(found: Branch, expected: Way) -> Way:
    """A found branch in the terms of the one stated by hand."""
    scale = None if expected.scale is None else found.scale
    return Way(found.name, found.channels, found.kernels, found.stride, scale, found.dilation)


def check_meetings(found: Sequence[Block], expected: Sequence[Meeting], model: str = "") -> None:
    """The blocks are the stated ones: all of them, no others, in order."""
    assert [block.name for block in found] == [block.name for block in expected]
    for block, stated in zip(found, expected, strict=True):
        title = f"{model} {block.name}"
        assert (block.kind, block.channels) == (stated.kind, stated.channels), title
        assert [b.name for b in block.branches] == [b.name for b in stated.branches], title
        for got, want in zip(block.branches, stated.branches, strict=True):
            assert way(got, want) == want, f"{title} {got.name}"
