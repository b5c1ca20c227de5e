"""`--data`, `--samples` and `--loss`: pictures in folders, files of tensors, and functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import allocator
from allocator.cli import main, make_parser
from allocator.cli.data import data_options, in_colour

NET = """
import torch
from torch import nn


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    ).eval()


def batches():
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(16, 3, 16, 16, generator=generator), torch.randint(3, (16,), generator=generator)


def nothing():
    pass


def inputs():
    return torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))


ready = [inputs()]
"""
MODEL = ("data_nets:classifier", "--input-size", "1x3x16x16")
ALLOCATE = ("allocate", *MODEL, "--flops", "60%", "-o", "small.pt", "--force", "--json", "-q")
LOSS = ("--loss", "torch.nn.functional:cross_entropy")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data_nets.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three classes of seven pictures of several sizes, as torchvision's ImageFolder has them."""
    generator = np.random.default_rng(0)
    for label, name in enumerate(("bird", "cat", "dog")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(7):
            pixels = generator.integers(0, 256, (20 + number, 24, 3), dtype=np.uint8)
            pixels[..., label] //= 4
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{number}.png")
    return tmp_path / "pictures"


def chosen(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*ALLOCATE, *arguments]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def is_by_trial(facts: dict[str, Any]) -> bool:
    """Whether the notes name what was tried."""
    return any(f"criterion {facts['criterion']} was chosen by trial" in note for note in facts["notes"])


def test_a_folder_of_pictures(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = chosen(capsys, "--data", str(pictures))
    assert facts["scope"] == "all"
    assert is_by_trial(facts)
    assert chosen(capsys, "--data", str(pictures / "cat"), "--samples", "1")["criterion"] == "fisher"


def test_pictures_with_their_classes_and_a_loss(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = chosen(capsys, "--data", str(pictures), *LOSS, "--criterion", "taylor")
    assert facts["criterion"] == "taylor"
    named = allocator.build("data_nets:classifier")
    small = allocator.load_model("small.pt", trust=True)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in named.parameters())


def test_labels_are_the_folders_in_the_order_of_their_names(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.extend(target.tolist())
        return torch.nn.functional.cross_entropy(output, target)

    monkeypatch.setattr(torch.nn.functional, "of_the_test", loss, raising=False)
    chosen(capsys, "--data", str(pictures), "--loss", "torch.nn.functional:of_the_test")
    assert sorted(seen) == [0] * 56 + [1] * 56 + [2] * 56
    assert seen[::8] != sorted(seen[::8])  # else those that are looked at first may all be of one class


def test_every_crop_has_the_label_of_its_picture(pictures: Path) -> None:
    args = make_parser().parse_args([*ALLOCATE, "--data", str(pictures), *LOSS])
    found = data_options(args, allocator.build("data_nets:classifier"))["data"]
    images, labels = (torch.cat(each) for each in zip(*found, strict=True))
    assert len(labels) == 21 * 8
    assert torch.equal(images.mean((2, 3)).argmin(1), labels)  # a class is dark in the colour of its number


def test_few_pictures_are_shown_in_several_crops(pictures: Path) -> None:
    def shown(samples: int) -> torch.Tensor:
        args = make_parser().parse_args([*ALLOCATE, "--data", str(pictures), "--samples", str(samples)])
        found: torch.Tensor = torch.cat(data_options(args, allocator.build("data_nets:classifier"))["data"])
        return found

    torch.manual_seed(1)
    once, crops = shown(30), shown(100)
    torch.manual_seed(1)
    assert torch.equal(once, shown(21))
    state = torch.get_rng_state()
    assert torch.equal(crops, shown(100))
    assert torch.equal(state, torch.get_rng_state())
    of_each = crops.reshape(21, 4, 3, 16, 16)  # side by side
    assert torch.equal(of_each[:, 0], once)  # the middle first
    assert len({each.numpy().tobytes() for each in of_each.flatten(0, 1)}) == 84
    assert len(shown(1000)) == 21 * 8
    again = (pictures / "cat" / "0.png").read_bytes()
    for name in ("cat", "dog"):
        (pictures / name / "0.png").write_bytes(again)
    of_each = shown(1000).reshape(21, -1)
    assert len({each.numpy().tobytes() for each in of_each}) == 21  # the same picture twice, in other crops


@pytest.mark.parametrize("name", ["inputs.pt", "inputs.npy"])
def test_a_file_of_a_tensor(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = torch.randn(24, 3, 16, 16)
    torch.save(inputs, "inputs.pt")
    np.save("inputs.npy", inputs.numpy())
    assert is_by_trial(chosen(capsys, "--data", name))


def test_a_function_that_gives_a_loader(capsys: pytest.CaptureFixture[str]) -> None:
    assert is_by_trial(chosen(capsys, "--data", "data_nets:batches", *LOSS, "--samples", "32"))


@pytest.mark.parametrize("name", ["inputs", "ready", "batches"])
def test_the_size_is_that_of_what_a_function_gives(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["allocate", "data_nets:classifier", "--flops", "60%", "--data", f"data_nets:{name}"]
    assert main([*arguments, "-o", "small.pt", "--force", "--json", "-q"]) == 0
    assert "input 1x3x16x16, from the first of the data" in json.loads(capsys.readouterr().out)["notes"]


@pytest.mark.parametrize("name", ["inputs", "ready"])
def test_a_function_that_gives_a_tensor_and_a_list_that_lies_there(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert is_by_trial(chosen(capsys, "--data", f"data_nets:{name}"))


def test_a_sweep_by_pictures_with_its_table_and_picture(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--csv", "curve.csv", "--plot", "curve.svg")
    assert main(["sweep", *MODEL, "--flops", "80%", "60%", "--data", str(pictures), *files, "--json", "-q"]) == 0
    facts = json.loads(capsys.readouterr().out)
    rows = Path("curve.csv").read_text().splitlines()
    assert rows[0] == "asked,cost,share,importance"
    assert [int(row.split(",")[1]) for row in rows[1:]] == [point["cost"] for point in facts["points"]]
    assert Path("curve.svg").read_text().startswith("<svg")
    assert main(["sweep", *MODEL, "--flops", "80%", *files]) == 1
    assert "curve.csv exists; use --force" in capsys.readouterr().err


def test_a_report_by_pictures(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *MODEL, "--flops", "60%", "--data", str(pictures), "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["budget"]["criterion"] == "fisher"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--loss", "torch.nn.functional:cross_entropy"], 2, "--loss goes with --data"),
        (["--data", "pictures", "--samples", "0"], 2, "--samples 0 is not above zero"),
        (["--data", "pictures", "--loss", "cross_entropy"], 2, "is not of the form package.module:function"),
        (["--data", "pictures", "--loss", "torch.nn:no_such"], 1, "'torch.nn:no_such' cannot be found"),
        (["--data", "pictures/cat", *LOSS], 1, "--loss needs labels, and pictures/cat/"),
        (["--data", "absent"], 1, "absent does not exist"),
        (["--data", "empty"], 1, "empty holds no pictures (.jpg"),
        (["--data", "broken"], 1, "a.png cannot be read"),
        (["--data", "data_nets.py"], 2, "for a function in it, write --data data_nets:FUNCTION"),
        (["--data", "broken/a.png"], 1, "a.png cannot be read as a tensor: neither .npy nor"),
        (["--data", "data_nets:nothing"], 1, "data_nets:nothing gave a NoneType, and not a loader: a list of batches"),
        (["--criterion", "taylor", "--data", "pictures"], 1, "needs labels: pass loss=function beside the data"),
        (["--criterion", "fisher"], 1, "criterion 'fisher' looks at data: give --data FOLDER"),
        (["--criterion", "fishr"], 1, "no criterion 'fishr'; did you mean 'fisher'?"),
    ],
)
@pytest.mark.usefixtures("pictures")
def test_what_cannot_be_looked_at(
    arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/a.png").write_bytes(b"no picture")
    assert main([*ALLOCATE, *arguments]) == status
    assert said in capsys.readouterr().err.replace("\n", " ")


def test_a_picture_that_is_refused_for_its_size_is_named(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(allocator.DataError, match=r"\d.png cannot be read: .*exceeds limit"):
        data_options(make_parser().parse_args([*ALLOCATE, "--data", str(pictures)]), torch.nn.Conv2d(3, 4, 1))


@pytest.mark.parametrize(
    ("name", "kind", "most"),
    [
        ("a.png", np.uint16, 65535),
        ("a.tif", np.uint16, 65535),
        ("a.tif", ">u2", 65535),
        ("a.tif", np.int32, 65535),
        ("a.tif", np.float32, 1),
        ("a.tif", np.float32, 255),
    ],
)
def test_grey_of_16_bits_or_of_floats_is_as_bright_as_that_of_8(
    tmp_path: Path, name: str, kind: Any, most: int
) -> None:
    grey = np.linspace(0, 255, 256).reshape(16, 16)
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "eight.png")
    Image.fromarray((grey * (most / 255)).astype(kind)).save(tmp_path / name)
    expected = np.asarray(in_colour(Image.open(tmp_path / "eight.png")))
    found = np.asarray(in_colour(Image.open(tmp_path / name)))
    assert found.shape == expected.shape == (16, 16, 3)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("pixels", [np.array([[0, 70000]], np.int32), np.array([[0, np.nan]], np.float32)])
@pytest.mark.usefixtures("pictures")
def test_grey_of_an_unknown_range_is_refused(pixels: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(pixels).save("pictures/odd.tif")
    assert main([*ALLOCATE, "--data", "pictures"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "odd.tif cannot be read: its grey is from" in said
    assert "of a range that is not known: save it in 8 or 16 bits" in said


def test_a_folder_named_like_a_picture_is_none(pictures: Path) -> None:
    (pictures / "bird" / "thumbs.png").mkdir()
    args = make_parser().parse_args([*ALLOCATE, "--data", str(pictures)])
    assert data_options(args, torch.nn.Conv2d(3, 4, 1))["data"]
