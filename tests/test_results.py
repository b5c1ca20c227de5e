"""Allocated models as .safetensors: what comes back, and that a file cannot make anything run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from allocator.api import Result, allocate, iterate, verify
from allocator.errors import AllocationMismatchError, FileError, NotSelfContainedWarning, UnsafeFileError
from allocator.io.files import load_allocation, load_model, save_model
from allocator.io.models import BUILD_ATTRIBUTE, build
from allocator.io.results import load_result, save_result
from allocator.rewriting.allocation import Allocation
from allocator.rewriting.lineage import led_to

IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def _randomise(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 1.5)
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
    return model.eval()


def _allocated(name: str, flops: str = "60%", **kwargs: Any) -> tuple[nn.Module, Result]:
    model = _randomise(build(name, **kwargs))
    return model, allocate(model, flops=flops, example_inputs=IMAGE, certify=False)


def _homemade() -> nn.Module:
    return _randomise(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1)))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("torchvision:resnet18", {"num_classes": 10}),
        ("torchvision:googlenet", {"num_classes": 10}),
        ("timm:res2net50_26w_4s", {"num_classes": 10}),
        ("torchvision:regnet_y_400mf", {}),  # cannot be built without values
    ],
)
def test_a_result_comes_back_from_its_file_alone(tmp_path: Path, name: str, kwargs: dict[str, Any]) -> None:
    model, result = _allocated(name, **kwargs)
    save_result(result, tmp_path / "s.safetensors")
    loaded = load_model(tmp_path / "s.safetensors")
    assert type(loaded) is type(model)
    assert not loaded.training
    expected = result.model.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    torch.testing.assert_close(loaded(IMAGE), result.model(IMAGE))
    assert all(not value.is_meta for value in (*loaded.parameters(), *loaded.buffers()))
    assert load_allocation(tmp_path / "s.safetensors").to_dict() == json.loads(json.dumps(result.allocation.to_dict()))


def test_the_loaded_model_passes_verification_and_trains(tmp_path: Path) -> None:
    model, result = _allocated("torchvision:resnet18")
    save_result(result, tmp_path / "s.safetensors")
    loaded = load_result(tmp_path / "s.safetensors")
    certificate = verify(model, loaded, load_allocation(tmp_path / "s.safetensors"), example_inputs=IMAGE)
    assert certificate.ok
    loaded.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_the_file_holds_no_pickle_and_keeps_dtype_and_mode(tmp_path: Path) -> None:
    _, result = _allocated("torchvision:resnet18")
    half = result.model.to(torch.bfloat16).train()
    save_result((half, result.allocation), tmp_path / "s.safetensors")
    loaded = load_result(tmp_path / "s.safetensors")
    assert loaded.training
    assert next(loaded.parameters()).dtype is torch.bfloat16
    with safe_open(tmp_path / "s.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "neuron-allocator"
    assert json.loads(metadata["build"]) == {"name": "torchvision:resnet18", "kwargs": {}}
    assert "torch" in json.loads(metadata["versions"])


def test_a_saved_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    save_result((_homemade(), Allocation()), tmp_path / "s.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "s.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_loading_does_not_disturb_the_random_state(tmp_path: Path) -> None:
    _, result = _allocated("torchvision:regnet_y_400mf")
    save_result(result, tmp_path / "s.safetensors")
    before = torch.random.get_rng_state()
    load_result(tmp_path / "s.safetensors")
    assert torch.equal(torch.random.get_rng_state(), before)


class LoadsItsOwnWay(nn.Sequential):
    """Its `load_state_dict` is from before there was `assign`."""

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> Any:  # type: ignore[override]
        return super().load_state_dict(state_dict, strict)


def test_a_network_that_loads_in_a_way_of_its_own_comes_back(tmp_path: Path) -> None:
    result = allocate(LoadsItsOwnWay(*_homemade().children()).eval(), flops="60%", example_inputs=IMAGE)
    save_result(result, tmp_path / "s.safetensors")
    loaded = load_result(tmp_path / "s.safetensors", model=LoadsItsOwnWay(*_homemade().children()))
    assert torch.equal(loaded(IMAGE), result.model(IMAGE))


def test_a_network_of_ones_own_needs_a_fresh_build(tmp_path: Path) -> None:
    result = allocate(_homemade(), flops="60%", example_inputs=IMAGE, certify=False)
    save_result(result, tmp_path / "s.safetensors")
    with pytest.raises(FileError, match=r"does not say how to build .*Sequential.*model="):
        load_result(tmp_path / "s.safetensors")
    for fresh in (_homemade, _homemade()):
        loaded = load_result(tmp_path / "s.safetensors", model=fresh)
        assert torch.equal(loaded(IMAGE), result.model(IMAGE))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

    model, empty = Tied(), Allocation()
    save_result((model, empty), tmp_path / "s.safetensors")
    loaded = load_result(tmp_path / "s.safetensors", model=Tied)
    assert isinstance(loaded, Tied)
    assert loaded.a.weight is loaded.b.weight
    assert torch.equal(loaded.a.weight, model.a.weight)
    assert loaded.a.bias is not loaded.b.bias


def test_repeated_allocation_saves_the_whole_way(tmp_path: Path) -> None:
    model, first = _allocated("torchvision:resnet18", "80%")
    second = allocate(first.model, flops="70%", example_inputs=IMAGE, certify=False)
    third = allocate(second.model, flops="90%", example_inputs=IMAGE, certify=False)
    for result in (second, third):
        save_result(result, tmp_path / "s.safetensors")
        loaded = load_result(tmp_path / "s.safetensors")
        torch.testing.assert_close(loaded(IMAGE), result.model(IMAGE))
        whole = load_allocation(tmp_path / "s.safetensors")
        assert whole.flops_before == first.flops_before
        assert verify(model, loaded, whole, example_inputs=IMAGE).ok


def test_the_way_is_remembered_through_every_file(tmp_path: Path) -> None:
    """Allocate, write and read each time: pickle, safetensors, pickle."""
    result = _allocated("torchvision:resnet18", "80%")[1]
    for i, suffix in enumerate((".pt", ".safetensors", ".pt")):
        file = tmp_path / f"{i}{suffix}"
        save_model(result.model, file) if suffix == ".pt" else save_result(result, file)
        result = allocate(load_model(file), flops="90%", example_inputs=IMAGE, certify=False)
    save_result(result, tmp_path / "s.safetensors")
    loaded = load_model(tmp_path / "s.safetensors")
    assert [tuple(p.shape) for p in loaded.parameters()] == [tuple(p.shape) for p in result.model.parameters()]
    assert len(load_allocation(tmp_path / "s.safetensors").parts) == 4


def test_a_trained_model_is_saved_alone(tmp_path: Path) -> None:
    """What an allocation gave can be trained and saved without the result it came in."""
    _, result = _allocated("torchvision:resnet18")
    bias = result.model.get_parameter("fc.bias")
    with torch.no_grad():
        bias.add_(1)
    save_result(result.model, tmp_path / "s.safetensors")
    assert torch.equal(load_result(tmp_path / "s.safetensors").get_parameter("fc.bias"), bias)
    with pytest.raises(FileError, match="no allocation is known"):
        save_result(build("torchvision:resnet18"), tmp_path / "t.safetensors")


def test_a_network_of_ones_own_is_saved_after_repeated_allocation(tmp_path: Path) -> None:
    first = allocate(_homemade(), flops="80%", example_inputs=IMAGE, certify=False)
    second = allocate(first.model, flops="80%", example_inputs=IMAGE, certify=False)
    save_result(second, tmp_path / "s.safetensors")
    torch.testing.assert_close(load_result(tmp_path / "s.safetensors", model=_homemade)(IMAGE), second.model(IMAGE))


def test_a_model_that_was_changed_since_forgets_its_way(tmp_path: Path) -> None:
    result = allocate(_homemade(), flops="60%", example_inputs=IMAGE, certify=False)
    changed: Any = result.model
    changed[0] = nn.Conv2d(3, 11, 3)
    changed[1] = nn.BatchNorm2d(11)
    changed[3] = nn.Conv2d(11, 16, 1)
    with pytest.raises(FileError, match="changed shape since"):
        save_result(changed, tmp_path / "s.safetensors")
    with pytest.raises(AllocationMismatchError, match="other sizes"):
        save_result(result, tmp_path / "s.safetensors")
    again = allocate(_randomise(changed), flops="60%", example_inputs=IMAGE, certify=False)
    assert not led_to(again.model).parts  # type: ignore[union-attr]


def test_the_allocation_must_fit_the_given_model(tmp_path: Path) -> None:
    _, result = _allocated("torchvision:resnet18")
    save_result(result, tmp_path / "s.safetensors")
    with pytest.raises(AllocationMismatchError):
        load_result(tmp_path / "s.safetensors", model=build("torchvision:resnet34"))


# ------------------------------------------------------------------------------------------ hostile, broken


def _forge(path: Path, build_spec: Any, **changes: str) -> None:
    metadata = {
        "format": "neuron-allocator",
        "format_version": "1",
        "allocation": json.dumps(Allocation().to_dict()),
        "build": json.dumps(build_spec),
        "aliases": "{}",
        "training": "false",
        "versions": "{}",
    }
    save_file({"w": torch.zeros(1)}, path, metadata=metadata | changes)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "subprocess:getoutput", "kwargs": {"cmd": "touch ran"}},
        {"name": "os:system", "kwargs": {"command": "touch ran"}},
        {"name": "evil_module:factory", "kwargs": {}},
        {"name": "hf:.", "kwargs": {}},
        {"name": "hf:ResNetConfig", "kwargs": {}},
        {"name": "timm:hf-hub:someone/something", "kwargs": {}},
        {"name": "timm:local-dir:.", "kwargs": {}},
        {"name": "timm:resnet18", "kwargs": {"pretrained": True}},
        {"name": "timm:resnet18", "kwargs": {"checkpoint_path": "x.pth"}},
        {"name": "timm:resnet18", "kwargs": {"pretrained_cfg": {"file": "x.pth"}}},
        {"name": "torchvision:resnet18", "kwargs": {"weights": "DEFAULT"}},
        {"name": "torchvision:fcn_resnet50", "kwargs": {"weights_backbone": "DEFAULT"}},
    ],
)
def test_a_file_cannot_name_code_to_run_or_things_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil_module.py").write_text("open('ran', 'w')\n")
    _forge(tmp_path / "s.safetensors", spec)
    with pytest.raises(UnsafeFileError, match="--trust"):
        load_result(tmp_path / "s.safetensors")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "other"}, "did not save"),
        ({"format_version": "99"}, "format version '99'.*pip install --upgrade"),
        ({"format_version": "99", "versions": '{"neuron-allocator": "7.1"}'}, "written by release 7.1"),
        ({"format_version": "new"}, "format version 'new'"),
        ({"format_version": "²"}, "format version"),
        ({"format_version": "2"}, "its digest does not fit"),
        ({"allocation": "{"}, "its allocation cannot be read"),
        ({"allocation": "{}"}, "allocation"),
        ({"build": "[1]"}, "its build is a list"),
        ({"build": '{"name": 3, "kwargs": {}}'}, "its build cannot be read"),
        ({"aliases": '{"a": "b"}'}, "which is missing"),
        ({"training": "7"}, "its training is an int"),
    ],
)
def test_damaged_metadata_is_named(tmp_path: Path, changes: dict[str, str], said: str) -> None:
    _forge(tmp_path / "s.safetensors", {"name": "torchvision:resnet18", "kwargs": {}}, **changes)
    with pytest.raises(FileError, match=said):
        load_result(tmp_path / "s.safetensors")


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    _forge(tmp_path / "s.safetensors", {"name": "torchvision:resnet18", "kwargs": {}})
    with pytest.raises(FileError, match="do not fit"):
        load_result(tmp_path / "s.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_results_are_said_to_be_so(tmp_path: Path, share: float) -> None:
    _, result = _allocated("torchvision:resnet18")
    file = tmp_path / "s.safetensors"
    save_result(result, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(FileError, match=r"truncated|is empty"):
        load_result(file)


def test_wrong_names_and_state(tmp_path: Path) -> None:
    model = _homemade()
    with pytest.raises(FileError, match="must end in"):
        save_result((model, Allocation()), tmp_path / "s.pt")
    type_with_state = type("Stateful", (nn.Module,), {"get_extra_state": lambda self: {"x": 1}})
    with pytest.raises(FileError, match="not a tensor"):
        save_result((type_with_state(), Allocation()), tmp_path / "s.safetensors")
    assert list(tmp_path.iterdir()) == []


class Own(nn.Sequential):
    """A class that no known library has."""


def _own(width: int = 8) -> Own:
    return Own(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 2, 1)).eval()


def test_what_a_file_needs_beside_itself_is_said_when_it_is_written(tmp_path: Path) -> None:
    image, path = torch.zeros(1, 3, 8, 8), tmp_path / "m.safetensors"
    result = allocate(_own(), "50%", example_inputs=image, certify=False)
    with pytest.warns(
        NotSelfContainedWarning, match=rf"gives a fresh {__name__}\.Own, by --arch NAME \(model=\.\.\.\)"
    ):
        save_result(result, path)
    assert isinstance(load_result(path, model=_own()), Own)
    with pytest.warns(NotSelfContainedWarning, match=rf"who opens it needs {__name__}\.Own, and says --trust"):
        save_model(result.model, tmp_path / "m.pt")
    assert isinstance(load_model(tmp_path / "m.pt", trust=True), Own)
    named = allocate(build(f"{__name__}:_own"), "50%", example_inputs=image, certify=False)
    with pytest.warns(
        NotSelfContainedWarning, match=rf"needs {__name__}:_own, and says --trust \(trust=True\) or gives"
    ):
        save_result(named, path)
    assert isinstance(load_result(path, trust=True), Own)


def test_a_class_of_the_script_that_was_run_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Own, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Own", Own, raising=False)
    with pytest.warns(
        NotSelfContainedWarning, match="lies in __main__, the script that was run, has to move into a mod"
    ):
        save_model(_own(), tmp_path / "m.pt")


@pytest.mark.filterwarnings("error")
def test_files_of_known_libraries_stand_alone(tmp_path: Path) -> None:
    result = allocate(build("recipe:scalenet-small"), "50%", certify=False)
    save_result(result, tmp_path / "m.safetensors")
    save_model(result.model, tmp_path / "m.pt")
    save_model(nn.Sequential(nn.Conv2d(1, 1, 1)), tmp_path / "n.pt")


def test_what_iterate_gave_is_saved(tmp_path: Path) -> None:
    model = build("recipe:scalenet-small")
    done = iterate(model, "50%", steps=1, train=lambda network: None, certify=False)
    save_result(done, tmp_path / "m.safetensors")
    assert load_result(tmp_path / "m.safetensors").state_dict().keys() == done.model.state_dict().keys()


def test_the_build_survives_allocation() -> None:
    _, result = _allocated("torchvision:resnet18", num_classes=4)
    assert getattr(result.model, BUILD_ATTRIBUTE)["kwargs"] == {"num_classes": 4}
