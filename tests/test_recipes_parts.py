"""Parts of the training recipes by themselves: processes, configurations, data and checkpoints that do not fit."""

from __future__ import annotations

import builtins
import math
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_runs import tiny_config

from allocator.errors import ConfigurationError, DataError, FileError, InputError, MissingPackageError
from allocator.recipes import detection, digits, train
from allocator.recipes.checkpoints import NAME, load_checkpoint, remove_leftovers
from allocator.recipes.configuration import CONFIGS, Training, config_names, load_config
from allocator.recipes.data import Batches, Samples, Tensors, TestBatches, open_data
from allocator.recipes.engine import OneProcess, average_buffers, summed
from allocator.recipes.processes import average_weights, make_accelerator
from allocator.recipes.training import Fit, train_network
from allocator.recipes.training import train as train_by_its_short_name
from allocator.settings import BUDGETS, OPTIONS


@dataclass
class TwoProcesses(OneProcess):
    """As one process sees two, the other of which holds `other` wherever this one holds something."""

    other: float = 0.0
    num_processes: int = 2

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        total = tensor + self.other
        return total if reduction == "sum" else total / 2


def test_sums_and_means_over_processes() -> None:
    engine = TwoProcesses(torch.device("cpu"), other=3.0)
    assert summed([1.0, 2.0], engine) == [4.0, 5.0]
    assert summed([1.0, 2.0], OneProcess(torch.device("cpu"))) == [1.0, 2.0]
    norm = nn.BatchNorm1d(2)
    average_buffers(norm, engine)
    assert norm.running_mean is not None
    assert norm.running_mean.tolist() == [1.5, 1.5]
    assert norm.num_batches_tracked is not None
    assert int(norm.num_batches_tracked) == 0  # no mean of whole numbers
    assert norm.weight.tolist() == [1.0, 1.0]
    average_weights(norm, engine)
    assert norm.weight.tolist() == [2.0, 2.0]


@dataclass
class Counting(OneProcess):
    """Notes what the loop asks for."""

    asked: list[str] = field(default_factory=list)

    def no_sync(self, model: nn.Module) -> Any:
        self.asked.append("no_sync")
        return super().no_sync(model)

    def clip_grad_norm_(self, parameters: Any, max_norm: float) -> torch.Tensor:
        self.asked.append(f"clip {max_norm}")
        return super().clip_grad_norm_(parameters, max_norm)


