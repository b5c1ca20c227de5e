"""Trace and flow alone for every network that timm knows, on tensors without storage.

python -m benchmarks.coverage_meta                     # all names without a row yet; goes on where it was cut off
python -m benchmarks.coverage_meta --names resnet50 --print
python -m benchmarks.coverage_meta --again failed      # those that failed, or have an operator without a rule

A process takes many networks, to import timm once; each has a time limit, and one that takes the process down
costs only itself. Writes results/coverage_meta.json and docs/coverage-timm.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

import allocator

from .common import ROOT, environment, median, read, table, where, write
from .peer import reason

LIMIT = 300
PER_PROCESS = 40
MEMORY = 8 << 30  # bytes a process may take: a network that is built for real must fit
PAGE = ROOT / "docs" / "coverage-timm.md"

Row = dict[str, Any]


def built(name: str) -> tuple[nn.Module, str]:
    """A network and where its weights lie: on meta, or for real where its constructor reads values."""
    try:
        with torch.device("meta"):
            return allocator.build(f"timm:{name}"), "meta"
    except Exception:  # whatever a constructor raises when it reads a value
        return allocator.build(f"timm:{name}"), "cpu"


def traced(name: str) -> Row:
    """One row: trace and flow, timed."""
    start = time.perf_counter()
    model, device = built(name)
    row: Row = {"parameters": sum(p.numel() for p in model.parameters()), "built": device}
    row["build_seconds"] = round(time.perf_counter() - start, 3)
    start = time.perf_counter()
    graph = allocator.trace(model)
    row["seconds"] = round(time.perf_counter() - start, 3)
    ops = graph.flow.trace.ops
    row |= {"traced": graph.flow.trace.mode, "operators": len(ops), "neurons": graph.size}
    row |= {"share": round(graph.share(), 4), "input": list(graph.inputs.tensors()[0].shape)}
    row["unsupported"] = sorted(graph.unsupported)
    return row


def rows_here(names: Sequence[str], limit: int) -> Iterator[Row]:
    """Rows of these networks, made in this process."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {limit} s")

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, stop)
    for name in names:
        row: Row = {"model": name}
        signal.alarm(limit)
        try:
            row |= traced(name)
        except Exception as error:  # whatever it raises is a result here
            row["failed"] = reason(error)
        signal.alarm(0)
        yield row


def rows(names: Sequence[str], limit: int = LIMIT) -> Iterator[Row]:
    """Rows of these networks, made in processes of some networks each."""
    left = list(names)
    while left:
        some = left[:PER_PROCESS]
        command = [sys.executable, "-m", "benchmarks.coverage_meta", "--here", f"--limit={limit}", "--names", *some]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith('{"model"'):
                    row = json.loads(line)
                    left.remove(row["model"])
                    some.remove(row["model"])
                    yield row
        if some:
            left.remove(some[0])
            yield {"model": some[0], "failed": f"took the process down (exit status {process.returncode})"}


def is_failed(row: Row) -> bool:
    """Whether a network could not be followed all the way."""
    return "failed" in row or bool(row["unsupported"])


def markdown(data: dict[str, Any]) -> str:
    """The page, which is written to docs/ too."""
    lines = data["rows"]
    done = [row for row in lines if "failed" not in row]
    unknown = sorted({name for row in done for name in row["unsupported"]})
    real = sum(row["built"] != "meta" for row in done)
    modes = [row for row in done if row["traced"] != "meta"]
    slowest = max(done, key=lambda row: row["seconds"])
    largest = max(done, key=lambda row: row["parameters"])
    per_operator = median([1e3 * row["seconds"] / row["operators"] for row in done])
    seconds = [row["seconds"] for row in done]
    text = [
        "# Trace and flow on every network of timm",
        "",
        "Made by `python -m benchmarks.coverage_meta`: every name of `timm.list_models()`, built and traced on "
        "tensors without storage at its own image size, and its channels followed.",
        "",
        f"- {len(done)} of {len(lines)} networks traced; {len(modes)} of them needed values.",
        f"- Operators without a rule: {', '.join(unknown) or 'none'}.",
        f"- {real} networks read values while they are built, and were built for real.",
        f"- Seconds per network: median {median(seconds):.2f}, sum {sum(seconds):,.0f}, most {slowest['seconds']:.1f} "
        f"({slowest['model']}, {slowest['operators']:,} calls); {per_operator:.2f} ms per call in the median.",
        f"- Largest: {largest['model']}, {largest['parameters'] / 1e6:,.0f} million parameters, "
        f"{largest['seconds']:.1f} s.",
        f"- Share of channels that can be allocated: median {100 * median([row['share'] for row in done]):.0f} %.",
        "",
        table(["network", "parameters", "calls", "input", "can go", "s", "note"], [_line(row) for row in lines]),
        "",
        where(data["environment"]),
        "",
    ]
    page = "\n".join(text)
    PAGE.write_text(page, encoding="utf-8")
    return page


def _line(row: Row) -> list[str]:
    if "failed" in row:
        return [row["model"], "", "", "", "", "", row["failed"].replace("|", "/")]
    notes = [f"no rule: {', '.join(row['unsupported'])}"] if row["unsupported"] else []
    notes += ["built for real"] if row["built"] != "meta" else []
    notes += [f"traced with {row['traced']} tensors"] if row["traced"] != "meta" else []
    size = "×".join(map(str, row["input"][1:]))
    figures = [f"{row['parameters'] / 1e6:.1f} M", f"{row['operators']:,}", size, f"{100 * row['share']:.0f} %"]
    return [row["model"], *figures, f"{row['seconds']:.2f}", "; ".join(notes)]


def _names() -> list[str]:
    import timm

    return sorted(timm.list_models())


def _save(known: Iterable[Row]) -> None:
    data = {"environment": environment(), "rows": sorted(known, key=lambda row: str(row["model"]))}
    write("coverage_meta", data, markdown(data))


def main(arguments: Sequence[str] | None = None) -> int:
    """Trace the networks that have no row yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage_meta", description=__doc__.split("\n")[0])
    parser.add_argument("--names", nargs="+", help="these networks instead of all, names as for timm.create_model")
    parser.add_argument("--again", choices=("failed", "all"), help="trace networks anew that have a row")
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds for a network")
    parser.add_argument("--print", action="store_true", help="show the rows, write nothing")
    parser.add_argument("--here", action="store_true", help="in this process; show the rows, write nothing")
    chosen = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    if chosen.here:
        for row in rows_here(chosen.names, chosen.limit):
            print(json.dumps(row), flush=True)
        return 0
    known: dict[str, Row] = {row["model"]: row for row in read("coverage_meta").get("rows", [])}
    again = {name for name, row in known.items() if chosen.again == "all" or (chosen.again and is_failed(row))}
    names = chosen.names or [name for name in _names() if name not in known or name in again]
    for row in rows(names, chosen.limit):
        known[row["model"]] = row
        print(json.dumps(row), flush=True)
        if not chosen.print and (len(known) % 20 == 0 or is_failed(row)):
            _save(known.values())
    if not chosen.print:
        _save(known.values())
    return 0


if __name__ == "__main__":
    sys.exit(main())
