"""What a TorchScript forward computes with while it is followed: values by name, and what is known outright.

What is known is itself: a number, a text, a list, a module as a `Record`. What the input decides is a `Value`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from allocator.io.programs.torchscript_source import unsupported

NUMBERS = ("int", "float", "number", "bool")
"""Kinds of values that are one number."""
_SAMPLES = {
    "Tensor": torch.empty(1, device="meta"),
    "List[Tensor]": [torch.empty(1, device="meta")],
    "List[int]": [1],
    "float": 1.0,
    "bool": True,
}
_MOST_EFFORT = 2_000_000
"""The most steps for one file; densenet201 takes forty thousand."""


@dataclass(frozen=True)
class Value:
    """What a forward computes.

    Attributes:
        name: in the program; "" for a number that only decides something, and is not followed.
        kind: its type in the operator's schema, such as "Tensor", "List[Tensor]" or "int".
    """

    name: str
    kind: str


def undecided(kind: str) -> Value:
    """A number that the input decides and that is not followed, such as its number of dims."""
    return Value("", kind)


DTYPE = undecided("dtype")
"""The type of the input, which is that of the weights."""


class Effort:
    """How much more may be done for one file, whose loops and lists within lists may have no end."""

    def __init__(self) -> None:
        self.left = _MOST_EFFORT

    def spend(self, amount: int = 1) -> None:
        """Note this many steps.

        Raises:
            UnsupportedModelError: they are too many.
        """
        self.left -= amount
        if self.left < 0:
            raise unsupported(f"takes more than {_MOST_EFFORT:,} steps to follow")

    def weigh(self, value: Any) -> None:
        """Note a step for every entry of a list, and of those in it, as often as they are reached.

        A list that holds another one twice, which holds a third twice, is small and still takes for ever to walk.
        """
        waiting = [value]
        while waiting:
            inside = waiting.pop()
            if isinstance(inside, dict):
                inside = list(inside.values())
            if isinstance(inside, (list, tuple)):
                self.spend(len(inside))
                waiting.extend(inside)


def is_computed(value: Any) -> bool:
    """Whether a tensor, or anything that the input decides, is in this."""
    if isinstance(value, (list, tuple)):
        return any(is_computed(entry) for entry in value)
    return isinstance(value, (Value, torch.Tensor))


def is_undecided(value: Any) -> bool:
    """Whether this is a number that the input decides and that is not followed."""
    return isinstance(value, Value) and not value.name


def is_followed(value: Any) -> bool:
    """Whether this is a tensor, or a list, that the forward computes."""
    return isinstance(value, Value) and bool(value.name) and value.kind not in NUMBERS


def is_number(value: Any) -> bool:
    """Whether this is one number, known or not."""
    if isinstance(value, torch.Tensor):
        return value.dim() == 0
    if isinstance(value, Value):
        return value.kind in NUMBERS
    return isinstance(value, (int, float))


def sample_of(value: Any) -> Any:
    """A value of the same kind, to choose an operator's overload by."""
    if isinstance(value, (list, tuple)):
        return [sample_of(entry) for entry in value]
    return _SAMPLES.get(value.kind, 1) if isinstance(value, Value) else value
