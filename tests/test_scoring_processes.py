"""Two processes that look at half of the data each choose what one chooses that looks at all; they fail together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scoring_ranks import CASES, chosen, loader

from allocator.scoring import calibration, ranks

SCRIPT = Path(__file__).parent / "scoring_ranks.py"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two gloo processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_choose_what_one_does(both: list[dict[str, Any]], name: str) -> None:
    assert both[0][name] == both[1][name] == chosen(name, loader())


def test_half_of_the_data_alone_would_choose_otherwise() -> None:
    batches = list(loader())
    for name in CASES:
        everything = chosen(name, loader())
        assert any(chosen(name, batches[turn::2]) != everything for turn in (0, 1)), name


def test_where_one_process_has_too_few_inputs_to_compare_on_all_go_without(both: list[dict[str, Any]]) -> None:
    assert both[0]["one input"] == both[1]["one input"]


def test_it_does_not_matter_which_half_is_whose(both: list[dict[str, Any]]) -> None:
    assert both[0]["halves"] == both[1]["halves"] == both[0]["activation"]


def test_a_loader_that_accelerate_prepared(both: list[dict[str, Any]]) -> None:
    assert both[0]["accelerate"] == both[1]["accelerate"] == both[0]["fisher of its own answers"]


def test_no_process_waits_for_one_that_failed(both: list[dict[str, Any]]) -> None:
    said = "the loss is nan, as the model's answers are not finite: check the data"
    assert both[0]["not finite"].startswith(f"rank 1 could not look at its data: DataError: {said}")
    assert both[1]["not finite"].startswith(said)
    assert "rank 1 could not look at its data: DataError: the data are empty" in both[0]["empty"]
    assert both[1]["empty"].startswith("the data are empty")


def test_as_many_gradients_are_kept_as_one_process_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes, each half; the batch at which the number is reached counts whole."""
    from subjects import Nested, trained

    import allocator

    images = torch.randn(48, 3, 16, 16)
    graph = allocator.trace(trained(Nested()), images[:1])
    monkeypatch.setattr(calibration, "MOST_CHUNKS", 3)
    data = [images[:16], images[16:32], images[32:]]
    assert len(calibration.collect(graph, data, ["gradients"]).read) == 4
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "gathered", lambda look: [look()])
    assert len(calibration.collect(graph, data, ["gradients"]).read) == 2


def test_one_process_needs_no_others() -> None:
    assert ranks.count() == 1
    assert ranks.gathered(lambda: 3) == [3]
    total = torch.ones(2)
    ranks.add_up(total)
    assert total.tolist() == [1, 1]
