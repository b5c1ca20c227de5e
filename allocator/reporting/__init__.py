"""Reports of models and of allocations: `collect` gathers what they say, the other modules show it."""

from .collect import importance, summarise, with_origin
from .curve import pareto
from .document import document, schema
from .facts import Budget, Point, Summary, Totals
from .render import FORMATS, as_text, format_of, write

__all__ = [
    "FORMATS",
    "Budget",
    "Point",
    "Summary",
    "Totals",
    "as_text",
    "document",
    "format_of",
    "importance",
    "pareto",
    "schema",
    "summarise",
    "with_origin",
    "write",
]
