"""Arguments that subcommands share, and how their text is read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from allocator.cli.words import flag_of
from allocator.settings import BUDGETS, CHOICES, DEFAULTS, KNOWN_POLICIES, OPTIONS

_UNIT_LETTERS = "kKmMgGbBtTuµnsS "


class UsageError(Exception):
    """The arguments do not fit together; ends with exit status 2."""


def add_command(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """A subcommand's parser with the options that every subcommand has."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")
    group.add_argument("-v", "--verbose", action="store_true", help="show each stage's time on stderr")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress and no notes on stderr")
    group.add_argument("--debug", action="store_true", help="show a traceback when something fails")
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


def add_layers_option(parser: argparse.ArgumentParser) -> None:
    """The option to list every layer."""
    parser.add_argument(
        "--layers", action="store_true", help="also list every layer: channels it gives and FLOPs, before and after"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return int(text)


def add_output_options(parser: argparse.ArgumentParser, *, what: str = "smaller", folders: bool = False) -> None:
    """Options for the model that is written, which may go from folder to folder."""
    said = f"the {what} model: .pt, .pth or .safetensors"
    if folders:
        said += "; or hf:OUT, a new folder, into which the weights in hf:FOLDER go one by one"
    parser.add_argument("-o", "--output", metavar="OUT", help=said)
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")


def add_report_options(parser: argparse.ArgumentParser, *, output: str, plot: str) -> None:
    """Options for what is shown, with the help of the two that name a file."""
    parser.add_argument(
        "--format", metavar="FORMAT", help="rich, json, csv, html or md (default: the suffix of FILE, else rich)"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help=output)
    parser.add_argument("--plot", metavar="FILE", help=plot)
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")


def add_plan_options(group: Any, *names: str) -> None:
    """A flag for every option of `allocator.settings`, or for those that are named."""
    for name in names or OPTIONS:
        option = OPTIONS[name]
        default = getattr(DEFAULTS, name)
        flag = flag_of(name)
        facts: dict[str, Any] = {"dest": name, "help": option.help.replace("%", "%%")}
        if isinstance(default, bool):
            facts["action"] = "store_false" if default else "store_true"
        elif isinstance(default, tuple):
            facts |= {"action": "append", "default": [], "metavar": option.metavar}
        else:
            facts["default"] = default
            facts["help"] += "" if default is None else f" (default: {default})"
            facts["choices"] = KNOWN_POLICIES if name == "policy" else CHOICES.get(name)
            facts["metavar"] = option.metavar or None
            facts["type"] = int if isinstance(default, int) else None
        group.add_argument(flag, **facts)


def add_budget_options(group: Any, *, several: bool = False, without: Sequence[str] = ()) -> None:
    """A flag for every budget of `allocator.settings`.

    Args:
        group: what to add them to.
        several: whether each takes several figures.
        without: budgets that this subcommand does not know.
    """
    for name, option in BUDGETS.items():
        if name not in without:
            facts: dict[str, Any] = {"nargs": "+"} if several else {}
            text = option.help.replace("%", "%%")
            group.add_argument(flag_of(name), dest=name, type=parse_budget, metavar=option.metavar, help=text, **facts)


def budgets(args: argparse.Namespace) -> dict[str, Any]:
    """The budgets that were given, by the names of their metrics."""
    # In some subcommands --latency is no budget, but a wish to have it measured.
    return {name: getattr(args, name) for name in BUDGETS if isinstance(getattr(args, name, None), (str, list))}


def plan_options(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """What was asked for, by the names of the options: all of them, or those that are named."""
    values = {}
    for name in names or OPTIONS:
        value = getattr(args, name)
        values[name] = tuple(value) if isinstance(value, list) else value
    return values


def parse_size(text: str) -> tuple[int, ...]:
    """``"1x3x224x224"`` as (1, 3, 224, 224)."""
    try:
        size = tuple(map(int, text.lower().split("x")))
    except ValueError:
        size = ()
    if not size or min(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1x3x224x224")
    return size


def parse_budget(text: str) -> str:
    """A budget as it is written, such as "4.2G", "60%" or "8ms", once it is known to be one."""
    number = text.strip().rstrip("%").rstrip(_UNIT_LETTERS)
    try:
        float(number.replace(",", "").replace("_", ""))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a budget such as 4.2e9, 4.2G or 60%") from None
    return text


def parse_setting(text: str) -> tuple[str, Any]:
    """``"num_classes=10"`` as ("num_classes", 10); a value that is not JSON is taken as text."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value
