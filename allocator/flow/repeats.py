"""Dims along which a tensor holds one number again and again, as where it was expanded: they fit any channels.

They have no labels until they meet some; then they have these, and so have the dims that they were made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from allocator.flow.labels import Labels
from allocator.tracing.calls import Op, Trace

Dim = tuple[int, int]
"""A value of a trace, and one of its dims."""


class Repeats:
    """Which dims of a trace's values are so, and of which others they were made."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._made_of: dict[Dim, tuple[Dim, ...]] = {}

    def __contains__(self, dim: Dim) -> bool:
        return dim in self._made_of

    def note(self, dim: Dim, made_of: Sequence[Dim] = ()) -> None:
        """It is one number along this dim, as it is along those that it was made of, and may be among."""
        before = self._made_of.get(dim, ()) if dim in made_of else ()
        self._made_of[dim] = (*before, *(each for each in made_of if each != dim))

    def passed(self, op: Op, dims: Sequence[int | None]) -> None:
        """What a call gives is one number along those of its dims that come from such dims of its first tensor.

        Args:
            op: a call that gives the numbers of its first tensor.
            dims: per dim of its result the dim that it was, None for others.
        """
        source, out = op.inputs()[0], op.outputs[0]
        if self._made_of and self._trace.root(out) not in self._written_apart:
            for dim, own in enumerate(dims):
                if own is not None and (source, own) in self:
                    self.note((out, dim), [(source, own)])

    def computed(self, index: int, made_of: Sequence[Sequence[Dim]], labels: Labels) -> None:
        """A value that was computed number by number is one along each dim of which all that made it is.

        Args:
            index: the value.
            made_of: per dim what made it, none where some of that is not so.
            labels: per dim the channels that it has by now.
        """
        for dim, dims in enumerate(made_of):
            if dims and self._trace.root(index) not in self._written_apart:
                self.note((index, dim), dims)
            elif labels[dim] is None:
                self._made_of.pop((index, dim), None)

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

    @cached_property
    def _written_apart(self) -> frozenset[int]:
        """Values that some call writes into not number by number, or where there are views of them."""
        root, viewed = self._trace.root, {value.base for value in self._trace.values}
        writes = [(op, i) for op in self._trace.ops if op.writes() for i in op.outputs]
        return frozenset(root(i) for op, i in writes if not op.operator.pointwise or root(i) in viewed)
