"""The table of operator rules: how channel labels pass through each ATen operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from ..flow import Flow
    from ..tracing import Op

Rule = Callable[["Flow", "Op"], None]
R = TypeVar("R", bound=Rule)

RULES: dict[str, Rule] = {}
_KNOWN_NAMESPACES = ("aten", "torchvision")


def rule(*names: str) -> Callable[[R], R]:
    """Register a function as the rule of the named operators (all their overloads).

    Args:
        names: operator names as in `torch.ops.aten`, or `torchvision::roi_align` for another namespace.

    Raises:
        ValueError: a name has a rule already, or is no operator of this torch.
    """

    def register(function: R) -> R:
        for name in names:
            if name in RULES:
                raise ValueError(f"operator {name} has a rule already: {RULES[name].__name__}")
            if "::" not in name and not hasattr(torch.ops.aten, name):
                raise ValueError(f"aten has no operator {name}")
            RULES[name.rpartition("::")[2]] = function
        return function

    return register


def find_rule(op: Op) -> Rule | None:
    """The rule for a recorded call, or None where there is none."""
    known = RULES.get(op.name)
    if known is None and op.name.endswith("_"):
        known = RULES.get(op.name[:-1])
    if known is None and torch.Tag.pointwise in op.target.tags:
        return RULES["add"]
    return known
