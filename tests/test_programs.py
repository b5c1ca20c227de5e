"""Exported programs: the same numbers, names and allocation as the module they were made from, and nothing runs."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import IMAGE, trained, untouched
from torch import nn

import allocator
from allocator.cli import main
from allocator.errors import (
    AllocationMismatchError,
    AllocatorError,
    FileError,
    UnsafeFileError,
    UnsupportedModelError,
)
from allocator.io.files import load_allocation, load_model
from allocator.io.results import _digest, read_safetensors

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
    # What older ones write is refused: tests/test_files.py.
    pytest.mark.skipif(torch.__version__ < "2.8", reason="reads programs of torch 2.8 and later"),
]
NETWORKS = [
    ("recipe:scalenet-small-seed", torch.zeros(1, 1, 32, 32)),
    ("recipe:res2net-small", torch.zeros(1, 1, 32, 32)),
    ("recipe:resnext-small", torch.zeros(1, 1, 32, 32)),
    pytest.param("torchvision:resnet18", torch.zeros(1, 3, 64, 64), marks=pytest.mark.sweep),
    pytest.param("timm:res2net50_26w_4s", torch.zeros(1, 3, 64, 64), marks=pytest.mark.sweep),
    pytest.param("torchvision:shufflenet_v2_x0_5", torch.zeros(1, 3, 64, 64), marks=pytest.mark.sweep),
    pytest.param("torchvision:mobilenet_v3_small", torch.zeros(1, 3, 64, 64), marks=pytest.mark.sweep),
    pytest.param("torchvision:resnext50_32x4d", torch.zeros(1, 3, 64, 64), marks=pytest.mark.sweep),
]


def _write(model: nn.Module, image: torch.Tensor, path: Path) -> None:
    open_batch = {0: torch.export.Dim("batch")}
    pair = torch.cat([image, image])
    torch.export.save(torch.export.export(model, (pair,), dynamic_shapes=(open_batch,)), path)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("programs") / "m.pt2"
    _write(trained(), IMAGE, path)
    return path


@pytest.mark.parametrize(("name", "image"), NETWORKS)
def test_a_program_is_allocated_like_its_module(tmp_path: Path, name: str, image: torch.Tensor) -> None:
    model = trained(allocator.build(name))
    _write(model, image, tmp_path / "m.pt2")
    program = load_model(tmp_path / "m.pt2")
    given = torch.randn(3, *image.shape[1:])
    torch.testing.assert_close(program(given), model(given), atol=1e-6, rtol=1e-6)
    assert program.state_dict().keys() == model.state_dict().keys()
    with untouched(program):
        result = allocator.allocate(program, "60%", example_inputs=image)
    assert result.certificate.ok
    assert result.flops_before == allocator.trace(model, image).flops
    assert 0.58 * result.flops_before < result.flops_after <= 0.6 * result.flops_before
    assert result.model(given).shape == model(given).shape


def test_the_size_of_the_input_is_known(written: Path) -> None:
    assert allocator.trace(load_model(written)).flops == allocator.trace(trained(), IMAGE).flops


def test_report_allocate_and_export_a_program(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(written), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"]
    assert main(["allocate", str(written), "--flops", "60%", "-o", "s.pt"]) == 0
    assert main(["export", "s.pt", "-o", "s.pt2"]) == 0
    small, again = load_model("s.pt"), load_model("s.pt2")
    given = torch.randn(2, *IMAGE.shape[1:])
    torch.testing.assert_close(small(given), again(given))


class Constants(nn.Module):
    """Tensors that a state_dict leaves out, tied weights, literals of every kind."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3)
        self.same = self.conv
        self.mix = nn.Conv2d(12, 12, 3, groups=3)
        self.head = nn.Conv2d(12, 4, 1)
        self.register_buffer("scale", torch.full((1, 1, 1), 3.0), persistent=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.mix(torch.relu(self.conv(x)) * self.scale + self.same(x).clamp(min=-float("inf")))
        out = self.head(y)
        high, _ = out.to(torch.float64).max(1)
        return high.float(), torch.cat(out.split([1, 3], 1), 1).mean((2, 3), keepdim=True) * torch.tensor([2.0])


@pytest.mark.parametrize("kind", ["pt2", "script"])
@pytest.mark.parametrize("model", [trained(), Constants()], ids=["trained", "constants"])
def test_a_result_of_a_program_comes_back_alone(tmp_path: Path, kind: str, model: nn.Module) -> None:
    if kind == "pt2":
        _write(model.eval(), IMAGE, tmp_path / "m.pt2")
    else:
        torch.jit.trace(model.eval(), IMAGE).save(tmp_path / "m.pt2")
    program = load_model(tmp_path / "m.pt2")
    result = allocator.allocate(program, "60%", example_inputs=IMAGE)
    allocator.save(result, tmp_path / "s.safetensors")
    given = torch.randn(2, *IMAGE.shape[1:])
    for loaded in (
        allocator.load(tmp_path / "s.safetensors"),
        allocator.load(tmp_path / "s.safetensors", model=program),
    ):
        torch.testing.assert_close(loaded(given), result.model(given))
        assert list(loaded.state_dict()) == list(result.model.state_dict())
        assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in result.model.named_parameters()]
    allocation = load_allocation(tmp_path / "s.safetensors")
    assert allocator.verify(program, allocator.load(tmp_path / "s.safetensors"), allocation, example_inputs=IMAGE).ok
    assert allocator.export(allocator.load(tmp_path / "s.safetensors"), tmp_path / "s.pt2").difference < 1e-4
    allocator.save(allocator.load(tmp_path / "s.safetensors"), tmp_path / "again.safetensors")
    torch.testing.assert_close(allocator.load(tmp_path / "again.safetensors")(given), result.model(given))


