"""Train the networks, allocate them in every way, and measure.

Every row is written as soon as it is there; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import allocator
from benchmarks.common import RESULTS  # sets one thread before torch is imported

from .arms import ARMS, flops_of
from .measure import errors, train, with_batch_norm_statistics
from .networks import NETWORKS
from .rows import add_row, is_known
from .task import Part, load

SHARES = (0.9, 0.8, 0.6, 0.4)
EPOCHS, LEARNING_RATE = 8.0, 0.1
LONGER = {"vit": {"epochs": 16.0, "warm_up": 0.1}}
TUNING_EPOCHS, TUNING_RATE = 0.5, 0.02
ROWS = RESULTS / "quality.jsonl"
"""One line per network, seed, share and arm."""


def trained(name: str, seed: int, parts: dict[str, Part], folder: Path) -> nn.Module:
    """The network, trained once and kept in a folder."""
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    path = folder / f"{name}-{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        plain = {"epochs": EPOCHS, "warm_up": 0.0}
        train(model, parts["train"], lr=LEARNING_RATE, seed=seed, **LONGER.get(name, plain))
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return model.eval()


def row(
    model: nn.Module, arm: str, share: float, parts: dict[str, Part], seed: int, *, tune: bool, recover: bool
) -> dict[str, Any]:
    """What one arm makes of one network."""
    image = parts["test"].images[:1]
    start = time.perf_counter()
    try:
        made = ARMS[arm](model, parts["calibration"], share)
    except Exception as error:  # whatever is raised is a result here
        return {"failed": f"{type(error).__name__}: {error!s:.120}"}
    found: dict[str, Any] = {"seconds": time.perf_counter() - start}
    small = made.model if isinstance(made, allocator.Result) else made
    found["share"] = flops_of(small, image) / flops_of(model, image)
    states = {"cut": small, "statistics": with_batch_norm_statistics(small, parts["calibration"])}
    if recover and isinstance(made, allocator.Result):
        start = time.perf_counter()
        recovered = allocator.recover(made, parts["calibration"].images)
        states["recovered"], found["recovery"] = recovered.model, recovered.recovery.to_dict()["tried"]
        found["recovery seconds"] = time.perf_counter() - start
    if tune:
        states["tuned"] = copy.deepcopy(small)
        train(states["tuned"], parts["train"], TUNING_EPOCHS, TUNING_RATE, seed)
    for state, network in states.items():
        for part in ("calibration", "test"):
            found[f"{state} {part}"] = errors(network, parts[part])
    return found


def run(
    networks: Sequence[str],
    seeds: Sequence[int],
    arms: Sequence[str],
    shares: Sequence[float],
    folder: Path,
    rows: Path = ROWS,
    *,
    tune: bool = True,
    recover: bool = True,
) -> None:
    """All rows that are not there yet."""
    parts = load()
    for seed in seeds:
        for name in networks:
            model = trained(name, seed, parts, folder)
            todo = [("full", 1.0), *((arm, share) for share in shares for arm in arms)]
            for arm, share in todo:
                key = {"network": name, "seed": seed, "arm": arm, "asked": share}
                if is_known(rows, **key):
                    continue
                if arm == "full":
                    found = {f"cut {part}": errors(model, parts[part]) for part in ("calibration", "test")}
                else:
                    found = row(model, arm, share, parts, seed, tune=tune, recover=recover)
                add_row(rows, found, **key)


def main() -> None:
    """See --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"), help="for trained networks")
    parser.add_argument("--no-tuning", action="store_true", help="leave out the state that trains")
    parser.add_argument("--no-recovery", action="store_true", help="leave out the state that is refitted")
    parser.add_argument("--rows", type=Path, default=ROWS, help="where they are written, one a line")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    run(
        args.networks,
        args.seeds,
        args.arms,
        args.shares,
        args.folder,
        args.rows,
        tune=not args.no_tuning,
        recover=not args.no_recovery,
    )


if __name__ == "__main__":
    main()
