"""The report of an allocation, as `allocator.Result.report` gives it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult

from allocator.arguments import checked
from allocator.disk import PathLike
from allocator.reporting.collect import Allocated, outcome_of, summarise
from allocator.reporting.curve import pareto
from allocator.reporting.facts import Outcome, Point, Summary
from allocator.reporting.layers import LayersText, layers_of
from allocator.reporting.outcome_text import OutcomeText
from allocator.reporting.render import format_of, write
from allocator.shown import Shown


class Report(Shown):
    """What an allocation did: print it with rich, take `to_dict()`, or write it to a file.

    Args:
        result: from `allocate`.
    """

    def __init__(self, result: Allocated) -> None:
        self.result = result

    def __repr__(self) -> str:
        name, after = type(self.result.model).__name__, self.result.flops_after
        return f"<Report: {name}, {self.result.flops_before:,} FLOPs before, {after:,} after>"

    @functools.cached_property
    def outcome(self) -> Outcome:
        """What is printed, and what `to_dict` gives."""
        return outcome_of(self.result)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form: FLOPs (fvcore's), parameters, blocks, certificate, notes, seconds per stage."""
        return self.outcome.to_dict()

    def layers(self) -> LayersText:
        """Every layer: the channels it gives and its FLOPs, before and after; printable, `to_dict()` for machines."""
        result = self.result
        layers = [layer for _, layer in layers_of(result.graph, result.plan.kept)]
        return LayersText(layers, result.flops_before, result.flops_after)

    def summary(self, name: str | None = None, *, curve: bool = False) -> Summary:
        """The original network with what was kept of it, as the reports of `allocator-cli report` show it.

        Args:
            name: what to call the network; its class if left out.
            curve: also plan over the range of budgets, for the curve of budget against importance.
        """
        result = self.result
        graph, allocation = result.graph, result.allocation
        notes = [note for note in result.notes if note not in graph.notes]
        problem = result.plan.problem
        scores = None if problem is None else problem.scores
        points: Sequence[Point] = pareto(graph, scores) if curve and scores is not None else ()
        return summarise(
            graph,
            name or type(graph.model).__name__,
            scores=scores,
            allocation=allocation,
            kept=result.plan.kept,
            optimality=result.optimality,
            certificate=str(result.certificate),
            recovery=None if result.recovery is None else str(result.recovery),
            curve=points,
            uncounted=result.uncounted,
            notes=notes,
        )

    @checked
    def save(self, path: PathLike, *, name: str | None = None) -> None:
        """Write the report in the format of the suffix: .html, .md, .csv, .json or .txt.

        Raises:
            UnknownNameError: the suffix stands for no format; names a near one.
            FileError: the path cannot be written.
            MissingPackageError: HTML needs the extra `report`.
        """
        format = format_of(path)
        write(self.summary(name, curve=format == "html"), path, format)

    @checked
    def to_html(self, path: PathLike, *, name: str | None = None) -> None:
        """Write the report as one HTML page that opens offline, whatever the suffix; raises like `save`."""
        write(self.summary(name, curve=True), path, "html")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield OutcomeText(self.outcome)
