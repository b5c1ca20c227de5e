"""``allocator-cli apply``: a saved allocation on a fresh model."""

from __future__ import annotations

import argparse
from typing import Any

from allocator.cli.arguments import UsageError, add_command, add_model_options, add_output_options
from allocator.cli.opening import open_model
from allocator.cli.outputs import MODEL_SUFFIXES, check_outputs, check_suffix, write_model
from allocator.cli.talk import Talk

_EXAMPLE = """\
  allocator-cli apply torchvision:resnet50 alloc.json -o fresh_small.pt"""


def register(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(commands, "apply", "apply a saved allocation to a fresh model", _EXAMPLE)
    parser.add_argument("model", metavar="MODEL", help="a file or a name of the original network")
    parser.add_argument("allocation", metavar="ALLOCATION", help="alloc.json, or a saved .safetensors result")
    add_output_options(parser)
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
    check_suffix(args.output, MODEL_SUFFIXES, "the model (-o)")
    check_outputs(args, args.output)
    from allocator.api import apply
    from allocator.io.files import load_allocation
    from allocator.modules import count_parameters

    talk = Talk(args)
    allocation = load_allocation(args.allocation)
    model = open_model(args.model, args, talk)
    with talk.stage("applying"):
        small = apply(model, allocation, args.weights)
    with talk.stage(f"writing {args.output}"):
        write_model(small, args.output)
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


def _text(facts: dict[str, Any]) -> str:
    return (
        f"FLOPs       {facts['flops_before']:,} -> {facts['flops_after']:,}\n"
        f"parameters  {facts['parameters_before']:,} -> {facts['parameters_after']:,}\n"
        f"model written to {facts['files']['model']}"
    )
