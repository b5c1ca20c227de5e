"""``allocator-cli train``: from a seed network to an allocated and trained one, as a configuration says."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from allocator.cli.arguments import UsageError, add_command
from allocator.cli.talk import Talk

if TYPE_CHECKING:
    from rich.table import Table

    from allocator.recipes.outcome import RunResult

_MOST_TESTS = 3

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
    progress = not (talk.quiet or talk.json)
    result = train(args.config, settings=args.set, resume=args.resume, dry_run=args.dry_run, progress=progress)
    if result.main:  # of several processes, one speaks
        facts = result.to_dict()
        if args.dry_run is not None:
            facts["folder"] = None
        talk.result(_table(result, args.dry_run), facts)
    return 0


def _table(result: RunResult, dry_run: int | None) -> Table:
    from rich.table import Table

    title = str(result.folder) if dry_run is None else f"dry run of {dry_run} updates"
    table = Table(title=title, title_justify="left")
    tests = _tests(result)
    table.add_column("network", justify="left")
    for header in ("FLOPs", "parameters", *(f"test {name}" for name in tests), "seconds"):
        table.add_column(header, justify="right")
    for stage in result.stages:
        cells = [stage.name, f"{stage.flops:,}", f"{stage.parameters:,}"]
        for name in tests:
            cells.append(f"{stage.test[name]:.1%}" if name in stage.test else "-")
        table.add_row(*cells, f"{stage.seconds:.0f}")
    return table


def _tests(result: RunResult) -> list[str]:
    """The first few measures that any of the networks was tested by."""
    names: dict[str, None] = {}
    for stage in result.stages:
        names |= dict.fromkeys(stage.test)
    return list(names)[:_MOST_TESTS]