def test_gradients_are_exchanged_with_the_last_chunk_and_clipped_once() -> None:
    batches = Batches(Samples(Tensors(torch.randn(8, 3, 4, 4), torch.arange(8) % 2)), 8, device_batch=2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    engine = Counting(torch.device("cpu"))
    fit = Fit(model, batches, Training(epochs=1, lr=0.1, batch_size=8, device_batch=2, clip=0.5), engine)
    fit.run(lambda _: None, lambda _: None)
    assert engine.asked == ["no_sync"] * 3 + ["clip 0.5"]


def test_an_average_and_a_scaler_come_back_with_the_state() -> None:
    class Scaler:
        scale = 1.0

        def state_dict(self) -> dict[str, float]:
            return {"scale": self.scale}

        def load_state_dict(self, state: dict[str, float]) -> None:
            self.scale = state["scale"]

    def fit_with(scale: float) -> Fit:
        batches = Batches(Samples(Tensors(torch.randn(4, 3, 4, 4), torch.arange(4) % 2)), 4)
        engine: Any = OneProcess(torch.device("cpu"))
        engine.scaler = Scaler()
        engine.scaler.scale = scale
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
        return Fit(model, batches, Training(epochs=1, lr=0.1, batch_size=4, average=0.5), engine)

    first, second = fit_with(8.0), fit_with(1.0)
    first.run(lambda _: None, lambda _: None)
    second.load_state_dict(first.state_dict())
    assert second.engine.scaler.scale == 8.0  # type: ignore[attr-defined]
    for name, tensor in first.result().state_dict().items():
        assert torch.equal(tensor, second.result().state_dict()[name])


def test_the_short_name_is_the_same_function() -> None:
    assert train_by_its_short_name is train_network


# --------------------------------------------------------------------------------------------- configurations


def misfits(**changes: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_config(tiny_config("runs/none", **changes))
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": 3}, "data: expected a section, got 3"),
        ({"data": {"arguments": [1]}}, "data.arguments: expected a section, got [1]"),
        ({"data": {"dataset": "digits", "mean": [1, "x"]}}, "data.mean: expected a list, each a number, got [1, 'x']"),
        ({"allocation": {"exclude": [1]}}, "allocation.exclude: expected a list, each text, got [1]"),
        ({"allocation": {"exclude": "fc"}}, "allocation.exclude: expected a list, got 'fc'"),
        ({"allocation": {"same": [["fc", 1]]}}, "allocation.same: expected a list, each text, got [['fc', 1]]"),
        ({"allocation": {"flops": 0}}, "allocation: flops=0.0 must be positive and finite"),
        ({"allocation": {"params": "many"}}, "allocation: params='many' is not a number such as 10e6 or '10M'"),
        ({"allocation": {"latency": "8 hours"}}, "allocation: latency='8 hours' is not a number such as 0.008"),
        ({"allocation": {"activations": True}}, "allocation.activations: expected a number or text or null, got True"),
        ({"allocation": {"peak_activations": math.nan}}, "allocation: peak_activations=nan must be positive"),
        ({"allocation": {"flop": "60%"}}, "unknown key allocation.flop; did you mean flops?"),
        ({"allocation": {"at_least": "some"}}, "allocation: at_least='some' is neither a number of channels nor"),
        ({"allocation": {"at_least": {"fc": -1}}}, "allocation: at_least=-1 is neither a number of channels nor"),
        ({"allocation": {"multiple": 0}}, "expected allocation.multiple and allocation.samples above zero"),
        ({"allocation": {"criterion": "fishr"}}, "allocation: no criterion 'fishr'; did you mean 'fisher'?"),
        ({"allocation": {"criterion": 3}}, "allocation.criterion: expected text or a list, each text, got 3"),
        ({"final": {"epochs": True}}, "final.epochs: expected a whole number, got True"),
        ({"final": {"epochs": 1, "lr": math.nan}}, "final.lr: expected a number > 0, got nan"),
        ({"final": {"epochs": 1, "weight_decay": math.inf}}, "final.weight_decay: expected a number >= 0, got inf"),
        ({"seed": None, "final": None}, "nothing to train: give seed, final or both"),
        ({"allocation": None}, "seed and final without an allocation between them"),
        ({"data": {"dataset": "digits", "mean": [0.5]}}, "data.mean has 1 values, data.std 0"),
        ({"data": {"dataset": "digits", "augment": "shift"}}, "data.augment=shift needs data.side"),
        ({"data": {"workers": -1}}, "expected data.workers >= 0"),
        ({"detector": {}}, "detector is for task=detection"),
        ({"task": "detection"}, "task=detection needs a section detector"),
        ({"task": "detection", "detector": {"trained_stages": -1}}, "detector.trained_stages: expected a number >= 0"),
    ],
)
def test_what_does_not_fit_is_said(changes: dict[str, Any], message: str) -> None:
    assert message in misfits(**changes)


