"""What the operator rules note of a model: what goes together, what must stay, what writes and reads its neurons.

`Tie`, `Frozen` and `AtLeast` are the constraints of a plan. Whatever forbids something says so with one of these,
whether a rule found it, a repair, or the caller asked for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


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
        written: neurons, by the parameters that write them; only these can be removed.
        read: slots of parameters along which they are contracted with an activation.
        multiplied: slots of activations that are contracted with one another, where no weight reads them.
        gammas: what scales channels.
        attributes: sizes that modules hold.
        groups: per weight of a grouped layer whose groups come and go whole, one slot per group.
        refused: operators without a rule, with the modules that call them.
        advice: per class of module, what stays because of sizes that its forward reads, and what could be done.
    """

    ties: list[Tie] = field(default_factory=list)
    computed_ties: list[Tie] = field(default_factory=list)
    frozen: list[Frozen] = field(default_factory=list)
    at_least: list[AtLeast] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)
    read: list[np.ndarray] = field(default_factory=list)
    multiplied: list[np.ndarray] = field(default_factory=list)
    gammas: list[Gamma] = field(default_factory=list)
    attributes: list[Attribute] = field(default_factory=list)
    groups: dict[str, np.ndarray] = field(default_factory=dict)
    refused: dict[str, list[str]] = field(default_factory=dict)
    advice: dict[str, str] = field(default_factory=dict)
