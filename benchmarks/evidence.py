"""Is a learned allocation worth it? Test error of four ways to spend the same FLOPs, on digits at varying size.

python -m benchmarks.evidence                # all random seeds and budgets, into results/evidence.{json,md,png}
python -m benchmarks.evidence --short        # one budget, one random seed, under ten minutes; shown, not written
python -m benchmarks.evidence --pilot        # even and single-scale arms alone, to choose how hard the task is

A run that was cut off goes on where it was: every trained network is a row in results/evidence.json.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from . import peer
from .clutter import Task, load
from .common import environment, read, write
from .evidence_report import draw, markdown

from reference_set import count  # isort: skip

import allocator
from allocator.recipes.digits import Split
from allocator.recipes.scalenet import ScaleNet, scalenet_small_seed
from allocator.recipes.training import evaluate, train_network
from allocator.rewriting.materialise import reset_parameters

TASK = Task()
BLOCKS, PLANES, STEM_STRIDE = (2,), (8,), 2
EPOCHS, RATE, BATCH = 4, 0.1, 64
BUDGETS = (0.7, 0.45)
SEEDS = 9
ARMS = ("learned", "even", "single", "peer")
PILOT = {f"{pieces} pieces": replace(TASK, pieces=pieces) for pieces in (0, 2)}

Row = dict[str, Any]


def seed_network() -> ScaleNet:
    """The multi-scale seed; its planes are its neurons per scale."""
    return scalenet_small_seed(image_side=TASK.side, blocks=BLOCKS, planes=PLANES, stem_stride=STEM_STRIDE)


def single_scale_network() -> ScaleNet:
    """The same network with one scale in place of four: a plain bottleneck, as in ResNet."""
    sides = [TASK.side // STEM_STRIDE >> i for i in range(len(BLOCKS))]
    rows = [[4 * planes, side] for n, planes, side in zip(BLOCKS, PLANES, sides, strict=True) for _ in range(n)]
    shape: dict[str, Any] = {"num_classes": 10, "in_channels": 1, "image_side": TASK.side, "small_stem": STEM_STRIDE}
    return ScaleNet(rows, BLOCKS, PLANES, rates=(1,), **shape)


def fit(model: nn.Module, data: Split, seed: int) -> float:
    """Train from the weights it has, by the schedule that all arms share; seconds."""
    model.to(memory_format=torch.channels_last)
    return train_network(model, data, EPOCHS, RATE, batch_size=BATCH, seed=seed, progress=False).seconds


def make(arm: str, trained: ScaleNet, image: torch.Tensor, budget: float) -> nn.Module:
    """The network of one arm at the budget, with weights that are yet to be drawn.

    Args:
        arm: one of `ARMS`.
        trained: the seed network after its training.
        image: (1, 1, side, side).
        budget: FLOPs at most.
    """
    if arm == "peer":
        return peer.prune_to_budget(trained, image, budget, classes=10).model
    options: dict[str, Any] = {"flops": budget, "example_inputs": image, "criterion": "bn_scale"}
    if arm == "single":
        plain = single_scale_network()
        narrow = {"policy": "uniform", "scope": "inner", "exclude": ["*.conv1", "conv1"]}
        return allocator.allocate(plain, **options, **narrow).model
    policy = "per_block" if arm == "learned" else "uniform"
    return allocator.allocate(trained, **options, policy=policy, scope="branches").model


def runs(task: Task, seed: int, arms: Sequence[str], budgets: Sequence[float], done: set[Any]) -> Iterator[Row]:
    """Train the seed network, then every arm from scratch at every budget; one row each."""
    todo = [(share, arm) for share in budgets for arm in arms if (seed, share, arm) not in done]
    if not todo:
        return
    training, test = load(task, seed)
    image = test.images[:1]
    torch.manual_seed(seed)
    network = seed_network()
    own = count(network, image).flops
    if {arm for _, arm in todo} & {"learned", "peer"}:
        seconds = fit(network, training, seed)
        yield {"seed": seed, "arm": "seed", "share": 1.0, "flops": own, "seconds": seconds} | _error(network, test)
    for share, arm in todo:
        start = time.perf_counter()
        model = make(arm, network, image, share * own)
        made = time.perf_counter() - start
        torch.manual_seed(1000 + seed)
        reset_parameters(model)
        seconds = fit(model, training, seed)
        row: Row = {"seed": seed, "arm": arm, "share": share, "flops": count(model, image).flops}
        row |= {"seconds": seconds, "made": made} | _error(model, test)
        if arm in ("learned", "even") and isinstance(model, ScaleNet):
            row["rows"] = model.rows()
        yield row


def _error(model: nn.Module, test: Split) -> Row:
    return {"error": 1 - evaluate(model, test)}


def measure(name: str, task: Task, seeds: int, arms: Sequence[str], budgets: Sequence[float], keep: bool) -> list[Row]:
    """All rows, those of an earlier run with the same settings included; each is written as soon as it is there."""
    settings = {"task": asdict(task), "epochs": EPOCHS, "rate": RATE, "batch": BATCH}
    settings |= {"blocks": BLOCKS, "planes": PLANES, "stem_stride": STEM_STRIDE}
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    settings["task"] = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(task).items()}
    known = read(name) if keep else {}
    rows: list[Row] = known["rows"] if known.get("settings") == settings else []
    for seed in range(seeds):
        done = {(row["seed"], row["share"], row["arm"]) for row in rows}
        for row in runs(task, seed, arms, budgets, done):
            rows = [old for old in rows if (old["seed"], old["share"], old["arm"]) != _key(row)] + [row]
            print(f"{row['seed']} {row['share']:.2f} {row['arm']:8s} error {row['error']:.2%}", flush=True)
            if keep:
                data = {"settings": settings, "environment": environment(), "rows": rows}
                write(name, data, markdown(data, ARMS))
    return rows


def _key(row: Row) -> tuple[int, float, str]:
    return row["seed"], row["share"], row["arm"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="one budget, one random seed; shown, not written")
    parser.add_argument("--pilot", action="store_true", help="even and single-scale arms alone, on several tasks")
    chosen = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    if chosen.pilot:
        for name, task in PILOT.items():
            print(name, task, flush=True)
            measure("", task, 2, ("even", "single"), BUDGETS[:1], keep=False)
        return 0
    if chosen.short:
        rows = measure("", TASK, 1, ARMS, BUDGETS[:1], keep=False)
        print(markdown({"settings": {"task": asdict(TASK)}, "environment": environment(), "rows": rows}, ARMS))
        return 0
    rows = measure("evidence", TASK, SEEDS, ARMS, BUDGETS, keep=True)
    data = read("evidence")
    write("evidence", data, markdown(data, ARMS))
    draw(rows, "evidence")
    return 0


if __name__ == "__main__":
    sys.exit(main())
