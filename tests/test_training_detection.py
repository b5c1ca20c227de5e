"""Training of detectors: the shipped configuration, resume, average precision, and what is wrong with the data."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor, nn

import allocator
from allocator import recipes
from allocator.cli import main
from allocator.errors import AllocationMismatchError, AllocatorError, ConfigurationError, DataError, UnsafeFileError
from allocator.recipes import train
from allocator.recipes.boxes import Detection, average_precision, mirrored
from allocator.recipes.configuration import load_config
from allocator.recipes.detection import CocoBoxes, predict
from allocator.recipes.outcome import RunResult
from allocator.recipes.run import _Run
from allocator.recipes.training import Fit

COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
"""COCO's 80 categories among 90 ids."""
COLOURS = ("red", "blue")


def write_coco(root: Path, ids: list[int], parts: tuple[str, str] = ("train", "val"), count: int = 6) -> Path:
    """Generated images in COCO's folders, with one or two filled boxes each and the first one with none."""
    generator = torch.Generator().manual_seed(0)
    (root / "annotations").mkdir(parents=True)
    for part in parts:
        (root / part).mkdir()
        images: list[dict[str, Any]] = []
        boxes: list[dict[str, Any]] = []
        for number in range(1, count + 1):
            width, height = 60 + 8 * (number % 3), 64
            picture = Image.new("RGB", (width, height), "grey")
            for _ in range(0 if number == 1 else 1 + number % 2):
                x, y, w, h = (int(n) for n in torch.randint(4, 32, (4,), generator=generator))
                which = len(boxes) % 2
                ImageDraw.Draw(picture).rectangle((x, y, x + w + 8, y + h + 8), fill=COLOURS[which])
                box = {"id": len(boxes) + 1, "image_id": number, "category_id": (ids[0], ids[-1])[which]}
                boxes.append(box | {"bbox": [x, y, w + 8, h + 8], "area": (w + 8) * (h + 8), "iscrowd": 0})
            picture.save(root / part / f"{number:012d}.jpg")
            images.append({"id": number, "file_name": f"{number:012d}.jpg", "width": width, "height": height})
        content = {"images": images, "annotations": boxes, "categories": [{"id": i, "name": f"c{i}"} for i in ids]}
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"), [1, 2, 3])


SMALL = {"rpn_pre_nms_top_n_test": 40, "rpn_post_nms_top_n_test": 20, "rpn_post_nms_top_n_train": 40}


