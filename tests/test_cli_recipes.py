"""`allocator-cli recipes`, and the table in the documentation that it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from allocator import recipes
from allocator.cli import main
from allocator.cli.recipes import facts

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
GOLDEN = """\
recipe                input      parameters       FLOPs  made by
res2net-small         1x1x32x32      31,624   5,511,488  res2net.res2net_small()
res2net-small-seed    1x1x32x32      63,107  11,341,824  res2net.res2net_small_seed()
"""


def page_rows() -> dict[str, list[str]]:
    """The table in the documentation: input, parameters, FLOPs and call by name."""
    block = PAGE.read_text().split("```text\n")[1].split("```")[0]
    rows = [line.split(maxsplit=4) for line in block.splitlines()[1:]]
    return {name: rest for name, *rest in rows}


def check_row(name: str) -> None:
    got = facts(name)
    size = "x".join(map(str, got["input"]))
    assert page_rows()[name] == [size, f"{got['parameters']:,}", f"{got['flops']:,}", got["call"]]


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["recipes", "res2net_small*", "-q"]) == 0
    assert lines(capsys.readouterr().out) == lines(GOLDEN)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "scalenet-small", "resnet-small", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["recipes"]
    assert [row["name"] for row in rows] == ["scalenet-small", "resnet-small"]
    assert rows[1] == {
        "name": "resnet-small",
        "input": [1, 1, 32, 32],
        "parameters": 33_090,
        "flops": 5_403_904,
        "call": "resnet.resnet_small()",
    }


def test_a_pattern_that_matches_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "vgg*"]) == 2
    assert "no recipe matches vgg*" in capsys.readouterr().err


def test_the_page_lists_every_recipe_and_no_other() -> None:
    assert list(page_rows()) == recipes.names()


@pytest.mark.parametrize("name", [name for name in recipes.names() if "small" in name or name == "se-resnet50"])
def test_the_page_states_what_the_command_prints(name: str) -> None:
    check_row(name)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in recipes.names() if "small" not in name])
def test_the_page_states_what_the_command_prints_for_large_ones_too(name: str) -> None:
    check_row(name)
