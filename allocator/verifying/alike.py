"""Forwards in which one number stands in for all that a call draws at random."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from allocator.torch_private import TorchDispatchMode
from allocator.tracing.operators import operator_of
from allocator.tracing.seeds import Seeds


class Alike(TorchDispatchMode):
    """Calls give what they could have drawn, which hangs on no number of channels; what the forward seeded stays.

    Attributes:
        stood_in: how many of them did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stood_in = 0
        self._seeds = Seeds()

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """For one forward; a number is drawn first, so that one which seeds a generator is told from others."""
        torch.rand(1)
        self._seeds = Seeds()
        with self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, operator = kwargs or {}, operator_of(func)
        if not operator.draws or operator.declared.alike is None:
            return func(*args, **kwargs)
        given = operator.given(args, kwargs)
        if self._seeds.is_own(given):
            return func(*args, **kwargs)
        self.stood_in += 1
        value = operator.declared.alike(given)
        if isinstance(value, tuple):
            return value
        if operator.writes:
            return _written(args[0] if given.get("out") is None else given["out"], given, value)
        return _made(given, value)


def _written(target: torch.Tensor, given: dict[str, Any], value: Any) -> torch.Tensor:
    """The value in every place of what a call writes into."""
    if given.get("out") is target:
        target.resize_(_shape(given, value))
    return target.copy_(value) if isinstance(value, torch.Tensor) else target.fill_(value)


def _made(given: dict[str, Any], value: Any) -> torch.Tensor:
    """The value in every place of a tensor as the call would have given."""
    like = next((each for each in given.values() if isinstance(each, torch.Tensor)), torch.empty(0))
    asked = {name: given[name] for name in ("dtype", "device") if given.get(name) is not None}
    if isinstance(asked.get("dtype"), int):  # the default of a schema: a whole number
        asked["dtype"] = torch.int64
    return like.new_empty(_shape(given, value), **asked).copy_(torch.as_tensor(value))


def _shape(given: dict[str, Any], value: Any) -> Any:
    if given.get("size") is not None:
        return given["size"]
    return value.shape if isinstance(value, torch.Tensor) else given["self"].shape
