"""``allocator-cli apply``: a saved allocation on a fresh model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from allocator.cli.arguments import UsageError, add_command, add_model_options, add_output_options
from allocator.cli.opening import open_model
from allocator.cli.outputs import (
    check_model_output,
    check_outputs,
    folder_named,
    source_folder,
    without_weights,
    write_model,
)
from allocator.cli.talk import Talk

if TYPE_CHECKING:
    from torch import nn

    from allocator.rewriting.allocation import Allocation

_EXAMPLE = """\
  allocator-cli apply torchvision:resnet50 alloc.json -o fresh_small.pt
  allocator-cli apply hf:FOLDER alloc.json -o hf:OUT"""


def register(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(commands, "apply", "apply a saved allocation to a fresh model", _EXAMPLE)
    parser.add_argument("model", metavar="MODEL", help="a file or a name of the original network")
    parser.add_argument("allocation", metavar="ALLOCATION", help="alloc.json, or a saved .safetensors result")
    add_output_options(parser, folders=True)
    parser.add_argument(
        "--weights",
        default="keep",
        choices=("keep", "reset"),
        help="keep the model's, or start afresh (default: keep)",
    )
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Apply, write the model, print what changed."""
    if args.output is None:
        raise UsageError("nothing to write: give -o OUT")
    check_model_output(args.output)
    check_outputs(args, args.output)
    from allocator.io.files import load_allocation
    from allocator.modules import count_parameters

    talk = Talk(args)
    allocation = load_allocation(args.allocation)
    folder = folder_named(args.output)
    if folder is not None:
        model, small = _in_folder(allocation, folder, args, talk)
    else:
        model, small = _in_memory(allocation, args, talk)
    facts = {
        "model": args.model,
        "allocation": args.allocation,
        "flops_before": allocation.flops_before,
        "flops_after": allocation.flops_after,
        "parameters_before": count_parameters(model),
        "parameters_after": count_parameters(small),
        "files": {"model": args.output},
    }
    talk.result(_text(facts), facts)
    return 0


def _in_memory(allocation: Allocation, args: argparse.Namespace, talk: Talk) -> tuple[nn.Module, nn.Module]:
    from allocator.api import apply

    model = open_model(args.model, args, talk)
    with talk.stage("applying"):
        small = apply(model, allocation, args.weights)
    with talk.stage(f"writing {args.output}"):
        write_model(small, args.output)
    return model, small


def _in_folder(
    allocation: Allocation, output: str, args: argparse.Namespace, talk: Talk
) -> tuple[nn.Module, nn.Module]:
    """Both without their weights, which go from folder to folder."""
    from allocator.api import rewrite
    from allocator.folders import apply_folder

    folder = source_folder(args, "arch", "weights")
    model = without_weights(args, talk)
    with talk.stage("applying") as update:
        apply_folder(folder, allocation, output, model=model, progress=update)
    return model, rewrite(model, allocation)


def _text(facts: dict[str, Any]) -> str:
    return (
        f"FLOPs       {facts['flops_before']:,} -> {facts['flops_after']:,}\n"
        f"parameters  {facts['parameters_before']:,} -> {facts['parameters_after']:,}\n"
        f"model written to {facts['files']['model']}"
    )
