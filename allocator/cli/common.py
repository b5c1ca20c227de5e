"""What the subcommands share: their arguments, opening models, writing results, talking."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import nn

    from allocator.cost.latency import Latency
    from allocator.rewriting.allocation import Allocation

MODEL_SUFFIXES = (".pt", ".pth", ".safetensors")
_PIPE_WIDTH = 120
_PATIENCE = 2.0
_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


class UsageError(Exception):
    """The arguments do not fit together; ends with exit status 2."""


# ---------------------------------------------------------------------------------------------- arguments


def add_command(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """A subcommand's parser with the options that every subcommand has."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    talk = parser.add_argument_group("output")
    talk.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")
    talk.add_argument("-v", "--verbose", action="store_true", help="show each stage's time on stderr")
    talk.add_argument("-q", "--quiet", action="store_true", help="no progress and no notes on stderr")
    talk.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options that say how to open MODEL and what to feed it."""
    group = parser.add_argument_group("model")
    group.add_argument("--arch", metavar="NAME", help="the network a file of weights alone belongs to")
    group.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        type=parse_setting,
        help="an argument for a named model, such as num_classes=10 (repeat for more)",
    )
    group.add_argument("--trust", action="store_true", help="let model files run the code they ask for")


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """The option that states the input's size."""
    parser.add_argument(
        "--input-size",
        metavar="NxCxHxW",
        action="append",
        type=parse_size,
        help="size of an input, such as 1x3x224x224 (repeat for more inputs); left out: the model's own",
    )


