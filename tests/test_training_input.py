"""What is wrong with a configuration, data, checkpoints or the disk is said, by name."""

from __future__ import annotations

import math
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from training_runs import tiny_config

import allocator
from allocator.cli import main
from allocator.errors import (
    AllocationMismatchError,
    ConfigurationError,
    DataError,
    FileError,
    InputError,
    MissingPackageError,
    UnknownNameError,
)
from allocator.recipes import train
from allocator.recipes.checkpoints import load_checkpoint, save_checkpoint
from allocator.recipes.configuration import load_config
from allocator.recipes.data import Batches, Samples, Tensors
from allocator.recipes.outcome import RunResult
from allocator.recipes.training import NonFiniteLossError


def short_config(folder: Path, **changes: Any) -> dict[str, Any]:
    """One network, one epoch of two updates."""
    training = {"epochs": 1, "batch_size": 4}
    return tiny_config(folder / "run", seed=None, allocation=None, final=training, **changes)


def write_images(root: Path, classes: int = 4, each: int = 2, side: int = 20) -> None:
    """Generated images in ImageFolder's form, train/CLASS/IMAGE and val/CLASS/IMAGE."""
    for part in ("train", "val"):
        for label in range(classes):
            folder = root / part / f"class{label:04d}"
            folder.mkdir(parents=True)
            for i in range(each):
                colour = (label * 37 % 256, i * 91 % 256, len(part) * 20)
                Image.new("RGB", (side, side + 4), colour).save(folder / f"{i}.jpg")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / "images")
    return tmp_path / "images"


def folder_data(root: Path, **changes: Any) -> dict[str, Any]:
    return {"dataset": "folder", "root": str(root), "side": 16, "resize": 18, "augment": "imagenet"} | changes


# ------------------------------------------------------------------------------------------- configuration


def test_unknown_recipe_and_depth_name_near_ones(tmp_path: Path) -> None:
    config = short_config(tmp_path, network={"name": "recipe:scalnet50-seed"})
    with pytest.raises(UnknownNameError, match=r"scalnet50-seed.*did you mean.*scalenet50-seed"):
        train(config, progress=False)
    with pytest.raises(UnknownNameError, match=r"scalenet60-seed.*did you mean.*scalenet50-seed"):
        train(config | {"network": {"name": "recipe:scalenet60-seed"}}, resume=True, progress=False)
    network = {"name": "allocator.recipes.scalenet:scalenet_seed", "arguments": {"depth": 99}}
    with pytest.raises(UnknownNameError, match=r"no ScaleNet has 99 layers; there are 50, 101, 152 \(nearest: 101\)"):
        train(config | {"network": network}, resume=True, progress=False)


def test_unknown_configuration_names_near_ones() -> None:
    with pytest.raises(
        UnknownNameError, match=r"'scalenet_digit' is neither a .yaml file.*did you mean scalenet_digits"
    ):
        load_config("scalenet_digit")


