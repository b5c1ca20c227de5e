"""What the commands share that plan: options that say how neurons are chosen, and reports of what was."""

from __future__ import annotations

from typing import Any

from allocator.cli.common import UsageError


def add_plan_options(group: Any) -> None:
    """Who competes with whom, by what, and what stays."""
    group.add_argument(
        "--policy",
        default="per_block",
        choices=("per_block", "global", "uniform"),
        help="who competes with whom: branches of a block, all neurons, or none (default: per_block)",
    )
    group.add_argument(
        "--criterion",
        default="auto",
        metavar="NAME",
        help="what ranks neurons, such as bn_scale or magnitude (default: auto, bn_scale where it can meet the budget)",
    )
    group.add_argument(
        "--scope",
        default="auto",
        choices=("auto", "branches", "inner", "all"),
        help="which neurons may go (default: auto, the narrowest that can meet the budget)",
    )
    group.add_argument(
        "--groups",
        default="whole",
        choices=("whole", "width"),
        help="in grouped convolutions, drop whole groups or narrow all of them (default: whole)",
    )
    group.add_argument(
        "--norms",
        default="exact",
        choices=("exact", "loose"),
        help="keep channels under a norm over channels, or let them go (default: exact)",
    )
    group.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave modules of this name alone, as in 'layer4*' (repeat for more)",
    )
    group.add_argument("--no-fill", action="store_true", help="keep plain shares; do not fill the budget up")


def check_report(report: str | None, plot: str | None) -> None:
    """Usage error, before any work is done, where the name of a report or a picture does not say its format."""
    from allocator.errors import UnknownNameError
    from allocator.reporting import format_of
    from allocator.reporting.pictures import picture_format

    try:
        if report is not None:
            format_of(report)
        if plot is not None:
            picture_format(plot)
    except UnknownNameError as error:
        raise UsageError(str(error)) from error
