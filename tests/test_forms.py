"""What is shown of values: one line as `repr`, all of it when printed, the same in a notebook; and the public names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import allocator

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def result() -> allocator.Result:
    torch.manual_seed(0)
    return allocator.allocate(allocator.build("recipe:scalenet-small"), "50%")


def values(result: allocator.Result) -> dict[str, Any]:
    """One of each, with what its text has to say."""
    graph = result.graph
    return {
        "result": (result, "FLOPs before"),
        "report": (result.report(), "certificate: passed"),
        "allocation": (result.allocation, "FLOPs asked"),
        "graph": (graph, "an output of the model"),
        "block": (graph.blocks[0], "conv2.3"),
    }


@pytest.mark.parametrize("kind", ["result", "report", "allocation", "graph", "block"])
def test_a_value_has_one_line_a_text_and_a_page(result: allocator.Result, kind: str) -> None:
    value, said = values(result)[kind]
    assert len(repr(value)) < 140
    assert "\n" not in repr(value)
    text = str(value)
    assert said in text
    assert text.count("\n") >= 4
    assert max(map(len, text.splitlines())) <= 120
    html = value._repr_html_()
    assert html.startswith("<pre")
    assert html.endswith("</pre>")
    words = re.sub(r"<[^>]+>", "", html).replace("&gt;", ">").replace("&lt;", "<").replace("&#x27;", "'")
    assert [line.rstrip() for line in words.splitlines()] == [line.rstrip() for line in text.splitlines()]


def test_an_allocation_out_of_a_file_of_an_earlier_format_is_shown(result: allocator.Result, tmp_path: Path) -> None:
    result.allocation.save(tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text())
    del data["digest"]
    for block in data["blocks"]:
        block["branches"] = [{key: row[key] for key in ("name", "before", "after")} for row in block["branches"]]
    assert "layer1.0 (concat)" in str(allocator.Allocation.from_dict(data))


def test_scores_and_steps_are_one_line(result: allocator.Result) -> None:
    scores = allocator.score(result.graph)
    assert re.fullmatch(r"Scores\(group_norm: 344 neurons, [\d.]+ to [\d.]+\)", repr(scores))


def test_the_package_shows_its_public_names_and_no_others() -> None:
    assert dir(allocator) == sorted(allocator.__all__)
    assert all(hasattr(allocator, name) for name in dir(allocator))
    assert {"allocate", "Result", "BudgetError", "__version__"} <= set(dir(allocator))
    with pytest.raises(AttributeError, match="did you mean allocate"):
        allocator.alocate  # type: ignore[attr-defined]  # noqa: B018


def test_rooms_and_names_come_when_they_are_asked_for() -> None:
    """Folders of a clone, such as build/, stand for none."""
    (ROOT / "build").mkdir(exist_ok=True)
    code = (
        "import sys, allocator; print('torch' in sys.modules, allocator.__version__);"
        "from allocator import build; assert callable(build);"
        "print(allocator.recipes.names()[0], allocator.errors.AllocatorError is allocator.AllocatorError);"
        "from allocator import *; print(allocate.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    first, second, third = done.stdout.splitlines()
    assert first == f"False {allocator.__version__}"
    assert second.endswith("True")
    assert third == "allocate"
