"""Operator rules by family. Importing this package fills the registry."""

from . import contraction, create, join, norm, pointwise, reduce, select, spatial, view
from .registry import RULES, find_rule, rule

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
