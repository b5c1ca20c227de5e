"""Runs that are killed with SIGKILL, anywhere, go on as if they had not been."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import random_kills

SCRIPT = Path(__file__).parent / "training_runs.py"


def killed_and_whole(folder: Path, kills: list[dict[str, Any]]) -> list[dict[str, int]]:
    command = [sys.executable, str(SCRIPT), str(folder), json.dumps(kills)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def assert_same_result(folder: Path) -> None:
    for name in ("seed.safetensors", "model.safetensors"):
        whole, killed = (load_file(folder / run / name) for run in ("whole", "killed"))
        assert whole.keys() == killed.keys()
        for key, tensor in whole.items():
            assert torch.equal(tensor, killed[key]), f"{name}: {key}"
    states = [torch.load(folder / run / "checkpoint.pt", weights_only=True) for run in ("whole", "killed")]
    assert states[0]["allocation"] == states[1]["allocation"]
    histories = [{k: v for k, v in state["fit"]["history"].items() if k != "seconds"} for state in states]
    assert histories[0] == histories[1]
    assert not list((folder / "killed").glob(".*.tmp"))


def test_killed_three_times(tmp_path: Path) -> None:
    """In an update, in writing a checkpoint, and in an update of the second network."""
    found = killed_and_whole(tmp_path, [{"update": 10}, {"write": 4, "share": 0.6}, {"update": 14}])
    # Checkpoints are two updates apart. The fourth one after update 8 is that of update 16.
    assert found == [
        {"signal": 9, "reached": 9, "kept": 8},
        {"signal": 9, "reached": 16, "kept": 14},
        {"signal": 9, "reached": 27, "kept": 26},
    ]
    assert_same_result(tmp_path)


@pytest.mark.sweep
def test_killed_ten_times_at_random(tmp_path: Path) -> None:
    kills = random_kills(10, seed=7)
    found = killed_and_whole(tmp_path, kills)
    assert [each["signal"] for each in found] == [9] * 10
    # Checkpoints are two updates apart, and one may have been under way when the run was killed.
    assert all(each["reached"] - each["kept"] <= 3 for each in found), found
    assert_same_result(tmp_path)
    print(json.dumps([kill | each for kill, each in zip(kills, found)], indent=1))
