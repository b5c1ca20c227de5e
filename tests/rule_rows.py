"""Words that the table of operator rules is written in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from oracle import Case, Data

aten = torch.ops.aten
IMAGE = Data((2, 6, 4, 4), (1,))
FEATURES = Data((3, 6), (1,))
TOKENS = Data((2, 3, 6), (2,))
SIGNAL = Data((2, 6, 5), (1,))
VOLUME = Data((2, 4, 4, 4, 4), (1,))
WHOLE, WIDTH = {"groups": "whole"}, {"groups": "width"}
LOOSE = {"norms": "loose"}


def image(channels: int = 6, side: int = 4, *, dims: tuple[int, ...] = (1,)) -> Data:
    """(2, channels, side, side)."""
    return Data((2, channels, side, side), dims)


def case(run: Callable[..., Any], *data: Data, **more: Any) -> Case:
    """A `Case` with its activations as plain arguments."""
    return Case(run, data, **more)


def each(function: Callable[..., Any], *data: Data, **more: Any) -> list[Case]:
    """One case that applies a function to the activations alone."""
    return [case(lambda m, *x: function(*x), *data, **more)]
