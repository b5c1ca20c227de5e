"""What works on which model: every network in a process of its own, beside Torch-Pruning on the same one.

python -m benchmarks.coverage                                # set 1: torchvision's classifiers, timm's families
python -m benchmarks.coverage --names timm:resnest14d --print
python -m benchmarks.coverage --part 3/7                     # every seventh network, from the third
python -m benchmarks.coverage --again failed                 # those whose last row says that something failed

A process is forked for each network and tool, with a limit of CPU time. Every row is written as soon as it is there,
into results/coverage.json and docs/coverage.md; a run that was cut off goes on with the networks that have no row.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from . import coverage_one
from .common import environment, read, write
from .coverage_models import SETS, names_of
from .coverage_report import fell, markdown

LIMIT = 120
TOOLS = ("ours", "peer")
Row = dict[str, Any]


def measure(name: str, tools: Sequence[str] = TOOLS, limit: int = LIMIT) -> Row:
    """Tools on one network, each in a process of its own with a limit of CPU seconds."""
    return {"model": name, **{tool: apart(coverage_one.row, (name, tool), limit) for tool in tools}}


def apart(row_of: Callable[..., Row], what: Sequence[str], limit: int) -> Row:
    """A row from a forked process, which has the libraries imported already."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(send, row_of, what, limit))
    process.start()
    send.close()
    row: Row = {}
    with contextlib.suppress(EOFError):
        row = receive.recv()
    process.join()
    if row:
        return row
    late = process.exitcode == -signal.SIGXCPU
    return {"failed": f"not done after {limit} s" if late else f"the process ended with {process.exitcode}"}


def _child(send: Connection, row_of: Callable[..., Row], what: Sequence[str], limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10))
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    send.send(row_of(*what))


def import_what_tools_import() -> None:
    """Once, before the first fork."""
    for package in ("torchvision", "timm", "fvcore.nn", "torch_pruning", "networkx", "scipy.sparse.csgraph"):
        importlib.import_module(package)


def is_failed(row: Row) -> bool:
    """Whether ours did not go all the way on a network."""
    return not row.get("ours", {}).get("train_step")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the networks that have no row yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__.split("\n")[0])
    parser.add_argument("--set", choices=list(SETS), default="1", help="which networks (default 1)")
    parser.add_argument("--names", nargs="+", help="these networks instead, names as for allocator.build")
    parser.add_argument("--part", default="1/1", help="K/N: every N-th network, from the K-th")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS, help="which of the two (default both)")
    parser.add_argument("--limit", type=int, default=LIMIT, help=f"CPU seconds per network and tool (default {LIMIT})")
    parser.add_argument("--again", choices=("failed", "all"), help="measure networks anew that have a row")
    parser.add_argument("--print", action="store_true", help="show the rows, write nothing")
    chosen = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    start, step = (int(n) for n in chosen.part.split("/"))
    rows: dict[str, Row] = {row["model"]: row for row in read("coverage").get("rows", [])}
    import_what_tools_import()
    for name in chosen.names or names_of(chosen.set)[start - 1 :: step]:
        known = rows.get(name, {})
        again = chosen.again == "all" or (chosen.again == "failed" and is_failed(known))
        tools = [tool for tool in chosen.tools if again or tool not in known]
        if not tools:
            continue
        rows[name] = {**known, **measure(name, tools, chosen.limit)}
        print(json.dumps(rows[name]), flush=True)
        for worse in fell(known, rows[name]):
            print(f"{name} fell: {worse}", flush=True)
        if not chosen.print:
            data = {"environment": environment(), "rows": [rows[key] for key in sorted(rows)]}
            write("coverage", data, markdown(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
