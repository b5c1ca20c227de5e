"""``allocator-cli report``: what a model is made of, and what a budget would leave of it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.cli.arguments import (
    UsageError,
    add_budget_options,
    add_command,
    add_input_options,
    add_latency_options,
    add_layers_option,
    add_model_options,
    add_plan_options,
    add_report_options,
    budgets,
    plan_options,
)
from allocator.cli.data import add_data_options, data_options
from allocator.cli.next_step import command
from allocator.cli.opening import example_inputs, measured, open_model
from allocator.cli.outputs import asked_format, check_outputs, check_report
from allocator.cli.talk import Talk
from allocator.cli.words import in_shell
from allocator.errors import CriterionError

if TYPE_CHECKING:
    from allocator.cost.latency import Latency
    from allocator.fitting.fit import Fitted
    from allocator.graph.channel_graph import ChannelGraph
    from allocator.reporting import Point, Summary
    from allocator.scoring.scores import Scores
    from allocator.settings import Settings

_EXAMPLE = """\
  allocator-cli report torchvision:googlenet
  allocator-cli report model.pt --flops 60% -o report.html
  allocator-cli report model.pt --params 10M --data photographs/ --include 'backbone*' --multiple 8
  allocator-cli report model.pt --flops 60% --criterion fpgm --policy priced
  allocator-cli report small.safetensors --format csv -o small.csv
  allocator-cli report model.pt --input-size 1x3x64x64 --json"""


def register(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(commands, "report", "list a model's blocks, branches, scales, neurons and FLOPs", _EXAMPLE)
    parser.add_argument("model", metavar="MODEL", help="a file or a name")
    group = parser.add_argument_group("budgets, to also show what they would leave")
    add_budget_options(group, without=["latency"])
    add_report_options(
        parser,
        output="write the report here: .txt, .json, .csv, .html or .md",
        plot="draw each block's neurons per scale: .png, .svg or .pdf",
    )
    parser.add_argument(
        "--blocks", type=_limit, default=None, metavar="N", help="list at most N blocks, 0 for all (default: 64)"
    )
    add_layers_option(parser)
    add_plan_options(parser.add_argument_group("plan"))
    add_data_options(parser)
    add_latency_options(parser)
    add_input_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=run)


def _limit(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of blocks; 0 stands for all")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Trace the model, plan if there is a budget, and print or write the report."""
    format = asked_format(args)
    if args.layers and format not in ("rich", "json"):
        raise UsageError(f"--layers lists them as text, and --json holds them; {format} does not")
    check_report(None, args.plot)
    check_outputs(args, args.output, args.plot)
    talk = Talk(args)
    summary = _summary(args, talk, format)
    if args.plot is not None:
        from allocator.reporting.pictures import draw_summary

        with talk.stage(f"drawing {args.plot}"):
            draw_summary(summary, args.plot)
    _show(args, talk, summary, format)
    return 0


def _summary(args: argparse.Namespace, talk: Talk, format: str) -> Summary:
    model = open_model(args.model, args, talk)
    from allocator.io.files import RESULT_SUFFIX, load_allocation
    from allocator.model_checks import check_model
    from allocator.pipeline.choice import budgets_of, settled
    from allocator.pipeline.model import trace_model
    from allocator.reporting import with_origin
    from allocator.settings import Limits, Settings

    settings = Settings(**plan_options(args))
    seen = data_options(args, model)
    with talk.stage("tracing"):
        graph = trace_model(check_model(model), example_inputs(args, model), settings, seen.get("data"))
        if budgets(args):
            graph, _ = settled(graph, budgets_of(graph, Limits(**budgets(args))), settings)
    summary = _collected(args, talk, graph, settings, seen, format)
    if Path(args.model).suffix == RESULT_SUFFIX and Path(args.model).exists():
        summary = with_origin(summary, load_allocation(args.model))
    return summary


def _collected(
    args: argparse.Namespace, talk: Talk, graph: ChannelGraph, settings: Settings, seen: dict[str, Any], format: str
) -> Summary:
    """With what a budget would leave, where one is given, and with the curve, where it is drawn."""
    from allocator.reporting import pareto, summarise

    notes: list[str] = []
    scores = _scores(args, talk, graph, settings, seen, notes)
    found = _choice(args, talk, graph, settings, scores)
    curve: tuple[Point, ...] = ()
    if format == "html" and scores is not None:
        with talk.stage("drawing the curve of budgets") as update:
            curve = pareto(graph, scores, progress=update)
    latency = measured(graph.model, args.model, graph.inputs, args, talk)
    with talk.stage("collecting"):
        if found is None:
            return summarise(graph, args.model, scores=scores, curve=curve, notes=notes, latency=latency)
        return summarise(
            found.graph,
            args.model,
            scores=None if scores is None else scores.on(graph, found.graph),
            allocation=found.allocation,
            kept=found.plan.kept,
            optimality=found.plan.optimality(),
            curve=curve,
            notes=[*notes, *map(in_shell, found.notes)],
            latency=latency,
            latency_kept=_latency_kept(args, talk, found),
        )


def _choice(
    args: argparse.Namespace, talk: Talk, graph: ChannelGraph, settings: Settings, scores: Scores | None
) -> Fitted | None:
    """What a budget keeps, where one is given."""
    from allocator.pipeline.choice import budgets_of, choose
    from allocator.settings import Limits

    if not budgets(args):
        return None
    with talk.stage("planning"):
        return choose(graph, budgets_of(graph, Limits(**budgets(args))), settings, scores)


def _scores(
    args: argparse.Namespace,
    talk: Talk,
    graph: ChannelGraph,
    settings: Settings,
    seen: dict[str, Any],
    notes: list[str],
) -> Scores | None:
    """Of all neurons; a model that nothing ranks is no error where nothing has to be chosen."""
    from allocator.api import score

    try:
        with talk.stage("scoring") as update:
            return score(graph, settings.criterion, **seen, progress=update)
    except CriterionError as error:
        if budgets(args):
            raise
        notes.append(in_shell(str(error)))
        return None


def _latency_kept(args: argparse.Namespace, talk: Talk, found: Fitted) -> Latency | None:
    from allocator.api import rewrite

    if not args.latency:
        return None
    small = rewrite(found.graph.model, found.allocation)
    return measured(small, "what is left of it", found.graph.inputs, args, talk)


def _show(args: argparse.Namespace, talk: Talk, summary: Summary, format: str) -> None:
    from rich.console import Group, RenderableType
    from rich.text import Text

    from allocator.reporting import as_text, write
    from allocator.reporting.layers import LayersText
    from allocator.reporting.rows import LIMIT
    from allocator.reporting.text import SummaryText

    limit: int | None = LIMIT
    if args.blocks is not None:
        limit = args.blocks or None  # 0 stands for all
    layers: list[RenderableType] = []
    if args.layers:
        layers = [Text(), LayersText(summary.layers, summary.totals.flops, _left(summary))]
    if args.output is not None:
        with talk.stage(f"writing {args.output}"):
            write(summary, args.output, format, limit)
        talk.announce(f"report written to {args.output}")
    elif format == "rich":
        talk.result(Group(SummaryText(summary, limit), *layers), {})
    else:
        with talk.stage(f"rendering {format}"):
            text = as_text(summary, format, limit)
        sys.stdout.write(text)
    if format == "rich" and summary.neurons:
        budget = {} if budgets(args) else {"flops": "60%"}
        talk.announce(f"next: {command('allocate', args, **budget, output='small.pt', plot=None)}")


def _left(summary: Summary) -> int:
    return summary.totals.flops if summary.budget is None else summary.budget.totals.flops
