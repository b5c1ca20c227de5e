"""Does MorphNet's loop beat one cut, at equal training? `python -m benchmarks.quality.morphnet`.

The trained networks of `run` come down to a share of their FLOPs in one step, or by three rounds that each go below
it by importance and widen evenly up to it again (Gordon et al., CVPR 2018). Both see the same images as often, at one
rate. Every row is written as soon as it is there; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import allocator
from benchmarks.common import RESULTS, table  # sets one thread before torch is imported

from .measure import errors, train
from .rows import add_row, is_known, read_rows
from .run import TUNING_RATE, trained
from .task import Part, load

ROWS = RESULTS / "quality_morphnet.jsonl"
"""One line per network and seed."""
PAGE = RESULTS / "morphnet.md"
FAMILIES = ("residual", "inception", "inverted", "dense")
SHARE, ROUNDS, EPOCHS, GROW = "40%", 3, 0.5, 0.7
CALIBRATION = 256


def row(model: nn.Module, parts: dict[str, Part], seed: int) -> dict[str, float]:
    """Test errors in percent, and the FLOPs of both."""
    images = parts["calibration"].images[:CALIBRATION]
    once = allocator.allocate(model, SHARE, data=images, example_inputs=images[:1])
    train(once.model, parts["train"], ROUNDS * EPOCHS, TUNING_RATE, seed)
    rounds = allocator.iterate(
        model,
        SHARE,
        grow=GROW,
        steps=ROUNDS,
        data=images,
        example_inputs=images[:1],
        train=lambda network: train(network, parts["train"], EPOCHS, TUNING_RATE, seed),
    )
    ways = {"full": model, "one cut": once.model, "loop": rounds.model}
    return {name: 100 * errors(network, parts["test"])["error"] for name, network in ways.items()}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Every network, and by how much the loop is ahead."""
    ahead = np.array([row["one cut"] - row["loop"] for row in rows])
    lines = [
        [row["network"], row["seed"], *(f"{row[name]:.1f}" for name in ("full", "one cut", "loop")), f"{gain:+.1f}"]
        for row, gain in zip(rows, ahead, strict=True)
    ]
    error = ahead.std(ddof=1) / len(ahead) ** 0.5 if len(ahead) > 1 else float("nan")
    return "\n\n".join(
        [
            "# MorphNet's loop, or one cut",
            "Made by `python -m benchmarks.quality.morphnet`. Test errors in percent on cluttered digits at "
            f"{SHARE} of the FLOPs, by the default choice with data; {ROUNDS * EPOCHS} epochs of fine-tuning after one "
            f"cut, or {EPOCHS} after each of {ROUNDS} rounds that go down to {GROW:.0%} of the budget and widen evenly "
            "up to it.",
            f"In the mean of {len(ahead)} networks the loop is {ahead.mean():+.2f} points ahead (standard error "
            f"{error:.2f}; below zero it is behind), and it is ahead on {int((ahead > 0).sum())} of them.",
            table(["network", "seed", "full", "one cut", "loop", "points ahead"], lines) + "\n",
        ]
    )


def main() -> None:
    """See --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(FAMILIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"), help="for trained networks")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    parts = load()
    for seed in args.seeds:
        for name in args.networks:
            if is_known(ROWS, network=name, seed=seed):
                continue
            model = trained(name, seed, parts, args.folder)
            torch.manual_seed(seed)
            add_row(ROWS, row(model, parts, seed), network=name, seed=seed)
    PAGE.write_text(markdown(read_rows(ROWS)), encoding="utf-8")


if __name__ == "__main__":
    main()
