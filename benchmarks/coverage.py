"""What works on which model: every network in a process of its own, beside Torch-Pruning on the same one.

python -m benchmarks.coverage                                # set 1: torchvision's classifiers, timm's families
python -m benchmarks.coverage --names timm:resnest14d --print
python -m benchmarks.coverage --part 3/7                     # every seventh network, from the third
python -m benchmarks.coverage --again failed                 # those whose last row says that something failed

Every row is written as soon as it is there, into results/coverage.json and docs/coverage.md; a run that was cut
off goes on with the networks that have no row.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from .common import ROOT, environment, read, write
from .coverage_models import SETS, names_of
from .coverage_report import markdown

LIMIT = 600

Row = dict[str, Any]


def measure(name: str, limit: int = LIMIT) -> Row:
    """Both tools on one network, each in a fresh process with a time limit in seconds."""
    row: Row = {"model": name}
    for tool in ("ours", "peer"):
        command = [sys.executable, "-m", "benchmarks.coverage_one", name, tool]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            row[tool] = {"failed": f"not done after {limit} s"}
            continue
        last = (done.stdout.strip().splitlines() or [""])[-1]
        if done.returncode == 0 and last.startswith("{"):
            row[tool] = json.loads(last)
        else:
            said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            row[tool] = {"failed": said[:200]}
    return row


def is_failed(row: Row) -> bool:
    """Whether ours did not go all the way on a network."""
    return not row["ours"].get("train_step")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the networks that have no row yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__.split("\n")[0])
    parser.add_argument("--set", choices=list(SETS), default="1", help="which networks (default 1)")
    parser.add_argument("--names", nargs="+", help="these networks instead, names as for allocator.build")
    parser.add_argument("--part", default="1/1", help="K/N: every N-th network, from the K-th")
    parser.add_argument("--again", choices=("failed", "all"), help="measure networks anew that have a row")
    parser.add_argument("--print", action="store_true", help="show the rows, write nothing")
    chosen = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    start, step = (int(n) for n in chosen.part.split("/"))
    rows: dict[str, Row] = {row["model"]: row for row in read("coverage").get("rows", [])}
    for name in chosen.names or names_of(chosen.set)[start - 1 :: step]:
        known = rows.get(name)
        if known and not chosen.names and not (chosen.again == "all" or (chosen.again and is_failed(known))):
            continue
        rows[name] = measure(name)
        print(json.dumps(rows[name]), flush=True)
        if not chosen.print:
            data = {"environment": environment(), "rows": [rows[key] for key in sorted(rows)]}
            write("coverage", data, markdown(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
