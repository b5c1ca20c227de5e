"""How channels are followed: what the caller asked for, and what repairs found that a forward needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from allocator.tracing.calls import Trace


class Place(NamedTuple):
    """A call by its module, its operator's name, and which of its calls there it is; None for all of them.

    By its place the same call is found again in the trace of a rewritten model. What it "reads" or "gives" may be meant
    alone, or a dim of a tensor that it gives ("gives 0, 2"); "" for all.
    """

    module: str
    operator: str
    call: int | None = None
    part: str = ""


Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Slots, and those that go with them, place by place."""


def gives_dim(which: int, dim: int) -> str:
    """The part of a place that is one dim of one of the tensors that the call gives."""
    return f"gives {which}, {dim}"


def places_of(trace: Trace) -> list[Place]:
    """The place of every call."""
    calls_so_far: dict[tuple[str, str], int] = {}
    places = []
    for op in trace.ops:
        count = calls_so_far.get((op.module, op.name), 0)
        calls_so_far[op.module, op.name] = count + 1
        places.append(Place(op.module, op.name, count))
    return places


@dataclass(frozen=True)
class Options:
    """How channels are followed.

    Attributes:
        groups: "whole" removes whole groups of a grouped convolution, "width" the same places of every group; "auto" is
            "whole" where that can meet what is asked for.
        norms: "exact" keeps channels under a norm over channels (of a group norm, whole groups may go), "loose" lets
            them go, "even" is for wider networks: there are equally many of each.
        exclude: what stays as it is: module or parameter name patterns, module classes, or modules.
        include: what alone may change, in the same words; all of the model where there is none.
        same: layers whose outputs stay alike, in the same words; one group of layers per item.
        renumbers: buffers that name channels follow those that stay; else what they pick from stays.
        equal_parts: modules whose split parts must stay equal (found by repairs).
        frozen: calls whose neurons stay (found by repairs).
        tied: slots that go together, place by place, since one attribute counts both (found by repairs).
        heads: per view that splits a dim into heads of an attention, which go whole, the dim of its result that
            counts them; None where this has not been looked for yet.
        channels: per view that splits a dim into channels and pixels, the dim of its result that holds the channels.
    """

    groups: str = "whole"
    norms: str = "exact"
    exclude: tuple[Any, ...] = ()
    include: tuple[Any, ...] = ()
    same: tuple[Any, ...] = ()
    renumbers: bool = True
    equal_parts: frozenset[str] = frozenset()
    frozen: frozenset[Place] = frozenset()
    tied: frozenset[Pair] = frozenset()
    heads: dict[Place, int] | None = field(default=None, hash=False)
    channels: dict[Place, int] = field(default_factory=dict, hash=False)

    @property
    def grows(self) -> bool:
        """Whether neurons are to be added."""
        return self.norms == "even"

    def freezes(self, place: Place, part: str) -> bool:
        """Whether the neurons that this call "reads", or those that it "gives", stay."""
        ways = (place._replace(call=call, part=which) for call in (place.call, None) for which in (part, ""))
        return not self.frozen.isdisjoint(ways)

    def freezing(self, places: Iterable[Place]) -> Options:
        """With these calls frozen as well."""
        return replace(self, frozen=self.frozen | frozenset(places))

    def tying(self, pairs: Iterable[Pair]) -> Options:
        """With these slots tied as well."""
        return replace(self, tied=self.tied | frozenset(pairs))

    def untying(self, pairs: Iterable[Pair]) -> Options:
        """Without these slots tied."""
        return replace(self, tied=self.tied - frozenset(pairs))

    def equalising(self, modules: Iterable[str]) -> Options:
        """With the split parts in these modules equal as well."""
        return replace(self, equal_parts=self.equal_parts | frozenset(modules))
