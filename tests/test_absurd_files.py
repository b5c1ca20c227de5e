"""Files, paths and disks that nobody would make on purpose: one of this package's errors, and nothing breaks."""

from __future__ import annotations

import contextlib
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import allocator
from allocator.cli import main, make_parser
from allocator.cli.data import data_options
from allocator.disk import write_text
from allocator.errors import AllocationMismatchError, AllocatorError, FileError, InputError, UnsafeFileError
from allocator.io.files import load_allocation, load_model, save_model
from allocator.io.results import save_result
from allocator.recipes.configuration import load_config
from allocator.recipes.residual import Widths
from allocator.recipes.scalenet import read_rows, write_rows
from allocator.rewriting.allocation import Allocation

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
IMAGE = torch.zeros(1, 3, 8, 8)


def _net(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 2, 1)).eval()


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _write(folder: Path, changes: dict[str, Any]) -> Path:
    (folder / "a.json").write_text(json.dumps(Allocation().to_dict() | changes))
    return folder / "a.json"


# ------------------------------------------------------------------------------------------ allocations

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "changes",
    [
        {"costs": {"flops": {"asked": NAN}}},
        {"costs": {"flops": {"asked": INF}}},
        {"costs": {"flops": {"asked": 10**400}}},
        {"attributes": {"0": {"out_channels": NAN}}},
        {"kept": {"0.weight": [[NAN], None, None, None]}},
        {"kept": {"0.weight": [[True], None, None, None]}},
        {"blocks": [{"name": NAN, "kind": "sum", "branches": []}]},
        {"unknown": [1, 2, -INF]},
        {"costs": {"flops": {"asked": NAN}}, "digest": "0" * 16},
        {"format": 1, "costs": {}, "flops_asked": NAN},
        {"format": True},
        {"format": NAN},
        {"input_shapes": [[1, 3, 10**30]]},
        {"input_shapes": [[-1]]},
        {"input_shapes": [[[1]]]},
        {"absent": [""]},
        {"blocks": [1, 2]},
        {"blocks": [{"name": "b", "kind": "sum", "branches": [1]}]},
        {"blocks": [{"name": "b", "kind": "sum", "branches": [{"name": "x", "before": 1}]}]},
        {"blocks": [{"name": "b", "kind": "sum", "branches": [{"name": "x", "before": 1, "after": "many"}]}]},
        {"blocks": [{"branches": 3}]},
        {"parts": [1]},
        {"parts": [{"kept": {"0.weight": 1}, "format": 5}]},
        {"added": {"init": "copy", "seed": -1, "reads": {}}},
        {"added": {"init": "copy", "seed": 2**63, "reads": {}}},
    ],
)
def test_allocations_that_mean_nothing_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(FileError, match=r"a\.json: the allocation"):
        load_allocation(_write(tmp_path, changes))


def test_a_key_that_comes_twice_is_told(tmp_path: Path) -> None:
    """Of two, readers of JSON forget the first."""
    path = _write(tmp_path, {"kept": {"0.weight": [[0], None, None, None]}})
    for text in (path.read_text()[:-1] + ', "kept": {}}', path.read_text().replace('"0.weight"', '"x": 1, "x"')):
        path.write_text(text)
        with pytest.raises(FileError, match=r"a\.json: this is not JSON: the key '(kept|x)' comes twice"):
            load_allocation(path)


@pytest.mark.parametrize("name", ["_parameters", "_modules", "training"])
def test_what_torch_keeps_in_a_module_is_not_set(name: str) -> None:
    with pytest.raises(AllocationMismatchError, match=f"sets .{name} to"):
        allocator.apply(_net(), Allocation(attributes={"": {name: {}}}))


@pytest.mark.parametrize("kept", [[2, 1, 0], [0, 2, 1], [0, 0]])
def test_indices_ascend(kept: list[int]) -> None:
    with pytest.raises(AllocationMismatchError, match=r"0\.weight: .*(indices are not in asc|adds indices)"):
        allocator.apply(_net(), Allocation(kept={"0.weight": [kept, None, None, None]}))