def add_latency_options(parser: argparse.ArgumentParser) -> None:
    """Options to measure the time of a forward."""
    group = parser.add_argument_group("latency")
    group.add_argument("--latency", action="store_true", help="also measure the median time of a forward, here")
    group.add_argument("--threads", type=_positive, metavar="N", help="for --latency (default: as torch has it)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return int(text)


def measured(model: nn.Module, name: str, inputs: Any, args: argparse.Namespace, talk: Talk) -> Latency | None:
    """The latency of a model, where it is asked for."""
    if not args.latency:
        if args.threads is not None:
            raise UsageError("--threads goes with --latency")
        return None
    from allocator.cost.latency import latency

    with talk.stage(f"measuring {name}"):
        return latency(model, inputs, threads=args.threads)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Options for the model that is written."""
    parser.add_argument("-o", "--output", metavar="OUT", help="the smaller model: .pt, .pth or .safetensors")
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")


def parse_size(text: str) -> tuple[int, ...]:
    """``"1x3x224x224"`` as (1, 3, 224, 224)."""
    try:
        size = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        size = ()
    if not size or min(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1x3x224x224")
    return size


def parse_flops(text: str) -> float | str:
    """``"4.2e9"`` or ``"4.2G"`` as a number of FLOPs; ``"60%"`` stays a share of the model's own."""
    text = text.strip()
    number, unit = (text[:-1], text[-1:].lower()) if text[-1:].lower() in {"%", *_UNITS} else (text, "")
    try:
        value = float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a budget such as 4.2e9, 4.2G or 60%") from None
    return text if unit == "%" else value * _UNITS.get(unit, 1.0)


def parse_setting(text: str) -> tuple[str, Any]:
    """``"num_classes=10"`` as ("num_classes", 10); a value that is not JSON is taken as text."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


# ---------------------------------------------------------------------------------------------- models


def open_model(spec: str, args: argparse.Namespace, talk: Talk) -> nn.Module:
    """The model a MODEL argument stands for: a file if there is one of that name, else a named network."""
    from allocator.errors import FileError
    from allocator.io.files import load_model
    from allocator.io.models import build

    if os.path.exists(spec) or not _is_name(spec):
        if args.set:
            raise UsageError("--set goes with a named model, not with a file")
        try:
            with talk.stage(f"reading {spec}"):
                return load_model(spec, arch=args.arch, trust=args.trust)
        except FileError as error:
            if os.path.exists(spec) or os.sep in spec or "." in spec:
                raise
            raise FileError(f"{error}; a named model has a prefix, as in torchvision:{spec}") from error
    if args.arch:
        raise UsageError("--arch goes with a file of weights, not with a named model")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # so that package.module:factory finds the user's own code
    import torch

    torch.manual_seed(0)  # a name stands for the same weights every time, so that verify can build it again
    with talk.stage(f"building {spec}"):
        return build(spec, **dict(args.set))


def _is_name(spec: str) -> bool:
    prefix, colon, rest = spec.partition(":")
    return bool(colon and rest) and all(part.isidentifier() for part in prefix.split("."))


def example_inputs(args: argparse.Namespace, allocation: Allocation | None = None) -> tuple[torch.Tensor, ...] | None:
    """Random inputs of the sizes asked for, else of those an allocation was made with, else None."""
    sizes = args.input_size or (allocation.input_shapes if allocation is not None else None)
    if not sizes:
        return None
    import torch

    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(tuple(size), generator=generator) for size in sizes)


# ---------------------------------------------------------------------------------------------- outputs


def check_outputs(args: argparse.Namespace, *paths: str | None) -> None:
    """Refuse, before any work is done, outputs that could not be written or would overwrite a file."""
    from allocator.errors import FileError
    from allocator.io.files import check_writable

    given = [path for path in paths if path is not None]
    if len({os.path.realpath(path) for path in given}) < len(given):
        raise UsageError("two outputs have the same name")
    for path in given:
        check_writable(path)
        if os.path.exists(path) and not args.force:
            raise FileError(f"{path} exists; use --force to overwrite it")


def check_suffix(path: str | None, suffixes: tuple[str, ...], what: str) -> None:
    """Usage error where a name does not end as its content asks."""
    if path is not None and Path(path).suffix not in suffixes:
        raise UsageError(f"{what} must end in {' or '.join(suffixes)}, not {Path(path).name!r}")


def write_model(result: Any, path: str) -> None:
    """Write a model that came out of an allocation, or a result, as pickle or as safetensors by the path's suffix."""
    from allocator.io.files import RESULT_SUFFIX, save_model, save_result

    if Path(path).suffix == RESULT_SUFFIX:
        save_result(result, path)
    else:
        save_model(getattr(result, "model", result), path)


# ---------------------------------------------------------------------------------------------- talking


class Talk:
    """Progress, times and notes on stderr; results on stdout.

    Attributes:
        timings: seconds per stage, in order.
    """

    def __init__(self, args: argparse.Namespace, patience: float = _PATIENCE):
        self.patience = patience
        self.json: bool = args.json
        self.verbose: bool = args.verbose
        self.quiet: bool = args.quiet
        self.timings: dict[str, float] = {}
        self.notes: list[str] = []

    @contextlib.contextmanager
    def stage(self, title: str) -> Iterator[Callable[[str], None]]:
        """Show a spinner while a stage runs, collect its warnings as notes, and time it.

        Yields:
            A function that changes the spinner's text.
        """
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught, self._spinner(title) as update:
            warnings.simplefilter("always")
            yield update
        self.timings[title] = time.perf_counter() - start
        if self.verbose:
            print(f"{self.timings[title]:8.3f} s  {title}", file=sys.stderr)
        for warning in caught:
            self._take_warning(warning)

    def _take_warning(self, warning: warnings.WarningMessage) -> None:
        from allocator.errors import AllocatorWarning

        if issubclass(warning.category, AllocatorWarning):
            self.note(str(warning.message))
        elif self.verbose:
            print(f"warning: {warning.message}", file=sys.stderr)

    def note(self, text: str) -> None:
        """Something worth knowing, once, on stderr."""
        if text in self.notes:
            return
        self.notes.append(text)
        if not self.quiet:
            print(f"note: {text}", file=sys.stderr)

    def times(self, timings: dict[str, float]) -> None:
        """With -v, the times of the parts of a stage."""
        if self.verbose:
            for name, seconds in timings.items():
                print(f"{seconds:8.3f} s    {name}", file=sys.stderr)

    def said(self, text: str) -> None:
        """What was done, for people: on stderr, so that stdout holds results alone."""
        if not self.quiet:
            print(text, file=sys.stderr)

    def result(self, renderable: Any, facts: dict[str, Any]) -> None:
        """Print a result: ``facts`` as JSON for machines, else ``renderable`` for people."""
        if self.json:
            print(json.dumps(facts, indent=2, default=str))
        else:
            stdout_console().print(renderable)

    @contextlib.contextmanager
    def _announced(self, title: str) -> Iterator[None]:
        """In a log or a pipe, one plain line about a stage that takes long."""
        timer = threading.Timer(self.patience, lambda: print(f"{title} ...", file=sys.stderr, flush=True))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    @contextlib.contextmanager
    def _spinner(self, title: str) -> Iterator[Callable[[str], None]]:
        if self.quiet:
            yield lambda _: None
            return
        if not sys.stderr.isatty():
            with self._announced(title):
                yield lambda _: None
            return
        from rich.console import Console
        from rich.markup import escape

        with Console(stderr=True).status(escape(f"{title} ...")) as status:
            yield lambda part: status.update(escape(f"{title}: {part} ..."))


def stdout_console() -> Console:
    """A console for stdout: colour only on a terminal, and wide enough for tables when piped."""
    from rich.console import Console

    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=_PIPE_WIDTH if piped else None, soft_wrap=False, highlight=False)


def asked_format(args: argparse.Namespace) -> str:
    """The format of a report: by name (`--json`, `--format`), else by the suffix of `-o`, else "rich"."""
    from allocator.errors import UnknownNameError
    from allocator.reporting.render import check_format, format_of

    if args.json and args.format not in (None, "json"):
        raise UsageError(f"--json and --format {args.format} do not go together")
    try:
        if args.json or args.format is not None:
            format = check_format("json" if args.json else args.format)
        else:
            format = "rich" if args.output is None else format_of(args.output)
    except UnknownNameError as error:
        raise UsageError(str(error)) from error
    if format == "html" and args.output is None and sys.stdout.isatty():
        raise UsageError("HTML is not for a terminal: give -o FILE.html")
    return format
