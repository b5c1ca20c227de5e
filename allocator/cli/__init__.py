"""The command line, ``allocator-cli``: one module per subcommand.

Exit status: 0 done, 1 the job failed (the reason is on stderr), 2 bad usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

# A command imports what it works with (torch, and the rooms of this package that need it) once its arguments were found
# to fit, so that help and complaints come at once.
from allocator import __version__
from allocator.cli import allocate, apply, compare, export, recipes, report, sweep, train, verify, widen
from allocator.cli.arguments import UsageError
from allocator.cli.words import in_shell
from allocator.errors import AllocatorError, BudgetError, in_words, text_of

_DESCRIPTION = """\
Learn how many neurons each branch of a PyTorch vision model gets, under a FLOPs budget, and write out the
smaller network with a certificate.

MODEL is a file (.pt, .pth, .pt2, .safetensors) or a name: torchvision:resnet50, timm:res2net50_26w_4s,
recipe:scalenet50, hf:ResNetConfig or package.module:factory. A named model has random weights, the same every
time, unless --set asks for others (--set pretrained=true for timm, --set weights=DEFAULT for torchvision).
FLOPs are counted as fvcore counts them: one multiply-add is one FLOP."""

_EPILOG = """\
examples:
  allocator-cli report torchvision:googlenet
  allocator-cli allocate model.pt --flops 60% -o small.pt --allocation alloc.json
  allocator-cli verify model.pt small.pt alloc.json

Each command has its own --help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments without the program's name; those of the process if left out.

    Returns:
        The exit status.
    """
    args = make_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a name that the terminal cannot show is no failure
    _end_cleanly_on_sigterm()
    try:
        status = _run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; say no more
        return 1
    except KeyboardInterrupt:
        print("allocator-cli: interrupted; unfinished files were removed", file=sys.stderr)
        return 130
    return status


def _run(args: argparse.Namespace) -> int:
    try:
        return int(args.run(args))
    except BrokenPipeError:
        raise
    except UsageError as error:
        print(f"allocator-cli {args.command}: error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        return _failed(args, error)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; the help and the documentation are made from it."""
    parser = argparse.ArgumentParser(
        prog="allocator-cli",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (report, allocate, sweep, widen, apply, verify, compare, export, recipes, train):
        module.register(commands)
    parser.set_defaults(parsers=commands.choices)  # so that a command can name the one that comes next
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"neuron-allocator {__version__}")
        parser.exit(0)


def _failed(args: argparse.Namespace, error: Exception) -> int:
    """Report an error on stderr, and for machines on stdout as well."""
    if args.debug:
        traceback.print_exc()
    message = in_shell(text_of(error))
    if not isinstance(error, AllocatorError):
        message = f"unexpected {in_words(error)}"
        if not args.debug:
            message += " (run again with --debug for the traceback)"
    print(f"allocator-cli {args.command}: {message}", file=sys.stderr)
    if args.json:
        facts: dict[str, Any] = {"error": type(error).__name__, "message": message}
        if isinstance(error, BudgetError):
            facts |= {"asked": error.asked, "reachable": error.reachable}
        print(json.dumps(facts, indent=2))
    return 1


def _end_cleanly_on_sigterm() -> None:
    """Let a polite kill unwind the stack, so that half-written files are removed."""

    def leave(*_: Any) -> NoReturn:
        raise SystemExit(143)

    with contextlib.suppress(ValueError):  # not in the main thread: its owner decides
        signal.signal(signal.SIGTERM, leave)
