"""``allocator-cli allocate``: a smaller model under a budget."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from allocator.cli.arguments import (
    UsageError,
    add_budget_options,
    add_command,
    add_input_options,
    add_layers_option,
    add_model_options,
    add_output_options,
    add_plan_options,
    budgets,
    plan_options,
)
from allocator.cli.data import add_data_options, data_options
from allocator.cli.next_step import command
from allocator.cli.opening import example_inputs, open_model
from allocator.cli.outputs import MODEL_SUFFIXES, check_outputs, check_report, check_suffix, write_model
from allocator.cli.talk import Talk
from allocator.cli.words import in_shell
from allocator.settings import METHODS, RECOVERING_OPTIONS, SIZES

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
  allocator-cli allocate model.pt --flops 60% -o small.pt --report report.html --plot shares.png"""


def register(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(commands, "allocate", "allocate a model's neurons under a budget", _EXAMPLE)
    parser.add_argument("model", metavar="MODEL", help="a file or a name")
    add_budget_options(parser.add_argument_group("budgets, of which at least one is needed"))
    add_output_options(parser)
    parser.add_argument("--allocation", metavar="FILE", help="also write the allocation, as .json")
    plan = parser.add_argument_group("plan")
    add_layers_option(parser)
    add_plan_options(plan)
    add_data_options(parser)
    _add_result_options(plan)
    parser.add_argument("--report", metavar="FILE", help="also write the report: .html, .md, .csv, .json or .txt")
    parser.add_argument("--plot", metavar="FILE", help="also draw each block's neurons per scale: .png, .svg or .pdf")
    add_input_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=run)


def _add_result_options(group: Any) -> None:
    group.add_argument(
        "--weights",
        default="keep",
        choices=("keep", "reset"),
        help="keep them, or start afresh to train the result from scratch (default: keep)",
    )
    option = RECOVERING_OPTIONS["recover"]
    group.add_argument(
        "--recover", nargs="?", const="auto", default=False, choices=METHODS, help=f"{option.help} (needs --data)"
    )
    group.add_argument(
        "--certify",
        choices=SIZES,
        default=SIZES[0],
        help="compare outputs on the smallest inputs that the network takes in the same steps (small, the default), or "
        "on inputs of the full size",
    )
    group.add_argument("--no-certificate", action="store_true", help="leave out the numeric certificate")
    group.add_argument("--seed", type=int, default=0, help="of the certificate's input (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Allocate, write the files, print the report."""
    if not budgets(args):
        raise UsageError("no budget is given, such as --flops 60%")
    check_suffix(args.output, MODEL_SUFFIXES, "the model (-o)")
    check_suffix(args.allocation, (".json",), "the allocation (--allocation)")
    check_report(args.report, args.plot)
    check_outputs(args, args.output, args.allocation, args.report, args.plot)
    talk = Talk(args)
    model = open_model(args.model, args, talk)
    result = _allocate(model, args, talk)
    written = write_files(args, talk, result)
    show(args, talk, result, written)
    return 0


def write_files(args: argparse.Namespace, talk: Talk, result: Result) -> dict[str, str]:
    """Write the files that were asked for; paths by what they hold."""
    written = {}
    if args.output is not None:
        with talk.stage(f"writing {args.output}"):
            write_model(result, args.output)
        written["model"] = args.output
    if args.allocation is not None:
        result.allocation.save(args.allocation)
        written["allocation"] = args.allocation
    if args.report is not None:
        with talk.stage(f"writing {args.report}"):
            result.report().save(args.report, name=args.model)
        written["report"] = args.report
    if args.plot is not None:
        from allocator.reporting.pictures import draw_summary

        with talk.stage(f"drawing {args.plot}"):
            draw_summary(result.report().summary(args.model), args.plot)
        written["picture"] = args.plot
    return written


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
            certify=not args.no_certificate and args.certify,
            seed=args.seed,
            progress=update,
        )
    talk.times(result.timings)
    result.notes = list(map(in_shell, result.notes))
    return result


def show(args: argparse.Namespace, talk: Talk, result: Result, written: dict[str, str]) -> None:
    """Print the report, and what was written where."""
    from rich.console import Group, RenderableType
    from rich.text import Text

    report = result.report()
    lines: list[RenderableType] = [Text(f"{kind} written to {path}") for kind, path in written.items()]
    facts = {"model": args.model, **report.to_dict(), "files": written}
    if args.layers:
        lines = [Text(), report.layers(), *lines]
        facts["layers"] = report.layers().to_dict()
    talk.result(Group(report, *lines), facts)
    if not written:
        talk.announce(
            f"nothing was written; to write the smaller model: {command('allocate', args, output='small.pt')}"
        )
