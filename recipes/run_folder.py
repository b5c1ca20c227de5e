"""The folder of a run: its configuration, its checkpoint, and the files that it leaves."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

import allocator
from allocator.disk import make_folder, shorten, write_text
from allocator.errors import FileError
from allocator.modules import shapes_of
from allocator.recipes.checkpoints import NAME, load_checkpoint, remove_leftovers, save_checkpoint
from allocator.recipes.outcome import RunResult, Stage
from allocator.recipes.sections import Config
from allocator.recipes.training import Fit
from allocator.rewriting.allocation import architecture_hash


class RunFolder:
    """Where a run writes; only its main process does.

    Attributes:
        path: the folder.
        config: of the run.
    """

    def __init__(self, config: Config):
        self.path, self.config = Path(config.run.output), config

    def checkpoint(self) -> dict[str, Any] | None:
        """The state that the run goes on from; None if there is none."""
        return load_checkpoint(self.path, self.config)

    def prepare(self, resume: bool) -> None:
        """Make the folder and note the configuration in it.

        Raises:
            FileError: it cannot be made, or holds a run that is not to go on.
        """
        make_folder(self.path)
        if (self.path / NAME).exists() and not resume:
            raise FileError(f"{self.path} holds a run already: resume it (--resume), or choose another run.output")
        remove_leftovers(self.path)
        write_text(self.path / "config.json", json.dumps(self.config.to_dict(), indent=2) + "\n")

    def save_state(
        self, name: str, fit: dict[str, Any], stages: list[Stage], allocation: allocator.Allocation | None
    ) -> None:
        """Write the checkpoint.

        Args:
            name: `seed` or `final`, of the network in training.
            fit: the state of its training.
            stages: the networks ahead of it.
            allocation: what was kept, if that is known.
        """
        state = {
            "stage": name,
            "stages": [asdict(stage) for stage in stages],
            "allocation": allocation and allocation.to_dict(),
            "fit": fit,
        }
        save_checkpoint(self.path, self.config, state)

    def restore(self, fit: Fit, state: dict[str, Any]) -> None:
        """Bring a network's training to where its checkpoint was made.

        Raises:
            FileError: the checkpoint is of another network.
        """
        try:
            fit.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as error:
            raise FileError(
                f"{self.path / NAME} holds the state of another network: {shorten(str(error), 400)}"
            ) from error

    def save_network(self, network: nn.Module, allocation: allocator.Allocation | None, name: str) -> None:
        """Write a network and what was kept in it, as a file of this name."""
        if allocation is None:
            # One that keeps everything, so that all files of a run are read alike.
            allocation = allocator.Allocation(architecture=architecture_hash(shapes_of(network)))
        allocator.save((network, allocation), self.path / name)

    def write(self, result: RunResult) -> None:
        """Write the last network, what was kept and the figures."""
        self.save_network(result.model, result.allocation, "model.safetensors")
        if result.allocation is not None:
            result.allocation.save(self.path / "allocation.json")
        write_text(self.path / "results.json", json.dumps(result.to_dict(), indent=2) + "\n")
