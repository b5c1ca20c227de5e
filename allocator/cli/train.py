"""``allocator-cli train``: from a seed network to an allocated and trained one, as a configuration says."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from allocator.cli.arguments import UsageError, add_command
from allocator.cli.talk import Talk

if TYPE_CHECKING:
    from rich.table import Table

    from allocator.recipes.run import RunResult

_EXAMPLE = """\
  allocator-cli train scalenet_digits
  allocator-cli train my.yaml --set data.root=/data/imagenet --set final.lr=0.2 --resume
  torchrun --nproc-per-node 8 -m allocator.cli train scalenet50 --set data.root=/data/imagenet
  allocator-cli train faster_rcnn_scalenet50 --set data.root=/data/coco"""


def register(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(commands, "train", "train a seed, allocate its neurons, train the result", _EXAMPLE)
    parser.add_argument("config", metavar="CONFIG", help="a .yaml file, or the name of an installed one")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change a value of the configuration, such as final.lr=0.05 (repeat for more)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in run.output")
    parser.add_argument(
        "--dry-run", type=int, metavar="STEPS", help="do this many updates per network, and leave nothing behind"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train; print what each network reached."""
    if args.resume and args.dry_run is not None:
        raise UsageError("--resume and --dry-run do not go together")
    from allocator.recipes.run import train

    talk = Talk(args)
    result = train(
        args.config, settings=args.set, resume=args.resume, dry_run=args.dry_run, progress=not (talk.quiet or talk.json)
    )
    if result.main:
        facts = result.to_dict()
        if args.dry_run is not None:
            facts["folder"] = None
        talk.result(_table(result, args.dry_run), facts)
    return 0


def _table(result: RunResult, dry_run: int | None) -> Table:
    from rich.table import Table

    where = f"dry run of {dry_run} updates" if dry_run is not None else str(result.folder)
    table = Table(title=where, title_justify="left")
    tests = list(dict.fromkeys(key for stage in result.stages for key in stage.test))[:3]
    for header in ("network", "FLOPs", "parameters", *(f"test {key}" for key in tests), "seconds"):
        table.add_column(header, justify="left" if header == "network" else "right")
    for stage in result.stages:
        shares = [f"{stage.test[key]:.1%}" if key in stage.test else "-" for key in tests]
        table.add_row(stage.name, f"{stage.flops:,}", f"{stage.parameters:,}", *shares, f"{stage.seconds:.0f}")
    return table
