"""Large networks: planned without their weights or beside them, and in time proportional to the number of calls.

python -m benchmarks.large                      # writes results/large.json and large.md
python -m benchmarks.large growth "GRU steps" 512   # one row alone, printed

Needs Linux, and 9 GiB of memory for the networks whose weights are there.
"""

from __future__ import annotations

import json
import math
import os
import statistics
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
from .memory import MALLOC, REFERENCES, resident, weight_bytes


def regnet_y(first: int, slope: float, group_width: int) -> nn.Module:
    """torchvision's of 27 blocks, whose sizes are computed with tensors that need values."""
    from torchvision.models.regnet import BlockParams, RegNet

    with torch.device("cpu"):
        sizes = BlockParams.from_init_params(27, w_0=first, w_a=slope, w_m=2.52, group_width=group_width, se_ratio=0.25)
    model: nn.Module = RegNet(sizes)
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "regnet_y_128gf": (lambda: regnet_y(456, 160.83, 264), "bn_scale"),
    "regnet_y_128gf, 5/4 as wide": (lambda: regnet_y(576, 202, 336), "bn_scale"),
    "vit_giant_patch14_224": (lambda: allocator.build("timm:vit_giant_patch14_224"), "magnitude"),
}
CHAINS = (36, 108, 360)  # blocks of 14 calls each: about 500, 1,500 and 5,000 calls
Row = dict[str, Any]


class Block(nn.Module):
    """Two branches that are concatenated, with a shortcut: 14 calls."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.c = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width))
        self.d = nn.Sequential(nn.ReLU(), nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.d(self.c(torch.cat([self.a(x), self.b(x)], 1)))).relu()


def chain(blocks: int, width: int = 32) -> nn.Module:
    """A network of so many blocks."""
    stem, head = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 10, 1)
    return nn.Sequential(stem, *[Block(width) for _ in range(blocks)], head)


class Unrolled(nn.Module):
    """A recurrent cell that is called once for each step of a sequence, (N, steps, 8) to (N, 4)."""

    def __init__(self, cell: type[nn.GRUCell] | type[nn.LSTMCell]) -> None:
        super().__init__()
        self.embedding, self.cell, self.head = nn.Linear(8, 12), cell(12, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(self.embedding(step), state)
        output: torch.Tensor = self.head(state[0] if isinstance(state, tuple) else state)
        return output


def plain_chain(modules: int) -> nn.Module:
    """So many modules one after the other."""
    unit = (lambda: nn.Conv2d(8, 8, 1), lambda: nn.BatchNorm2d(8), nn.ReLU, nn.Identity)
    layers = [unit[number % 4]() for number in range(modules - 2)]
    return nn.Sequential(nn.Conv2d(3, 8, 1), *layers, nn.Conv2d(8, 4, 1))


# What grows: how it is built for a number, the numbers, and the shape of its inputs for one.
GROWTH: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...], Callable[[int], tuple[int, ...]]]] = {
    "modules in a chain": (plain_chain, (1000, 3000, 10000), lambda _: (1, 3, 8, 8)),
    "GRU steps": (lambda _: Unrolled(nn.GRUCell), (64, 192, 512), lambda steps: (1, steps, 8)),
    "LSTM steps": (lambda _: Unrolled(nn.LSTMCell), (64, 192, 512), lambda steps: (1, steps, 8)),
    "blocks of two branches": (lambda blocks: chain(blocks, 8), (100, 300, 1000), lambda _: (1, 3, 8, 8)),
}


def grown(kind: str, number: int) -> Row:
    """The whole default call at 60 %, with fvcore's count and the certificate."""
    build, _, shape = GROWTH[kind]
    torch.manual_seed(0)
    model, image = build(number).eval(), torch.randn(shape(number))
    done = _Mark()
    result = allocator.allocate(model, "60%", example_inputs=image)
    seconds, memory = done.seconds(), done.peak()
    calls = len(allocator.trace(model, image).flow.trace.ops)
    certified = bool(result.certificate.ok)
    return {"number": number, "calls": calls, "seconds": seconds, "memory": memory, "certified": certified}


def exponent(rows: list[Row]) -> float:
    """The slope of seconds over calls, both by their logarithms."""
    calls, seconds = ([math.log(row[name]) for row in rows] for name in ("calls", "seconds"))
    return statistics.linear_regression(calls, seconds).slope


def planned(build: Callable[[], nn.Module], inputs: Any) -> Row:
    """Trace, flow, score by chance, plan at 60 % and check the rewritten forward, all on tensors without storage."""
    with torch.device("meta"):
        model = build()
        inputs = None if inputs is None else torch.zeros(inputs)
    done = _Mark()
    graph = allocator.trace(model, inputs)
    traced = time.process_time()
    plan = allocator.plan(graph, allocator.score(graph, "random"), "60%")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "calls": len(graph.flow.trace.ops),
        "neurons": graph.size,
        "trace_seconds": traced - done.start,
        "plan_seconds": time.process_time() - traced,
        "achieved": plan.flops_after / plan.flops_before,
        "memory": done.peak(),
    }


class _Mark:
    """Seconds of the CPU and peak memory from here on."""

    def __init__(self) -> None:
        REFERENCES.write_text("5", encoding="ascii")  # resets VmHWM to what is resident now
        self.before, self.start = resident("VmRSS"), time.process_time()

    def peak(self) -> int:
        """Bytes that the largest resident size grew by."""
        return resident("VmHWM") - self.before

    def seconds(self) -> float:
        """Seconds of the CPU."""
        return time.process_time() - self.start


