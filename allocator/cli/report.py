"""``allocator-cli report``: what a model is made of, before anything is allocated."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .common import Talk, add_command, add_input_options, add_model_options, example_inputs, open_model

if TYPE_CHECKING:
    from rich.console import RenderableType

_EXAMPLE = """\
  allocator-cli report torchvision:googlenet
  allocator-cli report model.pt --input-size 1x3x64x64 --json"""


def register(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands, "report", "list a model's blocks, branches, scales, neurons and FLOPs", _EXAMPLE
    )
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


def facts(graph: Any) -> dict[str, Any]:
    """A ChannelGraph's blocks and figures as plain data; FLOPs are fvcore's."""
    return {
        "flops": graph.flops,
        "neurons": len(graph.neurons),
        "blocks": [_block_facts(block) for block in graph.blocks],
        "unsupported": [str(each) for each in graph.unsupported],
        "assumptions": list(graph.assumptions),
    }


def _block_facts(block: Any) -> dict[str, Any]:
    return {
        "name": block.name,
        "kind": block.kind,
        "channels": block.channels,
        "branches": [_branch_facts(branch) for branch in block.branches],
    }


def _branch_facts(branch: Any) -> dict[str, Any]:
    plain = ("name", "channels", "stride", "scale", "kernel", "dilation", "receptive_field", "flops", "gamma")
    return {key: _plain(getattr(branch, key)) for key in plain} | {"producers": list(branch.producers)}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return float(value)


def _tables(name: str, graph: Any) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    branches = sum(len(block.branches) for block in graph.blocks)
    head = (
        f"{name}: {graph.flops:,} FLOPs, {len(graph.neurons):,} neurons, {len(graph.blocks)} blocks, "
        f"{branches} branches"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("block / branch", overflow="fold")
    for title in ("kind", "scale", "kernel", "field"):
        table.add_column(title)
    for title in ("neurons", "FLOPs", "γ min..mean..max"):
        table.add_column(title, justify="right")
    for block in graph.blocks:
        table.add_row(Text(block.name, style="bold"), block.kind, "", "", "", str(block.channels), "", "")
        for branch in block.branches:
            table.add_row(*_branch_row(branch))
    lines = [Text(f"not followed: {each}") for each in graph.unsupported]
    lines += [Text(f"assumed: {each}") for each in graph.assumptions]
    return Group(Text(head), table, *lines)


def _branch_row(branch: Any) -> list[str]:
    facts_ = _branch_facts(branch)
    gamma = facts_["gamma"]
    return [
        f"  {branch.name}",
        "",
        _short(facts_["scale"]),
        _short(facts_["kernel"]),
        _short(facts_["receptive_field"]),
        str(branch.channels),
        f"{branch.flops:,}" if branch.flops is not None else "",
        "{1:.3g}..{0:.3g}..{2:.3g}".format(*gamma) if gamma else "",
    ]


def _short(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return "x".join(_short(each) for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