Said = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda said: said["steps"][0].update(target="torch.ops.aten.from_file.default"), UnsafeFileError),
        (lambda said: said["steps"][0].update(target="os.system"), UnsafeFileError),
        (lambda said: said["steps"][0].update(target=7), FileError),
        (lambda said: said["steps"][0].pop("names"), FileError),
        (lambda said: said["steps"][0]["literals"].update(x={"dtype": "torch.os"}), FileError),
        (lambda said: said.update(steps=None), FileError),
        (lambda said: said.update(held={"v": "aten.0.x"}), FileError),
        (lambda said: said.update(held={"v": "forward"}, tensors={"forward": ["buffer", True, False]}), FileError),
        (lambda said: said["tensors"].clear(), FileError),
        (lambda said: said["tensors"].update({"stem.weight": "buffer"}), FileError),
        (lambda said: said["held"].popitem(), (FileError, AllocationMismatchError)),
    ],
)
def test_a_saved_program_is_as_suspect_as_its_file(written: Path, tmp_path: Path, change: Said, error: Any) -> None:
    from safetensors.torch import save_file

    result = allocator.allocate(load_model(written), "60%", example_inputs=IMAGE)
    allocator.save(result, tmp_path / "s.safetensors")
    metadata, tensors = read_safetensors(tmp_path / "s.safetensors")
    said = json.loads(metadata["program"])
    change(said)
    metadata["program"] = json.dumps(said)
    metadata["digest"] = _digest(metadata, tensors)
    save_file(tensors, tmp_path / "s.safetensors", metadata=metadata)
    with pytest.raises(error):
        allocator.load(tmp_path / "s.safetensors")


def test_plain_safetensors_weights_need_their_architecture(tmp_path: Path) -> None:
    from safetensors.torch import save_model

    model = allocator.build("recipe:scalenet-small")
    save_model(model, str(tmp_path / "w.safetensors"))
    with pytest.raises(FileError, match=r"weights alone .*--arch"):
        load_model(tmp_path / "w.safetensors")
    loaded = load_model(tmp_path / "w.safetensors", arch="recipe:scalenet-small")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    with pytest.raises(FileError, match="do not fit"):
        load_model(tmp_path / "w.safetensors", arch="recipe:resnet-small")


# ------------------------------------------------------------------------------------------ hostile programs

Change = Callable[[dict[str, Any]], None]