def filled(build: Callable[[], nn.Module]) -> nn.Module:
    """A network with random values of the usual size in memory, made without its own slow initialisation."""
    with torch.device("meta"):
        model = build()
    model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
        for buffer in model.buffers():
            buffer.fill_(1)
    return model


def beside_weights(build: Callable[[], nn.Module], criterion: str) -> Row:
    """Plan at 60 % with the weights in memory, then the whole flow with the structural certificate."""
    model = filled(build)
    planning = _Mark()
    graph = allocator.trace(model)
    plan = allocator.plan(graph, allocator.score(graph, criterion), "60%")
    row: Row = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": weight_bytes(model),
        "criterion": criterion,
        "plan_seconds": planning.seconds(),
        "plan_memory": planning.peak(),
        "achieved": plan.flops_after / plan.flops_before,
    }
    del graph, plan
    whole = _Mark()
    result = allocator.allocate(model, "60%", criterion=criterion, certify=False)
    row |= {"seconds": whole.seconds(), "memory": whole.peak(), "result": weight_bytes(result.model)}
    return row


def here(name: str, *more: str) -> Row:
    """One row, measured in this process."""
    warnings.simplefilter("ignore")
    planned(lambda: chain(2), (1, 3, 32, 32))  # imports and first calls
    if more:
        allocator.allocate(chain(2), "60%", example_inputs=torch.zeros(1, 3, 32, 32))
        return grown(more[0], int(more[1]))
    if name.isdigit():
        return planned(lambda: chain(int(name)), (1, 3, 32, 32))
    build, criterion = NETWORKS[name]
    return {"planned": planned(build, None), "beside": beside_weights(build, criterion)}


def measure(*name: str) -> Row:
    """One row, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.large", *name]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **MALLOC}, capture_output=True, text=True, check=True)
    row: Row = json.loads(done.stdout.splitlines()[-1])
    print(*name, row, flush=True)
    return row


def markdown(data: dict[str, Any]) -> str:
    """The page."""
    rows: dict[str, Row] = data["rows"]
    text = [
        "# Large networks",
        "",
        "Made by `python -m benchmarks.large`: each network in a process of its own. Seconds of the CPU; memory is "
        "what the process's peak grew by.",
        "",
        "Built on tensors without storage, traced, ranked by chance, planned at 60 % of its FLOPs, and its rewritten "
        "forward checked. The weights would take 4 bytes per parameter and are never there.",
        "",
        _planned_table({name: row.get("planned", row) for name, row in rows.items()}),
        "",
        "With float32 weights in memory and a criterion that reads them. Planning: trace, rank, plan at 60 %, with the "
        "rewritten forward checked. The whole: `allocate(..., certify=False)`, which adds the smaller network, its "
        "structural certificate and fvcore's count. Memory in multiples of the weights, above the model itself.",
        "",
        _beside_table({name: row["beside"] for name, row in rows.items() if "beside" in row}),
        "",
        'How the time of `allocate(model, "60%")` grows, with everything that is on by default: fvcore\'s count, the '
        "structural check and the outputs in float64. The exponent is the slope of seconds over calls, by logarithms.",
        "",
        _growth_table(data["growth"]),
        "",
        where(data["environment"]),
    ]
    return "\n".join(text)


def _planned_table(rows: dict[str, Row]) -> str:
    header = ["network", "parameters", "calls", "neurons", "trace s", "plan s", "ms per call", "FLOPs", "memory"]
    lines = []
    for name, row in rows.items():
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
                f"{row['memory'] / 2**20:,.0f} MiB",
            ]
        )
    return table(header, lines)


def _beside_table(rows: dict[str, Row]) -> str:
    header = ["network", "weights", "criterion", "FLOPs", "planning s", "planning memory", "whole s", "whole memory"]
    lines = []
    for name, row in rows.items():
        share = f"{row['memory'] / row['weights']:.2f} (result {row['result'] / row['weights']:.2f})"
        lines.append(
            [
                name,
                f"{row['weights'] / 2**30:.2f} GiB",
                row["criterion"],
                f"{100 * row['achieved']:.2f} %",
                f"{row['plan_seconds']:.1f}",
                f"{row['plan_memory'] / row['weights']:.3f}",
                f"{row['seconds']:.1f}",
                share,
            ]
        )
    return table(header, lines)


def _growth_table(growth: dict[str, list[Row]]) -> str:
    lines = []
    for kind, rows in growth.items():
        for row in rows:
            lines.append(
                [
                    f"{row['number']:,} {kind}",
                    f"{row['calls']:,}",
                    f"{row['seconds']:.1f}",
                    f"{1e3 * row['seconds'] / row['calls']:.2f}",
                    f"{row['memory'] / 2**20:,.0f} MiB",
                    "passed" if row["certified"] else "not passed",
                    f"{exponent(rows):.2f}" if row is rows[-1] else "",
                ]
            )
    return table(["network", "calls", "seconds", "ms per call", "memory", "certificate", "exponent"], lines)


def main() -> int:
    """Measure all, or one in this process."""
    if len(sys.argv) > 1:
        print(json.dumps(here(*sys.argv[1:])))
        return 0
    rows = {name: measure(name) for name in (*map(str, CHAINS), *NETWORKS)}
    growth = {
        kind: [measure("growth", kind, str(number)) for number in numbers] for kind, (_, numbers, _) in GROWTH.items()
    }
    data = {"environment": environment(), "rows": rows, "growth": growth}
    write("large", data, markdown(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
