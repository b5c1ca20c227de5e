"""``allocator-cli widen``: a wider model that computes the same."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, get_args

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
from allocator.cli.opening import example_inputs, open_model
from allocator.cli.results import add_file_options, add_weight_options, certify_of, check_files, show, write_files
from allocator.cli.talk import Talk
from allocator.settings import WIDENING_OPTIONS, Init

if TYPE_CHECKING:
    from torch import nn

    from allocator.result import Result

_EXAMPLE = """\
  allocator-cli widen torchvision:resnet50 --flops 150% -o wide.pt
  allocator-cli widen model.pt --factor 1.5 --init copy -o wide.safetensors --allocation wide.json
  allocator-cli widen model.pt --like learned.json --include 'layer3.*' -o wide.pt
  allocator-cli widen torchvision:googlenet --neurons 100% --weights reset -o seed.pt"""
_PLAN = ("scope", "groups", "exclude", "include", "multiple")


def register(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(commands, "widen", "make a model wider without changing what it computes", _EXAMPLE)
    parser.add_argument("model", metavar="MODEL", help="a file or a name")
    how = parser.add_argument_group("how wide: budgets above its own (150%, for example), or one of the others")
    add_budget_options(how, without=("latency",))
    how.add_argument("--factor", type=float, metavar="N", help=WIDENING_OPTIONS["factor"].help)
    how.add_argument("--like", metavar="FILE", help="every layer as wide as this allocation, .json, leaves it")
    how.add_argument(
        "--neurons", metavar="N", help="make a seed: every branch of a block as many, or a share of its widest branch"
    )
    add_file_options(parser, what="wider")
    plan = parser.add_argument_group("plan")
    add_plan_options(plan, *_PLAN)
    plan.add_argument("--init", default="zero", choices=get_args(Init), help=WIDENING_OPTIONS["init"].help)
    add_weight_options(plan)
    add_input_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Widen, write the files, print the report."""
    asked = [name for name in ("factor", "like", "neurons") if getattr(args, name) is not None]
    if len(asked) + bool(budgets(args)) != 1:
        raise UsageError("budgets, or one of --factor, --like and --neurons, are needed, such as --flops 150% alone")
    if args.neurons is not None and (args.scope, args.groups, args.multiple) != ("auto", "auto", 1):
        raise UsageError("--scope, --groups and --multiple do not go with --neurons, which names the branches itself")
    check_files(args)
    talk = Talk(args)
    model = open_model(args.model, args, talk)
    result = _widen(model, args, talk)
    show(args, talk, result, write_files(args, talk, result))
    return 0


def _widen(model: nn.Module, args: argparse.Namespace, talk: Talk) -> Result:
    from allocator.growing import seed, widen

    plan = plan_options(args, *_PLAN)
    with talk.stage("widening") as update:
        options: dict[str, Any] = {
            "init": args.init,
            "example_inputs": example_inputs(args, model),
            "exclude": plan["exclude"],
            "include": plan["include"],
            "weights": args.weights,
            "certify": certify_of(args),
            "seed": args.seed,
            "progress": update,
        }
        if args.neurons is not None:
            neurons = int(args.neurons) if args.neurons.isdecimal() else args.neurons
            result = seed(model, neurons, **options)
        else:
            options |= {**budgets(args), **{name: plan[name] for name in ("scope", "groups", "multiple")}}
            result = widen(model, factor=args.factor, like=args.like, **options)
        result.notes = talk.shows(result.notes)
    talk.times(result.timings)
    return result
