"""``allocator-cli report``: what a model is made of, and what a budget would leave of it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.cli.arguments import (
    add_command,
    add_input_options,
    add_latency_options,
    add_model_options,
    add_plan_options,
    add_report_options,
    parse_flops,
    plan_options,
)
from allocator.cli.opening import example_inputs, measured, open_model
from allocator.cli.outputs import asked_format, check_outputs, check_report
from allocator.cli.talk import Talk
from allocator.errors import CriterionError

if TYPE_CHECKING:
    from allocator.graph.channel_graph import ChannelGraph
    from allocator.reporting import Point, Summary
    from allocator.rewriting.allocation import Allocation
    from allocator.scoring.scores import Scores

_EXAMPLE = """\
  allocator-cli report torchvision:googlenet
  allocator-cli report model.pt --flops 60% -o report.html
  allocator-cli report small.safetensors --format csv -o small.csv
  allocator-cli report model.pt --input-size 1x3x64x64 --json"""


def register(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(commands, "report", "list a model's blocks, branches, scales, neurons and FLOPs", _EXAMPLE)
    parser.add_argument("model", metavar="MODEL", help="a file or a name")
    parser.add_argument(
        "--flops", type=parse_flops, metavar="N", help="also show what this budget would leave: 4.2e9, 4.2G or 60%%"
    )
    add_report_options(
        parser,
        output="write the report here: .txt, .json, .csv, .html or .md",
        plot="draw each block's neurons per scale: .png, .svg or .pdf",
    )
    parser.add_argument(
        "--blocks", type=_limit, default=None, metavar="N", help="list at most N blocks, 0 for all (default: 64)"
    )
    add_plan_options(parser.add_argument_group("plan"))
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
    from allocator.api import trace
    from allocator.io.files import RESULT_SUFFIX, load_allocation
    from allocator.reporting import with_origin

    model = open_model(args.model, args, talk)
    with talk.stage("tracing"):
        graph = trace(model, example_inputs(args), **plan_options(args, "groups", "norms", "exclude"))
    summary = _collected(args, talk, graph, format)
    if Path(args.model).suffix == RESULT_SUFFIX and Path(args.model).exists():
        summary = with_origin(summary, load_allocation(args.model))
    return summary


def _collected(args: argparse.Namespace, talk: Talk, graph: ChannelGraph, format: str) -> Summary:
    """With what a budget would leave, where one is given, and with the curve, where it is drawn."""
    from allocator.api import rewrite
    from allocator.reporting import pareto, summarise
    from allocator.rewriting.kept import kept_by

    notes: list[str] = []
    scores, allocation = _choice(args, talk, graph, notes)
    curve: tuple[Point, ...] = ()
    if format == "html" and scores is not None:
        with talk.stage("drawing the curve of budgets") as update:
            curve = pareto(graph, scores, progress=update)
    latency = measured(graph.model, args.model, graph.inputs, args, talk)
    latency_kept = None
    if latency is not None and allocation is not None:
        latency_kept = measured(rewrite(graph.model, allocation), "what is left of it", graph.inputs, args, talk)
    with talk.stage("collecting"):
        return summarise(
            graph,
            args.model,
            scores=scores,
            allocation=allocation,
            kept=None if allocation is None else kept_by(graph, allocation),
            curve=curve,
            notes=notes,
            latency=latency,
            latency_kept=latency_kept,
        )


def _choice(
    args: argparse.Namespace, talk: Talk, graph: ChannelGraph, notes: list[str]
) -> tuple[Scores | None, Allocation | None]:
    """Scores of all neurons, and what a budget keeps of them, where one is given; adds to the notes."""
    from allocator.api import plan, score

    if args.flops is None:
        return _scores(args.criterion, talk, graph, notes), None
    with talk.stage("planning"):
        scores = None if args.criterion == "auto" else score(graph, args.criterion)
        allocation = plan(graph, scores, args.flops, **plan_options(args, "policy", "scope", "fill"))
        return scores or score(graph, allocation.criterion), allocation


def _scores(criterion: str, talk: Talk, graph: ChannelGraph, notes: list[str]) -> Scores | None:
    """Of all neurons; a model that nothing ranks is no error here."""
    from allocator.api import score

    try:
        with talk.stage("scoring"):
            return score(graph, criterion)
    except CriterionError as error:
        notes.append(str(error))
        return None


def _show(args: argparse.Namespace, talk: Talk, summary: Summary, format: str) -> None:
    from allocator.reporting import as_text, write
    from allocator.reporting.rows import LIMIT
    from allocator.reporting.text import SummaryText

    limit: int | None = LIMIT
    if args.blocks is not None:
        limit = args.blocks or None  # 0 stands for all
    if args.output is not None:
        with talk.stage(f"writing {args.output}"):
            write(summary, args.output, format, limit)
        talk.announce(f"report written to {args.output}")
    elif format == "rich":
        talk.result(SummaryText(summary, limit), {})
    else:
        with talk.stage(f"rendering {format}"):
            text = as_text(summary, format, limit)
        sys.stdout.write(text)
