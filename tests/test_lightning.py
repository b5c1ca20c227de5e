"""Allocation in a Lightning training, on two processes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


@pytest.fixture
def training(tmp_path: Path) -> Any:
    """Makes LightningModules, and fits them in this process; gives their widths."""
    lightning = pytest.importorskip("lightning")
    inputs = torch.randn(8, 6)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs), batch_size=4)

    class Module(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self, early: bool = False) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
            self.early = torch.optim.SGD(self.parameters(), lr=0.1) if early else None

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            return self.model(batch[0]).square().mean()

        def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
            self.model(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.early or torch.optim.SGD(self.parameters(), lr=0.1)

    def run(callback: Any, what: str = "fit", module: Any = None, epochs: int = 1, **options: Any) -> list[int]:
        module = module or Module()
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, enable_checkpointing=False, callbacks=[callback],
        )  # fmt: skip
        getattr(trainer, what)(module, loader, **options)
        if what == "fit":
            trainer.save_checkpoint(tmp_path / "last.ckpt")
        assert "on_load_checkpoint" not in vars(module)
        return [module.model[0].out_features, module.model[2].out_features]

    run.module, run.path = Module, tmp_path / "last.ckpt"  # type: ignore[attr-defined]
    return run


def at(share: str) -> Any:
    from allocator.recipes.lightning_callback import Allocate

    return Allocate(lambda network: allocator.allocate(network, share, example_inputs=torch.zeros(1, 6), certify=False))


def test_a_checkpoints_choice_is_taken_not_made_again(training: Any) -> None:
    pytest.importorskip("lightning")
    widths = training(at("30%"))
    assert sum(widths) < 24
    assert training(at("90%"), "validate", ckpt_path=training.path, verbose=False) == widths
    assert training(at("90%"), epochs=2, ckpt_path=training.path) == widths


def test_one_callback_for_two_modules(training: Any) -> None:
    callback = at("30%")
    for _ in range(2):
        assert sum(training(callback)) < 24


def test_what_would_not_train_the_smaller_network_is_said(training: Any) -> None:
    with pytest.raises(allocator.InputError, match=r"'model' is not trained as it was made: .* in configure_"):
        training(at("30%"), module=training.module(early=True))
    callback = at("30%")
    callback.choose = lambda network: network
    with pytest.raises(allocator.InputError, match=r"choose gave Sequential: .* what allocator.allocate returns"):
        training(callback)


def test_a_checkpoint_of_the_full_network(training: Any) -> None:
    lightning = pytest.importorskip("lightning")
    assert training(lightning.Callback()) == [16, 16]
    with pytest.raises(allocator.InputError, match="holds no choice of this callback: load its weights"):
        training(at("30%"), epochs=2, ckpt_path=training.path)


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