def small_config(root: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """A small detector, three updates of two images per epoch, with everything that has a state."""
    training = {"epochs": 2, "lr": 0.01, "batch_size": 2, "device_batch": 1, "clip": 5.0, "average": 0.5}
    config: dict[str, Any] = {
        "task": "detection",
        "network": {"name": "recipe:scalenet-small", "arguments": {"image_side": 64, "in_channels": 3}},
        "detector": {"num_classes": 4, "out_channels": 16, "min_size": 64, "max_size": 80, "settings": SMALL},
        "data": {"dataset": "coco", "root": str(root), "augment": "flip"},
        "final": training,
        "run": {"output": str(folder), "checkpoint_updates": 1, "tensorboard": False},
    }
    return config | changes


def states(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(got[key], tensor), key


# --------------------------------------------------------------------------------------------- whole runs


def test_the_shipped_configuration_starts_as_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folders, categories, network, detector and schedule as they are; sizes and batch are smaller."""
    root = write_coco(tmp_path / "coco", COCO_IDS, ("train2017", "val2017"))
    small = ["detector.min_size=64", "detector.max_size=96", "final.batch_size=2", "data.workers=0"]
    given = [f"data.root={root}", f"run.output={tmp_path / 'never'}", *small]
    arguments = ["train", "faster_rcnn_scalenet50", "--dry-run", "2", "--json", "-q"]
    assert main([*arguments, *(word for setting in given for word in ("--set", setting))]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert 0 < stage["loss"] < 100
    assert "accuracy" not in stage
    assert 0 <= stage["test_AP"] <= stage["test_AP50"] <= 1
    with torch.device("meta"):
        whole = recipes.build("faster-rcnn", num_classes=91, backbone="recipe:scalenet50", frozen_norms=False)
    assert stage["parameters"] == sum(each.numel() for each in whole.parameters())
    assert not (tmp_path / "never").exists()


def test_the_shipped_schedule_is_torchvision_s() -> None:
    config = load_config("faster_rcnn_scalenet50")
    assert config.allocation is None
    assert config.final is not None
    final = config.final
    assert (final.epochs, final.lr, final.batch_size, final.milestones) == (26, 0.02, 8 * 2, [16, 22])
    assert (final.momentum, final.nesterov, final.weight_decay, final.gamma) == (0.9, False, 1e-4, 0.1)
    # 117,266 of the training images have boxes.
    assert round(final.warmup * (117_266 // 16)) == pytest.approx(1000, abs=5)


def test_a_killed_run_ends_as_the_whole_one(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(small_config(coco, tmp_path / "whole"), progress=False)
    plain = _Run._save_state

    def save_and_stop(run: _Run, fit: Fit) -> None:
        plain(run, fit)
        if fit.step == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(_Run, "_save_state", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(small_config(coco, tmp_path / "killed"), progress=False)
    monkeypatch.setattr(_Run, "_save_state", plain)
    assert torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["fit"]["step"] == 1
    resumed = train(small_config(coco, tmp_path / "killed"), resume=True, progress=False)
    assert_equal(states(resumed.model), states(whole.model))
    assert resumed.stages[0].loss == whole.stages[0].loss
    assert resumed.stages[0].test == whole.stages[0].test
    assert capsys.readouterr().out == "", "pycocotools' own output is left out"

    loaded = allocator.load(tmp_path / "killed" / "model.safetensors")
    assert_equal(states(loaded), states(whole.model))
    image = torch.rand(3, 64, 64)
    for got, wanted in zip(predict(loaded, [image]), predict(whole.model, [image]), strict=True):
        assert_equal(got, wanted)


def allocated(tmp_path: Path) -> tuple[allocator.Result, Path]:
    """A small seed, allocated, and the file of the result."""
    seed = allocator.build("recipe:scalenet-small-seed", image_side=64, in_channels=3)
    for module in seed.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 1.5)
    result = allocator.allocate(seed, "50%")
    allocator.save(result, tmp_path / "result.safetensors")
    return result, tmp_path / "result.safetensors"


def short(config: dict[str, Any], **network: Any) -> RunResult:
    """One update of a detector on the small seed."""
    arguments = {"image_side": 64, "in_channels": 3}
    config |= {"network": {"name": "recipe:scalenet-small-seed", "arguments": arguments, **network}}
    config["final"] |= {"epochs": 1, "batch_size": 5, "device_batch": 5, "average": None}
    return train(config, progress=False)


def test_a_saved_result_is_the_backbone(coco: Path, tmp_path: Path) -> None:
    """It brings its allocation and weights; norms, stem and first stage then stay as they are."""
    result, file = allocated(tmp_path)
    config = small_config(coco, tmp_path / "run")
    run = short(config, weights=str(file))
    body, start = states(run.model.get_submodule("backbone.body")), states(result.model)
    kept = [key for key in body if key.startswith(("conv1", "bn1", "layer1")) or ".bn" in key]
    assert "layer3.0.bn2.0.running_mean" in kept
    assert_equal({key: body[key] for key in kept}, {key: start[key] for key in kept})
    assert not torch.equal(body["layer2.0.conv1.weight"], start["layer2.0.conv1.weight"])
    file.unlink()
    assert_equal(states(allocator.load(tmp_path / "run" / "model.safetensors")), states(run.model))


def test_an_allocation_is_the_backbone_s(coco: Path, tmp_path: Path) -> None:
    result, _ = allocated(tmp_path)
    result.allocation.save(tmp_path / "alloc.json")
    run = short(small_config(coco, tmp_path / "run"), allocation=str(tmp_path / "alloc.json"))
    body, small = (states(each) for each in (run.model.get_submodule("backbone.body"), result.model))
    assert {key: body[key].shape for key in body} == {key: small[key].shape for key in body}
    assert any("running_mean" in key and not torch.equal(body[key], small[key]) for key in body), "norms are trained"


def test_a_whole_detector_is_allocated_and_trained_on(coco: Path, tmp_path: Path) -> None:
    training = {"epochs": 1, "lr": 0.01, "batch_size": 5}
    allocation = {"flops": "90%", "weights": "keep"}
    config = small_config(coco, tmp_path / "run", seed=training, allocation=allocation, final=training)
    config["network"]["name"] = "recipe:scalenet-small-seed"
    config["detector"]["frozen_norms"] = False
    result = train(config, progress=False)
    assert result.allocation is not None
    assert [stage.name for stage in result.stages] == ["seed", "final"]
    assert result.stages[0].flops == result.allocation.flops_before
    assert result.stages[1].flops == result.allocation.flops_after <= 0.9 * result.allocation.flops_before
    seed = allocator.load(tmp_path / "run" / "seed.safetensors")
    for head in ("rpn", "roi_heads"):
        shapes = [[p.shape for p in each.get_submodule(head).parameters()] for each in (result.model, seed)]
        assert shapes[0] == shapes[1], "heads are left alone"
    assert_equal(states(allocator.load(tmp_path / "run" / "model.safetensors")), states(result.model))


@pytest.mark.sweep
def test_a_detector_learns(coco: Path, tmp_path: Path) -> None:
    """It finds the boxes of its training images."""
    config = small_config(coco, tmp_path / "run")
    config["data"] |= {"test": "train", "augment": "none"}
    config["final"] = {"epochs": 150, "lr": 0.02, "batch_size": 5, "device_batch": 5, "warmup": 5}
    (stage,) = train(config, progress=False).stages
    assert stage.test["AP50"] > 0.8, stage


@pytest.mark.sweep
def test_two_processes_agree_with_one(coco: Path, tmp_path: Path) -> None:
    """The same weights up to rounding, and average precision over the images of both."""
    config = small_config(coco, tmp_path / "two", device="cpu")
    config["detector"]["frozen_norms"] = True  # their statistics follow the forwards of each process
    one = train(config, settings=[f"run.output={tmp_path / 'one'}"], progress=False)
    (tmp_path / "two.yaml").write_text(json.dumps(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "allocator.cli", "train", str(tmp_path / "two.yaml"), "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    together = load_file(tmp_path / "two" / "model.safetensors")
    for key, tensor in states(one.model).items():
        assert torch.allclose(tensor, together[key], rtol=1e-4, atol=1e-5), key
    (stage,) = json.loads((tmp_path / "two" / "results.json").read_text())["stages"]
    assert {key[5:]: value for key, value in stage.items() if key.startswith("test_")} == pytest.approx(
        one.stages[0].test, abs=1e-3
    )


# ------------------------------------------------------------------------------------------ data and figures


def test_average_precision(coco: Path) -> None:
    data = CocoBoxes(coco / "val", coco / "annotations" / "instances_val.json")
    truth = [{**annotation, "score": 1.0} for annotation in data.data.coco.anns.values()]
    assert average_precision(data, copy.deepcopy(truth), data.data.ids)["AP"] == pytest.approx(1)
    swapped = [{**row, "category_id": 4 - row["category_id"]} for row in truth]
    assert average_precision(data, swapped, data.data.ids)["AP"] == 0
    assert average_precision(data, [], data.data.ids)["AP"] == 0
    # Each box moved by a tenth of its width overlaps by 0.9 / 1.1 = 0.82: right up to 0.80, seven of ten.
    moved = [{**row, "bbox": [row["bbox"][0] + row["bbox"][2] / 10, *row["bbox"][1:]]} for row in truth]
    figures = average_precision(data, moved, data.data.ids)
    assert figures["AP"] == pytest.approx(0.7)
    assert figures["AP50"] == pytest.approx(1)
    # All boxes of one of two classes: half; only the seen images count.
    half = [row for row in truth if row["category_id"] == 1]
    assert average_precision(data, copy.deepcopy(half), data.data.ids)["AP"] == pytest.approx(0.5)
    seen = [half[0]["image_id"]]
    rows = [row for row in truth if row["image_id"] in seen]
    assert average_precision(data, rows, seen)["AP"] == pytest.approx(1)
    assert average_precision(data, [], [1]) == {}, "no boxes, no figure"


def test_images_are_mirrored_with_their_boxes(coco: Path) -> None:
    data = Detection().open(load_config(small_config(coco, coco / "run")))
    assert (len(data.train), len(data.test)) == (5, 6), "training leaves out the image without boxes"
    image, target = data.train.source[0]
    other, flipped = mirrored(image, target)
    x1, y1, x2, y2 = (int(n) for n in target["boxes"][0])
    u1, v1, u2, v2 = (int(n) for n in flipped["boxes"][0])
    assert torch.equal(other[:, v1:v2, u1:u2], image[:, y1:y2, x1:x2].flip(2))
    found = [data.train[(epoch, 0)][0] for epoch in range(12)]
    assert {torch.equal(torch.as_tensor(each), image) for each in found} == {True, False}
    assert torch.equal(torch.as_tensor(data.train[(3, 0)][0]), torch.as_tensor(found[3]))
    assert all(torch.equal(torch.as_tensor(data.test[(e, 1)][0]), data.test.source[1][0]) for e in range(6))


# ------------------------------------------------------------------------------------------------- bad input


def edit(root: Path, change: Callable[[dict[str, Any]], Any], part: str = "train") -> None:
    file = root / "annotations" / f"instances_{part}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


BAD_DATA: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no annotations": (
        lambda root: (root / "annotations" / "instances_val.json").unlink(),
        r"instances_val.json: no such file of annotations; expected val/IMAGE and annotations/instances_{part}.json",
    ),
    "no folder": (lambda root: shutil.rmtree(root / "val"), "val: no such folder of images"),
    "empty folder": (
        lambda root: [path.rename(root / path.name) for path in (root / "train").iterdir()],
        "train is empty; .*instances_train.json lists 6 images",
    ),
    "no COCO file": (lambda root: edit(root, lambda c: c["images"][0].pop("id")), "not annotations in COCO's format"),
    "no boxes": (lambda root: edit(root, lambda c: c.update(annotations=[])), "instances_train.json has no boxes"),
    "other classes": (
        lambda root: edit(root, lambda c: c["categories"].append({"id": 7, "name": "x"}), "val"),
        "train has category ids to 3, val to 7",
    ),
    "unlisted class": (
        lambda root: edit(root, lambda c: c["annotations"][0].update(category_id=9)),
        "boxes of category 9, which is not in its list of categories",
    ),
    "class 0": (
        lambda root: edit(root, lambda c: c["categories"].append({"id": 0, "name": "x"})),
        "category id 0; ids start at 1, as 0 stands for the background",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_do_not_fit(coco: Path, tmp_path: Path, case: str) -> None:
    shutil.copytree(coco, tmp_path / "coco")
    harm, message = BAD_DATA[case]
    harm(tmp_path / "coco")
    with pytest.raises(DataError, match=message):
        train(small_config(tmp_path / "coco", tmp_path / "run"), progress=False)


def test_a_wrong_class_count(coco: Path, tmp_path: Path) -> None:
    message = "the detector has 91 classes with the background, the data 4: set detector.num_classes=4"
    with pytest.raises(DataError, match=message):
        train(small_config(coco, tmp_path), settings=["detector.num_classes=91"], progress=False)


def test_images_that_cannot_be_read(coco: Path, tmp_path: Path) -> None:
    shutil.copytree(coco, tmp_path / "coco")
    (tmp_path / "coco" / "train" / "000000000002.jpg").write_bytes(b"no image")
    (tmp_path / "coco" / "val" / "000000000003.jpg").unlink()
    config = small_config(tmp_path / "coco", tmp_path / "run")
    with pytest.raises(DataError, match=r"2 of 11 images cannot be read: .*000002.jpg .*000003.jpg"):
        train(config, settings=["data.check=true"], progress=False)
    with pytest.raises(DataError, match=r"cannot read .*00000[23].jpg"):
        train(config, resume=True, progress=False)
    skip = ["data.corrupt=skip", "final.epochs=1", f"run.output={tmp_path / 'skip'}"]
    result = train(config, settings=skip, progress=False)
    assert [name.split(" (")[0][-7:] for name in result.corrupt] == ["002.jpg", "003.jpg"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("task=segmentation", "task: expected classification or detection, got 'segmentation'"),
        ("task=classification", "data.dataset=coco is for task=detection"),
        ("detector=null", "task=detection needs a section detector"),
        ("detector.min_siz=3", "unknown key detector.min_siz; did you mean min_size"),
        ("detector.max_size=8", "0 < min_size <= max_size"),
        ("detector.trained_stages=-1", "detector.trained_stages: expected a number >= 0, got -1"),
        ("detector.trained_stages=9", "detector.trained_stages: the network has 3 stages, got 9"),
        ("detector.settings.boxes=3", r"detector.settings: unknown to torchvision's FasterRCNN.*'boxes'"),
        ("data.dataset=folder", "data.dataset: expected coco for task=detection, got 'folder'"),
        ("data.side=64", "data.side is not for detectors"),
        ("data.augment=imagenet", "data.augment: expected flip or none for task=detection"),
        ("final.label_smoothing=0.1", "final: label_smoothing and recalibrate are not for detectors"),
        ("network.name=recipe:vgg", "no recipe is called 'vgg'"),
        ("allocation.criterion=fisher", "allocation.criterion='fisher' looks at data, which is not for detectors yet"),
    ],
)
def test_a_configuration_that_does_not_fit(coco: Path, tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(AllocatorError, match=message):
        train(small_config(coco, tmp_path), settings=[setting], progress=False)


def test_penalties_need_norms_that_are_trained(coco: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"l1 needs batch norms that are trained"):
        train(small_config(coco, tmp_path), settings=["final.l1=1e-4", "detector.frozen_norms=true"], progress=False)


def test_an_allocation_of_another_network(coco: Path, tmp_path: Path) -> None:
    _, file = allocated(tmp_path)
    with pytest.raises(AllocationMismatchError):
        train(
            small_config(coco, tmp_path / "run"),
            settings=[f"network.weights={file}", "network.name=recipe:resnet-small"],
            progress=False,
        )


def test_a_file_names_no_code_to_run_as_a_backbone() -> None:
    for backbone, arguments in (("os:getcwd", {}), ("torchvision:resnet18", {"weights": "DEFAULT"})):
        with pytest.raises(UnsafeFileError):
            recipes.build("faster-rcnn", backbone=backbone, backbone_arguments=arguments)
