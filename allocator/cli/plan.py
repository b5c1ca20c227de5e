"""What the commands share that plan: options that say how neurons are chosen, and reports of what was."""

from __future__ import annotations

import argparse
from typing import Any

from allocator.cli.arguments import UsageError
from allocator.settings import CHOICES, DEFAULTS, KNOWN_POLICIES, OPTIONS


def add_plan_options(group: Any) -> None:
    """A flag for every option of `allocator.settings`."""
    for name, option in OPTIONS.items():
        default = getattr(DEFAULTS, name)
        flag = f"--{(option.flag or name).replace('_', '-')}"
        if isinstance(default, bool):
            group.add_argument(flag, dest=name, action=f"store_{str(not default).lower()}", help=option.help)
        elif isinstance(default, tuple):
            group.add_argument(flag, dest=name, action="append", default=[], metavar=option.metavar, help=option.help)
        else:
            choices = KNOWN_POLICIES if name == "policy" else CHOICES.get(name)
            said = f"{option.help} (default: {default})"
            group.add_argument(
                flag, dest=name, default=default, choices=choices, metavar=option.metavar or None, help=said
            )


def plan_options(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """What was asked for, by the names of the options: all of them, or those that are named."""
    values = {name: getattr(args, name) for name in names or OPTIONS}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


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
