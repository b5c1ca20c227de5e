"""Things that hold one another, where one is held several times: how many they are once it is written out as often."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def written_out(root: T, inside: Callable[[T], Iterable[T]], most: int) -> int:
    """Count a thing and all that it holds, however deep; each is looked at once, and counts as often as it is held.

    Args:
        root: to begin with.
        inside: what a thing holds.
        most: that there may be.

    Raises:
        ValueError: there are more, or one lies within itself.
    """
    counts: dict[int, int] = {}
    around: dict[int, list[T]] = {}
    waiting = [root]
    while waiting:
        thing = waiting[-1]
        if id(thing) in counts:
            waiting.pop()
        elif id(thing) in around:
            counts[id(thing)] = 1 + sum(counts[id(each)] for each in around.pop(id(thing)))
            if counts[id(thing)] > most:
                raise ValueError(f"it holds more than {most:,} entries, once all that it repeats is written out")
        else:
            held = around[id(thing)] = list(inside(thing))
            if any(id(each) in around for each in held):
                raise ValueError("it holds what lies within itself")
            waiting += [each for each in held if id(each) not in counts]
    return counts[id(root)]
