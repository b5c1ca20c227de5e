"""``allocator-cli recipes``: the networks that come with the package, with their size."""

from __future__ import annotations

import argparse
import fnmatch
from typing import TYPE_CHECKING, Any

from allocator.cli.arguments import UsageError, add_command
from allocator.cli.talk import Talk

if TYPE_CHECKING:
    from rich.table import Table

_EXAMPLE = """\
  allocator-cli recipes
  allocator-cli recipes 'res*50*' --json"""


def register(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(commands, "recipes", "list the recipes with their parameters and FLOPs", _EXAMPLE)
    parser.add_argument("pattern", metavar="PATTERN", nargs="*", help="only recipes whose name matches, such as '*50*'")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Build every recipe without storage, trace it, and print what it costs."""
    from allocator import recipes

    talk = Talk(args)
    names = [name for name in recipes.names() if _is_wanted(name, args.pattern)]
    if not names:
        raise UsageError(f"no recipe matches {' or '.join(args.pattern)}; without a pattern, all are listed")
    rows = []
    with talk.stage("tracing") as update:
        for name in names:
            update(name)
            rows.append(facts(name))
    talk.result(_table(rows), {"recipes": rows})
    return 0


def facts(name: str) -> dict[str, Any]:
    """A recipe's parameters and FLOPs (as fvcore counts them, for one image of the stated size) as plain data."""
    import torch

    from allocator import recipes
    from allocator.api import trace
    from allocator.modules import count_parameters

    with torch.device("meta"):
        model = recipes.build(name)
    graph = trace(model)
    return {
        "name": name,
        "input": list(graph.inputs.tensors()[0].shape),
        "parameters": count_parameters(model),
        "flops": graph.flops,
        "call": recipes.call(name),
    }


def _is_wanted(name: str, patterns: list[str]) -> bool:
    if not patterns:
        return True
    return any(fnmatch.fnmatchcase(name, pattern.lower().replace("_", "-")) for pattern in patterns)


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("recipe")
    table.add_column("input")
    table.add_column("parameters", justify="right")
    table.add_column("FLOPs", justify="right")
    table.add_column("made by", overflow="fold")
    for row in rows:
        size = "x".join(map(str, row["input"]))
        table.add_row(row["name"], size, f"{row['parameters']:,}", f"{row['flops']:,}", row["call"])
    return table
