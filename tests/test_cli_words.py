"""The command line speaks of flags, names the command that comes next, lists layers, and finds own modules."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from allocator.cli import main, make_parser
from allocator.cli.next_step import command
from allocator.cli.opening import find_local_modules
from allocator.cli.words import in_shell
from allocator.reporting import schema
from allocator.verifying import smaller

ROOT = Path(__file__).resolve().parents[1]
NET = """
import torch
from torch import nn


class OwnNet(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(1, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.b = nn.Conv2d(width, width, 3, padding=1)
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        return self.fc(self.b(self.bn(self.a(x)).relu()).relu().mean((2, 3)))


def own(width=16):
    return OwnNet(width)
"""
SIZE = ("--input-size", "1x1x12x12")


@pytest.fixture(autouse=True)
def _beside_own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with a module, and what this process knew of modules after it as before."""
    (tmp_path / "own_nets.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("cannot be met with scope='auto': 3", "cannot be met with --scope auto: 3"),
        ("exclude='layer4*' matches no module", "--exclude layer4* matches no module"),
        (
            "at least 40% of its channels (at_least=0: any number)",
            "at least 40% of its channels (--at-least 0: any number)",
        ),
        ("Given groups=1, weight of size [2]", "Given groups=1, weight of size [2]"),
        ("trust it, pass --trust (trust=True), which", "trust it, pass --trust, which"),
        ("belong to with --arch NAME (arch=...), for", "belong to with --arch NAME, for"),
        (
            "looks at data: pass data=loader",
            "looks at data: give --data FOLDER, a folder of pictures or a file of a tensor",
        ),
        ("example_inputs do not fit: it raised", "the --input-size does not fit: it raised"),
    ],
)
def test_messages_speak_of_flags(said: str, shown: str) -> None:
    assert in_shell(said) == shown


def test_an_input_that_does_not_fit_or_is_not_known_is_asked_for_by_its_flag(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["report", "own_nets:own", "--input-size", "1x3x12x12"]) == 1
    said = capsys.readouterr().err
    assert "the --input-size does not fit" in said
    assert "give another --input-size" in said
    assert "example_inputs" not in said


def test_own_modules_are_found_for_factories_and_trusted_files_alone() -> None:
    def found(name: str, *, trust: bool = False) -> bool:
        path = list(sys.path)
        find_local_modules(argparse.Namespace(trust=trust), name)
        changed, sys.path[:] = sys.path != path, path
        return changed

    assert not found("model.pt")
    assert not found("torchvision:resnet18")
    assert found("own_nets:own")
    assert found("model.pt", trust=True)


def test_a_file_of_an_own_class_opens_with_trust(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([sys.executable, "-c", "import torch, own_nets; torch.save(own_nets.own(), 'own.pt')"])
    assert done.returncode == 0
    assert main(["report", "own.pt", *SIZE]) == 1
    assert "pass --trust, which runs" in capsys.readouterr().err
    assert main(["report", "own.pt", *SIZE, "--trust"]) == 0
    following = capsys.readouterr().err.splitlines()[-1].removeprefix("next: ")
    assert following == "allocator-cli allocate own.pt --flops 60% -o small.pt --input-size 1x1x12x12 --trust"


def test_a_class_of_a_script_is_told_from_one_of_a_module(capsys: pytest.CaptureFixture[str]) -> None:
    Path("script.py").write_text(NET + "\ntorch.save(own(), 'script.pt')\n")
    assert subprocess.run([sys.executable, "script.py"]).returncode == 0
    assert main(["report", "script.pt", *SIZE, "--trust"]) == 1
    assert "a class of the script that was run, which lies in __main__" in capsys.readouterr().err


def test_the_next_command_can_be_run_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["own_nets:own", *SIZE, "--set", "width=12", "--flops", "70%", "--exclude", "f*", "--multiple", "2"]
    assert main(["report", *given, "--layers"]) == 0
    following = shlex.split(capsys.readouterr().err.splitlines()[-1].removeprefix("next: "))
    assert following[:2] == ["allocator-cli", "allocate"]
    asked, parsed = (
        vars(make_parser().parse_args(words)) for words in (["allocate", *given, "-o", "small.pt"], following[1:])
    )
    assert {**parsed, "parsers": None} == {**asked, "parsers": None}
    assert main(following[1:]) == 0
    assert Path("small.pt").exists()


def test_no_option_of_the_budgeted_command_gets_lost() -> None:
    words = ["allocate", "m.pt", "--params", "1M", "--latency", "8ms", "--same", "a*", "--recover", "fold", "--no-fill"]
    words += ["--data", "x.npy", "--at-least", "25%", "--weights", "reset", "--set", 'name="a b"', "--arch", "timm:x"]
    parser = make_parser()
    args = parser.parse_args(words)
    again = parser.parse_args(shlex.split(command("allocate", args))[1:])
    assert {**vars(again), "parsers": None} == {**vars(args), "parsers": None}


@pytest.mark.parametrize(
    ("name", "share", "what"), [("allocate", "50%", "smaller"), ("widen", "150%", "wider")], ids=["allocate", "widen"]
)
def test_without_a_place_to_write_to_the_plan_is_shown(
    name: str, share: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "own_nets:own", *SIZE, "--flops", share]) == 0
    out, err = capsys.readouterr()
    assert "certificate: passed" in out
    assert (
        f"nothing was written; to write the {what} model: allocator-cli {name} own_nets:own --flops {share} -o" in err
    )
    assert sorted(path.name for path in Path().iterdir() if path.is_file()) == ["own_nets.py"]


def test_layers_add_up_to_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["own_nets:own", *SIZE, "--flops", "50%", "--layers"]
    assert main(["allocate", *given, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    jsonschema.validate(facts, schema("allocate"))
    layers = facts["layers"]
    assert [layer["name"] for layer in layers] == ["a", "b", "fc"]
    assert facts["flops"]["before"] - sum(layer["flops"] for layer in layers) == 2 * 16 * 144  # the batch norm's
    left = layers[0]["kept"]
    assert facts["flops"]["after"] - sum(layer["flops_kept"] for layer in layers) == 2 * left * 144
    assert layers[0]["flops_kept"] == 144 * 9 * left
    assert layers[1]["flops_kept"] == 144 * 9 * left * layers[1]["kept"]
    assert main(["report", *given]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^a +conv 3x3 +16 → \d+ ", out, re.MULTILINE)
    assert "norms and other calls" in out
    assert main(["report", *given, "--format", "csv"]) == 2
    assert "--layers lists them as text" in capsys.readouterr().err
    assert main(["report", "own_nets:own", *SIZE, "--json"]) == 0
    jsonschema.validate(json.loads(capsys.readouterr().out), schema())


@pytest.mark.parametrize(
    "words",
    [["allocate", "recipe:resnet-small", "--flops", "80%"], ["widen", "recipe:resnet-small", "--factor", "1.5"]],
)
def test_what_a_report_notes_is_not_said_before_it(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = "note: --exclude convv1 matches no module or parameter; did you mean 'conv1'?"
    for more, places in (([], (1, 0)), (["--quiet"], (1, 0)), (["--json"], (0, 1))):
        assert main([*words, "--exclude", "convv1", *more]) == 0
        found = capsys.readouterr()
        assert (found.out.count(said), found.err.count(said)) == places


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["allocate", "--help"], ["alocate"], ["report", "no.pt"]])
def test_help_and_complaints_do_not_wait_for_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom allocator.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "sys.exit(7 if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_saved_model_of_a_tensor_file_is_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch.zeros(3), "tensor.pt")
    assert main(["report", "tensor.pt"]) == 1
    assert "holds a Tensor, not a model" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["allocate", "widen"])
@pytest.mark.parametrize(
    ("options", "compared"),
    [((), [[1, 1, 64, 64]]), (("--certify", "full"), [[1, 1, 128, 128]]), (("--no-certificate",), [])],
    ids=["small", "full", "none"],
)
def test_how_large_the_inputs_are_that_outputs_are_compared_on(
    name: str, options: tuple[str, ...], compared: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(smaller, "WORTH", 0)
    share = "50%" if name == "allocate" else "150%"
    assert main([name, "own_nets:own", "--input-size", "1x1x128x128", "--flops", share, "--json", *options]) == 0
    assert json.loads(capsys.readouterr().out)["certificate"]["compared_shapes"] == compared
