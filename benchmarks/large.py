"""Large networks: planned without their weights, and in time proportional to the number of calls.

python -m benchmarks.large            # writes results/large.json and large.md
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import allocator

from .common import ROOT, environment, table, where, write


def regnet_y_128gf() -> nn.Module:
    """torchvision's, whose block sizes are computed with tensors that need values."""
    from torchvision.models.regnet import BlockParams, RegNet

    with torch.device("cpu"):
        sizes = BlockParams.from_init_params(depth=27, w_0=456, w_a=160.83, w_m=2.52, group_width=264, se_ratio=0.25)
    model: nn.Module = RegNet(sizes)
    return model


NETWORKS = {
    "regnet_y_128gf": regnet_y_128gf,
    "vit_giant_patch14_224": lambda: allocator.build("timm:vit_giant_patch14_224"),
}
CHAINS = (24, 71, 238)  # blocks of 21 calls each: about 500, 1,500 and 5,000 calls
Row = dict[str, Any]


class Block(nn.Module):
    """Two branches that are concatenated, with a shortcut: 21 calls with the layers' own."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.c = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width))
        self.d = nn.Sequential(nn.ReLU(), nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.d(self.c(torch.cat([self.a(x), self.b(x)], 1)))).relu()


def chain(blocks: int) -> nn.Module:
    """A network of so many blocks."""
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), *[Block() for _ in range(blocks)], nn.Conv2d(32, 10, 1))


def planned(build: Callable[[], nn.Module], inputs: Any) -> Row:
    """Trace, flow, score by chance, plan at 60 % and check the rewritten forward, all on tensors without storage."""
    with torch.device("meta"):
        model = build()
        inputs = None if inputs is None else torch.zeros(inputs)
    before = _resident()
    start = time.process_time()
    graph = allocator.trace(model, inputs)
    traced = time.process_time()
    scores = allocator.score(graph, "random")
    plan = allocator.plan(graph, scores, "60%")
    done = time.process_time()
    calls = len(graph.flow.trace.ops)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "calls": calls,
        "neurons": graph.size,
        "trace_seconds": traced - start,
        "plan_seconds": done - traced,
        "achieved": plan.flops_after / plan.flops_before,
        "memory": _resident() - before,
    }


def _resident() -> int:
    """Largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def here(name: str) -> Row:
    """One row, measured in this process."""
    warnings.simplefilter("ignore")
    planned(lambda: chain(2), (1, 3, 32, 32))  # imports and first calls
    if name.isdigit():
        return planned(lambda: chain(int(name)), (1, 3, 32, 32))
    return planned(NETWORKS[name], None)


def measure(name: str) -> Row:
    """One row, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.large", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    row: Row = json.loads(done.stdout.splitlines()[-1])
    print(name, row, flush=True)
    return row


def markdown(data: dict[str, Any]) -> str:
    """The page."""
    header = ["network", "parameters", "calls", "neurons", "trace s", "plan s", "ms per call", "FLOPs", "memory"]
    lines = []
    for name, row in data["rows"].items():
        seconds = row["trace_seconds"] + row["plan_seconds"]
        lines.append(
            [
                f"chain of {name} blocks" if name.isdigit() else name,
                f"{row['parameters'] / 1e6:,.1f} M",
                f"{row['calls']:,}",
                f"{row['neurons']:,}",
                f"{row['trace_seconds']:.2f}",
                f"{row['plan_seconds']:.2f}",
                f"{1e3 * seconds / row['calls']:.2f}",
                f"{100 * row['achieved']:.2f} %",
                f"{row['memory'] / 2**20:,.0f} MB",
            ]
        )
    text = [
        "# Large networks",
        "",
        "Made by `python -m benchmarks.large`: each network in a process of its own, built on tensors without storage, "
        "traced, ranked by chance, planned at 60 % of its FLOPs, and its rewritten forward checked. Seconds of the "
        "CPU. Memory is what the process's peak grew by; the weights would take 4 bytes per parameter and are never "
        "there.",
        "",
        table(header, lines),
        "",
        where(data["environment"]),
    ]
    return "\n".join(text)


def main() -> int:
    """Measure all, or one in this process."""
    if len(sys.argv) > 1:
        print(json.dumps(here(sys.argv[1])))
        return 0
    rows = {name: measure(name) for name in (*map(str, CHAINS), *NETWORKS)}
    data = {"environment": environment(), "rows": rows}
    write("large", data, markdown(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
