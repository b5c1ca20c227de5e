"""The command line: help, usage, exit status, files, and what it prints."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import allocator
from allocator.cli import main
from allocator.cli.arguments import parse_budget, parse_setting, parse_size
from allocator.io.files import load_allocation, load_model, save_model

COMMANDS = ("report", "allocate", "apply", "verify", "compare", "export", "recipes", "sweep", "train", "widen")
NET = """
import torch
from torch import nn


class Branches(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.a = nn.Conv2d(3, width, 1)
        self.b = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(2 * width)
        self.out = nn.Conv2d(2 * width, 4, 1)
        torch.manual_seed(1)
        nn.init.uniform_(self.bn.weight, 0.2, 1.5)

    def forward(self, x):
        return self.out(torch.relu(self.bn(torch.cat([self.a(x), self.b(x)], 1))))


def branches(width=8):
    torch.manual_seed(0)
    return Branches(width).eval()
"""
GOLDEN_REPORT = """\
cli_nets:branches: Branches, input 1x3x16x16
FLOPs        86,016  86.0 k (one is one multiply-add)
parameters      356  356                             
activations   5,120  5.12 k                          
16 neurons, 1 block, 2 branches; ranked by group_norm
a budget can go down to 12.5% (branches), 12.5% (inner), 12.5% (all) of its FLOPs, by scope

block / branch  kind    scale  kernel  stride  field  channels   FLOPs   share       |γ|  mean
model           concat                                      16  61,440   71.4%                
  a                     1      1x1     1       1x1           8   6,144    7.1%  0.24–1.2  0.88
  b                     1      3x3     1       3x3           8  55,296   64.3%   0.6–1.1  0.86
outside blocks                                                  24,576   28.6%                
total                                                           86,016  100.0%                
4 of 20 written channels must stay:
  4: an output of the model
"""  # noqa: W291
SIZE = ("--input-size", "1x3x16x16")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each command in an empty folder that holds one homemade network."""
    (tmp_path / "cli_nets.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def _save_sequential(path: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 5, 1)).eval()
    nn.init.uniform_(net[1].weight, 0.2, 1.5)  # type: ignore[arg-type]
    save_model(net, path)


# ------------------------------------------------------------------------------------------ help and usage


def _status(arguments: list[str]) -> int:
    """The exit status, whether it comes from our code or from the argument parser."""
    try:
        return main(arguments)
    except SystemExit as left:
        return int(left.code or 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert f"example:\n  allocator-cli {command}" in shown
    assert "--json" in shown


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("allocate", "--data --loss --params --activations --latency --multiple --at-least --exclude --same"),
        ("report", "--data --include --multiple --criterion --policy"),
        ("sweep", "--data --plot --csv --params --peak-activations --allocations --policy --at-least"),
    ],
)
def test_examples_show_the_flags(command: str, flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    examples = capsys.readouterr().out.partition("example:\n")[2]
    assert [flag for flag in flags.split() if f"{flag} " not in examples] == []


def test_the_main_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {command} " in shown for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: COMMAND"),
        (["alocate"], "invalid choice"),
        (["allocate", "m.pt", "-o", "s.pt"], "no budget is given, such as --flops 60%"),
        (["allocate", "m.pt", "--flops", "many", "-o", "s.pt"], "not a budget"),
        (["allocate", "m.pt", "--flops", "60%", "-o", "s.txt"], "must end in"),
        (["allocate", "m.pt", "--flops", "60%", "--allocation", "a.yaml"], "must end in .json"),
        (["allocate", "m.pt", "--flops", "60%", "-o", "s.pt", "--policy", "best"], "invalid choice"),
        (["report", "m.pt", "--input-size", "1x3xbig"], "not a size"),
        (["report", "m.pt", "--input-size", "1x0x8x8"], "not a size"),
        (["report", "torchvision:resnet18", "--set", "num_classes"], "KEY=VALUE"),
        (["report", "torchvision:resnet18", "--arch", "torchvision:resnet18"], "--arch goes with a file"),
        (["apply", "m.pt", "a.json"], "nothing to write"),
        (["verify", "m.pt", "s.pt"], "ALLOCATION is needed"),
    ],
)
def test_bad_usage_ends_with_status_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _status(arguments) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    "text",
    ["4.2e9", "4.2G", "300m", "60%", " 0.5 ", "-1", "8ms", "0.5 s", "1,000,000"],
)
def test_budgets_are_read_as_people_write_them(text: str) -> None:
    assert parse_budget(text) == text