def test_inputs_without_end_are_not_made() -> None:
    """Of what a file says, without a try: some of the memory that a wrong number asks for may be there."""
    layer = nn.Linear(2, 2)
    layer.in_features = 10**12
    with pytest.raises(InputError, match="an input of 1x1000000000000, from the first linear layer, has more than"):
        allocator.trace(layer)
    with pytest.raises(InputError, match="from the allocation, has more than"):
        allocator.verify(_net(), _net(), Allocation(input_shapes=[[10**6, 3, 10**5, 10**5]]))


@pytest.mark.parametrize("depth", [50, 400, 900])
@pytest.mark.parametrize("key", ["kept", "attributes", "blocks", "parts", "unknown"])
@pytest.mark.parametrize("digest", [{}, {"digest": "0" * 16}])
def test_lists_within_lists_are_refused(tmp_path: Path, depth: int, key: str, digest: dict[str, Any]) -> None:
    """Python reads them, and runs out of stack where they are copied or written again."""
    deep = {"0": [_nested(depth)]} if key in ("kept", "attributes") else [_nested(depth)]
    with pytest.raises(FileError, match="levels deep"):
        load_allocation(_write(tmp_path, {key: deep} | digest))


def test_a_long_text_among_indices_takes_no_more_than_itself(tmp_path: Path) -> None:
    """numpy would give each of the 50,000 entries the room of the longest: 20 GB."""
    with pytest.raises(FileError, match="not a list of index lists"):
        load_allocation(_write(tmp_path, {"kept": {"0.weight": [["x" * 100_000, *[""] * 50_000]]}}))


def test_numbers_beyond_floats_are_told(tmp_path: Path) -> None:
    path = _write(tmp_path, {"costs": {"flops": {"asked": 777}}})
    path.write_text(path.read_text().replace("777", "1e999"))
    with pytest.raises(FileError, match=r"holds inf, a number"):
        load_allocation(path)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\0", b"\xef\xbb\xbf{}", b"[" + b"1" * 5000 + b"]", b"null", b"[]", b"{}"]
)
def test_what_is_no_allocation_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FileError, match=r"a\.json"):
        load_allocation(tmp_path / "a.json")


def test_what_is_read_can_be_written_again(tmp_path: Path) -> None:
    blocks = [{"name": "b", "kind": "sum", "branches": [{"name": "x", "before": 3, "after": 2, "kernel": [3, 3]}]}]
    rich = {
        "kept": {"0.weight": [[0, 2], None, None, None], "1.weight": [None, [[0], [1]], [], None]},
        "attributes": {"0": {"sizes": [1, [2, 3]], "bias": None}},
        "blocks": blocks,
        "costs": {"flops": {"asked": 1.5, "before": None, "after": 3}},
        "input_shapes": [[1, 3, 8, 8], []],
    }
    allocation = load_allocation(_write(tmp_path, rich))
    allocation.save(tmp_path / "b.json")
    assert load_allocation(tmp_path / "b.json") == allocation
    assert allocation.kept["1.weight"] == [None, [[0], [1]], [], None]


@pytest.mark.parametrize(
    "second",
    [
        {"0.weight": [[0]]},
        {"0.weight": [[-1], None, None, None]},
        {"0.weight": [[7], None, None, None]},
        {"1.weight": [None, [[0], [0], [0]], None, None]},
        {"1.weight": [[9], [[0]], None, None]},
    ],
)
def test_allocations_that_do_not_follow_each_other_are_told(second: dict[str, Any]) -> None:
    first = Allocation(kept={"0.weight": [[1, 3], None, None, None], "1.weight": [None, [[0], [1]], None, None]})
    with pytest.raises(AllocationMismatchError, match=r"[01]\.weight"):
        first.compose(Allocation(kept=second))


# ------------------------------------------------------------------------------------------ paths

NO_PATHS = {"NUL": "a\0b", "long": "x" * 300, "deep": "d/" * 3000 + "x", "half character": "\ud800"}
no_path = pytest.mark.parametrize("name", NO_PATHS.values(), ids=list(NO_PATHS))


@no_path
@pytest.mark.parametrize("suffix", [".pt", ".json", ".safetensors", ".pt2", ".onnx"])
def test_reading_what_cannot_be_a_path(name: str, suffix: str) -> None:
    for read in (load_model, load_allocation, allocator.load, Allocation.load):
        with pytest.raises(FileError):
            read(name + suffix)


