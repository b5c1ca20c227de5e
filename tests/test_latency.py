"""Latency: what is measured and how it is said. No test looks at how fast anything is."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import jsonschema
import pytest
import torch
from report_subjects import IMAGE, mixed, summary
from subjects import untouched
from torch import nn

import allocator
from allocator import Latency
from allocator.cli import main
from allocator.cost import latency as timing
from allocator.errors import InputError, TraceError, UnsupportedModelError
from allocator.reporting import FORMATS, as_text, schema
from allocator.reporting.compare import compare, side_of_summary
from allocator.reporting.compare_render import COMPARISONS

NOW = Latency(0.0123, 0.0004, 1200, 2, "cpu (AVX2)", ((1, 3, 16, 16),))
LEFT = replace(NOW, seconds=0.00615)
NET = "import sys\nsys.path.insert(0, {folder!r})\nfrom report_subjects import mixed\n"
SIZE = ("--input-size", "1x3x16x16")


@pytest.fixture(autouse=True)
def _briefly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measure for a moment, in an empty folder with one network by name, and leave the threads as they were."""
    (tmp_path / "nets.py").write_text(NET.format(folder=str(Path(__file__).parent)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(timing.latency, "__kwdefaults__", {**(timing.latency.__kwdefaults__ or {}), "seconds": 0.01})
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads


class Watches(nn.Module):
    """Notes how it is called."""

    seen: ClassVar[list[tuple[bool, bool, int, tuple[int, ...]]]] = []

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((self.training, torch.is_grad_enabled(), torch.get_num_threads(), tuple(x.shape)))
        return self.conv(x)


def test_the_forward_runs_in_eval_mode_with_the_threads_asked_for() -> None:
    model = Watches().train()
    Watches.seen.clear()
    with untouched(model):
        found = allocator.latency(model, torch.zeros(2, 3, 4, 4), threads=1)
    assert model.training
    assert {call[:2] for call in Watches.seen} == {(False, False)}
    assert Watches.seen[-1][2:] == (1, (2, 3, 4, 4))
    assert found.threads == 1
    assert found.inputs == ((2, 3, 4, 4),)
    assert found.device.startswith("cpu (")
    assert 0 < found.forwards <= len(Watches.seen)
    assert found.seconds > 0
    assert found.spread >= 0


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(InputError, match="threads=0, "):
        allocator.latency(mixed(), IMAGE, threads=0)
    with pytest.raises(InputError, match="seconds=0: both"):
        allocator.latency(mixed(), IMAGE, seconds=0)
    with pytest.raises(TraceError, match=r"the forward raised RuntimeError with inputs of \(1, 5, 16, 16\)"):
        allocator.latency(mixed(), torch.zeros(1, 5, 16, 16))
    with torch.device("meta"):
        empty = nn.Conv2d(1, 1, 1)
    with pytest.raises(UnsupportedModelError, match="no values"):
        allocator.latency(empty, torch.zeros(1, 1, 1, 1))


def test_every_format_of_a_report_says_it() -> None:
    of = summary("60%")
    assert of.budget is not None
    timed = replace(of, latency=NOW, budget=replace(of.budget, latency=LEFT))
    said = "12.3 ms now, 6.15 ms (50.0%) kept; median of 1,200 forwards, cpu (AVX2), 2 threads, input 1x3x16x16"
    for name in FORMATS:
        text, without = as_text(timed, name), as_text(of, name)
        if name == "csv":
            last = list(csv.DictReader(io.StringIO(text)))[-1]
            assert (last["kind"], last["seconds"], last["seconds_kept"]) == ("latency", "0.0123", "0.00615")
            assert "seconds" not in without
        elif name == "json":
            facts = json.loads(text)
            jsonschema.validate(facts, schema())
            assert [facts["latency"]["seconds"], facts["budget"]["latency"]["seconds"]] == [0.0123, 0.00615]
            assert json.loads(without)["latency"] is None
        else:
            assert said in " ".join(text.split())
            assert said not in " ".join(without.split())


def test_every_format_of_a_comparison_says_it() -> None:
    a = side_of_summary(replace(summary(), latency=NOW))
    both = compare(a, replace(a, latency=LEFT))
    for name, written in COMPARISONS.items():
        text = written(both)
        if name == "csv":
            last = list(csv.DictReader(io.StringIO(text)))[-1]
            assert [last["kind"], last["a"], last["b"]] == ["latency (seconds)", "0.0123", "0.00615"]
        elif name == "json":
            assert [json.loads(text)[side]["latency"]["seconds"] for side in "ab"] == [0.0123, 0.00615]
        else:
            assert "A takes 12.3 ms; median of 1,200 forwards, cpu (AVX2), 2 threads" in text
            assert "B takes 50.0% of A's time" in text.replace("&#x27;", "'")


def test_report_measures_now_and_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["report", "nets:mixed", *SIZE, "--json", "--latency", "--threads", "1"]
    for more in ([], ["--flops", "60%"]):
        assert main([*command, *more]) == 0
        facts = json.loads(capsys.readouterr().out)
        jsonschema.validate(facts, schema())
        for measured in [facts["latency"], *([facts["budget"]["latency"]] if more else [])]:
            assert measured["threads"] == 1
            assert measured["inputs"] == [[1, 3, 16, 16]]
    assert main(["report", "nets:mixed", *SIZE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["latency"] is None


def test_compare_measures_models_and_saved_results(capsys: pytest.CaptureFixture[str]) -> None:
    name = "recipe:scalenet-small-seed"
    files = ["-o", "s.safetensors", "--allocation", "a.json", "--criterion", "magnitude"]
    assert main(["allocate", name, "--flops", "60%", *files, "-q"]) == 0
    capsys.readouterr()
    assert main(["compare", name, "s.safetensors", "--latency", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    jsonschema.validate(facts, schema("compare"))
    assert facts["a"]["latency"]["inputs"] == facts["b"]["latency"]["inputs"] == [[1, 1, 32, 32]]
    assert main(["compare", name, "a.json", "--latency"]) == 2
    assert "a.json is an allocation alone" in capsys.readouterr().err


def test_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "nets:mixed", *SIZE, "--threads", "2"]) == 2
    assert "--threads goes with --latency" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["report", "nets:mixed", "--latency", "--threads", "0"])
    assert "not a number above zero" in capsys.readouterr().err


class Sleeps(nn.Module):
    """Takes a known time at least."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return x


def test_no_forward_is_quicker_than_it_can_be() -> None:
    found = allocator.latency(Sleeps(), torch.zeros(1, 3), threads=1)
    assert found.seconds >= 0.05
    assert found.spread != found.seconds


def test_torch_says_nothing_on_stderr() -> None:
    """As it does where CUDA's compiler is installed and no GPU is there."""
    code = "import allocator, torch; allocator.latency(torch.nn.Linear(2, 2), torch.zeros(1, 2), seconds=0.01)"
    environment = {**os.environ, "CUDA_HOME": "/usr", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
