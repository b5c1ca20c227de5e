"""``allocator-cli allocate``: a smaller model under a budget."""

from __future__ import annotations

import argparse
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
from allocator.cli.outputs import folder_named, source_folder, without_weights
from allocator.cli.results import add_file_options, add_weight_options, certify_of, check_files, show, write_files
from allocator.cli.talk import Talk
from allocator.settings import METHODS, RECOVERING_OPTIONS

if TYPE_CHECKING:
    from torch import nn

    from allocator.result import Result

_EXAMPLE = """\
  allocator-cli allocate torchvision:resnet50 --flops 60% --layers
  allocator-cli allocate torchvision:resnet50 --flops 60% -o small.pt
  allocator-cli allocate model.pt --flops 4.2e9 -o small.safetensors --allocation alloc.json
  allocator-cli allocate model.pt --flops 60% --data photographs/ -o small.pt
  allocator-cli allocate model.pt --flops 60% --data photographs/ --loss torch.nn.functional:cross_entropy -o small.pt
  allocator-cli allocate model.pt --params 10M --activations 70% --multiple 8 --at-least 25% -o small.pt
  allocator-cli allocate model.pt --latency 8ms --exclude 'head*' --same 'encoder.layer.*' -o small.pt
  allocator-cli allocate model.pt --flops 60% --data photographs/ --recover -o small.pt
  allocator-cli allocate hf:FOLDER --flops 70% -o hf:OUT
  allocator-cli allocate model.pt --flops 60% -o small.pt --report report.html --plot shares.png"""


def register(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(commands, "allocate", "allocate a model's neurons under a budget", _EXAMPLE)
    parser.add_argument("model", metavar="MODEL", help="a file or a name")
    add_budget_options(parser.add_argument_group("budgets, of which at least one is needed"))
    add_file_options(parser, folders=True)
    plan = parser.add_argument_group("plan")
    add_plan_options(plan)
    add_data_options(parser)
    add_weight_options(plan)
    _add_recover_option(plan)
    add_input_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=run)


def _add_recover_option(group: Any) -> None:
    option = RECOVERING_OPTIONS["recover"]
    group.add_argument(
        "--recover", nargs="?", const="auto", default=False, choices=METHODS, help=f"{option.help} (needs --data)"
    )


def run(args: argparse.Namespace) -> int:
    """Allocate, write the files, print the report."""
    if not budgets(args):
        raise UsageError("no budget is given, such as --flops 60%")
    check_files(args, folders=True)
    talk = Talk(args)
    folder = folder_named(args.output)
    if folder is not None:
        result = _from_folder(folder, args, talk)
    else:
        result = _allocate(open_model(args.model, args, talk), args, talk)
    written = write_files(args, talk, result)
    show(args, talk, result, written)
    return 0


def _allocate(model: nn.Module, args: argparse.Namespace, talk: Talk) -> Result:
    from allocator.api import allocate

    with talk.stage("allocating") as update:
        result = allocate(
            model,
            **budgets(args),
            **data_options(args, model),
            example_inputs=example_inputs(args, model),
            **plan_options(args),
            weights=args.weights,
            recover=args.recover,
            certify=certify_of(args),
            seed=args.seed,
            progress=update,
        )
        result.notes = talk.shows(result.notes)
    talk.times(result.timings)
    return result


def _from_folder(output: str, args: argparse.Namespace, talk: Talk) -> Result:
    """From the folder of the model into another, tensor by tensor."""
    from allocator.folders import allocate_folder

    folder = source_folder(args, "arch", "data", "loss", "latency", "recover", "weights")
    model = without_weights(args, talk)
    with talk.stage("allocating") as update:
        result = allocate_folder(
            folder,
            output,
            **budgets(args),
            model=model,
            example_inputs=example_inputs(args, model),
            **plan_options(args),
            progress=update,
        )
        result.notes = talk.shows(result.notes)
    talk.times(result.timings)
    return result