@no_path
@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".pt", lambda path: save_model(_net(), path)),
        (".json", lambda path: Allocation().save(path)),
        (".safetensors", lambda path: save_result((_net(), Allocation()), path)),
        (".pt2", lambda path: allocator.export(_net(), path, example_inputs=IMAGE)),
    ],
)
def test_writing_to_what_cannot_be_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str, write: Callable[[str], Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match="cannot write"):
        write(name + suffix)
    assert list(tmp_path.iterdir()) == []


@no_path
def test_the_shell_says_in_a_sentence_what_cannot_be_a_path(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    report, small = ["report", "recipe:scalenet-small"], ["allocate", "recipe:scalenet-small", "--flops", "50%"]
    lines = (
        [*report, "--plot", f"{name}.svg"],
        [*report, "-o", f"{name}.html"],
        [*small, "-o", f"{name}.pt"],
        [*small, "--data", name],
        ["train", name],
        ["train", f"{name}.yaml"],
    )
    for line in lines:
        assert main(line) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"allocator-cli {line[0]}: ")
        assert "unexpected" not in said


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _terabyte(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_pipe, "is a device, a pipe or a socket, not a file"),
        (_zeros, "is a device, a pipe or a socket, not a file"),
        (
            _terabyte,
            "is 1,099,511,627,776 bytes, more than the 1,073,741,824 that|damaged|neither|oldest .* format",
        ),
    ],
)
def test_what_never_ends_is_not_read(tmp_path: Path, make: Callable[[Path], None], said: str) -> None:
    reads: dict[str, list[Callable[[Path], Any]]] = {
        ".json": [load_allocation, Allocation.load, read_rows, Widths.load],
        ".yaml": [load_config],
        ".npy": [lambda path: _data(str(path))],
        ".pt": [load_model],
        ".safetensors": [load_model, allocator.load],
    }
    for suffix, functions in reads.items():
        path = tmp_path / f"a{suffix}"
        make(path)
        for read in functions:
            with pytest.raises(FileError, match=said):
                read(path)


def _data(path: str) -> Any:
    args = make_parser().parse_args(["report", "m.pt", "--data", path])
    return data_options(args, _net())


def test_a_tensor_of_one_number_is_no_data(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.float32(3))
    with pytest.raises(FileError, match=r"a\.npy holds a number, not a tensor of inputs"):
        _data(str(tmp_path / "a.npy"))


