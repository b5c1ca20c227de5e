"""The command that comes next, with all that was given to this one."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from typing import Any

_OWN = ("help", "json", "verbose", "quiet", "debug", "force", "latency", "layers")
"""Options of how a command talks, which the next one need not."""


def command(name: str, args: argparse.Namespace, **changes: Any) -> str:
    """The command line of a subcommand for what was said to another, or to itself.

    Args:
        name: of the subcommand that is to be run.
        args: of the one that was.
        changes: values by destination, in place of those in `args`; None for none.
    """
    values = {**vars(args), **changes}
    words = ["allocator-cli", name]
    for action in args.parsers[name]._actions:
        value = values.get(action.dest)
        if (action.dest not in _OWN or isinstance(value, str)) and value is not None and value != action.default:
            words += _words(action, value)
    return shlex.join(words)


def _words(action: argparse.Action, value: Any) -> Iterator[str]:
    if not action.option_strings:
        yield str(value)
        return
    flag = action.option_strings[0]
    if action.nargs == 0:
        yield flag
    elif isinstance(value, list):
        for each in value:
            yield from (flag, _text(each))
    else:
        yield from (flag, _text(value))


def _text(value: Any) -> str:
    """As it was typed: a size such as 1x3x224x224, a setting such as num_classes=10."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        import json

        setting = value[1] if isinstance(value[1], str) else json.dumps(value[1])
        return f"{value[0]}={setting}"
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