def test_all_problems_are_listed_at_once() -> None:
    config = tiny_config("x", precision="fp8")
    config["seed"] = {"epoch": 3, "lr": "fast", "momentum": True}
    config["netwrok"] = {}
    with pytest.raises(ConfigurationError) as caught:
        load_config(config)
    for problem in (
        "unknown key netwrok; did you mean network?",
        "unknown key seed.epoch; did you mean epochs?",
        "seed.epochs is missing",
        "seed.lr: expected a number, got 'fast'",
        "seed.momentum: expected a number, got True",
    ):
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("precision=fp8", "precision: expected fp32 or bf16 or fp16, got 'fp8'"),
        ("final.lr=-1", r"final.lr: expected a number > 0, got -1"),
        ("seed.epochs=0", r"seed.epochs: expected a number >= 1, got 0"),
        ("seed.batch_size=12", "seed.batch_size: expected a multiple of device_batch=8, got 12"),
        ("final.milestones=[]", "final.schedule=steps needs final.milestones"),
        ("allocation=null", "seed and final without an allocation"),
        ("data.side=null", "data.augment=shift needs data.side"),
        ("data.mean=[0.5]", "data.mean has 1 values, data.std 0"),
        ("allocation.recover=magic", "allocation: no recover 'magic'"),
        ("allocation.recover=3", "allocation.recover: expected true or false or text, got 3"),
        ("allocation.recover=true", "allocation.recover refits the weights that are kept: set allocation.weights=keep"),
        (
            "allocation={file: a.json, weights: keep, recover: fold}",
            "refits what is chosen here: leave out allocation.file",
        ),
        ("seed.lr", "'seed.lr' is not of the form section.key=value"),
    ],
)
def test_values_that_do_not_fit(setting: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_config(tiny_config("x"), [setting])


def test_not_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("network: [unclosed")
    with pytest.raises(ConfigurationError, match=r"a.yaml is not YAML"):
        load_config(path)
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(ConfigurationError, match=r"a.yaml is not YAML.*python/object/apply"):
        load_config(path)
    for text, says in (("[" * 20_000 + "]" * 20_000, "too deep within one another"), ("1" * 9_999, "limit")):
        path.write_text(f"a: {text}")
        with pytest.raises(ConfigurationError, match=rf"a.yaml is not YAML: .*{says}"):
            load_config(path)
    with pytest.raises(FileError, match=r"there is no file"):
        load_config(tmp_path / "none.yaml")


ALIASES = "x-0: &a0 [x, x]\n" + "".join(f"x-{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
MERGED = "x-0: &a0 {k: 1}\n" + "".join(
    f"x-{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{ALIASES}network: *a9", "holds more than 100,000 entries"),
        (f"{MERGED}network: *a9", "holds more than 100,000 entries"),
        ("network: &a {b: *a}", "holds what lies within itself"),
        ("network: {name: a, name: b}", r"the key 'name' comes twice \(line 1\)"),
        ("data: {}\nnetwork: {}\ndata: {}", r"the key 'data' comes twice \(line 3\)"),
    ],
    ids=["aliases", "merged", "itself", "twice in a section", "a section twice"],
)
def test_aliases_are_bounded_and_keys_come_once(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=f"a.yaml is not YAML: .*{said}"):
        load_config(tmp_path / "a.yaml")


