"""``allocator-cli report``: what a model is made of, before anything is allocated."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .common import Talk, add_command, add_input_options, add_model_options, example_inputs, open_model

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..blocks import Block, Branch
    from ..graph import ChannelGraph

_EXAMPLE = """\
  allocator-cli report torchvision:googlenet
  allocator-cli report model.pt --input-size 1x3x64x64 --json"""


_BRANCH_FACTS = (
    "name",
    "channels",
    "inner",
    "scale",
    "stride",
    "kernels",
    "dilation",
    "receptive_field",
    "flops",
    "gamma",
)


def register(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(commands, "report", "list a model's blocks, branches, scales, neurons and FLOPs", _EXAMPLE)
    parser.add_argument("model", metavar="MODEL", help="a file or a name")
    add_input_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trace the model and print its blocks."""
    talk = Talk(args)
    model = open_model(args.model, args, talk)
    from ..api import trace

    with talk.stage("tracing"):
        graph = trace(model, example_inputs(args))
    talk.result(_tables(args.model, graph), {"model": args.model, **facts(graph)})
    return 0


def facts(graph: ChannelGraph) -> dict[str, Any]:
    """A traced model's blocks and figures as plain data; FLOPs are fvcore's."""
    return {
        "flops": graph.flops,
        "neurons": len(graph.neurons),
        "blocks": [_block_facts(block) for block in graph.blocks],
        "unsupported": {operator: list(modules) for operator, modules in graph.unsupported.items()},
        "assumptions": list(graph.assumptions),
    }


def _block_facts(block: Block) -> dict[str, Any]:
    return {
        "name": block.name,
        "kind": block.kind,
        "channels": block.channels,
        "branches": [
            {key: getattr(branch, key) for key in _BRANCH_FACTS} | {"kernel": branch.kernel}
            for branch in block.branches
        ],
    }


def _tables(name: str, graph: ChannelGraph) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    branches = sum(len(block.branches) for block in graph.blocks)
    head = (
        f"{name}: {graph.flops:,} FLOPs, {_count(len(graph.neurons), 'neuron')}, "
        f"{_count(len(graph.blocks), 'block')}, {_count(branches, 'branch')}"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("block and branches", overflow="fold")
    for title in ("kind", "scale", "kernel", "field"):
        table.add_column(title)
    for title in ("channels", "FLOPs", "|γ| min mean max"):
        table.add_column(title, justify="right")
    for block in graph.blocks:
        table.add_row(Text(block.name, style="bold"), block.kind, "", "", "", str(block.channels), "", "")
        for row in _branch_rows(block):
            table.add_row(*row)
    lines = [
        Text(f"not followed: {operator} in {', '.join(modules)}; what it touches stays")
        for operator, modules in graph.unsupported.items()
    ]
    lines += [Text(f"assumed: {each}") for each in graph.assumptions]
    return Group(Text(head), table, *lines)


def _branch_rows(block: Block) -> list[list[str]]:
    """One row per branch; the groups of a convolution, which differ in γ alone, in one row together."""
    if block.kind != "groups":
        return [_branch_row(branch, branch.name) for branch in block.branches]
    first, count = block.branches[0], len(block.branches)
    row = _branch_row(first, f"{count} groups of {first.channels}")
    row[-3:] = [str(block.channels), f"{sum(branch.flops for branch in block.branches):,}", ""]
    known = [branch.gamma for branch in block.branches if branch.gamma is not None]
    if known:
        means, lows, highs = zip(*known, strict=True)
        row[-1] = _gamma((sum(means) / len(means), min(lows), max(highs)))
    return [row]


def _branch_row(branch: Branch, name: str) -> list[str]:
    return [
        f"  {name}",
        "",
        f"{branch.scale:g}",
        _size(branch.kernel),
        _size(branch.receptive_field),
        str(branch.channels),
        f"{branch.flops:,}",
        _gamma(branch.gamma),
    ]


def _count(number: int, what: str) -> str:
    plural = f"{what}es" if what.endswith("ch") else f"{what}s"
    return f"{number:,} {what if number == 1 else plural}"


def _gamma(gamma: tuple[float, float, float] | None) -> str:
    """(mean, min, max) in the order that people read them."""
    if gamma is None:
        return ""
    mean, low, high = gamma
    return f"{low:.2g} {mean:.2g} {high:.2g}"


def _size(size: tuple[int, ...]) -> str:
    return "x".join(str(each) for each in size)
