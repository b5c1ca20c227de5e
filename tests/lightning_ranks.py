"""A training by Lightning on two processes that allocates first; run as `python lightning_ranks.py FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import allocator
from allocator.recipes.lightning_callback import Allocate


class Classifier(lightning.LightningModule):
    """A small network, and one loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
        )  # fmt: skip

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def train(folder: Path, epochs: int, checkpoint: Path | None = None) -> tuple[Classifier, Allocate]:
    """Train, or go on."""
    lightning.seed_everything(0, verbose=False)
    images, labels = torch.randn(32, 1, 12, 12), torch.arange(32) % 4
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    rank = int(torch.distributed.get_rank()) if torch.distributed.is_initialized() else 0
    share = [(images[rank::2], labels[rank::2])]
    allocate = Allocate(lambda network: allocator.allocate(network, "50%", data=share, certify=False))
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=epochs, default_root_dir=folder,
        callbacks=[allocate, ModelCheckpoint(folder, filename="last")], logger=CSVLogger(folder),
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    module = Classifier()
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return module, allocate


def main(folder: Path) -> None:
    """Train for an epoch, then for another from the checkpoint."""
    first, chosen = train(folder / "first", 1)
    again, taken = train(folder / "again", 2, folder / "first" / "last.ckpt")
    assert chosen.allocation is not None
    assert taken.allocation is not None
    rank = torch.distributed.get_rank()
    facts = {
        "widths": [tuple(p.shape) for p in first.model.parameters()],
        "same": chosen.allocation.to_json() == taken.allocation.to_json(),
        "widths again": [tuple(p.shape) for p in again.model.parameters()],
        "sum": sum(float(p.sum()) for p in first.model.parameters()),
        "shares": chosen.allocation.shares(),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
