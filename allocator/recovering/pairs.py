"""The same inputs on their way through both networks, which wait together at the same layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import nn

from allocator.errors import DataError
from allocator.modules import skeleton
from allocator.recovering.samples import Samples, size_of
from allocator.recovering.shelf import Shelf
from allocator.recovering.walk import Stop, Walk
from allocator.tracing.inputs import Inputs

Place = tuple[str, bool] | None
"""Where forwards wait: the weight of a layer, and whether at the sum after it; None at the end."""


@dataclass
class Pair:
    """Some inputs on their way through both networks.

    Attributes:
        original, small: the forwards. The original waits before a layer or sum and after it, the smaller one before it.
        watched: names of the weights to wait at; True for those whose turn comes at the sum that follows.
        count: how many inputs these are.
        held: back, or to be fitted.
        due: what is to be made of what the smaller network holds before it goes on.
    """

    original: Walk
    small: Walk
    watched: Mapping[str, bool]
    count: int
    held: bool
    due: Callable[[Stop], None] | None = None

    @contextmanager
    def at_next(self) -> Iterator[tuple[Place, Stop | None, Stop | None]]:
        """At the next layer whose turn it is: where that is, and how both forwards wait there; None each at the end.

        What the forwards hold is in memory within this, and what the original holds at the layer is let go after it.

        Raises:
            DataError: they are not at the same.
        """
        for walk in (self.original, self.small):
            walk.holdings.take()
        if self.due is not None and self.small.stop is not None:
            self.due(self.small.stop)
        self.due = None
        place = self._lead()
        yield place, self.original.stop, self.small.stop
        self.original.advance()
        for walk in (self.original, self.small):
            walk.holdings.lay()

    def _lead(self) -> Place:
        while True:
            self.small.advance()
            place = check_same([_place(self.original.stop), _place(self.small.stop)])
            self.original.advance()
            if place is None or place[1] == self.watched[place[0]]:
                return place
            self.original.advance()


def _place(stop: Stop | None) -> Place:
    return None if stop is None else (stop.weight, stop.meeting is not None)


def check_same(places: Sequence[Place]) -> Place:
    """Where all of them are.

    Raises:
        DataError: they are not all at the same.
    """
    if len(set(places)) > 1:
        said = ", ".join(sorted({place[0] if place else "the end" for place in places}))
        raise DataError(f"the forward takes another path for some inputs ({said}): nothing can be lined up")
    return places[0]


def set_out(
    model: nn.Module, small: nn.Module, watched: Mapping[str, bool], samples: Samples, shelf: Shelf, stack: ExitStack
) -> list[Pair]:
    """Both networks' forwards of all parts of the inputs, before the first layer.

    Args:
        model, small: in eval mode.
        watched: as of `Pair`.
        samples: inputs.
        shelf: where the forwards lay what they hold.
        stack: ends them.
    """
    pairs = []
    for held, parts in ((False, samples.seen), (True, samples.held)):
        for inputs in parts:
            original, cut = (_walk(each, inputs, watched, each is model, shelf, stack) for each in (model, small))
            original.advance()
            original.holdings.lay()
            pairs.append(Pair(original, cut, watched, size_of(inputs), held))
    return pairs


def _walk(
    model: nn.Module, inputs: Inputs, watched: Mapping[str, bool], after: bool, shelf: Shelf, stack: ExitStack
) -> Walk:
    """In modules that no other forward shares: one may keep in a module what it reads later."""
    walk = Walk(skeleton(model, lambda _, tensor: tensor), inputs, watched, after=after, shelf=shelf)
    stack.callback(walk.close)
    return walk
