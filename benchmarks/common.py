"""What all benchmarks share: one thread, the reference set, clocks, and where results go."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
sys.path.insert(0, str(ROOT / "tests"))  # the reference set is the tests'

torch.set_num_threads(1)

T = TypeVar("T")


class Seconds(NamedTuple):
    """Time of one call: by the clock on the wall, and of this process on the CPU."""

    wall: float
    cpu: float


def timed(function: Callable[[], T]) -> tuple[T, Seconds]:
    """Call `function` once, with the garbage collected beforehand."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def median(values: Sequence[float]) -> float:
    """Median, rounded to microseconds."""
    return round(statistics.median(values), 6)


def environment() -> dict[str, str]:
    """What the figures depend on besides this project."""
    packages = ("torch", "torchvision", "timm", "fvcore", "torch-pruning", "numpy", "scipy")
    return {
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        **{name: version(name) for name in packages},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def write(name: str, data: dict[str, Any], markdown: str) -> None:
    """Write `results/NAME.json` and `results/NAME.md`, and say so."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(markdown.rstrip() + "\n", encoding="utf-8")
    print(f"wrote benchmarks/results/{name}.json and {name}.md", flush=True)


def read(name: str) -> dict[str, Any]:
    """What `write` wrote before; empty where there is nothing yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    rule = ["---", *("---:" for _ in header[1:])]
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def where(data: dict[str, str]) -> str:
    """The environment in one line."""
    packages = ", ".join(f"{name} {data[name]}" for name in ("torch", "torch-pruning", "fvcore", "timm"))
    return (
        f"{data['processor']}, {data['threads']} thread, load at the start {data['load']}; "
        f"Python {data['python']}, {packages}."
    )


def short(name: str) -> str:
    """A model's name without its library."""
    return name.partition(":")[2]
