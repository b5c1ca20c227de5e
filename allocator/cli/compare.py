"""``allocator-cli compare``: two allocations or two models side by side."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.cli.arguments import (
    UsageError,
    add_command,
    add_input_options,
    add_latency_options,
    add_model_options,
    add_report_options,
)
from allocator.cli.opening import example_inputs, measured, open_model
from allocator.cli.outputs import asked_format, check_outputs, check_report
from allocator.cli.talk import Talk
from allocator.disk import write_text
from allocator.errors import InputError

if TYPE_CHECKING:
    from allocator.reporting.compare import Comparison, Side

_EXAMPLE = """\
  allocator-cli compare learned.json even.json
  allocator-cli compare recipe:scalenet50-seed small.safetensors --plot both.svg
  allocator-cli compare torchvision:resnet50 torchvision:resnext50_32x4d --format csv -o both.csv"""


def register(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(commands, "compare", "show two allocations or two models side by side", _EXAMPLE)
    side = "an allocation (.json), a saved result (.safetensors), or a model: a file or a name"
    parser.add_argument("a", metavar="A", help=side)
    parser.add_argument("b", metavar="B", help=side)
    parser.add_argument("--all", action="store_true", help="also list the blocks that are alike")
    add_report_options(
        parser,
        output="write it here: .txt, .json, .csv, .html or .md",
        plot="draw both side by side: .png, .svg or .pdf",
    )
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
        write_text(args.output, COMPARISONS[format](comparison))
        talk.announce(f"comparison written to {args.output}")
    elif format == "rich":
        talk.result(ComparisonText(comparison, everything=args.all), {})
    else:
        sys.stdout.write(COMPARISONS[format](comparison))
    return 0


def _side(spec: str, args: argparse.Namespace, talk: Talk) -> Side:
    """What an argument stands for: an allocation where the file holds one, else a model."""
    from allocator.io.files import RESULT_SUFFIX

    suffix = Path(spec).suffix
    if suffix == ".json" and args.latency:
        raise UsageError(f"{spec} is an allocation alone, which takes no time: give the model or the saved result")
    if suffix in (".json", RESULT_SUFFIX):
        return _side_of_file(spec, args, talk)
    return _side_of_model(spec, args, talk)


def _side_of_file(path: str, args: argparse.Namespace, talk: Talk) -> Side:
    """What an allocation keeps; of a saved result, whose model is there too, the time as well."""
    from allocator.io.files import load_allocation
    from allocator.reporting.compare import side_of_allocation

    with talk.stage(f"reading {path}"):
        allocation = load_allocation(path)
    time = None
    if args.latency:
        model = open_model(path, args, talk)
        time = measured(model, path, example_inputs(args, model, allocation), args, talk)
    return side_of_allocation(path, allocation, time)


def _side_of_model(spec: str, args: argparse.Namespace, talk: Talk) -> Side:
    from allocator.api import trace
    from allocator.reporting import summarise
    from allocator.reporting.compare import side_of_summary

    model = open_model(spec, args, talk)
    with talk.stage(f"tracing {spec}"):
        graph = trace(model, example_inputs(args, model))
        summary = summarise(graph, spec)
    return side_of_summary(replace(summary, latency=measured(model, spec, graph.inputs, args, talk)))


def _draw(comparison: Comparison, path: str) -> None:
    """Each side's channels per branch of the blocks whose branches add up."""
    from allocator.reporting.facts import SHARED
    from allocator.reporting.pictures import Panel, draw_shares

    panels = []
    for side in (comparison.a, comparison.b):
        parts = {name: row for name, row in side.channels.items() if side.kinds[name] not in SHARED}
        if not parts:
            raise InputError(f"{side.name} has no blocks whose branches could be drawn")
        panels.append(Panel(f"{side.name}: {side.flops:,} FLOPs", parts))
    draw_shares(panels, path)
