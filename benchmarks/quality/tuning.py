"""Is one epoch of fine-tuning after recovery worth two without? `python -m benchmarks.quality.tuning`.

The trained networks of `run` are narrowed twice by what `allocate` does on its own with unlabelled data: with
`recover=True`, and then fine-tuned for one epoch; and without, and then fine-tuned for two. Schedule and order of
images are the same. Every row is written as soon as it is there; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import allocator
from benchmarks.common import RESULTS, table  # sets one thread before torch is imported

from .measure import errors, train
from .networks import NETWORKS
from .rows import add_row, is_known, read_rows
from .run import TUNING_RATE, trained
from .task import Part, load

ROWS = RESULTS / "quality_tuning.jsonl"
"""One line per network, seed and share."""
PAGE = RESULTS / "recovery_tuning.md"
FAMILIES = ("residual", "inception", "inverted", "dense")


def row(model: nn.Module, share: float, parts: dict[str, Part], seed: int) -> dict[str, float]:
    """Test errors in percent."""
    images = parts["calibration"].images
    cut, recovered = (_allocated(model, share, images, recover=recover) for recover in (False, True))
    found = {"full": model, "cut": cut, "recovered": recovered}
    for name, small, epochs in (("two epochs", cut, 2.0), ("recovered, one epoch", recovered, 1.0)):
        found[name] = copy.deepcopy(small)
        train(found[name], parts["train"], epochs, TUNING_RATE, seed)
    return {name: 100 * errors(network, parts["test"])["error"] for name, network in found.items()}


def _allocated(model: nn.Module, share: float, images: Tensor, *, recover: bool) -> nn.Module:
    small: nn.Module = allocator.allocate(
        model, f"{100 * share}%", data=images, recover=recover, example_inputs=images[:1], certify=False
    ).model
    return small


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Every network, and how often which way was ahead."""
    lines = [
        [
            row["network"],
            row["seed"],
            f"{row['asked']:.0%}",
            *(f"{row[name]:.1f}" for name in ("full", "cut", "recovered", "recovered, one epoch", "two epochs")),
            f"{row['recovered, one epoch'] - row['two epochs']:+.1f}",
        ]
        for row in sorted(rows, key=lambda row: (-row["asked"], row["network"], row["seed"]))
    ]
    heads = ["network", "seed", "FLOPs", "full", "cut", "recovered", "recovered, 1 epoch", "2 epochs", "difference"]
    parts = [
        "# One epoch after recovery, or two without",
        "",
        "Made by `python -m benchmarks.quality.tuning`. Test errors in percent on cluttered digits, of networks "
        "narrowed by what `allocate` does on its own with 1,000 images without labels: recovered as well, and then "
        "trained for one epoch; or not, and trained for two.",
    ]
    for share in sorted({row["asked"] for row in rows}, reverse=True):
        behind = np.array([row["recovered, one epoch"] - row["two epochs"] for row in rows if row["asked"] == share])
        error = behind.std(ddof=1) / len(behind) ** 0.5 if len(behind) > 1 else float("nan")
        parts += [
            "",
            f"At {share:.0%} of the FLOPs one epoch after recovery is {behind.mean():+.2f} points (standard error "
            f"{error:.2f}) from two without, in the mean of {len(behind)} networks; {int((behind <= 0).sum())} of them "
            f"are not behind, and the worst is {behind.max():+.1f}.",
        ]
    return "\n".join([*parts, "", table(heads, lines), ""])


def main() -> None:
    """See --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(FAMILIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.4, 0.25])
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"), help="for trained networks")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    parts = load()
    for share in args.shares:
        for seed in args.seeds:
            for name in args.networks:
                if is_known(ROWS, network=name, seed=seed, asked=share):
                    continue
                found = row(trained(name, seed, parts, args.folder), share, parts, seed)
                add_row(ROWS, found, network=name, seed=seed, asked=share)
    PAGE.write_text(markdown(read_rows(ROWS)), encoding="utf-8")


if __name__ == "__main__":
    main()
