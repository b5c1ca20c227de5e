"""Many budgets at once: one trace, one scoring, allocations that lie within one another."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import nn

from allocator.arguments import checked
from allocator.clock import Progress, bar
from allocator.cost.budget import Budgets
from allocator.disk import PathLike, write_text
from allocator.errors import InputError, SweepError, as_given, in_words, plural
from allocator.fitting.fit import Fitted
from allocator.graph.channel_graph import ChannelGraph
from allocator.model_checks import check_model
from allocator.pipeline.choice import budgets_of, choose, counted_on, settled
from allocator.pipeline.model import trace_model
from allocator.pipeline.trial import suitable_scores
from allocator.reporting.charts import lines
from allocator.reporting.pictures import save
from allocator.reporting.words import percent, short
from allocator.rewriting.allocation import Allocation
from allocator.rewriting.rewrite import rewrite
from allocator.scoring.registry import Data
from allocator.scoring.scores import Scores
from allocator.settings import Limits, Settings
from allocator.shown import Shown

Evaluate = Callable[[nn.Module], float | Mapping[str, float]]


@dataclass(frozen=True)
class Point:
    """One budget of a sweep.

    Attributes:
        asked: the budget, in the metric's unit.
        cost: what the plan costs of it.
        share: that cost over the network's own.
        importance: share of all scores that is kept.
        allocation: the choice as data.
        values: what the caller's function gave for the smaller network, by name.
    """

    asked: float
    cost: int
    share: float
    importance: float
    allocation: Allocation
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep(Shown):
    """Allocations for many budgets, the largest first; each keeps a part of what the one before it keeps.

    Attributes:
        metric: what was limited.
        unit: of the metric.
        points: one per budget.
    """

    metric: str
    unit: str
    points: tuple[Point, ...]

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, without the allocations."""
        rows = [
            {"asked": p.asked, "cost": p.cost, "share": p.share, "importance": p.importance, **p.values}
            for p in self.points
        ]
        return {"metric": self.metric, "unit": self.unit, "points": rows}

    def to_csv(self, path: PathLike | None = None) -> str:
        """One line per budget; also written to a file where a path is given.

        Raises:
            FileError: the path cannot be written.
        """
        rows = self.to_dict()["points"]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]) if rows else ["asked"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        if path is not None:
            write_text(path, text.getvalue())
        return text.getvalue()

    @checked
    def plot(self, path: PathLike, *, title: str = "") -> None:
        """Draw importance, and what `evaluate` gave, over the share that is kept: .png, .svg or .pdf.

        Raises:
            UnknownNameError: another suffix.
            MissingPackageError: the package that draws is not installed.
            FileError: the path cannot be written.
        """
        rows = []
        for point in self.points:
            for name, value in {"importance": point.importance, **point.values}.items():
                rows.append({"name": name, "x": point.share, "y": value})
        save(lines(rows, title=title, x=f"share of {self.unit} kept", y=""), path)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names = list(dict.fromkeys(name for point in self.points for name in point.values))
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
        for title in ("asked", self.unit, "share", "importance", *names):
            table.add_column(title, justify="right", no_wrap=True)
        for point in self.points:
            values = [f"{point.values[name]:.4g}" if name in point.values else "" for name in names]
            table.add_row(
                short(point.asked), f"{point.cost:,}", percent(point.share), percent(point.importance), *values
            )
        yield table


def sweep_model(
    model: nn.Module,
    asked: Mapping[str, Sequence[float | str] | None],
    example_inputs: Any,
    settings: Settings,
    *,
    data: Data | None = None,
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Allocations for many budgets; see `allocator.sweep`.

    Args:
        model: the trained network; not changed.
        asked: the budgets, by the name of their metric; of one metric.
        example_inputs: as the caller gave them.
        settings: how neurons are chosen.
        data: what criteria may look at.
        evaluate: called with every smaller network.
        progress: called with how far it is.
    """
    given = {name: figures for name, figures in asked.items() if figures is not None}
    if len(given) != 1:
        raise InputError("a sweep is over budgets of one metric: pass flops=['80%', '60%'], or another metric alone")
    ((name, figures),) = given.items()
    if not isinstance(figures, Sequence) or isinstance(figures, str) or not figures:
        raise InputError(
            f"{name}={as_given(figures)} is no list of budgets: pass several, such as ['80%', '60%', '40%']"
        )
    graph = trace_model(check_model(model), example_inputs, settings, None if data is None else data.loader)
    budgets = [budgets_of(graph, Limits(**{name: figure})) for figure in figures]
    budgets.sort(key=lambda each: each.first.limit, reverse=True)
    traced, (graph, _) = graph, settled(graph, budgets[-1], settings)
    budgets = [counted_on(graph, traced, each) for each in budgets]
    scores, _ = suitable_scores(graph, budgets[-1], settings, data)
    metric = budgets[0].first.metric
    done = Sweep(metric.name, metric.unit, ())
    with bar("planning", progress, total=len(budgets)) as advance:
        for budget, fitted in zip(budgets, _nested(graph, scores, budgets, settings), strict=True):
            said = f"{budget.first.limit:,.0f} {metric.unit}"
            point = _point(graph, fitted, scores, budget, _evaluated(model, fitted, evaluate, said, done))
            done = replace(done, points=(*done.points, point))
            advance(said)
    return done


def _nested(graph: ChannelGraph, scores: Scores, budgets: Sequence[Budgets], settings: Settings) -> Iterator[Fitted]:
    """A plan per budget, the largest first, each within the one before.

    The smallest is fitted first: what it shows not to fit stays in all of them, so that repairs are made once.
    """
    repaired = choose(graph, budgets[-1], settings, scores).graph
    gone = np.zeros(graph.slots.total, dtype=bool)
    for each in budgets:
        fitted = choose(repaired, each, settings, scores.on(graph, repaired), gone=gone)
        gone |= ~fitted.graph.stays(fitted.plan.kept)
        yield fitted


def _evaluated(
    model: nn.Module, fitted: Fitted, evaluate: Evaluate | None, budget: str, done: Sweep
) -> Mapping[str, float]:
    """What the caller's function gives for the network of a budget, named in words; `done`: those before it."""
    if evaluate is None:
        return {}
    small = rewrite(model, fitted.allocation)
    kept = f"; the error's .done has the {plural(len(done), 'budget')} before it" if done.points else ""
    try:
        found = evaluate(small)
    except Exception as error:
        raise SweepError(f"evaluate raised {in_words(error)}, given the network of {budget}{kept}", done) from error
    named = found if isinstance(found, Mapping) else {"value": found}
    try:
        return {str(name): float(value) for name, value in named.items()}
    except (TypeError, ValueError) as error:
        said = f"evaluate gave {found!r:.200} for the network of {budget}: expected a number, or numbers by name"
        raise SweepError(f"{said}{kept}", done) from error


def _point(graph: ChannelGraph, fitted: Fitted, scores: Scores, budgets: Budgets, values: Mapping[str, float]) -> Point:
    kept, metric = fitted.plan.kept, fitted.plan.budgets.first.metric
    ranked = np.nan_to_num(scores.on(graph, fitted.graph).values)
    whole, cost = float(ranked.sum()), metric.value(kept)
    importance = float(ranked[kept].sum()) / whole if whole > 0 else 1.0
    return Point(budgets.first.limit, cost, cost / metric.whole, importance, fitted.allocation, values)
