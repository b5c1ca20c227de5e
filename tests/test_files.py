"""Reading and writing models: what opens, what is refused, and that nothing in a file runs."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from allocator.disk import write_atomically
from allocator.errors import FileError, UnsafeFileError, UnsupportedModelError
from allocator.io.files import load_allocation, load_model, save_model
from allocator.io.models import build
from allocator.io.pickles import globals_in, open_pickle
from allocator.io.programs.program import Program


def _tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


class Homemade(nn.Module):
    """A module class that no library knows."""


# ------------------------------------------------------------------------------------------ what opens


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_a_pickled_module_comes_back(tmp_path: Path, suffix: str) -> None:
    model = _net()
    save_model(model, tmp_path / f"m{suffix}")
    loaded = load_model(tmp_path / f"m{suffix}")
    image = torch.randn(1, 3, 8, 8)
    assert torch.equal(model.eval()(image), loaded.eval()(image))


@pytest.mark.parametrize(
    "name",
    [
        "torchvision:resnet18",
        "torchvision:densenet121",
        "torchvision:googlenet",
        "torchvision:vit_b_16",
        "torchvision:mobilenet_v3_small",
        "torchvision:shufflenet_v2_x0_5",
        "torchvision:efficientnet_b0",
        "torchvision:fasterrcnn_mobilenet_v3_large_fpn",
        "timm:res2net50_26w_4s",
        "timm:skresnet18",
        "timm:vit_tiny_patch16_224",
        "timm:hrnet_w18_small",
        "timm:efficientnet_b0",
    ],
)
def test_library_models_open_without_trust(tmp_path: Path, name: str) -> None:
    with torch.device("meta"):
        model = build(name)
    torch.save(model, tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt")
    assert type(loaded) is type(model)
    assert [key for key, _ in loaded.named_parameters()] == [key for key, _ in model.named_parameters()]


def test_weights_in_the_older_format_open_and_modules_need_trust(tmp_path: Path) -> None:
    model = build("torchvision:squeezenet1_1")
    torch.save(model.state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    loaded = load_model(tmp_path / "w.pt", arch="torchvision:squeezenet1_1")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))
    torch.save(model, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeFileError, match=r"before version 1\.6"):
        load_model(tmp_path / "m.pt")
    assert type(load_model(tmp_path / "m.pt", trust=True)) is type(model)


def test_activation_functions_and_partials_open(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu")
    save_model(layer, tmp_path / "m.pt")
    assert load_model(tmp_path / "m.pt").activation is layer.activation


def test_a_module_in_a_checkpoint_and_in_data_parallel_is_unwrapped(tmp_path: Path) -> None:
    torch.save({"model": nn.DataParallel(_net()), "epoch": 3}, tmp_path / "m.pt")
    assert isinstance(load_model(tmp_path / "m.pt"), nn.Sequential)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 2},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    ],
    ids=["plain", "checkpoint", "data-parallel"],
)
def test_weights_alone_need_their_architecture(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    model = build("torchvision:squeezenet1_1", num_classes=1000)
    torch.save(wrap(model.state_dict()), tmp_path / "w.pth")
    with pytest.raises(FileError, match=r"weights alone .*--arch"):
        load_model(tmp_path / "w.pth")
    loaded = load_model(tmp_path / "w.pth", arch="torchvision:squeezenet1_1")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    torch.save(_net().state_dict(), tmp_path / "w.pth")
    with pytest.raises(FileError, match="do not fit torchvision:resnet18"):
        load_model(tmp_path / "w.pth", arch="torchvision:resnet18")


# ------------------------------------------------------------------------------------------ what never runs


class _Runs:
    """Unpickles by calling something."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def _os_system(marker: Path) -> Any:
    return _Runs(os.system, f"touch {marker}")


def _eval(marker: Path) -> Any:
    return _Runs(eval, f"open({str(marker)!r}, 'w')")


def _nested_in_a_module(marker: Path) -> Any:
    model = _net()
    model.hidden = {"deep": [_os_system(marker)]}  # type: ignore[assignment]
    return model


def _in_a_state_dict(marker: Path) -> Any:
    return {"weight": torch.zeros(2), "extra": _os_system(marker)}


def _through_a_library(marker: Path) -> Any:
    return _Runs(torch.save, torch.zeros(1), str(marker))


def _through_torch_hub(marker: Path) -> Any:
    return _Runs(torch.hub.load, str(marker.parent), "touch", "source=local")


ATTACKS = [_os_system, _eval, _nested_in_a_module, _in_a_state_dict, _through_a_library, _through_torch_hub]


def _as_zip(thing: Any, path: Path) -> None:
    torch.save(thing, path)


def _as_legacy(thing: Any, path: Path) -> None:
    torch.save(thing, path, _use_new_zipfile_serialization=False)


