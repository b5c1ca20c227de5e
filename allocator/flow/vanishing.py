"""Whether numbers are zero where the neurons that they were made of are zeroed.

Where two activations are multiplied and summed over, no weight reads what is dropped; the proof zeroes what writes it.
That shows what leaving it out does only if one of the two is zero then: the exponential of nothing is one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from allocator.flow.flow import Flow
from allocator.tracing.calls import Op, Ref

_SOMETHING = 0.7
"""In place of a number that may be any."""


def vanishes(flow: Flow, value: int, label: np.ndarray) -> bool:
    """Whether a value is zero where these neurons are; operators that are not known to do otherwise keep zeros."""
    return _Walk(flow, label).vanishes(value)


class _Walk:
    """Back from a value to what wrote the neurons."""

    def __init__(self, flow: Flow, label: np.ndarray) -> None:
        self.flow, self.slots = flow, set(label.reshape(-1).tolist())
        self.known: dict[int, bool] = {}

    def vanishes(self, value: int) -> bool:
        if value not in self.known:
            self.known[value] = True  # what works in place gives what it read
            made = [op for op in self.flow.makers.get(value, ()) if not op.declared.creates]
            self.known[value] = all(self._keeps_zero(op, value) for op in made)
        return self.known[value]

    def _keeps_zero(self, op: Op, value: int) -> bool:
        carrying = [i for i in op.inputs() if self.flow.is_activation(i) and self._carries(i)]
        if not carrying or op.arg("weight") is not None:  # a parameter wrote them, which is zeroed, or scales them
            return True
        zero = {i for i in carrying if self.vanishes(i)}
        if op.declared.multiplies:
            return bool(zero)
        return _of_zeros(op, zero) if op.operator.pointwise else len(zero) == len(carrying)

    def _carries(self, value: int) -> bool:
        labels = (label for label in self.flow.labels(value) if label is not None)
        return any(not self.slots.isdisjoint(label.reshape(-1).tolist()) for label in labels)


def _of_zeros(op: Op, zero: set[int]) -> bool:
    """Whether a call that works number by number gives zero of zeros and other numbers; also where it can't be run."""

    def given(item: Any) -> Any:
        if isinstance(item, Ref):
            return torch.full((1,), 0.0 if item.index in zero else _SOMETHING)
        return tuple(map(given, item)) if isinstance(item, tuple) else item

    try:
        out = op.target(*map(given, op.args), **{name: given(item) for name, item in op.kwargs.items()})
        first = out[0] if isinstance(out, tuple) else out
        return not bool(first.any())
    except (RuntimeError, TypeError, AttributeError, NotImplementedError):
        return True
