"""Operator rules by family. Importing this package fills the registry."""

from allocator.flow.rules import contraction, create, join, norm, pointwise, reduce, select, spatial, view
from allocator.flow.rules.registry import RULES, find_rule, rule

__all__ = [
    "RULES",
    "contraction",
    "create",
    "find_rule",
    "join",
    "norm",
    "pointwise",
    "reduce",
    "rule",
    "select",
    "spatial",
    "view",
]
