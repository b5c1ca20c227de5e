"""The picture of learned shares: what the blocks of a small ScaleNet keep of a trained seed.

python -m benchmarks.shares          # train, allocate, write results/shares.{json,md} and the pictures in docs/img
python -m benchmarks.shares --draw   # write and draw again from results/shares.json, without training
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

import allocator
from allocator.recipes.scalenet import scalenet_small_seed
from allocator.recipes.training import evaluate, train_network
from allocator.reporting.pictures import Panel, draw_shares

from .clutter import Task, load
from .common import ROOT, environment, read, table, where, write

TASK = Task()
BLOCKS, PLANES = (2, 2, 2, 2), (8, 16, 32, 64)
EPOCHS, RATE, BUDGET = 6, 0.1, "50%"
PICTURES = {"shares.svg": False, "shares-dark.svg": True}
"""Names in docs/img, and whether for a dark page."""


def measure() -> dict[str, Any]:
    """Train the seed on the digits of `benchmarks.evidence`, allocate it, and return the shares as data."""
    training, test = load(TASK, seed=0)
    torch.manual_seed(0)
    seed = scalenet_small_seed(image_side=TASK.side, blocks=BLOCKS, planes=PLANES)
    seed.to(memory_format=torch.channels_last)
    history = train_network(seed, training, EPOCHS, RATE)
    rule: dict[str, Any] = {"criterion": "bn_scale", "policy": "per_block", "scope": "narrowest"}
    result = allocator.allocate(seed, BUDGET, example_inputs=test.images[:1], **rule)
    return {
        "settings": {
            "task": asdict(TASK), "blocks": BLOCKS, "planes": PLANES, "epochs": EPOCHS, "rate": RATE, "flops": BUDGET,
        },
        "environment": environment(),
        "seconds": history.seconds,
        "seed_error": 1 - evaluate(seed, test),
        "flops_before": result.flops_before,
        "flops_after": result.flops_after,
        "scope": result.allocation.scope,
        "certificate": str(result.certificate),
        "seed": seed.parts(),
        "parts": result.model.parts(),
    }  # fmt: skip


def markdown(data: dict[str, Any]) -> str:
    """What was run, in words."""
    settings = data["settings"]
    return "\n\n".join(
        [
            "# Learned shares of a small ScaleNet",
            "Made by `python -m benchmarks.shares`.",
            f"A seed of {sum(settings['blocks'])} blocks with four scales each was trained for {settings['epochs']} "
            f"epochs on the digits of [the evidence](evidence.md) (test error {100 * data['seed_error']:.1f} %), then "
            f"allocated to {settings['flops']} of its {data['flops_before']:,} FLOPs. The {data['flops_after']:,} that "
            "are left went to the neurons below. What is left was not trained again for this picture.",
            "![Each scale's share of the neurons, block by block, in the seed and after](../../docs/img/shares.svg)",
            _table(data),
            f"The certificate: {data['certificate']}.",
            where(data["environment"]),
        ]
    )


def _table(data: dict[str, Any]) -> str:
    """Neurons kept of those of the seed, per block and scale."""
    names = list(next(iter(data["seed"].values())))
    lines = [
        (block, *(f"{data['parts'][block].get(name, 0)} of {row[name]}" for name in names))
        for block, row in data["seed"].items()
    ]
    return table(("block", *names), lines)


def draw(data: dict[str, Any]) -> None:
    """Draw the pictures for light and for dark pages into docs/img."""
    panels = [
        Panel(f"{name}: {flops / 1e6:.1f} MFLOPs", parts)
        for name, flops, parts in (
            ("Seed", data["flops_before"], data["seed"]),
            ("Learned", data["flops_after"], data["parts"]),
        )
    ]
    for name, dark in PICTURES.items():
        draw_shares(panels, ROOT / "docs" / "img" / name, dark=dark)
        print(f"wrote docs/img/{name}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, or draw again."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shares", description=__doc__.split("\n")[0])
    parser.add_argument("--draw", action="store_true", help="draw from results/shares.json, without training")
    data = read("shares") if parser.parse_args(arguments).draw else measure()
    write("shares", data, markdown(data))
    draw(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
