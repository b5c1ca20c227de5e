"""What the commands that make a model have in common: its options, its files, and what is shown of it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from allocator.cli.arguments import add_layers_option, add_output_options
from allocator.cli.next_step import command
from allocator.cli.outputs import (
    MODEL_SUFFIXES,
    check_model_output,
    check_outputs,
    check_report,
    check_suffix,
    folder_named,
    write_model,
)
from allocator.cli.talk import Talk
from allocator.settings import SIZES, Certify

if TYPE_CHECKING:
    from allocator.result import Result


def add_file_options(parser: argparse.ArgumentParser, *, what: str = "smaller", folders: bool = False) -> None:
    """What is written, and whether layers are listed; the model may go into a folder."""
    add_output_options(parser, what=what, folders=folders)
    parser.add_argument("--allocation", metavar="FILE", help="also write the allocation, as .json")
    parser.add_argument("--report", metavar="FILE", help="also write the report: .html, .md, .csv, .json or .txt")
    parser.add_argument("--plot", metavar="FILE", help="also draw each block's neurons per scale: .png, .svg or .pdf")
    add_layers_option(parser)


def add_weight_options(group: Any) -> None:
    """What becomes of the weights, and how the result is proven."""
    group.add_argument(
        "--weights",
        default="keep",
        choices=("keep", "reset"),
        help="keep them, or start afresh to train the result from scratch (default: keep)",
    )
    group.add_argument(
        "--certify",
        choices=SIZES,
        default=SIZES[0],
        help="compare outputs on the smallest inputs that the network takes in the same steps (small, the default), or "
        "on inputs of the full size",
    )
    group.add_argument("--no-certificate", action="store_true", help="leave out the numeric certificate")
    group.add_argument(
        "--seed", type=int, default=0, help="of what is drawn, and of the certificate's input (default: 0)"
    )


def certify_of(args: argparse.Namespace) -> Certify:
    """How the result is proven."""
    return not args.no_certificate and args.certify


def check_files(args: argparse.Namespace, *, folders: bool = False) -> None:
    """Refuse, before any work is done, what could not be written.

    Args:
        args: of the command line.
        folders: the model may also be written into a folder, `hf:OUT`.
    """
    if folders:
        check_model_output(args.output)
    else:
        check_suffix(args.output, MODEL_SUFFIXES, "the model (-o)")
    check_suffix(args.allocation, (".json",), "the allocation (--allocation)")
    check_report(args.report, args.plot)
    check_outputs(args, args.output, args.allocation, args.report, args.plot)


def write_files(args: argparse.Namespace, talk: Talk, result: Result) -> dict[str, str]:
    """Write the files that were asked for; paths by what they hold."""
    written = {}
    if args.output is not None:
        if folder_named(args.output) is None:
            with talk.stage(f"writing {args.output}"):
                write_model(result, args.output)
        written["model"] = args.output
    if args.allocation is not None:
        result.allocation.save(args.allocation)
        written["allocation"] = args.allocation
    if args.report is not None:
        with talk.stage(f"writing {args.report}"):
            result.report().save(args.report, name=args.model)
        written["report"] = args.report
    if args.plot is not None:
        from allocator.reporting.pictures import draw_summary

        with talk.stage(f"drawing {args.plot}"):
            draw_summary(result.report().summary(args.model), args.plot)
        written["picture"] = args.plot
    return written


def show(args: argparse.Namespace, talk: Talk, result: Result, written: dict[str, str]) -> None:
    """Print the report, and what was written where, or how to write it."""
    from rich.console import Group, RenderableType
    from rich.text import Text

    report = result.report()
    lines: list[RenderableType] = [Text(f"{kind} written to {path}") for kind, path in written.items()]
    facts = {"model": args.model, **report.to_dict(), "files": written}
    if args.layers:
        lines = [Text(), report.layers(), *lines]
        facts["layers"] = report.layers().to_dict()
    talk.result(Group(report, *lines), facts)
    if not written:
        name, size = ("wide.pt", "wider") if args.command == "widen" else ("small.pt", "smaller")
        talk.announce(f"nothing was written; to write the {size} model: {command(args.command, args, output=name)}")