def test_all_that_does_not_fit_is_said_at_once() -> None:
    message = misfits(precision="fp8", seed=None, final={"epochs": 0, "schedule": "steps"})
    assert message.splitlines()[1:] == [
        "  precision: expected fp32 or bf16 or fp16, got 'fp8'",
        "  final.epochs: expected a number >= 1, got 0",
        "  final.schedule=steps needs final.milestones, in epochs",
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("final.lr", "'final.lr' is not of the form section.key=value"),
        ("=3", "'=3' is not of the form section.key=value"),
        ("precision.x=3", "'precision.x=3': precision is no section"),
        ("final.lr=[", r"'final.lr=\[': the value is not YAML"),
    ],
)
def test_settings_that_do_not_fit(setting: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_config({**tiny_config("runs/none"), "precision": "fp32"}, [setting])


def test_a_setting_opens_a_section_and_leaves_what_it_shares_alone() -> None:
    shared = {"epochs": 2}
    config = load_config(tiny_config("runs/none", seed=shared, final=shared), ["final.lr=0.3"])
    assert config.final is not None
    assert config.seed is not None
    assert (config.seed.lr, config.final.lr) == (0.1, 0.3)
    assert shared == {"epochs": 2}


def test_a_setting_makes_the_section_that_is_missing() -> None:
    config = load_config(tiny_config("runs/none", allocation=None), ["allocation.exclude=['fc']"])
    assert config.allocation is not None
    assert config.allocation.exclude == ("fc",)
    assert config.to_dict()["allocation"]["exclude"] == ["fc"]
    assert load_config(config.to_dict()) == config


@pytest.mark.parametrize("at_least", [None, 8, "25%", {"layer1.*": 4, "*": "10%"}])
def test_an_option_of_several_forms_comes_as_it_is_written(at_least: Any) -> None:
    config = load_config(tiny_config("runs/none", allocation={"at_least": at_least}))
    assert config.allocation is not None
    assert config.allocation.at_least == at_least
    assert load_config(config) == config


def test_every_budget_and_option_is_a_key() -> None:
    given: dict[str, Any] = {
        "flops": "4.2G",
        "params": 10e6,
        "activations": "5M",
        "peak_activations": "60%",
        "latency": "8ms",
        "policy": "priced",
        "criterion": ["fisher", "magnitude"],
        "scope": "all",
        "fill": False,
        "groups": "width",
        "norms": "loose",
        "exclude": ["fc"],
        "include": ["layer*"],
        "same": [["layer1.*", "layer2.*"], "layer3.*"],
        "at_least": {"*": "10%"},
        "multiple": 8,
    }
    assert given.keys() == {*BUDGETS, *OPTIONS}
    plan = load_config(tiny_config("runs/none", allocation=given)).allocation
    assert plan is not None
    lists = {"exclude", "include", "same"}
    assert plan.budgets() == {name: given[name] for name in BUDGETS}
    assert plan.options() == {name: tuple(given[name]) if name in lists else given[name] for name in OPTIONS}
    assert plan.looks_at_data()


def test_the_paper_s_rule_and_half_of_the_flops_are_the_defaults() -> None:
    plan = load_config(tiny_config("runs/none", allocation={})).allocation
    assert plan is not None
    assert plan.budgets() == {"flops": "50%"}
    assert (plan.criterion, plan.scope, plan.weights) == ("bn_scale", "narrowest", "reset")
    assert not plan.looks_at_data()
    other = load_config(tiny_config("runs/none", allocation={"params": "60%", "criterion": "auto"})).allocation
    assert other is not None
    assert other.budgets() == {"params": "60%"}
    assert not other.looks_at_data()


@pytest.mark.parametrize("name", [name for name in config_names() if load_config(name).allocation is not None])
def test_installed_configurations_state_the_paper_s_rule(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    for line in ("criterion: bn_scale", "policy: per_block", "scope: narrowest"):
        assert f"\n  {line}" in text


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [\n"])
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=r"bad.yaml(: expected sections .* got a list| is not YAML)"):
        load_config(tmp_path / "bad.yaml")


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Let imports of a package fail, as where it is not installed."""
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(tiny_config(tmp_path))
    without(monkeypatch, "yaml")
    with pytest.raises(MissingPackageError, match=r"configurations are YAML: pip install 'neuron-allocator\[train\]'"):
        load_config("scalenet_digits")
    without(monkeypatch, "accelerate")
    with pytest.raises(MissingPackageError, match="training needs accelerate"):
        make_accelerator(config)
    without(monkeypatch, "torchvision")
    with pytest.raises(MissingPackageError, match="image data are read by torchvision"):
        open_data(config.data, 0)
    without(monkeypatch, "sklearn")
    with pytest.raises(MissingPackageError, match="the digits come with scikit-learn"):
        digits.load()


def test_tensorboard_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allocator.recipes.processes.find_spec", lambda name: None)
    config = load_config(tiny_config(tmp_path), ["run.tensorboard=true"])
    with pytest.raises(MissingPackageError, match=r"run\.tensorboard needs TensorBoard"):
        make_accelerator(config)


def test_processes_that_do_not_see_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(tiny_config(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: types.SimpleNamespace(num_processes=1))
    with pytest.raises(ConfigurationError, match="2 processes were launched, accelerate sees 1"):
        make_accelerator(config)


def test_a_dry_run_does_something(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="a dry run of at least one update, got 0"):
        train(tiny_config(tmp_path), dry_run=0)


# ------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "tapes"}, "expected folder, digits or torchvision:NAME, got 'tapes'"),
        ({"dataset": "digits", "arguments": {"sise": 3}}, "data.arguments do not fit digits.load: .*sise"),
        ({"dataset": "folder"}, "data.root is missing"),
        ({"dataset": "torchvision:FakeDatas"}, "torchvision has no data set 'FakeDatas'; did you mean FakeData"),
        ({"dataset": "torchvision:MNIST"}, r"torchvision:MNIST does not open with \{'root': .*'train': True\}"),
        ({"dataset": "torchvision:SVHN"}, r"torchvision:SVHN does not open with \{'root': .*'split': 'train'\}"),
        ({"dataset": "torchvision:FakeData", "arguments": {"size": 0}}, "there are no training images in torchvision"),
    ],
)
def test_data_that_do_not_open(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    if changes["dataset"] not in ("folder", "digits"):
        changes = {**changes, "root": str(tmp_path)}
    config = load_config(tiny_config("runs/none", data=changes))
    with pytest.raises(DataError, match=message):
        open_data(config.data, 0)


def test_lists_in_a_configuration_are_tuples_to_the_digits() -> None:
    arguments = {"side": 12, "sizes": [8, 10], "copies": [1, 1]}
    config = load_config(tiny_config("runs/none", data={"dataset": "digits", "arguments": arguments}))
    data = open_data(config.data, 0)
    assert (data.classes, tuple(data.train[0, 0][0].shape)) == (10, (1, 12, 12))  # type: ignore[union-attr]


class Unreadable:
    """Images of which those in `bad` cannot be read."""

    def __init__(self, count: int, bad: set[int], side: int = 2):
        self.count, self.bad, self.side = count, bad, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index in self.bad:
            raise OSError("cannot identify")
        return torch.full((1, self.side + index % 2, 2), float(index)), index


def test_what_takes_the_place_of_an_image_that_cannot_be_read() -> None:
    source = Unreadable(4, {1, 3})
    image, label, unread = Samples(source, corrupt="replace")[0, 1]
    assert image is not None
    assert (label, unread) == (2, ("image 1 (cannot identify)",))
    assert Samples(source, corrupt="replace")[0, 3][1] == 0  # from the beginning
    assert Samples(source, corrupt="drop")[0, 1] == (None, -1, ("image 1 (cannot identify)",))
    only_gaps = next(iter(TestBatches(Samples(Unreadable(2, {0, 1}), corrupt="drop"), 2)))
    assert len(only_gaps.images) == len(only_gaps.labels) == 0
    assert len(only_gaps.corrupt) == 2


def test_images_that_make_no_batch() -> None:
    with pytest.raises(DataError, match="none of the 2 images can be read, such as image 0"):
        list(Batches(Samples(Unreadable(2, {0, 1}), corrupt="replace"), 2).epoch(0))
    with pytest.raises(DataError, match=r"images differ in shape \(\(1, 2, 2\), \(1, 3, 2\)\): set data.side"):
        list(TestBatches(Samples(Unreadable(4, set())), 4))
    with pytest.raises(InputError, match="3 training images are fewer than one batch of 4"):
        Batches(Samples(Unreadable(3, set())), 4, world=2)


def test_torchvision_is_asked_for_by_detectors(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(Exception, match=r"detection needs torchvision and pycocotools: .*\[detection\]") as caught:
        detection.faster_rcnn(nn.Identity(), 2)
    assert type(caught.value).__name__ == "UnsupportedModelError"


# ------------------------------------------------------------------------------------------------- checkpoints


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    config = load_config(tiny_config(tmp_path))
    assert load_checkpoint(tmp_path, config) is None
    (tmp_path / NAME).write_bytes(b"no checkpoint")
    with pytest.raises(FileError, match="is damaged or not a checkpoint"):
        load_checkpoint(tmp_path, config)
    torch.save({"format": 99}, tmp_path / NAME)
    with pytest.raises(FileError, match="is not a checkpoint of this version"):
        load_checkpoint(tmp_path, config)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / f".{NAME}.12.tmp").write_bytes(b"half")
    (tmp_path / "notes.tmp").write_text("mine")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.tmp"]
