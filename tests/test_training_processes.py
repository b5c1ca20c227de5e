"""Two processes agree with each other and with one; a lost process ends the run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import looking_config, tiny_config

from allocator.recipes.run import train

SCRIPT = Path(__file__).parent / "training_ranks.py"


def on_two(folder: Path, *fate: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(SCRIPT), str(folder), *fate]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    done = on_two(tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / "two" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    one = train(tiny_config(tmp_path / "one"), progress=False)
    assert one.allocation is not None
    assert ranks[0]["kept"] == one.allocation.kept
    assert ranks[0]["stages"] == [stage.test_accuracy for stage in one.stages]
    for name in ("seed", "model"):
        alone, together = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("one", "two"))
        for key, tensor in alone.items():
            if tensor.is_floating_point():  # batch norm counts the forwards of one process
                assert torch.allclose(tensor, together[key], rtol=1e-5, atol=1e-6), f"{name}: {key}"


def test_two_processes_choose_what_one_does(tmp_path: Path) -> None:
    done = on_two(tmp_path / "two", "looks")
    assert done.returncode == 0, done.stderr[-3000:]
    facts = [json.loads((tmp_path / "two" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    one = train(looking_config(tmp_path / "one"), progress=False)
    assert one.allocation is not None
    assert [fact["kept"] for fact in facts] == [one.allocation.kept] * 2
    assert facts[0]["stages"] == facts[1]["stages"]


def test_a_process_that_dies_ends_the_run(tmp_path: Path) -> None:
    start = time.monotonic()
    done = on_two(tmp_path / "two", "dies")
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL) received" in done.stderr
    assert time.monotonic() - start < 120
    assert not (tmp_path / "two" / "model.safetensors").exists()


@pytest.mark.sweep
def test_a_process_that_hangs_ends_the_run(tmp_path: Path) -> None:
    """The other waits for twenty seconds, as configured."""
    done = on_two(tmp_path / "two", "hangs")
    assert done.returncode != 0
    assert "Timed out waiting 20000ms" in done.stderr