def _as_plain_pickle(thing: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(thing))


@pytest.mark.parametrize("write", [_as_zip, _as_legacy, _as_plain_pickle])
@pytest.mark.parametrize("attack", ATTACKS)
def test_malicious_pickles_do_not_run(
    tmp_path: Path, attack: Callable[[Path], Any], write: Callable[[Any, Path], None]
) -> None:
    marker = tmp_path / "ran"
    file = tmp_path / "m.pt"
    write(attack(marker), file)
    with pytest.raises(UnsafeFileError, match="--trust"):
        load_model(file)
    with pytest.raises(UnsafeFileError):
        load_model(file, arch="torchvision:squeezenet1_1")
    assert not marker.exists()


def test_the_attacks_would_run_if_let(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    _as_zip(_os_system(marker), tmp_path / "m.pt")
    with pytest.raises(FileError, match="not a model"):
        load_model(tmp_path / "m.pt", trust=True)
    assert marker.exists()


def test_the_message_names_what_was_asked_for(tmp_path: Path) -> None:
    _as_zip(_os_system(tmp_path / "ran"), tmp_path / "m.pt")
    with pytest.raises(UnsafeFileError, match=r"(posix|nt)\.system"):
        load_model(tmp_path / "m.pt")


def test_own_module_classes_need_trust(tmp_path: Path) -> None:
    save_model(Homemade(), tmp_path / "m.pt")
    with pytest.raises(UnsafeFileError, match="Homemade"):
        load_model(tmp_path / "m.pt")
    assert isinstance(load_model(tmp_path / "m.pt", trust=True), Homemade)


def _pickle_of_global(module: str, name: str) -> bytes:
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"."


def _write_zip_pickle(path: Path, payload: bytes) -> None:
    """A file as torch.save lays it out, around a hand-made pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torchvision.models", "get_model"),  # a function of a trusted package
        ("timm.models", "create_model"),
        ("timm.models._helpers", "load_checkpoint"),
        ("torch.nn.modules.module", "register_module_forward_hook"),
        ("torch.nn.modules.module", "torch"),  # a module seen through another
        ("torchvision.models.feature_extraction", "DualGraphModule"),  # compiles text
        ("torchvision.models._api", "importlib"),
        ("timm.models._features_fx", "FeatureGraphNet"),
        ("torch.fx.graph_module", "reduce_graph_module"),
        ("torch.jit._script", "RecursiveScriptModule"),
        ("allocator.build", "build"),
        ("builtins", "getattr"),
        ("importlib", "import_module"),
    ],
)
def test_functions_and_code_makers_of_trusted_packages_are_refused(tmp_path: Path, module: str, name: str) -> None:
    _write_zip_pickle(tmp_path / "m.pt", _pickle_of_global(module, name))
    with pytest.raises(UnsafeFileError):
        open_pickle(tmp_path / "m.pt")
    _as_plain = tmp_path / "plain.pt"
    _as_plain.write_bytes(_pickle_of_global(module, name))
    with pytest.raises(UnsafeFileError):
        open_pickle(_as_plain)


def test_no_module_outside_the_trusted_packages_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    _write_zip_pickle(tmp_path / "m.pt", _pickle_of_global("evil_module", "Net"))
    with pytest.raises(UnsafeFileError, match=r"evil_module\.Net"):
        load_model(tmp_path / "m.pt")
    assert not (tmp_path / "ran").exists()


def test_names_hidden_by_newer_pickle_instructions_are_refused(tmp_path: Path) -> None:
    _write_zip_pickle(tmp_path / "m.pt", pickle.dumps(_os_system(tmp_path / "ran"), protocol=4))
    with pytest.raises(UnsafeFileError):
        load_model(tmp_path / "m.pt")
    assert not (tmp_path / "ran").exists()


def test_the_oldest_tar_format_is_refused(tmp_path: Path) -> None:
    marker, file = tmp_path / "ran", tmp_path / "m.pt"
    with tarfile.open(file, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            payload = pickle.dumps(_os_system(marker), protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(payload)
            archive.addfile(entry, io.BytesIO(payload))
    with pytest.raises(UnsafeFileError, match="oldest"):
        load_model(file)
    assert not marker.exists()


def test_a_pickle_dressed_as_torchscript_is_refused(tmp_path: Path) -> None:
    marker, file = tmp_path / "ran", tmp_path / "m.pt"
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("data.pkl", "constants.pkl"):
            archive.writestr(f"archive/{name}", pickle.dumps(_os_system(marker), protocol=2))
        archive.writestr("archive/version", "3\n")
    with pytest.raises(UnsafeFileError, match="system"):
        load_model(file)
    assert not marker.exists()


def test_the_scan_lists_what_a_module_needs(tmp_path: Path) -> None:
    expected = ["BatchNorm2d", "Conv2d", "ReLU", "Sequential"]
    for zipped in (True, False):
        torch.save(_net(), tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
        assert sorted(name.rpartition(".")[2] for name in globals_in(tmp_path / "m.pt")) == expected


# ------------------------------------------------------------------------------------------ what is no model


def test_torchscript_is_no_pickle(tmp_path: Path) -> None:
    torch.jit.trace(_net().eval(), torch.zeros(1, 3, 8, 8)).save(tmp_path / "m.pt")
    for trust in (False, True):
        assert isinstance(load_model(tmp_path / "m.pt", trust=trust), Program)


def test_exported_programs_of_old_say_what_to_do(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt2", "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
    with pytest.raises(UnsupportedModelError, match=r"before torch 2\.8.*Python model"):
        load_model(tmp_path / "m.pt2")


def test_onnx_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\x08\x07")
    with pytest.raises(UnsupportedModelError, match="ONNX"):
        load_model(tmp_path / "m.onnx")


def test_missing_folder_empty_and_unknown_files(tmp_path: Path) -> None:
    (tmp_path / "empty.pt").touch()
    (tmp_path / "m.txt").write_text("hello")
    for name, said in [
        ("absent.pt", "there is no file"),
        (".", "is a folder"),
        ("empty.pt", "is empty"),
        ("m.txt", r"unknown kind of file '\.txt'"),
    ]:
        with pytest.raises(FileError, match=said):
            load_model(tmp_path / name)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files_are_said_to_be_so(tmp_path: Path, share: float, zipped: bool) -> None:
    state = build("torchvision:squeezenet1_1").state_dict()
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "m.pt").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(FileError, match="truncated or damaged") as caught:
        load_model(tmp_path / "m.pt", arch="torchvision:squeezenet1_1")
    assert not isinstance(caught.value, UnsafeFileError)


@pytest.mark.parametrize("content", [b"just some text", b"PK\x03\x04 no zip", b"\x80\x02", struct.pack("<d", 1.5)])
def test_files_that_hold_something_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(FileError):
        load_model(tmp_path / "m.pt")


@pytest.mark.parametrize("thing", [[1, 2, 3], "text", {"a": 1}, torch.zeros(3), {}])
def test_other_objects_are_not_models(tmp_path: Path, thing: Any) -> None:
    torch.save(thing, tmp_path / "m.pt")
    with pytest.raises(FileError, match="not a model"):
        load_model(tmp_path / "m.pt")


def test_code_that_is_not_here_is_named(tmp_path: Path) -> None:
    _write_zip_pickle(tmp_path / "m.pt", _pickle_of_global("a_package_nobody_has", "Net"))
    with pytest.raises(FileError, match="a_package_nobody_has"):
        load_model(tmp_path / "m.pt", trust=True)


def test_allocation_files_of_the_wrong_kind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("{}")
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text("{")
    for name in ("a.txt", "a.json", "b.json", "absent.json"):
        with pytest.raises(FileError):
            load_allocation(tmp_path / name)


# ------------------------------------------------------------------------------------------ writing


def _write_and_raise(file: Path, error: type[BaseException]) -> None:
    with write_atomically(file) as temporary:
        temporary.write_text("half")
        raise error


def _write_to_a_full_disk(file: Path) -> None:
    with write_atomically(file) as temporary:
        temporary.unlink()
        temporary.symlink_to("/dev/full")
        temporary.write_text("x" * 100_000)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "m.pt"
    file.write_text("old")
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error):
            _write_and_raise(file, error)
        assert file.read_text() == "old"
        assert list(tmp_path.iterdir()) == [file]


def test_a_model_that_does_not_pickle_is_a_file_error(tmp_path: Path) -> None:
    model = _net()
    model.hook = lambda x: x  # type: ignore[assignment]
    with pytest.raises(FileError, match="cannot write"):
        save_model(model, tmp_path / "m.pt")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.pt").mkdir()
    for name, said in [
        ("absent/m.pt", "no folder"),
        ("file/m.pt", "no folder"),
        ("folder.pt", "is a folder"),
        ("m.txt", "use .pt or .pth"),
    ]:
        with pytest.raises(FileError, match=said):
            save_model(_net(), tmp_path / name)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_file_error(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_text("old")
    with pytest.raises(FileError, match="No space left"):
        _write_to_a_full_disk(tmp_path / "m.pt")
    assert (tmp_path / "m.pt").read_text() == "old"


def test_an_overwritten_file_keeps_its_mode_and_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "m.pt").touch()
    (tmp_path / "m.pt").chmod(0o640)
    (tmp_path / "link.pt").symlink_to("m.pt")
    save_model(_net(), tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink()
    assert (tmp_path / "m.pt").stat().st_mode & 0o777 == 0o640
    assert isinstance(load_model(tmp_path / "m.pt"), nn.Sequential)
