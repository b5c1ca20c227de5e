"""`allocator-cli report` and `allocate --report`: formats, files, pictures, colours, progress."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import signal
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import torch
from report_subjects import IMAGE, mixed
from torch import nn

import allocator
from allocator.cli import main
from allocator.cli.talk import Talk
from allocator.errors import AllocatorWarning
from allocator.reporting import schema

SIZE = ("--input-size", "1x3x16x16")
NET = "import sys\nsys.path.insert(0, {folder!r})\nfrom report_subjects import many_blocks, mixed\n"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each command in an empty folder, with one network by name."""
    (tmp_path / "nets.py").write_text(NET.format(folder=str(Path(__file__).parent)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delitem(sys.modules, "nets", raising=False)


def report(*arguments: str) -> int:
    """The exit status, whether it comes from our code or from the argument parser."""
    try:
        return main(["report", "nets:mixed", *SIZE, *arguments])
    except SystemExit as left:
        return int(left.code or 0)


def test_json_is_as_its_schema_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert report("--json", "--flops", "60%") == 0
    facts = json.loads(capsys.readouterr().out)
    jsonschema.validate(facts, schema())
    assert facts["budget"]["totals"]["flops"] <= 0.6 * facts["flops"]
    # what it says would be left is what allocate leaves
    result = allocator.allocate(mixed(), "60%", example_inputs=IMAGE)
    assert facts["budget"]["totals"]["flops"] == result.flops_after
    assert facts["budget"]["totals"]["parameters"] == sum(p.numel() for p in result.model.parameters())


def test_a_budget_that_narrower_groups_alone_can_meet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of the two groups is half of the FLOPs."""
    grouped = "from torch import nn\ndef grouped():\n    layers = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2)\n"
    (tmp_path / "more.py").write_text(f"{grouped}    return nn.Sequential(*layers, nn.Conv2d(8, 2, 1))\n")
    asked = ["report", "more:grouped", *SIZE, "--json", "--flops", "45%"]
    assert main(asked) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["budget"]["totals"]["flops"] <= 0.45 * facts["flops"]
    assert main([*asked, "--groups", "whole"]) == 1
    assert "--groups width" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("format", "begins"),
    [("rich", "nets:mixed: Mixed"), ("csv", "block,kind,"), ("md", "# nets:mixed"), ("html", "<!doctype html>")],
)
def test_formats_on_stdout_and_in_files(format: str, begins: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report("--format", format) == 0
    out = capsys.readouterr().out
    assert out.startswith(begins)
    name = f"é.{'txt' if format == 'rich' else format}"
    assert report("-o", name) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"report written to {name}" in printed.err
    assert Path(name).read_text(encoding="utf-8").startswith(begins)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "htm"], "did you mean 'html'"),
        (["--format", "yaml"], "there are rich, json, csv, html, md"),
        (["-o", "r.cvs"], "did you mean .csv"),
        (["-o", "report"], "does not say its format. A report ends in"),
        (["--plot", "p.pgn"], "did you mean .png"),
        (["--json", "--format", "csv"], "do not go together"),
        (["--blocks", "-1"], "not a number of blocks"),
        (["-o", "r.md", "--plot", "r.md"], "a picture ends in"),
    ],
)
def test_bad_usage_is_refused_before_any_work(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(*arguments) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.out == ""
    assert os.listdir() == ["nets.py"]


def test_existing_files_stay_unless_forced(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.md").write_text("precious")
    assert report("-o", "r.md") == 1
    assert "--force" in capsys.readouterr().err
    assert Path("r.md").read_text() == "precious"
    assert report("-o", "r.md", "--force") == 0
    assert Path("r.md").read_text().startswith("# nets:mixed")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(capsys: pytest.CaptureFixture[str]) -> None:
    Path("locked").mkdir()
    Path("locked").chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert report("-o", "locked/r.md") == 1
    assert "no permission" in capsys.readouterr().err


def test_unwritable_places_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder.md").mkdir()
    for place, said in (("absent/r.md", "there is no folder"), ("folder.md", "it is a folder")):
        assert report("-o", place, "--force") == 1
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(("suffix", "begins"), [("png", b"\x89PNG"), ("svg", b"<svg"), ("pdf", b"%PDF")])
def test_pictures(suffix: str, begins: bytes) -> None:
    assert report("--plot", f"p.{suffix}", "--flops", "60%", "-q") == 0
    assert Path(f"p.{suffix}").read_bytes().startswith(begins)


def test_a_network_without_blocks_has_no_picture(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), "m.pt")
    assert main(["report", "m.pt", *SIZE, "--plot", "p.png"]) == 1
    assert "no blocks" in capsys.readouterr().err
    assert not Path("p.png").exists()


def test_allocate_writes_its_report_and_picture(capsys: pytest.CaptureFixture[str]) -> None:
    files = ["-o", "s.pt", "--report", "r.json", "--plot", "p.svg"]
    assert main(["allocate", "nets:mixed", "--flops", "60%", *SIZE, *files, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    jsonschema.validate(facts, schema("allocate"))
    assert facts["files"] == {"model": "s.pt", "report": "r.json", "picture": "p.svg"}
    written = json.loads(Path("r.json").read_text())
    jsonschema.validate(written, schema())
    assert written["budget"]["certificate"].startswith("passed")
    assert written["budget"]["totals"]["flops"] == facts["flops"]["after"]
    assert "kept:" in Path("p.svg").read_text()


def test_reports_of_results_in_python(tmp_path: Path) -> None:
    result = allocator.allocate(mixed(), "60%", example_inputs=IMAGE)
    for name in ("r.html", "r.md", "r.csv"):
        result.report().save(tmp_path / name)
    result.report().to_html(tmp_path / "other")
    assert (tmp_path / "other").read_text(encoding="utf-8") == (tmp_path / "r.html").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text(encoding="utf-8"))))
    assert sum(int(row["own_flops_kept"]) for row in rows) == result.flops_after


def test_a_saved_result_says_what_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    name = "recipe:scalenet-small-seed"
    options = ["--criterion", "magnitude", "-o", "s.safetensors", "--json"]
    assert main(["allocate", name, "--flops", "60%", *options]) == 0
    before = json.loads(capsys.readouterr().out)
    jsonschema.validate(before, schema("allocate"))
    assert main(["report", "s.safetensors", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    jsonschema.validate(facts, schema())
    assert facts["flops"] == before["flops"]["after"]
    known = {(b["name"], r["name"]): r for b in before["blocks"] for r in b["branches"]}
    for block in facts["blocks"]:
        for branch in block["branches"]:
            row = known[block["name"], branch["name"]]
            assert (branch["before"], branch["channels"]) == (row["before"], row["after"])
    assert any(note.startswith("allocated from") for note in facts["notes"])


# ------------------------------------------------------------------------------------------ terminals and pipes


def run_command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """The command as a process with a pipe for stdout and stderr."""
    code = "import sys; from allocator.cli import main; sys.exit(main())"
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"} | variables
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, env=environment, check=False)


def test_pipes_get_no_control_characters_and_any_encoding() -> None:
    done = run_command("report", "nets:mixed", *SIZE, "--flops", "60%", "-v", PYTHONIOENCODING="ascii", NO_COLOR="1")
    assert done.returncode == 0, done.stderr
    for text in (done.stdout, done.stderr):
        assert b"\x1b" not in text
        assert b"\r" not in text
        assert b"Traceback" not in text
    assert b" s  tracing" in done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_long_stages_say_so_where_there_is_no_spinner(capsys: pytest.CaptureFixture[str]) -> None:
    import time

    args = argparse.Namespace(json=False, verbose=False, quiet=False)
    with Talk(args, patience=0.05).stage("waiting"):
        time.sleep(0.3)
    assert capsys.readouterr().err == "waiting ...\n"
    with Talk(args, patience=5).stage("quick"):
        pass
    args.quiet = True
    with Talk(args, patience=0.01).stage("silent"):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    """What takes itself for a terminal."""

    def isatty(self) -> bool:
        """As it says."""
        return True


def test_a_terminal_sees_what_is_going_on(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    args = argparse.Namespace(json=False, verbose=True, quiet=False)
    talk = Talk(args)
    with talk.stage("drawing [bold]") as update:
        update("[red]half")
        warnings.warn("of the package's own", AllocatorWarning, stacklevel=1)
        warnings.warn("of another's", UserWarning, stacklevel=1)
    talk.note("of the package's own")
    talk.times({"part": 0.5})
    shown = screen.getvalue()
    assert "drawing [bold]" in shown
    assert " s  drawing [bold]\n" in shown
    assert shown.count("note: of the package's own\n") == 1
    assert "warning: of another's\n" in shown
    assert "   0.500 s    part\n" in shown


@pytest.mark.sweep
@pytest.mark.timeout(1200)
def test_a_network_of_five_thousand_blocks(record_property: Callable[[str, object], None]) -> None:
    import resource
    import time

    start = time.perf_counter()
    done = run_command("report", "nets:many_blocks", "--input-size", "1x3x8x8", "--flops", "60%", "-o", "r.html", "-v")
    assert done.returncode == 0, done.stderr
    record_property("seconds", time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
    record_property("MiB of memory", peak)
    page = Path("r.html").read_text(encoding="utf-8")
    record_property("MB of HTML", len(page.encode()) / 1e6)
    print(
        done.stderr.decode(), f"{time.perf_counter() - start:.0f} s, {peak:.0f} MiB, {len(page.encode()) / 1e6:.2f} MB"
    )
    assert len(page.encode()) < 10e6
    assert peak < 3000
    data = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert len(data["blocks"]) == 5000


# ------------------------------------------------------------------------------------------ Ctrl-C

PATIENT = """
import signal, sys
from allocator.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what runs in the background ignore it
sys.exit(main())
"""
INTERRUPTED = """
import os, signal, sys
from allocator import disk
from allocator.cli import main
plain = disk.os.fsync
def interrupted(file):
    plain(file)
    assert any(name.endswith(".tmp") and os.path.getsize(name) for name in os.listdir()), "nothing was written yet"
    os.kill(os.getpid(), signal.SIGINT)
disk.os.fsync = interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
"""


@pytest.mark.parametrize(("suffix", "before"), [("html", None), ("html", "precious"), ("json", "precious")])
def test_an_interrupted_report_leaves_no_half_written_file(suffix: str, before: str | None) -> None:
    """The signal comes when all is written and nothing is in place."""
    file = Path(f"r.{suffix}")
    if before is not None:
        file.write_text(before)
    command = ["report", "nets:mixed", *SIZE, "-o", str(file), *(["--force"] if before else [])]
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, *command], capture_output=True, check=False)
    assert done.returncode == 130, done.stderr
    assert b"interrupted; unfinished files were removed" in done.stderr
    assert b"Traceback" not in done.stderr
    assert (file.read_text() if file.exists() else None) == before
    assert {name for name in os.listdir() if name != "__pycache__"} == {"nets.py", *([file.name] if before else [])}


def test_a_report_interrupted_while_it_works_writes_nothing() -> None:
    command = [
        sys.executable,
        "-c",
        PATIENT,
        "report",
        "nets:many_blocks",
        "--input-size",
        "1x3x8x8",
        "-o",
        "r.html",
        "-v",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        while b"building" not in process.stderr.readline():  # the line that says how long it took: tracing begins
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert b"interrupted" in said
    assert not [name for name in os.listdir() if name.startswith((".", "r."))]


# ------------------------------------------------------------------------------------------ compare


def allocations() -> None:
    """Write a.json and b.json: two policies at one budget."""
    for name, policy in (("a.json", "per_block"), ("b.json", "uniform")):
        allocator.allocate(mixed(), "60%", example_inputs=IMAGE, policy=policy).allocation.save(name)


def test_compare_gives_each_side_and_the_difference(capsys: pytest.CaptureFixture[str]) -> None:
    allocations()
    assert main(["compare", "a.json", "b.json", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    jsonschema.validate(facts, schema("compare"))
    sides = [allocator.Allocation.load(name) for name in ("a.json", "b.json")]
    assert [facts["a"]["flops"], facts["b"]["flops"]] == [side.flops_after for side in sides]
    assert facts["flops_difference"] == sides[1].flops_after - sides[0].flops_after
    for row in facts["branches"]:
        known = []
        for side in sides:
            (block,) = [block for block in side.blocks if block["name"] == row["block"]]
            known.append(sum(r["after"] for r in block["branches"] if row["branch"] in (r["name"], "groups")))
        assert [row["a"], row["b"], row["difference"]] == [*known, known[1] - known[0]]
    assert {row["block"] for row in facts["branches"]} == {"model", "grouped.0", "model#2"}


def test_compare_a_model_with_what_is_left_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    allocations()
    assert main(["compare", "nets:mixed", "a.json", *SIZE, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    kept = allocator.Allocation.load("a.json").blocks[0]["branches"]
    assert [(r["branch"], int(r["a"]), int(r["b"])) for r in rows if r["block"] == "model"] == [
        (r["name"], r["before"], r["after"]) for r in kept
    ]
    assert main(["compare", "a.json", "a.json"]) == 0
    said = capsys.readouterr().out
    assert "B has +0 FLOPs, 100.0% of A's" in said
    assert "3 blocks alike, not shown" in said
    assert main(["compare", "a.json", "a.json", "--all"]) == 0
    assert "coarse.0" in capsys.readouterr().out


def test_compare_writes_files_and_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    allocations()
    assert main(["compare", "a.json", "b.json", "-o", "c.md", "--plot", "c.svg"]) == 0
    assert Path("c.md").read_text().startswith("# a.json and b.json")
    assert "b.json" in Path("c.svg").read_text()
    assert main(["compare", "a.json", "b.json", "-o", "c.html"]) == 0
    assert Path("c.html").read_text().startswith("<!doctype html>")
    assert main(["compare", "a.json", "b.json", "-o", "c.md"]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["compare", "a.json", "b.json", "-o", "c.cvs"]) == 2
    assert "did you mean .csv" in capsys.readouterr().err
    assert main(["compare", "absent.json", "b.json"]) == 1
    assert "there is no file absent.json" in capsys.readouterr().err
