"""Files made to harm: bombs, lies about sizes, path tricks, and thousands that are merely broken."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import allocator
from allocator.cli import main
from allocator.errors import AllocatorError, FileError, UnsafeFileError
from allocator.io.files import load_allocation, load_model, save_model

Server = subprocess.Popen[str]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A process with a limit to its memory that opens files and says what happened."""
    process = fuzz._start()
    yield process
    assert process.stdin is not None
    process.stdin.close()
    process.wait(30)


def _refused(server: Server, path: Path) -> None:
    """The file is refused by a process that takes little memory for it."""
    said = fuzz._ask(server, path)
    assert said in ("FileError", "UnsafeFileError")
    assert fuzz.peak(server) < 1200  # MiB, of which the libraries take most


def _module() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


# ------------------------------------------------------------------------------------------ bombs


@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/data/0", "m/models/model.json"])
def test_zip_bombs_are_refused_unopened(server: Server, tmp_path: Path, name: str) -> None:
    """128 MiB of zeros in 600 KiB."""
    path = tmp_path / ("m.pt2" if "models" in name else "m.pt")
    other = {"archive/data.pkl": b"\x80\x02}.", "archive/version": b"3\n"}
    if "models" in name:
        other = {"m/archive_format": b"pt2"}
    with zipfile.ZipFile(path, "w") as archive:
        for each, data in other.items():
            if each != name:
                archive.writestr(each, data)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(name, "w", force_zip64=True) as entry,
    ):
        for _ in range(128):
            entry.write(bytes(2**20))
    with pytest.raises(FileError, match="unpacks to 134"):
        load_model(path)
    _refused(server, path)


def test_overlapping_entries_are_counted_each(tmp_path: Path) -> None:
    """A thousand names for one megabyte: the central directory may say so, and the sum is what counts."""
    save_model(_module(), tmp_path / "m.pt")
    data = bytearray((tmp_path / "m.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        last = archive.infolist()[-1]
    place = data.rindex(last.filename.encode()) - 46
    struct.pack_into("<I", data, place + 24, 2**31 - 1)  # its uncompressed size
    (tmp_path / "m.pt").write_bytes(data)
    with pytest.raises(FileError):
        load_model(tmp_path / "m.pt")


@pytest.mark.parametrize("kind", ["deep", "wide"])
def test_pickle_bombs_are_refused(server: Server, tmp_path: Path, kind: str) -> None:
    deep = b"\x80\x02" + b"(" * 10**5 + b"t" * 10**5 + b"."
    wide = b"\x80\x02]q\x00" + b"(h\x00h\x00ld" * 100 + b"."
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("archive/data.pkl", deep if kind == "deep" else wide)
        archive.writestr("archive/version", "3\n")
    _refused(server, tmp_path / "m.pt")


# ------------------------------------------------------------------------------------------ lies about sizes


def _raw_safetensors(path: Path, header: Any, data: bytes = b"\0" * 64) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 64]}},
        {"w": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**62]}},
        {"w": {"dtype": "F32", "shape": [-16], "data_offsets": [0, 64]}},
        {"w": {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}},
        {"w": {"dtype": "F99", "shape": [16], "data_offsets": [0, 64]}},
        {"__metadata__": {"format": 7}, "w": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}},
        {"__metadata__": [1], "w": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}},
        b"not json",
        b"{" * 10_000,
        b"\xff\xfe",
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, header: Any) -> None:
    _raw_safetensors(tmp_path / "m.safetensors", header)
    for read in (load_model, allocator.load, load_allocation):
        with pytest.raises(FileError):
            read(tmp_path / "m.safetensors")


def test_a_header_longer_than_the_file_is_refused(server: Server, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    _refused(server, tmp_path / "m.safetensors")


def test_tensors_that_claim_more_than_their_data_are_refused(server: Server, tmp_path: Path) -> None:
    model = _module()
    model[0].weight = nn.Parameter(torch.zeros(1).expand(10**5, 10**5, 3, 3), requires_grad=False)
    torch.save(model, tmp_path / "m.pt")
    _refused(server, tmp_path / "m.pt")
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "w.pt")
    _refused(server, tmp_path / "w.pt")
    with pytest.raises(FileError, match="too little data"):
        load_model(tmp_path / "w.pt")