def test_keys_that_are_no_words(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("1: 2\nnull: 3")
    with pytest.raises(ConfigurationError, match="unknown key 1; known: network"):
        load_config(tmp_path / "a.yaml")


def test_arguments_that_the_network_does_not_take(tmp_path: Path) -> None:
    network = {"name": "training_runs:TwoBranches", "arguments": {"classes": 3}}
    with pytest.raises(ConfigurationError, match=r"network.arguments do not fit training_runs:TwoBranches.*'classes'"):
        train(short_config(tmp_path, network=network), progress=False)


def test_missing_packages_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, message in (("accelerate", "training needs accelerate"), ("yaml", "configurations are YAML")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(MissingPackageError, match=rf"{message}: pip install 'neuron-allocator\[train\]'"):
                train("scalenet_digits" if package == "yaml" else short_config(tmp_path), progress=False)


def test_batches_that_do_not_divide() -> None:
    samples = Samples(Tensors(torch.zeros(20, 1, 1, 1), torch.zeros(20).long()))
    with pytest.raises(InputError, match=r"16 images does not divide into equal shares of 5 images on 3 processes"):
        Batches(samples, 16, world=3)
    with pytest.raises(InputError, match=r"20 training images are fewer than one batch of 64"):
        Batches(samples, 64, 32)


# ---------------------------------------------------------------------------------------------------- data


def test_missing_and_empty_folders(tmp_path: Path, images: Path) -> None:
    def fails(root: Path, message: str, **changes: Any) -> None:
        with pytest.raises(DataError, match=message):
            train(short_config(tmp_path, data=folder_data(root, **changes)), resume=True, progress=False)

    fails(tmp_path / "no", "there is no folder .*no/train: expected train/CLASS/IMAGE and val/CLASS/IMAGE")
    fails(images, "there is no folder .*images/test", test="test")
    (tmp_path / "bare" / "train").mkdir(parents=True)
    fails(tmp_path / "bare", "bare/train has no images in the form CLASS/IMAGE")
    for file in (images / "train" / "class0002").iterdir():
        file.unlink()
    fails(images, "train has no images in the form CLASS/IMAGE: .*class0002")
    shutil.rmtree(images / "val" / "class0001")
    shutil.rmtree(images / "train" / "class0002")
    fails(images, "train has 3 classes and val 3; not in both: class0001, class0002")
    fails(images, "expected folder, digits or torchvision:NAME, got 'imagenet'", dataset="imagenet")
    fails(images, "torchvision has no data set 'CIFAR11'; did you mean CIFAR10", dataset="torchvision:CIFAR11")


def test_wrong_class_count_and_image_shape(tmp_path: Path, images: Path) -> None:
    network = {"name": "training_runs:TwoBranches", "arguments": {"num_classes": 5}}
    message = "the network gives 5 scores, the data have 4 classes: set network.arguments.num_classes=4"
    with pytest.raises(DataError, match=message):
        train(short_config(tmp_path, network=network, data=folder_data(images)), progress=False)
    with pytest.raises(DataError, match=r"does not take images of shape \(1, 1, 32, 32\)"):
        train(short_config(tmp_path, data={"dataset": "digits"}), progress=False, resume=True)


@pytest.fixture
def three_corrupt(images: Path) -> Path:
    whole = (images / "train" / "class0000" / "0.jpg").read_bytes()
    (images / "train" / "class0001" / "0.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "train" / "class0003" / "1.jpg").write_bytes(b"no image")
    (images / "val" / "class0002" / "1.jpg").write_bytes(b"")
    return images


def test_a_corrupt_image_ends_the_run_by_name(tmp_path: Path, three_corrupt: Path) -> None:
    (three_corrupt / "val" / "class0002" / "1.jpg").unlink()
    for workers in (0, 1):
        data = folder_data(three_corrupt, workers=workers)
        with pytest.raises(
            DataError, match=r"cannot read .*/train/class000[13]/[01].jpg \(.*data.check=true"
        ) as caught:
            train(short_config(tmp_path, data=data), resume=True, progress=False)
        assert "Traceback" not in str(caught.value)


def test_corrupt_images_are_counted_ahead(tmp_path: Path, three_corrupt: Path) -> None:
    with pytest.raises(
        DataError, match=r"3 of 16 images cannot be read: .*class0001/0.jpg .*class0003/1.jpg .*2/1.jpg"
    ):
        train(short_config(tmp_path, data=folder_data(three_corrupt, check=True)), progress=False)


def test_corrupt_images_are_skipped_and_listed(tmp_path: Path, three_corrupt: Path) -> None:
    config = short_config(tmp_path, data=folder_data(three_corrupt, corrupt="skip"))
    result = train(config, progress=False)
    assert [Path(name.split(" (")[0]).parts[-3:] for name in result.corrupt] == [
        ("train", "class0001", "0.jpg"),
        ("train", "class0003", "1.jpg"),
        ("val", "class0002", "1.jpg"),
    ]
    # Seven of eight test images are left, so the share is of seven.
    assert (7 * result.stages[0].test_accuracy) == pytest.approx(round(7 * result.stages[0].test_accuracy))


# ----------------------------------------------------------------------------------- checkpoints and the disk


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    config = short_config(tmp_path)
    train(config, progress=False)
    with pytest.raises(FileError, match=r"run holds a run already: resume it \(--resume\), or choose another"):
        train(config, progress=False)
    other = tiny_config(tmp_path / "run", seed=None, allocation=None, final={"epochs": 2, "batch_size": 4})
    with pytest.raises(ConfigurationError, match=r"made with another configuration: final.epochs was 1, is 2"):
        train(other, resume=True, progress=False)
    other = config | {"network": {"name": "recipe:resnet-small", "arguments": {"in_channels": 3, "num_classes": 4}}}
    with pytest.raises(ConfigurationError, match=r"network.name was 'training_runs:TwoBranches', is 'recipe:resnet"):
        train(other, resume=True, progress=False)


def test_a_checkpoint_of_another_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is the same, what it builds has changed since."""
    config = short_config(tmp_path)
    train(config, progress=False)
    wider = allocator.recipes.build("resnet-small", in_channels=3, num_classes=4)
    monkeypatch.setattr("training_runs.TwoBranches", lambda num_classes: wider)
    with pytest.raises(FileError, match=r"checkpoint.pt holds the state of another network: .*Missing key"):
        train(config, resume=True, progress=False)


def test_weights_of_another_network(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(3, 3), tmp_path / "other.pt")
    network = {"name": "training_runs:TwoBranches", "weights": str(tmp_path / "other.pt")}
    with pytest.raises(FileError, match=r"other.pt holds weights of another network: .*Missing key"):
        train(short_config(tmp_path, network=network), progress=False)


def test_damaged_checkpoints_run_no_code(tmp_path: Path) -> None:
    config = load_config(short_config(tmp_path))
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(tmp_path, config, {"stage": "final"})
    good = path.read_bytes()
    for content in (good[: len(good) // 2], b"no checkpoint", b""):
        path.write_bytes(content)
        with pytest.raises(FileError, match=r"checkpoint.pt is (damaged or not a checkpoint|empty)"):
            load_checkpoint(tmp_path, config)
    torch.save({"format": 1, "config": {}, "code": Path}, path)
    with pytest.raises(FileError, match=r"damaged or not a checkpoint"):
        load_checkpoint(tmp_path, config)


@pytest.mark.parametrize("learned", [False, True])
def test_an_allocation_of_another_network(tmp_path: Path, learned: bool) -> None:
    other = allocator.recipes.build("resnet-small-seed")
    allocation = allocator.allocate(
        other, "60%", example_inputs=torch.zeros(1, 1, 32, 32), criterion="random"
    ).allocation
    if learned:
        allocation.kept = {"left.0.weight": [[0, 9], None, None, None]}
    allocation.save(tmp_path / "alloc.json")
    config = short_config(tmp_path) | {"allocation": {"file": str(tmp_path / "alloc.json")}}
    message = (
        "left.0.weight, dim 0: the allocation keeps index 9, the model has 6"
        if learned
        else "which TwoBranches does not"
    )
    with pytest.raises(AllocationMismatchError, match=message):
        train(config, progress=False)


def test_nan_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    config["seed"] |= {"clip": None, "schedule": "steps", "milestones": [1], "gamma": 1e30}
    with pytest.raises(NonFiniteLossError, match=r"became (nan|inf|NaN)"):
        train(config, progress=False)
    state = load_checkpoint(tmp_path / "run", load_config(config))
    assert state is not None
    assert state["fit"]["step"] == 6  # the rate explodes with the second epoch
    assert all(torch.isfinite(tensor).all() for tensor in state["fit"]["model"].values())
    assert all(math.isfinite(loss) for loss in state["fit"]["history"]["loss"])


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing more than `size` bytes fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    config = load_config(short_config(tmp_path))
    with largest_file(10_000), pytest.raises(FileError, match=r"cannot write .*; there is no previous checkpoint"):
        save_checkpoint(tmp_path, config, {"weights": torch.zeros(20_000)})
    save_checkpoint(tmp_path, config, {"weights": torch.ones(20_000)})
    with largest_file(10_000), pytest.raises(FileError, match=r"cannot write .*; the previous checkpoint is kept"):
        save_checkpoint(tmp_path, config, {"weights": torch.zeros(20_000)})
    state = load_checkpoint(tmp_path, config)
    assert state is not None
    assert torch.equal(state["weights"], torch.ones(20_000))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_the_command_line_reports_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "scalenet_digits", "--set", "final.epoch=3"]) == 1
    assert "allocator-cli train: the configuration does not fit:\n  unknown key final.epoch" in capsys.readouterr().err
    assert main(["train", "scalenet_digits", "--dry-run", "1", "--resume"]) == 2
    assert "--resume and --dry-run do not go together" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- ImageNet


def dry_run(name: str, root: Path, *settings: str) -> RunResult:
    """One update on two generated images in ImageNet's folders, in float32."""
    small = [f"{stage}.{key}=2" for stage in ("seed", "final") for key in ("batch_size", "device_batch")]
    given = [f"data.root={root}", "data.workers=0", "precision=fp32", *small, *settings]
    return train(name, settings=given, dry_run=1, progress=False)


def test_an_imagenet_configuration_starts(tmp_path: Path) -> None:
    write_images(tmp_path, classes=1000, each=1)
    result = dry_run("scalenet50", tmp_path, "data.side=64", "data.resize=72", "allocation.flops=55%")
    assert [stage.name for stage in result.stages] == ["seed", "final"]
    assert result.stages[1].flops <= 0.55 * result.stages[0].flops


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["scalenet50", "resnet50", "se_resnet50", "resnext50", "res2net50"])
def test_imagenet_configurations_start_as_given(tmp_path: Path, name: str) -> None:
    """At full size and budget; the batch alone is smaller."""
    write_images(tmp_path, classes=1000, each=1)
    result = dry_run(name, tmp_path)
    asked = load_config(name).allocation
    assert asked is not None
    flops = float(asked.budgets()["flops"])
    assert 0.995 * flops <= result.stages[1].flops <= flops
