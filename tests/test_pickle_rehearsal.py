"""Pickles that make much out of little: calls, hooks and objects without end are refused before torch reads them."""

from __future__ import annotations

import collections
import functools
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
from torch import nn

from allocator.errors import AllocatorError, FileError, UnsafeFileError
from allocator.io.files import load_model
from allocator.io.pickle_rehearsal import refused_calls
from allocator.io.pickles import open_pickle

PROTOCOL, LINEAR = b"\x80\x02", ("torch.nn.modules.linear", "Linear")


def _name(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def _number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _expanded(count: int) -> bytes:
    """A tensor of one number that is shown `count` times."""
    storage = b"(" + _text("storage") + _name("torch", "FloatStorage") + _text("0") + _text("cpu") + _number(1) + b"tQ"
    shape = _number(0) + _number(count) + b"\x85" + _number(0) + b"\x85"
    hooks = _name("collections", "OrderedDict") + b")R"
    return _name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + shape + b"\x89" + hooks + b"tR"


def _archive(path: Path, body: bytes, *, compression: int = zipfile.ZIP_STORED, folder: str = "archive") -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{folder}/data.pkl", PROTOCOL + body + b".")
        archive.writestr(f"{folder}/data/0", b"\0\0\0\0")
        archive.writestr(f"{folder}/byteorder", "little")
        archive.writestr(f"{folder}/version", "3\n")
    return path


LARGE = _number(20_000)
CALLS = {
    "a layer": _name(*LINEAR) + LARGE + LARGE + b"\x86R",
    "a layer in a container": _name("torch.nn.modules.container", "Sequential")
    + _name(*LINEAR)
    + LARGE
    + LARGE
    + b"\x86R\x85R",
    "a layer by way of a tensor": _name("torch._tensor", "_rebuild_from_type_v2")
    + b"("
    + _name(*LINEAR)
    + _name("torch", "Tensor")
    + LARGE
    + LARGE
    + b"\x86}tR",
    "a layer made with arguments": _name(*LINEAR) + LARGE + LARGE + b"\x86\x81",
    "bytes": _name("builtins", "bytearray") + _number(2**30) + b"\x85R",
    "bytes by their old name": _name("__builtin__", "bytearray") + _number(2**30) + b"\x85R",
    "bytes by a tensor": _name("builtins", "bytearray") + _expanded(1) + b"\x85R",
    "a tensor": _name("torch", "Tensor") + LARGE + LARGE + b"\x86R",
    "a tensor made with arguments": _name("torch", "FloatTensor") + LARGE + LARGE + b"\x86\x81",
    "a function": _name("torch", "relu") + _expanded(2**29) + b"\x85R",
    "another type": _name("torch._utils", "_rebuild_device_tensor_from_cpu_tensor")
    + b"("
    + _expanded(2**29)
    + _name("torch", "float64")
    + _text("cpu")
    + b"\x89tR",
    "a partial that is called": _name("functools", "partial") + _name(*LINEAR) + LARGE + LARGE + b"\x87R)R",
}


@pytest.mark.parametrize("body", CALLS.values(), ids=list(CALLS))
def test_calls_are_refused(tmp_path: Path, body: bytes) -> None:
    path = _archive(tmp_path / "m.pt", body)
    with pytest.raises(FileError, match=r"a call of|truncated or damaged"):
        load_model(path)


def test_torch_itself_would_make_them(tmp_path: Path) -> None:
    """What is refused is not imaginary: this one is only kept small."""
    body = _name(*LINEAR) + _number(3) + _number(5) + b"\x86R"
    path = _archive(tmp_path / "m.pt", body)
    with torch.serialization.safe_globals([nn.Linear]):
        assert torch.load(path, weights_only=True).weight.shape == (5, 3)
    with pytest.raises(UnsafeFileError, match=r"allow-list: a call of torch\.nn\.modules\.linear\.Linear\. .*--trust"):
        load_model(path)


def test_a_recurrent_layer_of_a_million_layers_is_refused(tmp_path: Path) -> None:
    """Restored from the format of old, it makes the names of all of them."""
    lstm = nn.LSTM(2, 3, num_layers=2, bidirectional=True)
    torch.save(lstm, tmp_path / "m.pt")
    assert isinstance(load_model(tmp_path / "m.pt"), nn.LSTM)
    for layers in (10**9, torch.tensor(10**9), 10.0):
        lstm.num_layers = layers  # type: ignore[assignment]
        lstm._all_weights = [[0]]  # type: ignore[list-item]
        torch.save(lstm, tmp_path / "m.pt")
        with pytest.raises(UnsafeFileError, match=r"LSTM of .* layers"):
            load_model(tmp_path / "m.pt")


def test_what_the_process_shares_is_not_changed(tmp_path: Path) -> None:
    from timm.layers.format import Format

    one = _name("timm.layers.format", "Format") + _text("NCHW") + b"\x85R"
    assert open_pickle(_archive(tmp_path / "m.pt", one)) is Format.NCHW
    changed = one + b"}" + _text("_value_") + _text("NHWC") + b"sb"
    with pytest.raises(UnsafeFileError, match=r"a change of timm\.layers\.format\.Format"):
        open_pickle(_archive(tmp_path / "m.pt", changed))
    assert Format.NCHW.value == "NCHW"


# ------------------------------------------------------------------------------------------ what modules bring along


def _giant(*_: Any) -> None:
    raise AssertionError("was called")


@pytest.mark.parametrize("place", ["state_dict", "forward", "_state_dict_pre_hooks", "_forward_hooks"])
def test_fields_that_others_call_are_refused(tmp_path: Path, place: str) -> None:
    """A partial is admitted, since layers keep such for later; whoever asks for a state_dict would call this one."""
    call = functools.partial(nn.Linear, 10**5, 10**5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    vars(model[1])[place] = {0: call} if place.endswith("_hooks") else call
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(UnsafeFileError, match=rf"1\.{place}"):
        load_model(tmp_path / "m.pt")


def test_fields_that_layers_keep_open(tmp_path: Path) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu")
    model.layer = functools.partial(nn.Linear, bias=False)  # type: ignore[assignment]
    torch.save(model, tmp_path / "m.pt")
    assert load_model(tmp_path / "m.pt").layer.func is nn.Linear  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------ objects and bytes


@pytest.fixture(scope="module")
def peak() -> Any:
    """Opens a file in a process of its own; gives what was said, and the process's most memory in MiB."""
    server = fuzz._start()

    def ask(path: Path) -> tuple[str | None, int]:
        return fuzz._ask(server, path), fuzz.peak(server)

    yield ask
    assert server.stdin is not None
    server.stdin.close()
    server.wait(30)


@pytest.mark.parametrize("piece", [b"]", b"}", b")", b"K\x01", b"(l0", b"0"])
def test_a_pickle_that_was_compressed_is_bounded(tmp_path: Path, peak: Any, piece: bytes) -> None:
    """A byte becomes a list of sixty: 15 MiB in a file of 15 KiB."""
    body = b"]" + piece * (15 * 2**20 // len(piece))
    said, memory = peak(_archive(tmp_path / "m.pt", body, compression=zipfile.ZIP_DEFLATED))
    assert said == "FileError"
    assert memory < 1200
    with pytest.raises(FileError, match="holds pickles of 15,"):
        load_model(tmp_path / "m.pt")


def test_objects_without_end_are_refused(tmp_path: Path, peak: Any) -> None:
    """Each of 300,000 modules is given the same fields, by eleven bytes that the archive compresses."""
    start = b"(" + _name("torch.nn.modules.module", "Module") + b"q\x00}q\x01"
    body = start + b"h\x00)\x81h\x01b" * 300_000 + b"t"
    said, memory = peak(_archive(tmp_path / "m.pt", body, compression=zipfile.ZIP_DEFLATED))
    assert said == "FileError"
    assert memory < 1200
    with pytest.raises(FileError, match="more objects than a file of its size"):
        load_model(tmp_path / "m.pt")


def test_modules_shared_without_end_are_refused(tmp_path: Path, peak: Any) -> None:
    """2 ** 40 of them, by their paths, in a file of a few thousand bytes."""
    model: nn.Module = nn.Linear(2, 2)
    for _ in range(40):
        model = nn.Sequential(model, model)
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(FileError, match="holds more than 1,000,000 entries, once all that it repeats is written out"):
        open_pickle(tmp_path / "m.pt")
    itself = nn.Sequential(nn.ReLU())
    itself.add_module("1", itself)
    torch.save(itself, tmp_path / "m.pt")
    with pytest.raises(FileError, match="holds what lies within itself"):
        open_pickle(tmp_path / "m.pt")


def test_lists_shared_without_end_are_looked_at_once(tmp_path: Path) -> None:
    lists: list[Any] = [torch.zeros(2)]
    for _ in range(4):
        lists = [lists] * 1_000
    torch.save({"a": lists}, tmp_path / "m.pt")
    assert len(open_pickle(tmp_path / "m.pt")["a"]) == 1_000


def test_names_in_capitals_are_the_same_names(tmp_path: Path) -> None:
    """torch finds entries in any case; of two it might open the one that was not looked at."""
    path = _archive(tmp_path / "m.pt", b"}")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/DATA.PKL", PROTOCOL + CALLS["a layer"] + b".")
    with pytest.raises(FileError):
        load_model(path)
    assert open_pickle(_archive(tmp_path / "n.pt", b"}", folder="ARCHIVE")) == {}


def test_instructions_that_take_room_are_refused_everywhere(tmp_path: Path, peak: Any) -> None:
    """A byte array of 8 GiB, by the instruction that allots it before it is read."""
    huge = b"\x80\x05\x96" + struct.pack("<Q", 2**33)
    torch.jit.script(nn.ReLU()).save(tmp_path / "whole.ts")
    with zipfile.ZipFile(tmp_path / "whole.ts") as old, zipfile.ZipFile(tmp_path / "m.ts", "w") as new:
        for item in old.infolist():
            new.writestr(item.filename, huge if item.filename.endswith("data.pkl") else old.read(item))
    _archive(tmp_path / "m.pt", huge)
    (tmp_path / "bare.pt").write_bytes(huge)
    for name in ("m.ts", "m.pt", "bare.pt"):
        said, memory = peak(tmp_path / name)
        assert said in ("FileError", "UnsafeFileError")
        assert memory < 1200


@pytest.mark.skipif(torch.__version__ < "2.8", reason="reads programs of torch 2.8 and later")
def test_a_pickled_tensor_of_a_program_is_rehearsed_too(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), tmp_path / "whole.pt2")
    pickled = _archive(tmp_path / "pickled.pt", CALLS["bytes"]).read_bytes()
    with zipfile.ZipFile(tmp_path / "whole.pt2") as old, zipfile.ZipFile(tmp_path / "m.pt2", "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith("weights_config.json"):
                said = json.loads(data)
                for entry in said["config"].values():
                    entry["use_pickle"] = True
                data = json.dumps(said).encode()
            new.writestr(item.filename, pickled if "weights/weight_" in item.filename else data)
    with pytest.raises(UnsafeFileError, match=r"pickle asks for a call of builtins\.bytearray"):
        load_model(tmp_path / "m.pt2")


# ------------------------------------------------------------------------------------------ what is written by torch


def _tagged(tensor: Any) -> Any:
    tensor.tag = "with an attribute of its own"
    return tensor


THINGS: dict[str, Any] = {
    "array of bytes": bytearray(b"abc"),
    "bytes": b"xyz",
    "counter": collections.Counter("aab"),
    "complex": 1j,
    "device": torch.device("cpu"),
    "dtype": torch.float16,
    "empty": [bytearray(), (), {}, set()],
    "large": 10**30,
    "ordered": collections.OrderedDict(a=1),
    "parameter": nn.Parameter(torch.zeros(2)),
    "set": {1, 2},
    "size": torch.Size([1]),
    "sparse": torch.eye(3).to_sparse(),
    "tagged": _tagged(torch.zeros(2)),
    "tagged parameter": _tagged(nn.Parameter(torch.zeros(2))),
    "half": torch.zeros(2, dtype=torch.bfloat16),
    "unsigned": torch.zeros(2).to(torch.uint16),
    "quantised": torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    "without values": torch.zeros(3, device="meta"),
}


@pytest.mark.parametrize("thing", THINGS.values(), ids=list(THINGS))
def test_what_torch_saves_opens(tmp_path: Path, thing: Any) -> None:
    torch.save({"thing": thing, "w": torch.zeros(1)}, tmp_path / "m.pt")
    assert type(open_pickle(tmp_path / "m.pt")["thing"]) is type(thing)


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_of_a_training_open(tmp_path: Path, zipped: bool) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.zeros(1, 2)).sum().backward()
    optimizer.step()
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(checkpoint, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    assert open_pickle(tmp_path / "m.pt")["epoch"] == 3


def test_a_damaged_pickle_of_old_is_told(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(4)}, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "m.pt").read_bytes()
    place = whole.index(b"_rebuild_tensor_v2")
    (tmp_path / "m.pt").write_bytes(whole[:place] + b"_rebuild_tensor_v9" + whole[place + 18 :])
    with pytest.raises(AllocatorError):
        load_model(tmp_path / "m.pt")


def test_nothing_real_takes_part() -> None:
    """Whatever a pickle names, nothing is imported or called for it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Ran(), 2))
    assert refused_calls(stream) == [f"a call of {__name__}._giant"]


def test_a_storage_is_as_long_as_its_record_whatever_torch_says() -> None:
    """Before torch 2.10 one that says to be longer was read past its end."""
    whole, longer = io.BytesIO(), io.BytesIO()
    torch.save({"w": torch.zeros(4)}, whole)
    assert refused_calls(whole) == []
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(longer, "w") as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item).replace(b"K\x04", b"K\x05"))
    with pytest.raises(FileError, match="storage '0' says to be longer than its data"):
        refused_calls(longer)


class _Ran:
    def __reduce__(self) -> Any:
        return _giant, ()
