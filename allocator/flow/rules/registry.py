"""The table of operator rules: how channel labels pass through each ATen operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from allocator.flow.flow import Flow
    from allocator.tracing.record import Op

Rule = Callable[["Flow", "Op"], None]
R = TypeVar("R", bound=Rule)

RULES: dict[str, Rule] = {}
_OTHER_NAMESPACES = ("torchvision",)


def rule(*names: str, recent: tuple[str, ...] = ()) -> Callable[[R], R]:
    """Register a function as the rule of the named operators (all their overloads).

    Args:
        names: operator names as in `torch.ops.aten`, or `torchvision::roi_align` for another namespace.
        recent: names that the oldest torch this package runs on does not have; there they are passed over.

    Raises:
        ValueError: a name has a rule already, or is no operator of this torch.
    """

    def register(function: R) -> R:
        for name in (*names, *(n for n in recent if hasattr(torch.ops.aten, n))):
            if name in RULES:
                raise ValueError(f"operator {name} has a rule already: {RULES[name].__name__}")
            namespace, _, _ = name.rpartition("::")
            if namespace and namespace not in _OTHER_NAMESPACES:
                raise ValueError(f"namespace {namespace} of {name} is none of {', '.join(_OTHER_NAMESPACES)}")
            if not namespace and not hasattr(torch.ops.aten, name):
                raise ValueError(f"aten has no operator {name}")
            RULES[name] = function
        return function

    return register


def find_rule(op: Op) -> Rule | None:
    """The rule for a recorded call, or None where there is none; one that works in place has its twin's."""
    name = op.target._schema.name.removeprefix("aten::")
    known = RULES.get(name)
    if known is None and name.endswith("_"):
        known = RULES.get(name[:-1])
    if known is None and torch.Tag.pointwise in op.target.tags and _gives_tensors(op.target):
        return RULES["add"]
    return known


def _gives_tensors(target: Any) -> bool:
    """`equal` is tagged as pointwise, though it gives one bool for all."""
    return all("Tensor" in str(result.type) for result in target._schema.returns)
