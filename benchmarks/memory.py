"""Peak memory above the model, each measurement in a process of its own.

    python -m benchmarks.memory torchvision:resnet50            # all measurements of one model, as JSON

The kernel's high-water mark of resident memory (VmHWM) is reset after the model is built and one small model
has gone through the same call, so that the mark holds neither the interpreter, nor imports, nor the model,
but all else: copies of weights, activations, labels, the smaller model itself. The C library is told to give
freed blocks of 64 KiB and more back at once, so that what building the model left over hides nothing.
It is reset between the stages of `allocate` too, so that each has a mark of its own. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .common import ROOT
from .peer import prune_once

from reference_set import example, randomised  # isort: skip

import allocator

Data = dict[str, Any]
WARM_UP = "torchvision:resnet18"
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


Progress = Callable[[str], None]


def forward(model: nn.Module, name: str, progress: Progress) -> object:
    """The model's own eval-mode forward on one image, for comparison."""
    with torch.no_grad():
        return model(example(name))


def allocate(model: nn.Module, name: str, progress: Progress) -> object:
    """The whole flow to 60 % of the FLOPs, certificate and fvcore included; the result stays alive."""
    return allocator.allocate(model, flops="60%", progress=progress)


def trace(model: nn.Module, name: str, progress: Progress) -> object:
    """Tracing and channel flow alone."""
    return allocator.trace(model)


def widen(model: nn.Module, name: str, progress: Progress) -> object:
    """Every layer 1.5 times as wide, certificate and fvcore included; the result stays alive."""
    return allocator.widen(model, factor=1.5, progress=progress)


WHAT: dict[str, Callable[[nn.Module, str, Progress], object]] = {
    "forward": forward,
    "trace": trace,
    "allocate": allocate,
    "widen": widen,
    "peer_once": lambda model, name, progress: prune_once(model, example(name)),
}


class HighWater:
    """Peak resident memory of each stage, above what was resident at first."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.stage = "before"
        self.base = resident("VmRSS")
        self("begin")
        self.peaks.clear()

    def __call__(self, stage: str) -> None:
        """End the stage that was, and begin another."""
        self.peaks[self.stage] = max(self.peaks.get(self.stage, 0), resident("VmHWM") - self.base)
        self.stage = stage
        REFERENCES.write_text("5", encoding="ascii")  # resets VmHWM to what is resident now


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def resident(field: str) -> int:
    """A field of the process's status, such as VmRSS or VmHWM, in bytes."""
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")


def measure_here(name: str, what: str) -> Data:
    """Measure in this process, once; see `measure`."""
    warnings.simplefilter("ignore")
    WHAT[what](randomised(WARM_UP), WARM_UP, lambda stage: None)
    model = randomised(name)
    weights = weight_bytes(model)
    water = HighWater()
    kept = WHAT[what](model, name, water)
    water("end")
    after = resident("VmRSS") - water.base
    made = weight_bytes(kept.model) if isinstance(kept, allocator.Result) else 0
    return {"weights": weights, "made": made, "peak": max(water.peaks.values()), "after": after, "stages": water.peaks}


def measure(name: str, what: str) -> Data | str:
    """Peak resident memory of a call above the model, in a fresh process.

    Args:
        name: as for `allocator.build`.
        what: one of `WHAT`.

    Returns:
        Bytes of the model's weights, of those of the model that was made, of the peak, of what stays after the call,
        and of each stage's peak; or why it failed.
    """
    command = [sys.executable, "-m", "benchmarks.memory", name, "--what", what]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **MALLOC}, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1][:160]
    result: Data = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Print one measurement made here, or all of them made in processes of their own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="name as for allocator.build")
    parser.add_argument("--what", choices=list(WHAT), help="measure this in the present process")
    chosen = parser.parse_args()
    if chosen.what:
        print(json.dumps(measure_here(chosen.model, chosen.what)))
    else:
        print(json.dumps({what: measure(chosen.model, what) for what in WHAT}, indent=1))


if __name__ == "__main__":
    main()
