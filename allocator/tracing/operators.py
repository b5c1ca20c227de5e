"""What torch says of an operator, read off its schema once."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Operator:
    """One overload.

    Attributes:
        name: its name without namespace or overload, such as `convolution`.
        arguments: position and default of each argument, by its name.
        writes: whether it changes one of its inputs in place.
        gives_views: whether a result shares the memory of an input.
        lists_views: whether it takes its first input apart into a list of views.
        reshapes: whether it gives an input another shape in place.
    """

    name: str
    arguments: dict[str, tuple[int, Any]]
    writes: bool
    gives_views: bool
    lists_views: bool
    reshapes: bool


@functools.cache
def operator_of(target: Any) -> Operator:
    """What is known of an overload such as `aten.convolution.default`."""
    schema = target._schema
    first = schema.arguments[0].alias_info if schema.arguments else None
    return Operator(
        name=schema.name.split("::")[1],
        arguments={a.name: (i, a.default_value) for i, a in enumerate(schema.arguments)},
        writes=bool(schema.is_mutable),
        gives_views=any(result.alias_info is not None for result in schema.returns),
        lists_views=first is not None and "*" in first.after_set,
        reshapes=torch.Tag.inplace_view in target.tags,
    )