def test_a_storage_longer_than_its_record_is_refused(server: Server, tmp_path: Path) -> None:
    """The pickle says 2**30 numbers, the record has four."""
    torch.save({"w": torch.zeros(4)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "m.pt", "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith("data.pkl"):
                assert data.count(b"K\x04") == 2  # the storage's length, and the tensor's size
                data = data.replace(b"K\x04", b"J" + struct.pack("<i", 2**30))
            new.writestr(item.filename, data)
    _refused(server, tmp_path / "m.pt")


def test_a_pickle_that_writes_into_a_tensor_is_refused(server: Server, tmp_path: Path) -> None:
    """Before torch 2.10 that went past the tensor's checks (CVE-2026-24747), as did storages too long."""
    write = pickle.BININT1 + b"\x00" + pickle.BININT1 + b"\x07" + pickle.SETITEM  # tensor[0] = 7
    torch.save({"w": torch.zeros(4)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "m.pt", "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith("data.pkl"):
                end = pickle.SETITEM + pickle.STOP
                assert data.endswith(end)
                data = data.removesuffix(end) + write + end
            new.writestr(item.filename, data)
    _refused(server, tmp_path / "m.pt")


def _result(path: Path, network: Any, **changes: str) -> None:
    metadata = {
        "format": "neuron-allocator",
        "format_version": "1",
        "allocation": json.dumps(allocator.Allocation().to_dict()),
        "build": json.dumps(network),
        "aliases": "{}",
        "training": "false",
        "versions": "{}",
    }
    save_file({"w": torch.zeros(1)}, path, metadata=metadata | changes)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("recipe:scalenet-small-seed", {"num_classes": 10**12}),
        ("recipe:scalenet-small-seed", {"blocks": [100_000, 1, 1]}),
        ("torchvision:regnet_y_400mf", {"num_classes": 10**9}),
        ("torchvision:resnet18", {"num_classes": "many"}),
        ("torchvision:resnet18", {"no_such_argument": 1}),
        ("recipe:scalenet-small-seed", {"planes": []}),
        ("recipe:scalenet-small-seed", {"image_side": -5}),
    ],
)
def test_a_file_cannot_ask_for_a_giant(tmp_path: Path, name: str, kwargs: dict[str, Any]) -> None:
    _result(tmp_path / "s.safetensors", {"name": name, "kwargs": kwargs})
    beyond = any(isinstance(value, int) and value > 10**6 for value in kwargs.values())
    with pytest.raises(AllocatorError, match="arguments beyond" if beyond else None):
        allocator.load(tmp_path / "s.safetensors")


@pytest.mark.parametrize("key", ["allocation", "build", "aliases", "training"])
@pytest.mark.parametrize("text", ["", "nonsense", "[" * 100_000, "NaN", '"\\ud800"'])
def test_metadata_that_is_not_json_is_refused(tmp_path: Path, key: str, text: str) -> None:
    _result(tmp_path / "s.safetensors", {"name": "torchvision:resnet18", "kwargs": {}}, **{key: text})
    with pytest.raises(FileError):
        allocator.load(tmp_path / "s.safetensors")


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("name", ["../../ran", "/tmp/ran", "archive/../../ran", "a\\..\\ran", "a\0b"])
def test_entries_with_paths_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    save_model(_module(), "m.pt")
    with zipfile.ZipFile("m.pt", "a") as archive:
        archive.writestr(name, "x")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with contextlib.suppress(AllocatorError):
        load_model("m.pt")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../w", "forward", "_parameters.w", "__class__", "a..b", ""])
def test_tensors_with_strange_names_do_not_reach_the_model(tmp_path: Path, name: str) -> None:
    save_file({name: torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(FileError, match="do not fit"):
        load_model(tmp_path / "w.safetensors", arch="recipe:scalenet-small")


# ------------------------------------------------------------------------------------------ code


class _Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_malice_in_every_member_of_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry of a model's file in turn replaced by a pickle that runs a command."""
    monkeypatch.chdir(tmp_path)
    save_model(_module(), "whole.pt")
    with zipfile.ZipFile("whole.pt") as archive:
        members = {item.filename: archive.read(item) for item in archive.infolist()}
    for member in members:
        with zipfile.ZipFile("m.pt", "w") as archive:
            for name, data in members.items():
                archive.writestr(name, pickle.dumps(_Runs(), 2) if name == member else data)
        with contextlib.suppress(AllocatorError):
            load_model("m.pt")
        assert not Path("ran").exists()


def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    """A scanner may read the first and a loader the second."""
    save_model(_module(), tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt", "a") as archive:
        name = next(each for each in archive.namelist() if each.endswith("data.pkl"))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr(name, pickle.dumps(_Runs(), 2))
    with pytest.raises((FileError, UnsafeFileError)):
        load_model(tmp_path / "m.pt")


def test_flipped_weights_in_an_archive_are_noticed(tmp_path: Path) -> None:
    save_model(_module(), tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        item = next(each for each in archive.infolist() if each.filename.endswith("data/0"))
        values = archive.read(item)
    data = bytearray((tmp_path / "m.pt").read_bytes())
    data[data.index(values)] ^= 1
    (tmp_path / "m.pt").write_bytes(data)
    with pytest.raises(FileError, match=r"checksum of .*data/0"):
        load_model(tmp_path / "m.pt")


# ------------------------------------------------------------------------------------------ the fuzzer


def _assert_kept(outcome: fuzz.Outcome, count: int) -> None:
    assert outcome.failures == []
    assert sum(sum(counts.values()) for counts in outcome.counts.values()) == count
    refused = sum(each for counts in outcome.counts.values() for said, each in counts.items() if said != "opened")
    assert refused > count / 2
    assert outcome.memory < 1500


def test_damaged_files_are_refused_by_name() -> None:
    _assert_kept(fuzz.fuzz(120), 120)


@pytest.mark.sweep
def test_thousands_of_damaged_files_are_refused_by_name() -> None:
    _assert_kept(fuzz.fuzz(4000, first=10_000), 4000)


@pytest.mark.parametrize("code", ["os.system('true')", "open('x', 'w')", "subprocess.run(['true'])", "os.remove('x')"])
def test_the_fuzzer_would_notice_code_that_ran(tmp_path: Path, code: str) -> None:
    script = f"import os, sys, subprocess; sys.path.insert(0, {str(fuzz.HERE)!r}); import fuzz\n"
    script += f"alarms = []; open('x', 'w').close(); fuzz._watch(alarms); {code}; print(len(alarms))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert int(done.stdout) >= 1, done.stderr


def test_the_fuzzer_would_notice_a_bare_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def one(folder: Path) -> list[Path]:
        (folder / "a.json").write_text("{}")
        return [folder / "a.json"]

    def idle() -> Server:
        return subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(fuzz, "write_subjects", one)
    monkeypatch.setattr(fuzz, "_start", idle)
    monkeypatch.setattr(fuzz, "_ask", lambda server, path: "FAILED ValueError: x")
    assert len(fuzz.fuzz(3).failures) == 3


# ------------------------------------------------------------------------------------------ the command line


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_model(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)).eval(), "m.pt")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "old.pt").write_text("precious")
    return tmp_path


ALLOCATE = ["allocate", "m.pt", "--flops", "60%", "--input-size", "1x3x8x8", "--criterion", "magnitude"]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([*ALLOCATE, "-o", "nowhere/s.pt"], 1, "there is no folder"),
        ([*ALLOCATE, "-o", "folder.pt"], 1, "is a folder"),
        ([*ALLOCATE, "-o", "old.pt"], 1, "use --force"),
        ([*ALLOCATE, "-o", "s.pt", "--allocation", "nowhere/a.json"], 1, "there is no folder"),
        ([*ALLOCATE, "-o", "/proc/s.pt"], 1, "cannot write /proc/s.pt"),
        ([*ALLOCATE, "-o", ""], 2, "must end in"),
        (["report", "folder.pt"], 1, "is a folder"),
        (["report", "."], 1, "is a folder"),
        (["report", "old.pt"], 1, "was not written by torch.save"),
        (["apply", "m.pt", "folder.pt", "-o", "s.pt"], 1, "is a folder"),
        (["apply", "m.pt", "old.pt", "-o", "s.pt"], 1, "is not an allocation"),
        (["verify", "m.pt", "folder.pt", "m.pt"], 1, "is not an allocation"),
        (["export", "m.pt", "-o", "nowhere/s.onnx"], 1, "there is no folder"),
        (["export", "m.pt", "-o", "old.pt"], 2, "no format 'pt'"),
    ],
)
def test_bad_places_end_in_one_line(
    folder: Path, arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    assert main(arguments) == status
    printed = capsys.readouterr()
    assert said in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert printed.out == ""
    assert sorted(folder.rglob("*")) == before
    assert Path("old.pt").read_text() == "precious"


@pytest.mark.parametrize("name", ["mit Leerzeichen.pt", "größe-網絡.pt", "a'b\"c.pt", "[bold]x.pt"])
def test_unusual_names_work(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "m.pt").rename(folder / f"in {name}")
    assert main(["allocate", f"in {name}", *ALLOCATE[2:], f"--output={name}", "--allocation", f"{name}.json"]) == 0
    assert f"model written to {name}" in capsys.readouterr().out.replace("\n", "")
    assert main(["verify", f"in {name}", f"./{name}", f"{name}.json"]) == 0
