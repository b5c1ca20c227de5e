"""What `result.report()` says of an allocation: printed, and as plain data."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from report_subjects import IMAGE, Mixed, mixed
from rich.console import Console
from torch import Tensor, nn

import allocator
from allocator import Allocation
from allocator.errors import BudgetNotBindingWarning
from allocator.reporting import schema

TABLE = """\
block / branch      scale  kernel  channels   inside  kept             
model (concat)                      16 → 15                            
  fine.0            1      3x3      12 → 11           ━━━━━━━━━━━─  92%
  coarse.0          2      3x3            4           ━━━━━━━━━━━━ 100%
grouped.0 (groups)                    8 → 6                            
  3 of 4 groups     1      3x3        8 → 6           ━━━━━━━━━───  75%
model#2 (sum)                       16 → 15                            
  identity          1               16 → 15           ━━━━━━━━━━━─  94%
  expand.0          1      3x3      16 → 15  16 → 12  ━━━━━━━━━━━─  94%
not counted by fvcore: max_pool2d (1), add (1), mean (1)
note: held against the original in eval mode with 1x3x16x16 and 3x3x48x48, in 
train mode with 2x3x8x8
"""  # noqa: W291


class Unfollowed(nn.Module):
    """Two convolutions side by side, and an operator that no rule follows behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.join, self.head = nn.Conv2d(16, 6, 1), Exponential()

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) to (n, 6, 6)."""
        x = self.join(torch.cat([self.a(x), self.b(x)], 1))
        return self.head(x.mean((2, 3)))


class Exponential(nn.Module):
    """(n, c) to (n, c, c)."""

    def forward(self, x: Tensor) -> Tensor:
        """Of the outer product with itself."""
        return torch.linalg.matrix_exp(x[:, :, None] * x[:, None, :])


def allocated(model: nn.Module | None = None, flops: float | str = "80%", **options: Any) -> allocator.Result:
    """Of `Mixed` as after training, ranked within its blocks, unless asked otherwise."""
    options = {"policy": "per_block", "criterion": "bn_scale", "certify": False, **options}
    return allocator.allocate(model or mixed(), flops, example_inputs=IMAGE, **options)


def printed(result: allocator.Result) -> str:
    """As on a terminal of 80 columns without colour."""
    console = Console(file=io.StringIO(), width=80, no_color=True, force_terminal=False)
    console.print(result.report())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_what_a_terminal_shows() -> None:
    figures, rule, table = printed(allocated(scope="inner")).partition("block / branch")
    assert rule + table == TABLE
    assert figures.startswith("Mixed: 425,552 FLOPs before, 340,299 after (80.0%)\n")
    assert "asked 340,442 FLOPs, achieved 99.958% (the cheapest further neuron costs 20,229)\n" in figures
    assert "1,965 parameters before, 1,600 after\n" in figures
    assert "policy per_block, criterion bn_scale, scope inner;" in figures
    assert figures.endswith("certificate: passed: every index accounted for, outputs not compared\n")


def test_what_comes_back_prints_in_a_few_lines_without_rich() -> None:
    result = allocated(scope="inner")
    assert str(result.report()).startswith("Mixed: ")
    assert "block / branch" in str(result.report())
    for value in (result, result.allocation, result.graph, result.plan):
        assert repr(value).strip("<").startswith(type(value).__name__)
        assert "\n" not in repr(value)
        assert len(repr(value)) < 400
    assert repr(Allocation()).startswith("Allocation(0 FLOPs before, 0 after")
    curve = allocator.sweep(mixed(), flops=["80%", "60%"], example_inputs=IMAGE)
    assert str(curve).splitlines()[0].split() == ["asked", "FLOPs", "share", "importance"]
    assert len(str(curve).splitlines()) == 3


def test_residual_streams_are_not_shown_where_they_are_out_of_scope() -> None:
    text = printed(allocated(scope="branches"))
    assert "model (concat)" in text
    assert "(sum)" not in text
    assert "1 block without a change of its own is not shown" in text


def test_what_was_not_followed_is_said_with_its_module() -> None:
    torch.manual_seed(0)
    text = printed(allocated(Unfollowed(), criterion="magnitude", scope="branches"))
    assert "no rule for linalg_matrix_exp: what it touches stays, in head\n" in text


def test_plain_data_are_those_of_the_allocation() -> None:
    result = allocated(scope="inner")
    data = result.report().to_dict()
    assert data["blocks"] == result.allocation.blocks
    assert data["certificate"] == result.certificate.to_dict()
    before, after = (sum(p.numel() for p in model.parameters()) for model in (mixed(), result.model))
    assert data["parameters"] == {"before": before, "after": after}
    jsonschema.validate(json.loads(json.dumps({"model": "mixed", **data, "files": {}})), schema("allocate"))


def test_scores_of_the_callers_own_need_no_name_to_be_reported(tmp_path: Path) -> None:
    graph = allocator.trace(mixed(), IMAGE)
    report = allocated(criterion=np.arange(graph.size, dtype=float)).report()
    summary = report.summary()
    assert summary.budget is not None
    assert summary.budget.criterion == "own"
    report.save(tmp_path / "r.html")


def test_where_everything_stays_there_is_a_report_too() -> None:
    with pytest.warns(BudgetNotBindingWarning):
        result = allocated(Mixed().eval(), 1e12)
    summary = result.report().summary(curve=True)
    assert (summary.criterion, summary.curve) == (None, ())
    assert summary.budget is not None
    assert summary.budget.totals == summary.totals
    assert "3 blocks without a change of their own are not shown" in printed(result)
