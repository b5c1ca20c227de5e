"""Configurations, order of the data, the loop's parts, and whole runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from training_runs import TwoBranches, tiny_config

import allocator
from allocator.cli import main
from allocator.recipes import train
from allocator.recipes.configuration import Training, config_names, load_config
from allocator.recipes.data import Batches, Samples, Tensors, TestBatches
from allocator.recipes.engine import OneProcess
from allocator.recipes.tasks import accuracy_on
from allocator.recipes.training import Fit, rate_share
from allocator.recovering.record import recovery_of

CPU = OneProcess(torch.device("cpu"))


def numbered(count: int) -> Samples:
    """Images whose only pixel is their number."""
    return Samples(Tensors(torch.arange(count).float().reshape(-1, 1, 1, 1), torch.zeros(count).long()))


def random_batches(count: int = 32, size: int = 8, **options: Any) -> Batches:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    return Batches(Samples(Tensors(images, torch.arange(count) % 4)), size, **options)


def nothing(_: Fit) -> None:
    """For runs that nobody watches."""


# ------------------------------------------------------------------------------------------- configurations


def test_installed_configurations_are_complete() -> None:
    assert {"scalenet_digits", "resnet_digits"} <= set(config_names())
    for name in config_names():
        config = load_config(name)
        assert config.final is not None, name
        if config.task == "classification":
            assert config.seed is not None, name
            assert config.allocation is not None, name
        assert load_config(config.to_dict()) == config


def test_settings_change_a_configuration() -> None:
    settings = [
        "final.lr=5e-2",
        "allocation.flops=4.2e9",
        "seed=null",
        "run.output=/x y",
        "data.mean=[0.5]",
        "data.std=[1]",
    ]
    config = load_config("scalenet_digits", settings)
    assert config.final is not None
    assert config.final.lr == 0.05
    assert config.final.epochs == 4
    assert config.allocation is not None
    assert config.allocation.flops == 4.2e9
    assert config.seed is None
    assert config.run.output == "/x y"
    assert config.data.std == [1.0]
    unchanged = load_config("scalenet_digits")
    assert unchanged.final is not None
    assert unchanged.final.lr == 0.1


def test_a_file_and_its_anchors(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "network: {name: 'recipe:resnet-small'}\n"
        "data: {dataset: digits}\n"
        "x-common: &common {epochs: 3, lr: 1e-2}\n"
        "final: {<<: *common, epochs: 5}\n"
    )
    config = load_config(path)
    assert config.final == Training(5, 0.01)
    assert yaml.safe_load(yaml.safe_dump(config.to_dict())) == config.to_dict()


# --------------------------------------------------------------------------------------------------- order


def test_every_image_once_per_epoch_in_another_order() -> None:
    batches = Batches(numbered(23), 5, seed=3)
    epochs = [[chunk.images.flatten() for chunks in batches.epoch(e) for chunk in chunks] for e in (0, 1, 0)]
    assert len(batches) == 4
    for epoch in epochs:
        assert [len(chunk) for chunk in epoch] == [5, 5, 5, 5]
        assert len(torch.cat(epoch).unique()) == 20
    assert torch.equal(torch.cat(epochs[0]), torch.cat(epochs[2]))
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))


def test_an_epoch_goes_on_in_the_middle() -> None:
    batches = Batches(numbered(24), 4, device_batch=2, seed=3)
    whole = [torch.cat([chunk.images for chunk in chunks]) for chunks in batches.epoch(5)]
    rest = [torch.cat([chunk.images for chunk in chunks]) for chunks in batches.epoch(5, 4)]
    assert len(rest) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_a_batch(world: int) -> None:
    """Chunk k of a batch goes to process k % world; together they are the batch of one process."""
    alone = [torch.cat([chunk.images for chunk in chunks]) for chunks in Batches(numbered(40), 8, 2).epoch(1)]
    ranks = [list(Batches(numbered(40), 8, 2, rank=rank, world=world).epoch(1)) for rank in range(world)]
    for i, batch in enumerate(alone):
        shares = [ranks[k % world][i][k // world].images for k in range(4)]
        assert torch.equal(torch.cat(shares), batch)


def test_test_images_fall_to_one_process_each() -> None:
    shares = [torch.cat([b.images for b in TestBatches(numbered(17), 4, rank=r, world=3)]) for r in range(3)]
    assert torch.cat(shares).flatten().sort().values.tolist() == list(range(17))


def test_augmentation_depends_on_epoch_and_image_alone() -> None:
    def noisy(image: Tensor) -> Tensor:
        return image + torch.rand(1)

    samples = Samples(numbered(9).source, noisy, seed=4)
    first = samples[(2, 5)][0]
    torch.rand(7)
    assert torch.equal(torch.as_tensor(first), torch.as_tensor(samples[(2, 5)][0]))
    assert not torch.equal(torch.as_tensor(first), torch.as_tensor(samples[(3, 5)][0]))


# ---------------------------------------------------------------------------------------------------- loop


def test_multi_step_schedule() -> None:
    options = Training(6, schedule="steps", milestones=[2, 4.5], gamma=0.1, warmup=0.5)
    rates = [rate_share(options, step, 4) for step in range(24)]
    assert rates[:2] == pytest.approx([1 / 3, 2 / 3])
    assert rates[2:8] == [1.0] * 6
    assert rates[8:18] == pytest.approx([0.1] * 10)
    assert rates[18:] == pytest.approx([0.01] * 6)


def test_accumulated_gradients_are_those_of_the_batch() -> None:
    """Without batch norm, two forwards of four images are one forward of eight."""
    torch.manual_seed(2)
    start = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).double()
    weights = []
    for chunk in (None, 4, 2):
        batches = random_batches(device_batch=chunk)
        batches.samples.source.images = batches.samples.source.images.double()  # type: ignore[attr-defined]
        model = copy.deepcopy(start)
        Fit(model, batches, Training(2, batch_size=8), CPU).run(nothing, nothing)
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.allclose(weights[0], weights[1], rtol=1e-10)
    assert torch.allclose(weights[0], weights[2], rtol=1e-10)
    assert not torch.equal(weights[0], nn.utils.parameters_to_vector(start.parameters()))


def test_l1_shrinks_the_scales() -> None:
    found = []
    for l1 in (0.0, 0.05):
        torch.manual_seed(2)
        fit = Fit(TwoBranches(), random_batches(), Training(10, batch_size=8, weight_decay=0.0, l1=l1), CPU)
        fit.run(nothing, nothing)
        found.append(nn.utils.parameters_to_vector(fit.scales).abs().mean())
    assert found[1] < 0.8 * found[0]


def test_gradients_are_clipped() -> None:
    model = TwoBranches()
    before = torch.cat([each.detach().flatten() for each in model.parameters()])
    options = Training(1, 1.0, batch_size=32, momentum=0.0, weight_decay=0.0, clip=1e-3)
    Fit(model, random_batches(size=32), options, CPU).run(nothing, nothing)
    after = torch.cat([each.detach().flatten() for each in model.parameters()])
    # One update at rate 1 moves the weights by the gradient, whose norm is cut to 1e-3.
    assert (after - before).norm() == pytest.approx(1e-3, rel=1e-2)


def test_the_average_is_the_result() -> None:
    torch.manual_seed(2)
    model = TwoBranches()
    seen = [copy.deepcopy(model.state_dict())]
    fit = Fit(model, random_batches(), Training(1, batch_size=8, average=0.9), CPU)

    def note(current: Fit) -> None:
        seen.append(copy.deepcopy(current.module.state_dict()))

    fit.run(note, note)
    assert isinstance(fit.average, AveragedModel)
    for key in ("fc.weight", "left.1.running_mean"):
        expected = seen[1][key]  # the first update starts the average
        for state in seen[2:]:
            expected = 0.9 * expected + 0.1 * state[key]
        assert torch.allclose(fit.result().state_dict()[key], expected, atol=1e-6), key
    assert not torch.allclose(fit.result().state_dict()["fc.weight"], model.fc.weight)


def test_a_state_goes_on_whatever_was_drawn_since() -> None:
    """Dropout is on, and no transform of an image sets the random state."""
    options = Training(2, batch_size=8, average=0.5)
    results = []
    for stops in (False, True):
        torch.manual_seed(2)
        fit = Fit(TwoBranches(), random_batches(), options, CPU)
        states: list[dict[str, Any]] = []

        def note(current: Fit, states: list[dict[str, Any]] = states) -> None:
            states.append(copy.deepcopy(current.state_dict()))

        fit.run(note, nothing)
        if stops:
            torch.manual_seed(99)
            fit = Fit(TwoBranches(), random_batches(), options, CPU)
            fit.load_state_dict(states[1])
            assert fit.step == 2
            fit.run(nothing, nothing)
        results.append(fit.result().state_dict() | fit.module.state_dict())
    for key, tensor in results[0].items():
        assert torch.equal(tensor, results[1][key]), key


def test_recalibration_gives_the_statistics_of_the_images() -> None:
    torch.manual_seed(2)
    model = TwoBranches()
    fit = Fit(model, random_batches(), Training(1, batch_size=8, recalibrate=4), CPU)
    with torch.no_grad():
        model.left[1].running_mean.fill_(7.0)  # type: ignore[operator]
    fit.recalibrate()
    images = fit.batches.samples.source.images  # type: ignore[attr-defined]
    expected = model.left[0](images).mean((0, 2, 3))
    assert torch.allclose(model.left[1].running_mean, expected, atol=1e-5)  # type: ignore[arg-type]


def test_accuracy_without_unreadable_images() -> None:
    class Half:
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            if index % 2:
                raise OSError("broken")
            return torch.zeros(3, 8, 8), 0 if index < 4 else 1

    model = TwoBranches()
    with torch.no_grad():
        model.fc.bias.copy_(torch.tensor([99.0, 0, 0, 0]))
    corrupt: set[str] = set()
    batches = TestBatches(Samples(Half(), corrupt="drop"), batch_size=3)
    assert accuracy_on(model, batches, CPU, corrupt) == 0.5
    assert corrupt == {f"image {i} (broken)" for i in (1, 3, 5, 7)}


# -------------------------------------------------------------------------------------------------- whole runs


def test_a_whole_run(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    config["run"]["tensorboard"] = True
    result = train(config, progress=False)
    assert result.allocation is not None
    assert [stage.name for stage in result.stages] == ["seed", "final"]
    assert result.stages[0].flops == result.allocation.flops_before
    assert result.stages[1].flops == result.allocation.flops_after <= 0.6 * result.allocation.flops_before
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"allocation.json", "checkpoint.pt", "config.json", "logs", "model.safetensors", "results.json"}
    assert any((tmp_path / "run" / "logs").iterdir())
    seed = allocator.load(tmp_path / "run" / "seed.safetensors", trust=True)
    final = allocator.load(tmp_path / "run" / "model.safetensors", trust=True)
    small = allocator.apply(seed, tmp_path / "run" / "allocation.json")
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in final.state_dict().items()}
    facts = json.loads((tmp_path / "run" / "results.json").read_text())
    assert facts["stages"][1]["test_accuracy"] == result.stages[1].test_accuracy
    # A finished run that is resumed only says again what it found.
    again = train(config, resume=True, progress=False)
    assert [stage.test_accuracy for stage in again.stages] == [stage.test_accuracy for stage in result.stages]
    assert all(torch.equal(a, b) for a, b in zip(final.state_dict().values(), again.model.state_dict().values()))


def test_fine_tuning_starts_from_the_seed_and_reset_does_not(tmp_path: Path) -> None:
    found = {}
    for weights in ("keep", "reset"):
        config = tiny_config(tmp_path / weights, allocation={"flops": "60%", "weights": weights})
        config["final"] = {"epochs": 1, "lr": 1e-9, "batch_size": 96, "weight_decay": 0.0}
        result = train(config, progress=False)
        seed = allocator.load(tmp_path / weights / "seed.safetensors", trust=True)
        kept = allocator.apply(seed, tmp_path / weights / "allocation.json")
        trained, start = (each.get_parameter("fc.weight") for each in (result.model, kept))
        found[weights] = torch.allclose(trained, start, atol=1e-6)
    assert found == {"keep": True, "reset": False}


@pytest.mark.parametrize("trained", [True, False])
def test_what_is_left_is_recovered_before_it_is_trained(tmp_path: Path, trained: bool) -> None:
    config = tiny_config(tmp_path, allocation={"flops": "50%", "weights": "keep", "recover": "least_squares"})
    config["final"] = {"epochs": 1, "lr": 1e-9, "batch_size": 96, "weight_decay": 0.0} if trained else None
    train(config, progress=False)
    seed, left = (allocator.load(tmp_path / f"{name}.safetensors", trust=True) for name in ("seed", "model"))
    cut = allocator.apply(seed, tmp_path / "allocation.json")
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, before, after = (network.eval()(images) for network in (seed, cut, left))
    assert (after - wanted).square().mean() < 0.9 * (before - wanted).square().mean()
    assert (recovery_of(left) is None) == trained


def test_an_allocation_from_a_file(tmp_path: Path) -> None:
    allocation = allocator.allocate(TwoBranches(), "60%", example_inputs=torch.zeros(1, 3, 16, 16), criterion="random")
    allocation.allocation.save(tmp_path / "alloc.json")
    config = tiny_config(tmp_path / "run", seed=None, allocation={"file": str(tmp_path / "alloc.json")})
    result = train(config, progress=False)
    assert [stage.name for stage in result.stages] == ["final"]
    assert result.allocation is not None
    assert result.allocation.kept == allocation.allocation.kept


def test_a_budget_of_parameters_by_a_criterion_that_looks_at_the_training_images(tmp_path: Path) -> None:
    plan = {"params": "60%", "activations": "90%", "criterion": ["fisher", "taylor"], "scope": "all", "samples": 40}
    result = train(tiny_config(tmp_path / "run", allocation=plan), progress=False)
    assert result.allocation is not None
    assert result.allocation.criterion == "fisher+taylor"
    assert result.allocation.scope == "all"
    for name, share in (("params", 0.6), ("activations", 0.9)):
        assert result.allocation.costs[name]["after"] <= share * result.allocation.costs[name]["before"]


def test_bfloat16_on_the_cpu(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", precision="bf16", allocation=None, final=None)
    result = train(config, progress=False)
    assert result.model(torch.zeros(1, 3, 16, 16)).dtype == torch.float32
    assert {each.dtype for each in result.model.parameters()} == {torch.float32}


def test_a_dry_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "never"
    arguments = ["train", "scalenet_digits", "--dry-run", "2", "--set", f"run.output={output}", "--json", "-q"]
    assert main(arguments) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in facts["stages"]] == ["seed", "final"]
    assert facts["allocation"]["flops_after"] <= 0.5 * facts["allocation"]["flops_before"]
    assert facts["folder"] is None
    assert not output.exists()
