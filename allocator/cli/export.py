"""``allocator-cli export``: a network as ONNX or as an exported program, held against the module."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from allocator.cli.arguments import UsageError, add_command, add_input_options, add_model_options
from allocator.cli.opening import example_inputs, open_model
from allocator.cli.outputs import check_outputs
from allocator.cli.talk import Talk
from allocator.errors import UnknownNameError

if TYPE_CHECKING:
    from allocator.io.export import Export

_EXAMPLE = """\
  allocator-cli export small.safetensors --to onnx -o small.onnx
  allocator-cli export torchvision:resnet18 -o resnet18.pt2"""


def register(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(commands, "export", "export a model, run what was written, and compare", _EXAMPLE)
    parser.add_argument("model", metavar="MODEL", help="a file or a name")
    parser.add_argument("--to", metavar="FORMAT", help="onnx or pt2 (left out: by the suffix of FILE)")
    parser.add_argument("-o", "--output", metavar="FILE", help="the file to write: .onnx or .pt2")
    parser.add_argument("--force", action="store_true", help="overwrite a file that exists")
    add_input_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export, compare, print the difference."""
    if args.output is None:
        raise UsageError("nothing to write: give -o FILE")
    from allocator.io.export import export, format_of

    try:
        to = format_of(args.output, args.to)
    except UnknownNameError as error:
        raise UsageError(str(error)) from error
    check_outputs(args, args.output)
    talk = Talk(args)
    model = open_model(args.model, args, talk)
    with talk.stage("exporting and comparing"):
        exported = export(model, args.output, to=to, example_inputs=example_inputs(args, model))
    for note in exported.notes:
        talk.note(note)
    talk.result(_text(exported), {"model": args.model, **exported.to_dict()})
    return 0


def _text(exported: Export) -> str:
    sizes = ", ".join(map(str, exported.batches))
    return (
        f"{exported.format} written to {exported.path} ({exported.size:,} bytes)\n"
        f"outputs    within {exported.difference:.1e} of the module's largest, at batches of {sizes}\n"
        f"layers     {exported.layer_flops:,} FLOPs in convolutions and linear layers, as in the module"
    )
