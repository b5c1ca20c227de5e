"""What a recovery costs: time over images and over layers, and memory.

    python -m benchmarks.recovery_cost                          # all, each in a process of its own
    python -m benchmarks.recovery_cost torchvision:resnet50     # one, here: --help says what else

Networks of the reference set at 224 pixels lose half of their FLOPs without data, and are refitted on images of noise:
what they hold makes no difference to what it costs. Memory is the kernel's high-water mark above the model, as in
`benchmarks.memory`; what `fold` takes, which makes no matrix of inputs by inputs, tells what the forwards hold. Where
all that waits lies in a file (`memory=0`), the system's cache of that file is not counted: it gives way to whoever
needs memory. A run that is in the results already is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from typing import Any

import torch

from . import memory
from .common import RESULTS, ROOT, environment, table, timed

from reference_set import randomised  # isort: skip

import allocator

Data = dict[str, Any]
SIDE = 224
RUNS = (
    ("torchvision:resnet50", 32, "fold", 1, None),
    ("torchvision:resnet50", 32, "least_squares", 1, None),
    ("torchvision:resnet50", 32, "least_squares", 1, "0"),
    ("torchvision:resnet50", 64, "least_squares", 1, None),
    ("torchvision:resnet50", 64, "least_squares", 1, "0"),
    ("torchvision:resnet50", 128, "least_squares", 1, "0"),
    ("torchvision:resnet101", 32, "least_squares", 1, "0"),
    ("torchvision:resnet50", 256, "least_squares", 1, None),
    ("torchvision:resnet50", 256, "least_squares", 1, "0"),
    ("torchvision:resnet50", 256, "auto", 2, None),
)


def measure_here(name: str, images: int, method: Any, threads: int, allowed: str | None) -> Data:
    """One recovery in this process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    model = randomised(name)
    data = torch.randn(images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    result = allocator.allocate(model, "50%", example_inputs=data[:1], at_least="40%", certify=False)
    water = memory.HighWater()
    recovered, seconds = timed(lambda: allocator.recover(result, data, method, memory=allowed))
    water("end")
    recovery = recovered.recovery
    assert recovery is not None
    widest = max(p[0].numel() for p in result.model.parameters() if p.dim() > 1)
    weights = memory.weight_bytes(model)
    return {
        "layers": sum(p.dim() > 1 for p in model.parameters()),
        "seconds": round(seconds.wall, 1),
        "cpu seconds": round(seconds.cpu, 1),
        "peak": max(water.peaks.values()),
        "smaller": memory.weight_bytes(result.model),
        "weights": weights,
        "gram": 8 * widest**2,
        "tried": recovery.tried,
        "environment": environment(),
    }


def markdown(rows: list[Data]) -> str:
    """The page."""
    lines = [
        [
            row["name"].removeprefix("torchvision:"),
            row["layers"],
            row["images"],
            row["method"],
            row["threads"],
            "half of what is free" if row.get("allowed") is None else row["allowed"],
            f"{row['cpu seconds']:.0f}",
            f"{row['seconds']:.0f} (load {row['environment']['load']})",
            f"{row['peak'] / 1e6:,.0f} MB",
            f"{(2 * row['weights'] + row['gram']) / 1e6:,.0f} MB",
        ]
        for row in rows
    ]
    heads = ["network", "layers", "images", "method", "threads", "memory", "CPU seconds", "seconds"]
    heads += ["peak above the model", "twice the model, and its largest matrix"]
    first = rows[0]
    said = (
        f"ResNet-50 has {first['weights'] / 1e6:,.0f} MB of weights, and its widest layer left a matrix of inputs by "
        f"inputs of {first['gram'] / 1e6:,.0f} MB. The seconds hold other work where the load says so."
    )
    said += "".join(f" {row['remark']}" for row in rows if "remark" in row)
    head = ["# What a recovery costs", "", "Made by `python -m benchmarks.recovery_cost`: see its first lines.", ""]
    return "\n".join([*head, table(heads, lines), "", said, ""])


def main() -> None:
    """See --help."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery_cost", description=__doc__.split("\n")[0])
    parser.add_argument("name", nargs="?", help="measure this network, in the present process")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--method", default="least_squares")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", help="bytes that what waits may take, such as 0 or 1GB")
    args = parser.parse_args()
    if args.name:
        print(json.dumps(measure_here(args.name, args.images, args.method, args.threads, args.memory)))
        return
    file = RESULTS / "recovery_cost.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    for name, images, method, threads, allowed in RUNS:
        key = {"name": name, "images": images, "method": method, "threads": threads, "allowed": allowed}
        if any(key.items() <= row.items() for row in rows):
            continue
        command = [sys.executable, "-m", "benchmarks.recovery_cost", name, "--images", str(images)]
        command += ["--method", method, "--threads", str(threads), *(["--memory", allowed] if allowed else [])]
        environ = {**os.environ, **memory.MALLOC, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append({**key, **found})
        print(key, found["cpu seconds"], found["peak"] // 2**20, flush=True)
        file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "recovery_cost.md").write_text(markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
