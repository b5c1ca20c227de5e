"""Files of earlier format versions stay readable, and damage in a file is noticed."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import allocator
from allocator.errors import AllocationMismatchError, FileError

VERSION_1 = Path(__file__).parent / "files" / "version1"
EXPECTED = json.loads((VERSION_1 / "expected.json").read_text())


def _own() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def _image(channels: int) -> Tensor:
    return torch.linspace(-1, 1, channels * 32 * 32).reshape(1, channels, 32, 32)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A result in today's format."""
    torch.manual_seed(0)
    model = allocator.build("recipe:scalenet-small-seed", planes=[4, 6], blocks=[1, 1], num_classes=5).eval()
    result = allocator.allocate(model, flops="50%", criterion="magnitude", example_inputs=_image(1))
    allocator.save(result, tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


# ------------------------------------------------------------------------------------------ version 1


def test_version_1_of_a_named_network_opens() -> None:
    model = allocator.load(VERSION_1 / "recipe.safetensors")
    torch.testing.assert_close(model(_image(1)), torch.tensor(EXPECTED["recipe"]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("file", ["own.safetensors", "own.pt"])
def test_version_1_of_a_network_of_ones_own_opens(file: str) -> None:
    path = VERSION_1 / file
    model = allocator.load_model(path) if file == "own.pt" else allocator.load(path, model=_own)
    torch.testing.assert_close(model(_image(3)).mean((2, 3)), torch.tensor(EXPECTED["own"]), atol=1e-6, rtol=1e-5)


def test_version_1_of_an_allocation_applies() -> None:
    small: Any = allocator.apply(_own(), VERSION_1 / "own.json")
    old: Any = allocator.load(VERSION_1 / "own.safetensors", model=_own)
    assert [p.shape for p in small.parameters()] == [p.shape for p in old.parameters()]
    with pytest.raises(AllocationMismatchError):
        allocator.apply(nn.Sequential(nn.Conv2d(3, 8, 5)), VERSION_1 / "own.json")


def test_a_version_1_file_is_saved_again_as_the_newest(tmp_path: Path) -> None:
    model = allocator.load(VERSION_1 / "recipe.safetensors")
    allocator.save(model, tmp_path / "s.safetensors")
    again = allocator.load(tmp_path / "s.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


# ------------------------------------------------------------------------------------------ today's


def test_the_file_describes_itself(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    said = {key: json.loads(metadata[key]) for key in ("build", "allocation", "versions", "flops", "certificate")}
    assert said["build"]["name"] == "recipe:scalenet-small-seed"
    assert said["flops"]["after"] <= said["flops"]["asked"] == said["flops"]["before"] / 2
    assert said["flops"]["after"] == allocator.trace(allocator.load(saved), _image(1)).flops
    assert said["certificate"]["ok"] is True
    assert said["versions"]["torch"] == torch.__version__.partition("+")[0] or said["versions"]["torch"]


def _flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_a_flipped_bit_in_the_weights_is_noticed(saved: Path) -> None:
    size = saved.stat().st_size
    (header,) = struct.unpack("<Q", saved.read_bytes()[:8])
    whole = saved.read_bytes()
    for offset in (8 + header, (8 + header + size) // 2, size - 1):
        saved.write_bytes(whole)
        _flip(saved, offset)
        with pytest.raises(FileError, match="digest"):
            allocator.load(saved)


def test_another_neuron_in_the_metadata_is_noticed(saved: Path) -> None:
    """One kept index for another: every shape still fits."""
    whole = saved.read_bytes()
    place = whole.index(b'"kept\\":') + len(b'"kept\\":')
    place += whole[place:].index(b"[[") + 2
    assert whole[place : place + 1] in b"0123456789"
    _flip(saved, place)
    with pytest.raises(FileError, match="digest"):
        allocator.load(saved)


def test_another_neuron_in_an_allocation_is_noticed(tmp_path: Path) -> None:
    allocation = allocator.Allocation.load(VERSION_1 / "own.json")
    allocation.save(tmp_path / "a.json")
    assert allocator.Allocation.load(tmp_path / "a.json") == allocation
    text = (tmp_path / "a.json").read_text()
    changed = json.loads(text)
    first = changed["kept"]["0.weight"][0]
    first[:] = sorted([next(i for i in range(8) if i not in first), *first[1:]])
    (tmp_path / "a.json").write_text(json.dumps(changed))
    with pytest.raises(FileError, match=r"a\.json: .*changed or damaged.*'digest'"):
        allocator.apply(_own(), tmp_path / "a.json")
    del changed["digest"]
    (tmp_path / "a.json").write_text(json.dumps(changed))
    allocator.apply(_own(), tmp_path / "a.json")


def test_an_allocation_is_applied_out_of_a_result_too(saved: Path) -> None:
    fresh = allocator.build("recipe:scalenet-small-seed", planes=[4, 6], blocks=[1, 1], num_classes=5)
    small = allocator.apply(fresh, saved)
    assert [p.shape for p in small.parameters()] == [p.shape for p in allocator.load(saved).parameters()]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kept": []}, "kept is a list, not a dict"),
        ({"kept": {"0.weight": [["a"]]}}, "entry for 0.weight"),
        ({"kept": {"0.weight": [[0.5]]}}, "entry for 0.weight"),
        ({"kept": {"0.weight": [[[0], [1, 2]]]}}, "entry for 0.weight"),
        ({"kept": {"0.weight": [[10**30]]}}, "entry for 0.weight"),
        ({"absent": [1]}, "absent layers"),
        ({"attributes": {"0": 7}}, "attributes of 0"),
        ({"input_shapes": [["a"]]}, "input shapes"),
        ({"flops_after": "many"}, "flops_after is a str"),
        ({"format": 6}, "has format 6"),
        ({"costs": {"flops": 7}, "format": 3}, "costs in flops"),
        ({"costs": {"flops": {"after": "many"}}, "format": 3}, "costs in flops"),
    ],
)
def test_allocations_of_the_wrong_types_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    data = json.loads((VERSION_1 / "own.json").read_text()) | changes
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(FileError, match=said):
        allocator.Allocation.load(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attributes": {"0": {"forward": 7}}}, "sets 0.forward"),
        ({"attributes": {"0": {"_parameters": []}}}, "sets 0._parameters"),
        ({"attributes": {"0": {"weight": 1}}}, "sets 0.weight"),
        ({"attributes": {"0": {"out_channels": "x"}}}, "sets 0.out_channels"),
        ({"attributes": {"nowhere": {"a": 1}}}, "the module 'nowhere'"),
        ({"absent": ["0.1.2"]}, "the module '0.1.2'"),
        ({"kept": {"nowhere": [[0]]}}, "names nowhere"),
        ({"kept": {"0.weight": [[-1], None, None, None]}}, "keeps index -1"),
    ],
)
def test_allocations_that_reach_beyond_the_model_are_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    data = json.loads((VERSION_1 / "own.json").read_text()) | changes
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(AllocationMismatchError, match=said):
        allocator.apply(_own(), tmp_path / "a.json")


def test_deeply_nested_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(FileError, match="not JSON"):
        allocator.Allocation.load(tmp_path / "a.json")
