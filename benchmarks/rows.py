"""Pages with a row per network: measured one by one and written after each, so that a run that was cut off goes on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from typing import Any

from .common import environment, write
from .peer import reason

Data = dict[str, Any]


def arguments_of(page: str) -> argparse.ArgumentParser:
    """What the command of every such page takes."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{page}")
    parser.add_argument("--names", nargs="+", help="these networks, whether or not they have a row")
    parser.add_argument("--print", action="store_true", help="show the rows, write nothing")
    return parser


def measure_rows(
    page: str,
    data: Data,
    known: Iterable[str],
    measure: Callable[[str], Data],
    markdown: Callable[[Data], str],
    chosen: argparse.Namespace,
) -> None:
    """Measure the networks that have no row yet, or those that were asked for.

    Args:
        page: name of its files.
        data: what they hold, with a row per network that was measured before.
        known: names of all its networks.
        measure: the row of one; what it raises is a row too.
        markdown: the page.
        chosen: as `arguments_of` reads it.
    """
    for name in chosen.names or [each for each in known if each not in data["rows"]]:
        try:
            row = measure(name)
        except Exception as error:  # whatever it raises is a result here
            row = {"failed": reason(error)}
        data["rows"][name] = row
        print(json.dumps({name: row}), flush=True)
        if not chosen.print:
            data["environment"] = environment()
            write(page, data, markdown(data))
