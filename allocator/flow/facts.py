"""What the operator rules note of a model: what goes together, what must stay, what writes and reads its neurons.

`Tie`, `Frozen`, `AtLeast`, `Multiple` and `Even` are the constraints of a plan. Whatever forbids something says so with
one of these, whether a rule found it, a repair, or the caller asked for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np

from allocator.flow.labels import FROZEN

JOINT = "a norm over the channels mixes them all"
"""Why channels stay under a norm over them, unless norms are "loose"."""

NO_RULE = "no rule for this operator"
"""Why channels stay that an operator touches of which nothing is known."""


class Tie(NamedTuple):
    """Slots in the same place of two arrays go together; `op` is the call that asks for it, -1 for none."""

    a: np.ndarray
    b: np.ndarray
    op: int = -1


class Frozen(NamedTuple):
    """Slots that must stay, because of what happens in a module ("" for the model, or the caller)."""

    label: np.ndarray
    module: str
    reason: str


class AtLeast(NamedTuple):
    """At least `minimum` of these slots must stay, because of what happens in a module."""

    label: np.ndarray
    module: str
    minimum: int = 1


class Multiple(NamedTuple):
    """How many of these slots stay is a multiple of `of`, because of what runs in a module."""

    label: np.ndarray
    module: str
    of: int


class Even(NamedTuple):
    """Slots of which there are equally many each, as an average is taken over them, because of what a module does."""

    label: np.ndarray
    module: str
    reason: str


class Written(NamedTuple):
    """Slots of neurons that a parameter writes, in a module."""

    label: np.ndarray
    module: str


class Gamma(NamedTuple):
    """Slots that a norm's vector scales, and the vector's name."""

    label: np.ndarray
    name: str


@dataclass(frozen=True)
class Attribute:
    """A module attribute that a forward reads as the size of tensors.

    Attributes:
        module: path of the module.
        name: attribute name.
        pieces: label arrays whose kept counts are the attribute's new value; one piece, or one per part.
        declared: an adapter says what it counts; it follows whether the forward reads it or not.
    """

    module: str
    name: str
    pieces: tuple[np.ndarray, ...]
    declared: bool = False


@dataclass
class Facts:
    """What the rules noted, over one or several traces of a model.

    Attributes:
        ties: what goes together.
        computed_ties: those of them that lie in weights which the forward computes from others.
        frozen: what must stay.
        at_least: of what some must stay.
        multiples: of what a multiple of a number must stay, or all.
        even: what a wider network has equally many of each.
        written: neurons, by the parameters that write them; only these can be removed.
        read: slots of parameters along which they are contracted with an activation.
        multiplied: slots of activations that are contracted with one another, where no weight reads them.
        gammas: what scales channels.
        attributes: sizes that modules hold.
        groups: per weight of a grouped layer whose groups come and go whole, one slot per group.
        picks: per buffer that names channels, the labels of the dim that it picks them from.
        refused: operators without a rule, with the modules that call them.
        advice: per class of module, what stays because of sizes that its forward reads, and what could be done.
    """

    ties: list[Tie] = field(default_factory=list)
    computed_ties: list[Tie] = field(default_factory=list)
    frozen: list[Frozen] = field(default_factory=list)
    at_least: list[AtLeast] = field(default_factory=list)
    multiples: list[Multiple] = field(default_factory=list)
    even: list[Even] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)
    read: list[np.ndarray] = field(default_factory=list)
    multiplied: list[np.ndarray] = field(default_factory=list)
    gammas: list[Gamma] = field(default_factory=list)
    attributes: list[Attribute] = field(default_factory=list)
    groups: dict[str, np.ndarray] = field(default_factory=dict)
    picks: dict[str, np.ndarray] = field(default_factory=dict)
    refused: dict[str, list[str]] = field(default_factory=dict)
    advice: dict[str, str] = field(default_factory=dict)

    def with_others(self, others: Iterable[Facts], component: np.ndarray) -> Facts:
        """These facts and what other forwards of the model ask for beyond them; these themselves where that is nothing.

        Args:
            others: what was noted of the other forwards.
            component: (slots,) which of them go together by these facts, that of `FROZEN` for those that must stay.
        """
        added = [self._beyond(other, component) for other in others]
        if not any(any(vars(each).values()) for each in added):
            return self
        merged: dict[str, Any] = {name: value.copy() for name, value in vars(self).items()}
        for each in added:
            for name, value in vars(each).items():
                merged[name] = {**value, **merged[name]} if isinstance(value, dict) else [*merged[name], *value]
        return Facts(**merged)

    def _beyond(self, other: Facts, component: np.ndarray) -> Facts:
        """What another forward asks for beyond these facts."""
        loose = _apart(other.ties, component)
        computed = {id(tie) for tie in other.computed_ties}
        attributes = {(each.module, each.name) for each in self.attributes}
        return Facts(
            ties=[tie._replace(op=-1) for tie in loose],  # a tie's call is one of the first forward's
            computed_ties=[tie._replace(op=-1) for tie in loose if id(tie) in computed],
            frozen=[each for each in other.frozen if (component[each.label] != component[FROZEN]).any()],
            at_least=_unknown(self.at_least, other.at_least),
            even=_unknown(self.even, other.even),
            written=_unknown(self.written, other.written),
            read=_beyond_slots(self.read, other.read, len(component)),
            multiplied=_beyond_slots(self.multiplied, other.multiplied, len(component)),
            gammas=_unknown(self.gammas, other.gammas),
            attributes=[each for each in other.attributes if (each.module, each.name) not in attributes],
            groups={name: label for name, label in other.groups.items() if name not in self.groups},
            picks={name: label for name, label in other.picks.items() if name not in self.picks},
            refused={name: paths for name, paths in other.refused.items() if name not in self.refused},
            advice={kind: text for kind, text in other.advice.items() if kind not in self.advice},
        )


F = TypeVar("F", AtLeast, Even, Written, Gamma)


def _apart(ties: list[Tie], component: np.ndarray) -> list[Tie]:
    """Ties of what does not go together yet."""
    if not ties:
        return []
    # All at once first: of most networks, further forwards tie nothing that the first did not.
    a = np.concatenate([tie.a.reshape(-1) for tie in ties])
    b = np.concatenate([tie.b.reshape(-1) for tie in ties])
    if np.array_equal(component[a], component[b]):
        return []
    return [tie for tie in ties if not np.array_equal(component[tie.a], component[tie.b])]


def _unknown(own: list[F], further: list[F]) -> list[F]:
    """Those that one does not have oneself; of a batch, heads are told as often as there are samples."""
    known = {_key(fact, fact.label) for fact in own}
    fresh = [fact for fact in further if _key(fact, fact.label) not in known]
    if fresh:
        known = {_key(fact, np.unique(fact.label)) for fact in own}
    return [fact for fact in fresh if _key(fact, np.unique(fact.label)) not in known]


def _key(fact: AtLeast | Even | Written | Gamma, label: np.ndarray) -> tuple[object, ...]:
    return (label.tobytes(), *fact[1:])


def _beyond_slots(own: list[np.ndarray], further: list[np.ndarray], total: int) -> list[np.ndarray]:
    """Those of these arrays of slots that hold one that is in none of one's own."""
    known = np.zeros(total, dtype=bool)
    for label in own:
        known[label] = True
    return [label for label in further if not known[label].all()]