@pytest.mark.parametrize("text", ["", "%", "G", "four", "1..2"])
def test_other_budgets_are_usage_errors(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_budget(text)


def test_sizes_and_settings_are_read() -> None:
    assert parse_size("1x3X224x224") == (1, 3, 224, 224)
    assert parse_setting("num_classes=10") == ("num_classes", 10)
    assert parse_setting("norm=batch") == ("norm", "batch")


# ------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report", "absent.pt"], "there is no file absent.pt"),
        (["report", "resnet50"], "as in torchvision:resnet50"),
        (["report", "torchvision:resnet5"], "did you mean"),
        (["report", "cli_nets:branchs"], "did you mean branches"),
        (["report", "notes.txt"], "unknown kind of file"),
        (["apply", "cli_nets:branches", "absent.json", "-o", "s.pt"], "there is no file absent.json"),
        (["allocate", "absent.pt", "--flops", "60%", "-o", "nowhere/s.pt"], "there is no folder"),
        (["report", "torchvision:resnet18", "--set", "no_such_thing=1"], "with no_such_thing=1 raised TypeError"),
    ],
)
def test_failures_end_with_status_1_and_a_reason(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("notes.txt").write_text("no network")
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert said in printed.err.replace("\n", " ")
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_failures_are_json_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "absent.pt", "--json"]) == 1
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert facts["error"] == "FileError"
    assert "absent.pt" in facts["message"]
    assert "absent.pt" in printed.err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "absent.pt", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_file_that_would_run_code_needs_trust(capsys: pytest.CaptureFixture[str]) -> None:
    from cli_nets import branches  # type: ignore[import-not-found]

    torch.save(branches(), "m.pt")
    assert main(["report", "m.pt", *SIZE]) == 1
    assert "cli_nets.Branches" in capsys.readouterr().err
    assert main(["report", "m.pt", *SIZE, "--trust"]) == 0


def test_existing_outputs_are_kept_unless_forced(capsys: pytest.CaptureFixture[str]) -> None:
    _save_sequential("m.pt")
    Path("s.pt").write_text("precious")
    command = ["allocate", "m.pt", "--flops", "60%", "-o", "s.pt", *SIZE]
    assert main(command) == 1
    assert "--force" in capsys.readouterr().err
    assert Path("s.pt").read_text() == "precious"
    assert main([*command, "--force"]) == 0
    assert isinstance(load_model("s.pt"), nn.Sequential)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_apply_keeps_an_existing_output_unless_forced(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    _save_sequential("m.pt")
    assert main(["allocate", "m.pt", "--flops", "60%", "-o", "s.pt", "--allocation", "a.json", *SIZE]) == 0
    Path(name).write_text("precious")
    before = sorted(os.listdir())
    command = ["apply", "m.pt", "a.json", "-o", name]
    assert main(command) == 1
    assert f"{name} exists; use --force to overwrite it" in capsys.readouterr().err
    assert Path(name).read_text() == "precious"
    assert main([*command[:-1], "m.pt"]) == 1  # nor its own input
    assert sorted(os.listdir()) == before
    assert main([*command, "--force"]) == 0
    assert sorted(os.listdir()) == before
    applied = load_model(name) if name.endswith(".pt") else allocator.load(name, model=load_model("m.pt"))
    for mine, its in zip(applied.parameters(), load_model("s.pt").parameters(), strict=True):
        assert torch.equal(mine, its)


def test_an_unreachable_budget_says_what_can_be_reached(capsys: pytest.CaptureFixture[str]) -> None:
    _save_sequential("m.pt")
    assert main(["allocate", "m.pt", "--flops", "10", "-o", "s.pt", "--json", *SIZE]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["error"] == "BudgetError"
    assert facts["asked"] == 10
    assert 10 < facts["reachable"] < 16 * 16 * 16 * (27 + 5)
    assert not Path("s.pt").exists()


# ------------------------------------------------------------------------------------------ the job


def test_report_lists_the_block_and_its_branches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "cli_nets:branches", *SIZE, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    # 16x16 positions; a: 3*8, b: 27*8, bn: 2*16 (fvcore counts two per element), out: 16*4
    assert facts["flops"] == 256 * (24 + 216 + 32 + 64)
    assert facts["neurons"] == 16
    (block,) = [block for block in facts["blocks"] if block["kind"] == "concat"]
    assert [branch["channels"] for branch in block["branches"]] == [8, 8]
    assert facts["unsupported"] == {}


def test_report_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "cli_nets:branches", *SIZE]) == 0
    assert capsys.readouterr().out == GOLDEN_REPORT


