"""Reports of models and of allocations: `collect` gathers what they say, the other modules show it."""

from allocator.reporting import forms  # noqa: F401 - registers what is shown of values
from allocator.reporting.collect import importance, summarise, with_origin
from allocator.reporting.curve import pareto
from allocator.reporting.facts import Budget, Point, Summary, Totals
from allocator.reporting.render import FORMATS, as_text, format_of, write
from allocator.reporting.schemas import schema

__all__ = [
    "FORMATS",
    "Budget",
    "Point",
    "Summary",
    "Totals",
    "as_text",
    "format_of",
    "importance",
    "pareto",
    "schema",
    "summarise",
    "with_origin",
    "write",
]