@pytest.mark.parametrize("read", [read_rows, Widths.load])
def test_widths_within_widths_are_refused(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(FileError, match=r"a\.json: not a readable"):
        read(tmp_path / "a.json")


def test_a_folder_that_cannot_be_made_is_told_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("precious")
    line = ["sweep", "recipe:scalenet-small", "--flops", "80%", "50%", "--allocations"]
    for folder in (tmp_path / "file" / "in it", tmp_path / "file", tmp_path / ("x" * 300)):
        assert main([*line, str(folder)]) == 1
        assert capsys.readouterr().err.startswith("allocator-cli sweep: cannot make the folder ")
    assert main([*line, str(tmp_path / "made" / "here")]) == 0
    assert sorted(path.name for path in (tmp_path / "made" / "here").iterdir()) == ["1.json", "2.json"]
    capsys.readouterr()
    assert main([*line, str(tmp_path / "made" / "here")]) == 1
    assert "1.json exists; use --force" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x" * 252 + ".pt", "é" * 125 + ".pt"])
def test_names_as_long_as_the_file_system_allows_are_written(tmp_path: Path, name: str) -> None:
    save_model(_net(), tmp_path / name)
    assert isinstance(load_model(tmp_path / name), nn.Sequential)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_way_through_a_folder_that_is_absent_leads_nowhere(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no folder"):
        allocator.export(_net(), f"{tmp_path}/absent/../m.pt2", example_inputs=IMAGE)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written_to_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the system says, because whoever runs the tests may be allowed everything."""
    save_model(_net(), tmp_path / "m.pt")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(FileError, match="no permission to write in"):
        save_model(_net(), tmp_path / "n.pt")
    with pytest.raises(FileError, match="no permission to read"):
        load_model(tmp_path / "m.pt")


def test_text_that_is_no_unicode_is_written(tmp_path: Path) -> None:
    """Reports hold names of files, which need not be text."""
    write_text(tmp_path / "r.md", "a \udcff b")
    assert (tmp_path / "r.md").read_text(encoding="utf-8") == "a \\udcff b"


# ------------------------------------------------------------------------------------------ full disks


@contextlib.contextmanager
def _full_disk() -> Iterator[None]:
    """No file grows beyond 20 kB: writers meet what they meet on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WIDE = _net(1000)
LONG = Allocation(absent=["x" * 50_000])


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("m.pt", lambda path: save_model(WIDE, path)),
        ("m.json", LONG.save),
        ("m.safetensors", lambda path: save_result((WIDE, Allocation()), path)),
        ("m.pt2", lambda path: allocator.export(WIDE, path, example_inputs=IMAGE)),
        ("m.onnx", lambda path: allocator.export(WIDE, path, example_inputs=IMAGE)),
        ("rows.json", lambda path: write_rows(path, [[1, 2, 4, 7, 32]] * 2_000)),
        ("widths.json", lambda path: Widths([[1] * 10_000], [1], 1).save(path)),
    ],
)
def test_a_full_disk_leaves_the_old_file_whatever_is_written(
    tmp_path: Path, name: str, write: Callable[[Path], Any]
) -> None:
    if name.endswith(".onnx"):
        pytest.importorskip("onnxscript")
    (tmp_path / name).write_text("precious")
    with _full_disk(), pytest.raises(FileError, match=rf"cannot write .*{name}: .*(too large|disk full)"):
        write(tmp_path / name)
    assert (tmp_path / name).read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == [name]


# ------------------------------------------------------------------------------------------ results


def _result(path: Path, **changes: str) -> None:
    metadata = {
        "format": "neuron-allocator",
        "format_version": "1",
        "allocation": json.dumps(Allocation().to_dict()),
        "build": json.dumps({"name": "torchvision:resnet18", "kwargs": {}}),
        "aliases": "{}",
        "training": "false",
        "versions": "{}",
    }
    save_file({"w": torch.zeros(1)}, path, metadata=metadata | changes)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"aliases": '{"a": [1]}'}, FileError),
        ({"aliases": '{"a": {}}'}, FileError),
        ({"aliases": '{"a": null}'}, FileError),
        ({"allocation": json.dumps(Allocation().to_dict() | {"unknown": NAN, "digest": "0"})}, FileError),
        ({"build": json.dumps({"name": "torchvision:resnet18", "kwargs": {"x": _nested(900)}})}, FileError),
        ({"build": json.dumps({"name": "torchvision:resnet18", "kwargs": {"num_classes": NAN}})}, FileError),
        ({"build": json.dumps({"name": "torchvision:res\0net", "kwargs": {}})}, UnsafeFileError),
        ({"program": json.dumps({"steps": _nested(900)})}, FileError),
        ({"program": "{}"}, FileError),
    ],
)
def test_results_that_mean_nothing_are_refused(tmp_path: Path, changes: dict[str, str], error: type) -> None:
    _result(tmp_path / "s.safetensors", **changes)
    with pytest.raises(error):
        allocator.load(tmp_path / "s.safetensors")


def test_a_small_file_cannot_ask_for_large_layers(tmp_path: Path) -> None:
    """A network that cannot be built without values, whose classifier alone would take 2.8 GB."""
    build = {"name": "torchvision:regnet_y_32gf", "kwargs": {"num_classes": 131_072}}
    _result(tmp_path / "s.safetensors", build=json.dumps(build))
    with pytest.raises(FileError, match="numbers are far too few"):
        allocator.load(tmp_path / "s.safetensors")


# ------------------------------------------------------------------------------------------ names of models


@pytest.mark.parametrize("name", ["a\0b:c", "..a:b", ".:x", " :x", "\ud800:x", "torchvision:\0", "torch.nn:a..b"])
def test_names_that_no_model_has(name: str) -> None:
    with pytest.raises(AllocatorError):
        allocator.build(name)
