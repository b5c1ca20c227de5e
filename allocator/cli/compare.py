"""``allocator-cli compare``: two allocations or two models side by side."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.cli.arguments import UsageError, add_command, add_input_options, add_latency_options, add_model_options
from allocator.cli.opening import example_inputs, measured, open_model
from allocator.cli.outputs import asked_format, check_outputs
from allocator.cli.plan import check_report
from allocator.cli.talk import Talk

if TYPE_CHECKING:
    from allocator.reporting.compare import Comparison, Side

_EXAMPLE = """\
  allocator-cli compare learned.json even.json
  allocator-cli compare recipe:scalenet50-seed small.safetensors --plot both.svg
  allocator-cli compare torchvision:resnet50 torchvision:resnext50_32x4d --format csv -o both.csv"""


def register(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(commands, "compare", "show two allocations or two models side by side", _EXAMPLE)
    for name in ("a", "b"):
        help_ = "an allocation (.json), a saved result (.safetensors), or a model: a file or a name"
        parser.add_argument(name, metavar=name.upper(), help=help_)
    parser.add_argument("--all", action="store_true", help="also list the blocks that are alike")
    parser.add_argument(
        "--format", metavar="FORMAT", help="rich, json, csv, html or md (default: the suffix of FILE, else rich)"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write it here: .txt, .json, .csv, .html or .md")
    parser.add_argument("--plot", metavar="FILE", help="draw both side by side: .png, .svg or .pdf")
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")
    add_latency_options(parser)
    add_input_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read both, pair their branches, print or write the comparison."""
    format = asked_format(args)
    check_report(None, args.plot)
    check_outputs(args, args.output, args.plot)
    from allocator.reporting.compare import compare
    from allocator.reporting.compare_render import COMPARISONS
    from allocator.reporting.compare_text import ComparisonText

    talk = Talk(args)
    comparison = compare(_side(args.a, args, talk), _side(args.b, args, talk))
    if args.plot is not None:
        with talk.stage(f"drawing {args.plot}"):
            _draw(comparison, args.plot)
    if args.output is not None:
        from allocator.io.files import write_text

        write_text(args.output, COMPARISONS[format](comparison))
        talk.said(f"comparison written to {args.output}")
    elif format == "rich":
        talk.result(ComparisonText(comparison, everything=args.all), {})
    else:
        sys.stdout.write(COMPARISONS[format](comparison))
    return 0


def _side(spec: str, args: argparse.Namespace, talk: Talk) -> Side:
    """What an argument stands for: an allocation where the file holds one, else a model."""
    from allocator.api import trace
    from allocator.io.files import RESULT_SUFFIX, load_allocation
    from allocator.reporting import summarise
    from allocator.reporting.compare import side_of_allocation, side_of_summary

    if Path(spec).suffix == ".json":
        if args.latency:
            raise UsageError(f"{spec} is an allocation alone, which takes no time: give the model or the saved result")
        with talk.stage(f"reading {spec}"):
            return side_of_allocation(spec, load_allocation(spec))
    if Path(spec).suffix == RESULT_SUFFIX:
        with talk.stage(f"reading {spec}"):
            allocation = load_allocation(spec)
        inputs = example_inputs(args, allocation)
        time = measured(open_model(spec, args, talk), spec, inputs, args, talk) if args.latency else None
        return side_of_allocation(spec, allocation, time)
    model = open_model(spec, args, talk)
    with talk.stage(f"tracing {spec}"):
        graph = trace(model, example_inputs(args))
        summary = summarise(graph, spec)
    return side_of_summary(replace(summary, latency=measured(model, spec, graph.inputs, args, talk)))


def _draw(comparison: Comparison, path: str) -> None:
    """Each side's channels per branch of the blocks whose branches add up."""
    from allocator.errors import InputError
    from allocator.reporting.facts import SHARED
    from allocator.reporting.pictures import Panel, draw_shares

    panels = []
    for side in (comparison.a, comparison.b):
        parts = {name: row for name, row in side.channels.items() if side.kinds[name] not in SHARED}
        if not parts:
            raise InputError(f"{side.name} has no blocks whose branches could be drawn")
        panels.append(Panel(f"{side.name}: {side.flops:,} FLOPs", parts))
    draw_shares(panels, path)
