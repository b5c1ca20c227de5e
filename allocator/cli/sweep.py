"""``allocator-cli sweep``: allocations for many budgets."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.cli.arguments import (
    UsageError,
    add_budget_options,
    add_command,
    add_input_options,
    add_model_options,
    add_plan_options,
    budgets,
    plan_options,
)
from allocator.cli.data import add_data_options, data_options
from allocator.cli.opening import example_inputs, open_model
from allocator.cli.outputs import check_outputs, check_report, check_suffix
from allocator.cli.talk import Talk
from allocator.disk import make_folder

if TYPE_CHECKING:
    from allocator.pipeline.sweep import Sweep

_EXAMPLE = """\
  allocator-cli sweep torchvision:resnet50 --flops 90% 80% 70% 60% 50%
  allocator-cli sweep model.pt --flops 80% 60% 40% --data photographs/ --plot curve.png --csv curve.csv
  allocator-cli sweep model.pt --params 20M 10M 5M --allocations allocations/
  allocator-cli sweep model.pt --peak-activations 90% 70% --policy isomorphic --at-least 8 --csv curve.csv"""


def register(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(commands, "sweep", "allocate for many budgets, each within the one before it", _EXAMPLE)
    parser.add_argument("model", metavar="MODEL", help="a file or a name")
    group = parser.add_argument_group("budgets, several of one of these")
    add_budget_options(group, several=True, without=["latency"])
    parser.add_argument("--csv", metavar="FILE", help="also write the table, as .csv")
    parser.add_argument("--plot", metavar="FILE", help="also draw the curve: .png, .svg or .pdf")
    parser.add_argument("--allocations", metavar="FOLDER", help="also write each allocation, as FOLDER/1.json, ...")
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")
    add_plan_options(parser.add_argument_group("plan"))
    add_data_options(parser)
    add_input_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Allocate for every budget, write the files, print the table."""
    if len(budgets(args)) != 1:
        raise UsageError("a sweep is over one kind of budget, such as --flops 80% 60% 40%")
    check_suffix(args.csv, (".csv",), "the table (--csv)")
    check_report(None, args.plot)
    paths = _allocation_paths(args)
    check_outputs(args, args.csv, args.plot, *paths)
    talk = Talk(args)
    model = open_model(args.model, args, talk)
    from allocator.api import sweep

    with talk.stage("allocating") as update:
        found = sweep(
            model,
            **budgets(args),
            **data_options(args, model),
            example_inputs=example_inputs(args, model),
            **plan_options(args),
            progress=update,
        )
    _write(args, found, paths)
    talk.result(found, {"model": args.model, **found.to_dict()})
    return 0


def _allocation_paths(args: argparse.Namespace) -> list[str]:
    """Where each allocation goes, in a folder that is made now."""
    if args.allocations is None:
        return []
    make_folder(args.allocations)
    (asked,) = budgets(args).values()
    return [str(Path(args.allocations) / f"{number + 1}.json") for number in range(len(asked))]


def _write(args: argparse.Namespace, found: Sweep, paths: Sequence[str]) -> None:
    if args.csv is not None:
        found.to_csv(args.csv)
    if args.plot is not None:
        found.plot(args.plot, title=args.model)
    for path, point in zip(paths, found, strict=bool(paths)):
        point.allocation.save(path)
