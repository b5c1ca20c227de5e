"""Checkpoints of a training run: one file, written beside the last one and put in its place when complete."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path
from typing import Any

import torch

from allocator.disk import existing, shorten, write_atomically
from allocator.errors import ConfigurationError, FileError
from allocator.recipes.sections import Config

FORMAT = 1
NAME = "checkpoint.pt"


def save_checkpoint(folder: Path, config: Config, state: dict[str, Any]) -> None:
    """Write a checkpoint; the previous one stays until the new one is complete.

    Args:
        folder: of the run.
        config: of the run, kept with the state so that it is not resumed with another.
        state: tensors and plain data.

    Raises:
        FileError: the disk is full or cannot be written to; the previous checkpoint is still there.
    """
    path = folder / NAME
    with write_atomically(path) as temporary:
        try:
            torch.save({"format": FORMAT, "config": config.what_decides(), **state}, temporary)
        except (RuntimeError, OSError) as error:  # torch reports a full disk as a RuntimeError
            kept = "the previous checkpoint is kept" if path.exists() else "there is no previous checkpoint"
            raise FileError(f"cannot write {path} ({shorten(str(error), 200)}); {kept}") from error


def load_checkpoint(folder: Path, config: Config) -> dict[str, Any] | None:
    """Read the checkpoint of a run onto the CPU; None if there is none. Runs no code from the file.

    Raises:
        FileError: it is damaged, or not a checkpoint.
        ConfigurationError: it was made with another configuration; says what differs.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        state = torch.load(existing(path), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise FileError(f"{path} is damaged or not a checkpoint: {shorten(str(error), 200)}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or "config" not in state:
        raise FileError(f"{path} is not a checkpoint of this version")
    then, now = state["config"], config.what_decides()
    differences = []
    for key in sorted({*then, *now}):
        if then.get(key) != now.get(key):
            differences.append(f"{key} was {then.get(key)!r}, is {now.get(key)!r}")
    if differences:
        # Eight of them: with another network or data set, whole sections differ.
        listed = "; ".join(differences[:8])
        raise ConfigurationError(
            f"{path} was made with another configuration: {listed}; go on with that one, or choose another run.output"
        )
    return state


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()