def test_input_sizes_are_of_the_models_precision(capsys: pytest.CaptureFixture[str]) -> None:
    halved = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)).half()
    save_model(halved, "half.pt")
    assert main(["allocate", "half.pt", "--flops", "60%", "--input-size", "1x3x8x8", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["certificate"]["ok"]
    assert said["flops"]["after"] <= 0.6 * said["flops"]["before"]


def test_settings_reach_the_factory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "cli_nets:branches", "--set", "width=5", *SIZE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["neurons"] == 10


@pytest.mark.parametrize("output", ["s.pt", "s.safetensors"])
def test_allocate_apply_and_verify(output: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = "torchvision:squeezenet1_1"
    size = ("--input-size", "1x3x64x64")
    options = [
        *size,
        "--criterion",
        "magnitude",
        "--allocation",
        "a.json",
        "--json",
        "--set",
        "num_classes=10",
    ]
    assert main(["allocate", name, "--flops", "70%", "-o", output, *options]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["files"] == {"model": output, "allocation": "a.json"}
    allocation = load_allocation("a.json")
    assert 0.995 * 0.7 <= allocation.flops_after / allocation.flops_before <= 0.7

    fresh = [name, "a.json", "-o", "fresh.pt", "--json", "--set", "num_classes=10"]
    assert main(["apply", *fresh]) == 0
    assert json.loads(capsys.readouterr().out)["flops_after"] == allocation.flops_after
    small, again = load_model(output), load_model("fresh.pt")
    assert all(torch.equal(p, q) for p, q in zip(small.parameters(), again.parameters(), strict=True))
    allocation_file = [] if output.endswith(".safetensors") else ["a.json"]
    assert main(["verify", name, output, *allocation_file, "--set", "num_classes=10"]) == 0
    said = capsys.readouterr().out
    assert "weights    the original's, bit for bit" in said
    assert "verdict    the original minus" in said


def test_a_network_of_one_s_own_is_verified_without_trust_in_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(allocator.build("cli_nets:branches").state_dict(), "weights.pt")
    named, filed = ["cli_nets:branches"], ["weights.pt", "--arch", "cli_nets:branches"]
    for original in (named, filed):
        assert main(["allocate", *original, *SIZE, "--flops", "60%", "-o", "s.safetensors", "--force"]) == 0
        assert main(["verify", original[0], "s.safetensors", *original[1:]]) == 0
        assert "verdict    the original minus" in capsys.readouterr().out
    assert main(["verify", "cli_nets:branches", "nothing.safetensors"]) == 1
    assert main(["verify", "cli_nets:branches", "weights.pt", "s.safetensors"]) == 1
    assert "weights.pt holds weights alone" in capsys.readouterr().err


def test_verify_says_that_weights_were_refitted(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)), "data.pt")
    seen = ["--data", "data.pt", "--recover", "least_squares"]
    assert main(["allocate", "cli_nets:branches", "--flops", "60%", *seen, "-o", "s.safetensors"]) == 0
    capsys.readouterr()
    assert main(["verify", "cli_nets:branches", "s.safetensors"]) == 0
    assert "weights    the original's, bit for bit before they were refitted on 12 inputs" in capsys.readouterr().out


def test_help_leaves_out_a_default_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["allocate", "--help"])
    assert "default: None" not in capsys.readouterr().out


def test_a_factory_in_the_working_folder_is_found_for_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(allocator.build("cli_nets:branches").state_dict(), "weights.pt")
    monkeypatch.delitem(sys.modules, "cli_nets")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != os.getcwd()])
    assert main(["report", "weights.pt", "--arch", "cli_nets:branches", *SIZE]) == 0


