"""Small runs for the tests of training, and a script that kills and resumes them.

As a script: `python training_runs.py FOLDER KILLS`, KILLS in JSON. Each run is a child of this process, so
that packages are imported once; nothing is trained in the parent.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class TwoBranches(nn.Module):
    """Two convolutions side by side and dropout, for (N, 3, H, W)."""

    def __init__(self, num_classes: int = 4):
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6))
        self.right = nn.Sequential(nn.Conv2d(3, 6, 1, 2), nn.BatchNorm2d(6))
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], 1).relu()
        logits: Tensor = self.fc(self.dropout(x.mean((2, 3))))
        return logits


def tiny_config(folder: Path | str, **changes: Any) -> dict[str, Any]:
    """Everything that has a state: augmentation, dropout, momentum, average, accumulation, two stages."""
    training = {
        "epochs": 3,
        "lr": 0.05,
        "batch_size": 16,
        "device_batch": 8,
        "warmup": 0.5,
        "average": 0.8,
        "clip": 1.0,
        "l1": 1e-3,
        "label_smoothing": 0.1,
        "recalibrate": 2,
    }
    steps = {"schedule": "steps", "milestones": [1, 2], "gamma": 0.3}
    config: dict[str, Any] = {
        "network": {"name": "training_runs:TwoBranches", "arguments": {"num_classes": 4}},
        "data": {
            "dataset": "torchvision:FakeData",
            "arguments": {"size": 96, "image_size": [3, 16, 16], "num_classes": 4},
            "side": 16,
            "augment": "shift",
        },
        "seed": training,
        "allocation": {"flops": "60%"},
        "final": training | steps,
        "run": {"output": str(folder), "checkpoint_updates": 2, "tensorboard": False},
    }
    return config | changes


def looking_config(folder: Path) -> dict[str, Any]:
    """A network that is not trained before; training images are looked at to choose from it and to recover the rest."""
    plan = {"criterion": "fisher", "policy": "priced", "samples": 64, "weights": "keep", "recover": True}
    return tiny_config(folder, seed=None, allocation=plan)


UPDATES = 2 * 3 * (96 // 16)
"""Updates of a whole run: two networks, three epochs of six batches."""


# ------------------------------------------------------------------------------------------------- killing


def kill_at_update(count: int, progress: Path) -> None:
    """Let this process kill itself in the middle of its `count`-th update; note every update done."""
    from allocator.recipes.training import Fit

    plain, done = Fit._update, [0]

    def update(fit: Fit, chunks: Any) -> None:
        if done[0] == count - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(fit, chunks)
        done[0] += 1
        progress.write_text(f"{fit.name} {fit.step}")

    setattr(Fit, "_update", update)  # noqa: B010


def kill_in_write(count: int, share: float) -> None:
    """Let this process kill itself when a share of its `count`-th checkpoint is written."""
    plain, done = torch.save, [0]

    def save(state: Any, path: Any) -> None:
        done[0] += 1
        plain(state, path)
        if done[0] == count:
            os.truncate(path, int(share * os.path.getsize(path)))
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save  # type: ignore[assignment]


def child(work: Callable[[], Any]) -> int:
    """Run `work` in a fork; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def run_once(folder: Path, kill: dict[str, Any] | None, log: Path) -> int:
    """One run in a child, killed or to its end; returns the signal that ended it."""

    def work() -> None:
        from rich.console import Console

        from allocator.recipes.run import train

        if kill and "write" in kill:
            kill_in_write(kill["write"], kill["share"])
        kill_at_update(kill.get("update", -1) if kill else -1, log.with_suffix(".step"))
        with log.open("a") as file:
            train(tiny_config(folder), resume=True, console=Console(file=file, width=200))

    pid = child(work)
    if kill and "seconds" in kill:
        time.sleep(kill["seconds"])
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"the run failed: {log.read_text()}")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def place(state: dict[str, Any]) -> int:
    """Updates that a checkpoint holds, over both networks."""
    return int(state["fit"]["step"]) + (UPDATES // 2 if state["stage"] == "final" else 0)


def kill_and_resume(folder: Path, kills: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Run to the end once, and once killed as asked; returns what each kill left."""
    run_once(folder / "whole", None, folder / "whole.log")
    found = []
    log = folder / "killed.log"
    for kill in kills:
        ended = run_once(folder / "killed", kill, log)
        path = folder / "killed" / "checkpoint.pt"
        kept = place(torch.load(path, weights_only=True)) if path.exists() else 0
        stage, step = log.with_suffix(".step").read_text().split() if log.with_suffix(".step").exists() else ("seed", 0)
        reached = int(step) + (UPDATES // 2 if stage == "final" else 0)
        found.append({"signal": ended, "kept": kept, "reached": reached})
    run_once(folder / "killed", None, log)
    return found


def random_kills(count: int, seed: int) -> list[dict[str, Any]]:
    """Kills of all three kinds at random: in an update, in a write, and from outside at some time."""
    generator = random.Random(seed)
    kinds: list[Callable[[], dict[str, Any]]] = [
        lambda: {"update": generator.randint(2, 14)},
        lambda: {"write": generator.randint(1, 6), "share": generator.random()},
        lambda: {"seconds": generator.uniform(0.5, 4.0)},
    ]
    return [kinds[i % 3]() for i in range(count)]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import allocator.recipes.run  # noqa: F401

    sys.modules["training_runs"] = sys.modules["__main__"]
    torch.set_num_threads(1)
    print(json.dumps(kill_and_resume(Path(sys.argv[1]), json.loads(sys.argv[2]))))