def _forge(source: Path, target: Path, change: Change, entry: str = "models/model.json") -> None:
    """The archive with one of its JSON entries changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith(entry):
                said = json.loads(data)
                change(said)
                data = json.dumps(said).encode()
            new.writestr(item.filename, data)


def _nodes(said: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = said["graph_module"]["graph"]["nodes"]
    return found


def _calls(target: str) -> Change:
    return lambda said: _nodes(said)[0].update(target=target)


def _expression(said: dict[str, Any]) -> None:
    """What torch's reader would hand to sympy, which evaluates it."""
    said["graph_module"]["graph"]["sym_int_values"]["evil"] = {
        "as_expr": {"expr_str": "__import__('os').system('touch ran')", "hint": None}
    }
    for value in said["graph_module"]["graph"]["tensor_values"].values():
        value["sizes"] = [{"as_expr": {"expr_str": "__import__('os').system('touch ran')", "hint": None}}]


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.no_such_operator.default",
        "torch.ops.profiler._record_function_enter.default",
        "torch.hub.load",
        "torch.os.system",
        "torch.ops.aten.conv2d.default.__init__.__globals__",
        "torch.ops.aten.__class__.default",
        "_operator.attrgetter",
        "_operator.methodcaller",
        "math.__loader__",
        "#evil",
        "os.system",
    ],
)
def test_only_operators_on_tensors_are_called(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    _forge(written, tmp_path / "m.pt2", _calls(target))
    with pytest.raises((UnsafeFileError, UnsupportedModelError), match="calls"):
        load_model(tmp_path / "m.pt2")


def test_expressions_are_not_evaluated(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _forge(written, tmp_path / "m.pt2", _expression)
    program = load_model(tmp_path / "m.pt2")
    torch.testing.assert_close(program(IMAGE), load_model(written)(IMAGE))
    assert not (tmp_path / "ran").exists()
    with contextlib.suppress(Exception):
        torch.export.load(tmp_path / "m.pt2")  # and this is what torch's own reader does with it
    assert (tmp_path / "ran").exists()


def _weights(**changes: Any) -> Change:
    def change(said: dict[str, Any]) -> None:
        entry = said["config"]["stem.weight"]
        entry.update({key: value for key, value in changes.items() if key in entry})
        entry["tensor_meta"] = entry["tensor_meta"] and entry["tensor_meta"] | {
            key: value for key, value in changes.items() if key in entry["tensor_meta"]
        }

    return change


@pytest.mark.parametrize(
    "changes",
    [
        {"sizes": [{"as_int": 10**9}] * 4},
        {"sizes": [{"as_int": -1}, {"as_int": 3}, {"as_int": 3}, {"as_int": 3}]},
        {"strides": [{"as_int": 10**9}] * 4},
        {"strides": [{"as_int": 0}] * 4, "sizes": [{"as_int": 40}] * 4},
        {"storage_offset": {"as_int": -5}},
        {"storage_offset": {"as_int": 10**12}},
        {"path_name": "../../../../../../etc/passwd"},
        {"path_name": "/etc/passwd"},
        {"dtype": 99},
        {"use_pickle": True},
        {"tensor_meta": None},
        {"is_param": "x", "sizes": None},
    ],
)
def test_tensors_lie_within_their_data(written: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    _forge(written, tmp_path / "m.pt2", _weights(**changes), "weights_config.json")
    with pytest.raises(FileError):
        load_model(tmp_path / "m.pt2")


def test_pickled_tensors_do_not_run(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import pickle

    class Runs:
        def __reduce__(self) -> Any:
            return os.system, ("touch ran",)

    monkeypatch.chdir(tmp_path)
    _forge(written, tmp_path / "a.pt2", _weights(use_pickle=True), "weights_config.json")
    with zipfile.ZipFile("a.pt2") as old, zipfile.ZipFile("m.pt2", "w") as new:
        for item in old.infolist():
            new.writestr(item.filename, pickle.dumps(Runs()) if "weight_0" in item.filename else old.read(item))
    with pytest.raises(FileError):
        load_model("m.pt2")
    assert not Path("ran").exists()


@pytest.mark.parametrize("key", ["nodes", "outputs", "tensor_values"])
@pytest.mark.parametrize("value", [None, 7, [1], {"a": 1}])
def test_graphs_of_another_shape_are_refused(written: Path, tmp_path: Path, key: str, value: Any) -> None:
    _forge(written, tmp_path / "m.pt2", lambda said: said["graph_module"]["graph"].update({key: value}))
    with pytest.raises(AllocatorError):
        load_model(tmp_path / "m.pt2")


@pytest.mark.parametrize("name", ["forward", "a..b", "", "training.x", "aten.0.x", "_parameters.x"])
def test_names_that_would_hide_something_are_refused(written: Path, tmp_path: Path, name: str) -> None:
    def change(said: dict[str, Any]) -> None:
        said["graph_module"]["signature"]["input_specs"][0]["parameter"]["parameter_name"] = name

    def rename(said: dict[str, Any]) -> None:
        said["config"][name] = next(iter(said["config"].values()))

    _forge(written, tmp_path / "a.pt2", change)
    _forge(tmp_path / "a.pt2", tmp_path / "m.pt2", rename, "weights_config.json")
    with pytest.raises(FileError):
        load_model(tmp_path / "m.pt2")


def test_a_program_that_branches_is_refused(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))

    torch.export.save(torch.export.export(Branching(), (torch.zeros(2),)), tmp_path / "m.pt2")
    with pytest.raises(UnsupportedModelError, match="no ATen operator"):
        load_model(tmp_path / "m.pt2")


def test_a_program_in_training_mode_is_refused(tmp_path: Path) -> None:
    _write(trained().train(), IMAGE, tmp_path / "m.pt2")
    with pytest.raises(UnsupportedModelError, match="eval mode"):
        load_model(tmp_path / "m.pt2")
