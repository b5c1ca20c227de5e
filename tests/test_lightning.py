"""Allocation in a Lightning training, on two processes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import allocator


def test_two_processes_train_the_same_smaller_network_and_go_on_with_it(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    script = Path(__file__).with_name("lightning_ranks.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert one == two  # the sum of all weights included: gradients were put together
    assert one["same"]
    assert one["widths"] == one["widths again"]
    assert one["widths"][0][0] + one["widths"][4][0] < 32
    with (tmp_path / "first" / "lightning_logs" / "version_0" / "metrics.csv").open(encoding="utf-8") as file:
        logged = next(csv.DictReader(file))
    assert {name: float(logged[f"share/{name}"]) for name in one["shares"]} == one["shares"]


def test_a_module_without_the_network() -> None:
    lightning = pytest.importorskip("lightning")
    from allocator.recipes.lightning_callback import Allocate

    with pytest.raises(allocator.InputError, match=r"has no network 'net': say network="):
        Allocate(lambda model: allocator.allocate(model, "50%"), "net").setup(
            lightning.Trainer(logger=False), lightning.LightningModule(), "fit"
        )


class Block(nn.Module):
    """Two branches that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.inner, self.outer = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        y: torch.Tensor = self.last(x + self.outer(self.inner(x)))
        return y


def test_shares_are_of_what_each_branch_keeps() -> None:
    allocation = allocator.allocate(
        Block(), "60%", example_inputs=torch.zeros(1, 3, 8, 8), exclude=["first"], certify=False
    ).allocation
    kept = len(allocation.kept["inner.weight"][0] or ())
    assert 0 < kept < 16
    assert allocation.shares() == {"model/outer": kept / 16, "model/identity": 1.0}
