"""Dims along which a tensor holds one number again and again, as where it was expanded: they fit any channels.

They have no labels until they meet some; then they have these, and so have the dims that they were made of.
"""

from __future__ import annotations

from collections.abc import Iterable

Dim = tuple[int, int]
"""A value of a trace, and one of its dims."""


class Repeats:
    """Which dims of which values are so, and of which others they were made."""

    def __init__(self) -> None:
        self._made_of: dict[Dim, tuple[Dim, ...]] = {}

    def __contains__(self, dim: Dim) -> bool:
        return dim in self._made_of

    def note(self, dim: Dim, made_of: Iterable[Dim] = ()) -> None:
        """It is one number along this dim, as it is along those that it was made of."""
        self._made_of[dim] = tuple(made_of)

    def forget(self, value: int) -> None:
        """A value that was written into."""
        for dim in [dim for dim in self._made_of if dim[0] == value]:
            del self._made_of[dim]

    def chain(self, dim: Dim) -> list[Dim]:
        """This dim and all that it was made of."""
        found: list[Dim] = []
        waiting = [dim]
        while waiting:
            each = waiting.pop()
            if each in self._made_of and each not in found:
                found.append(each)
                waiting += self._made_of[each]
        return found
