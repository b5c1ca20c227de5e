"""``allocator-cli verify``: is this model the original minus what its allocation removed?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.cli.arguments import UsageError, add_command, add_input_options, add_model_options
from allocator.cli.opening import example_inputs, open_model
from allocator.cli.outputs import folder_named
from allocator.cli.talk import Talk
from allocator.errors import FileError

if TYPE_CHECKING:
    from torch import nn

    from allocator.verifying.certificate import Certificate

_EXAMPLE = """\
  allocator-cli verify model.pt small.pt alloc.json
  allocator-cli verify model.pt small.safetensors"""


def register(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands, "verify", "check that a smaller model is the original minus the removed neurons", _EXAMPLE
    )
    parser.add_argument("model", metavar="MODEL", help="the original: a file or a name")
    parser.add_argument("small", metavar="SMALL", help="the smaller model's file, or hf:FOLDER")
    parser.add_argument(
        "allocation", metavar="ALLOCATION", nargs="?", help="alloc.json; a .safetensors SMALL holds its own"
    )
    add_input_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify, and print the certificate; status 1 where it does not hold."""
    source = args.allocation
    if source is None and Path(args.small).suffix == ".safetensors":
        source = args.small
    if source is None:
        raise UsageError("ALLOCATION is needed: only a .safetensors SMALL holds its own")
    from allocator.api import verify
    from allocator.io.files import load_allocation

    talk = Talk(args)
    allocation = load_allocation(source)
    model = open_model(args.model, args, talk)
    with talk.stage(f"reading {args.small}"):
        small = _small(args, model)
    with talk.stage("verifying"):
        certificate = verify(model, small, allocation, example_inputs=example_inputs(args, model, allocation))
    facts = {"model": args.model, "small": args.small, **certificate.to_dict()}
    talk.result(_text(certificate), facts)
    return 0 if certificate.ok else 1


def _small(args: argparse.Namespace, model: nn.Module) -> nn.Module:
    """The smaller model; a result that does not tell how to build its network is rebuilt from the original."""
    from allocator.io.files import load_model
    from allocator.io.results import load_result

    if folder_named(args.small) is not None:
        return load_result(args.small)
    try:
        return load_model(args.small, trust=args.trust)
    except FileError:
        if Path(args.small).suffix != ".safetensors":
            raise
        return load_result(args.small, model=model)


def _text(certificate: Certificate) -> str:
    structure = "holds" if certificate.structural else "BROKEN"
    weights = {None: "not compared", True: "the original's, bit for bit", False: "NOT the original's"}[
        certificate.weights
    ]
    if certificate.refitted is not None:
        weights += f" before they were refitted on {certificate.refitted} inputs"
    numbers = "not computed"
    if certificate.relative_error is not None:
        numbers = f"relative error {certificate.relative_error:.3g}"
        if not certificate.exact:
            numbers += " (inexact by nature: a norm over channels)"
    verdict = "the original minus the removed neurons"
    if certificate.widens:
        verdict = "the original with neurons that change nothing"
    if not certificate.ok:
        verdict = f"NOT {verdict}"
    return f"structure  {structure}\nweights    {weights}\nnumbers    {numbers}\nverdict    {verdict}"