def test_settings_reach_the_network_that_weights_belong_to(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(allocator.build("cli_nets:branches", width=5).state_dict(), "w.pt")
    weights = ("w.pt", "--arch", "cli_nets:branches", *SIZE)
    assert main(["report", *weights]) == 1
    assert "builds it with other arguments, as in --set num_classes=10" in capsys.readouterr().err.replace("\n", " ")
    assert main(["report", *weights, "--set", "width=5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["neurons"] == 10
    assert main(["report", "w.pt", "--set", "width=5"]) == 2
    assert "--set goes with a named model or with --arch NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cli_nets.py:branches"], "a network of your own is MODULE:FUNCTION, as in cli_nets:FUNCTION"),
        (["cli_nets.py"], "holds code, not a model: a network of your own is MODULE:FUNCTION"),
        (["cli_nets"], "there is no file cli_nets; a named model has a prefix, as in cli_nets:FUNCTION"),
        (["cli_nets:BRANCHES"], "did you mean Branches, branches?"),
        (["cli_nets:branches", "--set", "widht=5"], "building cli_nets:branches with widht=5 raised TypeError: "),
        (["cli_nets:branches", "--set", "width=wide"], "building cli_nets:branches with width='wide' raised "),
        (["folder"], "folder is a folder, not a model file; for one that transformers wrote, say hf:folder"),
    ],
)
def test_a_network_of_ones_own_named_in_another_way(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("folder").mkdir()
    Path("folder/config.json").write_text("{}")
    assert main(["report", *arguments]) == 1
    assert said in capsys.readouterr().err.replace("\n", " ")


def test_verify_tells_right_from_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    _save_sequential("m.pt")
    options = [*SIZE, "--allocation", "a.json"]
    assert main(["allocate", "m.pt", "--flops", "60%", "-o", "s.pt", *options]) == 0
    assert main(["verify", "m.pt", "s.pt", "a.json", "--json"]) == 0
    capsys.readouterr()
    small = load_model("s.pt")
    with torch.no_grad():
        next(small.parameters())[0] += 1.0
    save_model(small, "wrong.pt")
    assert main(["verify", "m.pt", "wrong.pt", "a.json"]) == 1
    said = capsys.readouterr().out
    assert "weights    NOT the original's" in said
    assert "verdict    NOT the original" in said


def test_verbose_shows_times_and_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    _save_sequential("m.pt")
    assert main(["report", "m.pt", *SIZE, "-v"]) == 0
    assert " s  tracing" in capsys.readouterr().err
    assert main(["report", "m.pt", *SIZE, "-q"]) == 0
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------ as a process


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "import sys; from allocator.cli import main; sys.exit(main())", *arguments]


def test_a_reader_that_leaves_is_no_error() -> None:
    _save_sequential("m.pt")
    with subprocess.Popen(
        _command("report", "m.pt", *SIZE, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read().decode()
    assert "Traceback" not in said
    assert "BrokenPipe" not in said


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_leaves_nothing_behind(number: signal.Signals, status: int) -> None:
    script = (
        "import signal, sys, time, torch\nfrom allocator.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where the tests run in the background
        "def slow(model, file):\n"
        "    open(file, 'w').write('half'); print('writing', flush=True); time.sleep(60)\n"
        "torch.save = slow\nsys.exit(main())"
    )
    _save_sequential("m.pt")
    before = set(os.listdir())
    command = [sys.executable, "-c", script, "allocate", "m.pt", "--flops", "60%", "-o", "s.pt", *SIZE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(30) == status
    assert set(os.listdir()) == before


def test_a_file_of_a_recipe_opens_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    result = allocator.allocate(allocator.build("recipe:resnet-small"), flops="50%", certify=False)
    allocator.save(result, path)
    command = [sys.executable, "-m", "allocator.cli", "report", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "ResidualNet" in done.stdout
