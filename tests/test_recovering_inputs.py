"""Recovering on data of all sorts: what cannot be used is refused, and what was done stays with the model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import recovering_ranks
import torch
from recovering_cases import drop
from subjects import IMAGE, Branches, untouched
from torch import Tensor, nn

import allocator
from allocator.cli import main
from allocator.recovering.record import recovery_of


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = Branches()
    for _ in range(10):
        net(torch.randn(32, 3, 16, 16))
    return net.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(80, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def result(model: nn.Module) -> allocator.Result:
    return allocator.allocate(model, "50%", example_inputs=IMAGE)


# Data that are no good ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "a few hundred inputs"),
        ([], "the data are empty"),
        (torch.randn(1, 3, 16, 16), "a single input"),
        (torch.full((20, 3, 16, 16), torch.nan), "NaN or infinite"),
        (torch.full((20, 3, 16, 16), torch.inf), "NaN or infinite"),
        (torch.zeros(20, 3, 16, 16), "the same number throughout"),
        (torch.randn(20, 4, 16, 16), "the model raised RuntimeError"),
        (torch.randint(9, (20, 3, 16, 16)), "the model raised RuntimeError"),
        (["a picture"], "yield a str"),
    ],
)
def test_data_that_are_no_good_are_refused(result: allocator.Result, data: Any, said: str) -> None:
    with untouched(result.model), pytest.raises(allocator.DataError, match=said):
        allocator.recover(result, data)


def test_other_dtypes_are_converted_and_other_sizes_go_through(result: allocator.Result, images: Tensor) -> None:
    for data in (images.double(), torch.randn(40, 3, 20, 24)):
        recovery = allocator.recover(result, data).recovery
        assert recovery is not None
        assert recovery.after < recovery.before


def test_two_inputs_are_few_and_it_says_so(result: allocator.Result, images: Tensor) -> None:
    recovery = allocator.recover(result, images[:2, :, :4, :4], "least_squares").recovery
    assert recovery is not None
    (wide,) = [layer for layer in recovery.layers if layer.name == "wide.weight"]
    assert wide.note.startswith("16 rows for ")
    auto = allocator.recover(result, images[:2]).recovery
    assert auto is not None
    assert auto.after <= auto.before


def test_no_more_inputs_than_asked_for(result: allocator.Result, images: Tensor) -> None:
    def forever() -> Any:
        while True:
            yield images[:10]

    recovery = allocator.recover(result, forever(), "batch_norm", samples=35).recovery
    assert recovery is not None
    assert recovery.inputs + recovery.held == 35


def test_calls_that_recover_in_one_go_say_what_is_missing(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(allocator.DataError, match="recover needs data"):
        allocator.allocate(model, "50%", recover=True)
    with pytest.raises(allocator.InputError, match="leave out"):
        allocator.allocate(model, "50%", data=images, recover=True, weights="reset")
    wrong: Any = "magic"
    with pytest.raises(allocator.UnknownNameError, match="no recover 'magic'"):
        allocator.allocate(model, "50%", data=images, recover=wrong)
    with pytest.raises(allocator.UnknownNameError, match="no method 'magic'"):
        allocator.recover(allocator.allocate(model, "50%", example_inputs=IMAGE), images, wrong)


def test_what_is_no_result_and_no_number_is_refused(result: allocator.Result, images: Tensor) -> None:
    nothing: Any
    for nothing in (result.model, result.allocation, None):
        with pytest.raises(allocator.InputError, match=r"pass what allocator\.allocate gave"):
            allocator.recover(nothing, images)
    for nothing in (0, 1, 1.5, None):
        with pytest.raises(allocator.InputError, match="whole number"):
            allocator.recover(result, images, samples=nothing)


def test_an_iterator_serves_choice_and_recovery(model: nn.Module, images: Tensor) -> None:
    made = allocator.allocate(model, "50%", data=iter(images.split(20)), recover=True, example_inputs=IMAGE)
    assert made.recovery is not None
    assert made.recovery.inputs + made.recovery.held == 80


def boxes_of(images: Tensor) -> list[dict[str, Tensor]]:
    """As of a detector: what is in each of the images, as many as it says."""
    return [{"boxes": image.flatten()[: 4 * (1 + number % 2)].reshape(-1, 4)} for number, image in enumerate(images)]


def numbers_of(images: Tensor) -> list[float]:
    return images.flatten(1)[:, 0].tolist()


def counts_of(images: Tensor) -> Any:
    return images.flatten(1)[:, 0].numpy()


def parts_of(images: Tensor) -> dict[str, Tensor]:
    """As of Ultralytics' loader: two boxes per image, with the number of the image in its batch."""
    return {"of": torch.arange(len(images)).repeat_interleave(2), "boxes": images.flatten(1)[:, :8].reshape(-1, 4)}


@pytest.mark.parametrize("targets_of", [boxes_of, numbers_of, counts_of, parts_of])
@pytest.mark.parametrize("size", [1, 5, 16])
def test_targets_stay_with_their_inputs(
    model: nn.Module, images: Tensor, size: int, targets_of: Callable[[Tensor], Any]
) -> None:
    """Whatever a loader gives beside a batch comes to the loss as it was, and the choice sees nothing held back."""
    data = [(part, targets_of(part)) for part in images.split(size)]
    known = {(len(part), repr(target)) for part, target in data}
    seen: list[int] = []

    def loss(output: Tensor, target: Any) -> Tensor:
        assert (len(output), repr(target)) in known
        seen.append(len(output))
        return output.square().mean()

    made = allocator.allocate(
        model, "50%", data=data, loss=loss, recover="batch_norm", criterion="taylor", example_inputs=IMAGE
    )
    assert made.recovery is not None
    assert made.recovery.inputs == sum(seen)
    assert made.recovery.inputs + made.recovery.held == 80


# Networks that are no good --------------------------------------------------------------------------


class Forks(nn.Module):
    """Bright images take another layer than dark ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 5)
        self.dark, self.bright = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).relu())
        return self.bright(y) if x.mean() > 0 else self.dark(y)


@pytest.mark.filterwarnings("ignore::allocator.ValueDependentTraceWarning")
def test_paths_that_depend_on_values_are_named() -> None:
    torch.manual_seed(0)
    data = torch.cat([torch.rand(32, 6), -torch.rand(32, 6)])
    result = drop(Forks().eval(), data[:1], "first.weight", 6)
    with pytest.raises(allocator.DataError, match=r"takes another path for some inputs .*weight"):
        allocator.recover(result, data, "least_squares")
    recovery = allocator.recover(result, data[:32], "least_squares").recovery
    assert recovery is not None
    assert [layer.name for layer in recovery.layers] == ["first.weight", "second.weight", "bright.weight"]


class Twice(nn.Module):
    """The same weights read twice, which no single refit suits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.head = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(self.first(x)).relu()))


class Blend(nn.Module):
    """A weight that the forward computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a = nn.Embedding(20, 12), nn.Parameter(torch.randn(4, 12))
        self.b = nn.Parameter(torch.randn(4, 12))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.first(x), self.a + self.b)


def test_weights_that_cannot_be_refitted_are_named() -> None:
    torch.manual_seed(0)
    data = torch.randn(40, 6)
    result = allocator.allocate(Twice().eval(), "60%", example_inputs=data[:1])
    recovery = allocator.recover(result, data, "least_squares").recovery
    assert recovery is not None
    assert recovery.left == {"shared.weight": "2 calls share it"}
    assert [layer.name for layer in recovery.layers] == ["first.weight", "head.weight"]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell, self.head = nn.Linear(6, 24), nn.LSTM(24, 20, batch_first=True), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.first(x).relu())[0][:, -1])


def test_recurrent_weights_are_named() -> None:
    torch.manual_seed(0)
    data = torch.randn(40, 7, 6)
    result = drop(Recurrent().eval(), data[:1], "first.weight", 12)
    recovery = allocator.recover(result, data, "least_squares").recovery
    assert recovery is not None
    assert recovery.left == {"cell.weight_ih_l0": "7 calls share it"}
    assert [layer.name for layer in recovery.layers] == ["first.weight", "head.weight"]


def test_a_network_of_such_weights_alone_is_refused() -> None:
    tokens = torch.randint(20, (40, 7))
    result = allocator.allocate(Blend().eval(), "60%", example_inputs=tokens[:1])
    with pytest.raises(allocator.RecoveryError, match=r"no layer .* can be refitted: a \(the forward computes"):
        allocator.recover(result, tokens, "least_squares")
    recovery = allocator.recover(result, tokens).recovery
    assert recovery is not None
    assert recovery.after <= recovery.before


class Overwrites(nn.Module):
    """Its result is written over what a gradient would need."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 20), nn.Linear(20, 20), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        z = self.second(y)
        y += z
        return self.head(y.relu_())


def test_a_network_that_cannot_be_trained_is_not_distilled() -> None:
    data = torch.randn(40, 6)
    result = allocator.allocate(Overwrites().eval(), "60%", example_inputs=data[:1])
    with pytest.raises(allocator.RecoveryError, match=r"cannot be trained .*method='least_squares' takes no gradient"):
        allocator.recover(result, data, "distil")


def test_nothing_dropped_is_nothing_to_do(model: nn.Module, images: Tensor) -> None:
    with pytest.warns(allocator.BudgetNotBindingWarning):
        result = allocator.allocate(model, "100%", example_inputs=IMAGE)
    recovered = allocator.recover(result, images)
    assert recovered.recovery is not None
    assert recovered.recovery.method == "none"
    assert recovered.certificate == result.certificate
    assert "nothing was better" in str(recovered.recovery)


# Networks that keep something, or write where they should not ---------------------------------------


class Restless(nn.Module):
    """It scales its input in place, counts its calls, draws noise, and keeps in itself what it reads again."""

    calls: Tensor
    kept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.third, self.head = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(24, 4, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.kept = self.first(nn.functional.dropout(x.mul_(1.5), 0.01, training=True)).relu()
        return self.head(torch.cat([self.kept, self.third(self.second(self.kept).relu())], 1))


def _under_inference_mode(images: Tensor) -> Tensor:
    with torch.inference_mode():
        return images.clone()


@pytest.mark.parametrize(
    "data_of", [Tensor.clone, lambda images: images.clone().requires_grad_(), _under_inference_mode]
)
def test_a_restless_forward_leaves_all_as_it_was(images: Tensor, data_of: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, data = Restless().eval(), data_of(images)
    state = torch.get_rng_state()
    with untouched(model):
        result = allocator.allocate(model, "50%", data=data, example_inputs=IMAGE)
        with untouched(result.model):
            recovered = allocator.recover(result, data, "least_squares")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(data, images)
    assert data.grad is None
    assert recovered.recovery is not None
    assert recovered.recovery.after < recovered.recovery.before  # by how much, its noise decides
    assert allocator.verify(model, recovered.model, recovered.allocation, example_inputs=IMAGE) == recovered.certificate


@pytest.mark.parametrize("count", [2, 4, 33, 241])
def test_no_statistics_are_taken_of_a_single_number(count: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 20), nn.BatchNorm1d(20), nn.ReLU()]
    data = torch.randn(count, 6)
    result = allocator.allocate(nn.Sequential(*layers, nn.Linear(20, 4)).eval(), "60%", example_inputs=data[:1])
    recovery = allocator.recover(result, data).recovery
    assert recovery is not None
    assert ("batch_norm" in recovery.tried) == (count > 4)


# Offsets that are not the layer's alone -------------------------------------------------------------


class Odd(nn.Module):
    """What is added to a layer's output is no bias of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Linear(6, 24), nn.Linear(24, 24)
        self.norm, self.head = nn.BatchNorm1d(24), nn.Linear(24, 4)
        nn.init.normal_(self.second.bias)
        nn.init.normal_(self.norm.get_buffer("running_mean"))
        if kind == "one bias for two layers":
            self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "one norm for two layers":
            y = self.norm(nn.functional.linear(x, self.first.weight)).relu()
            return self.head(self.norm(nn.functional.linear(y, self.second.weight)).relu())
        y = self.first(x).relu()
        if self.kind == "computed":
            return self.head(nn.functional.linear(y, self.second.weight, 2 * self.second.bias).relu())
        if self.kind == "scaled":
            return self.head(torch.addmm(self.second.bias, y, self.second.weight.t(), beta=0.5, alpha=2).relu())
        return self.head(self.second(y).relu())


@pytest.mark.parametrize(
    ("kind", "method", "changed"),
    [
        ("one bias for two layers", "fold", {"head.weight", "head.bias"}),
        ("one norm for two layers", "fold", {"head.weight", "head.bias"}),
        ("computed", "least_squares", {"head.weight", "head.bias"}),
        ("scaled", "least_squares", {"head.weight", "head.bias"}),
    ],
)
def test_an_offset_that_is_not_the_layers_alone_stays(kind: str, method: Any, changed: set[str]) -> None:
    torch.manual_seed(0)
    data = torch.randn(200, 6)
    result = allocator.allocate(Odd(kind).eval(), "50%", example_inputs=data[:1])
    recovery = allocator.recover(result, data, method).recovery
    assert recovery is not None
    assert set(recovery.tensors) == changed
    assert recovery.after < recovery.before


# What stays with the model --------------------------------------------------------------------------


def test_the_certificate_is_that_of_the_cut(model: nn.Module, result: allocator.Result, images: Tensor) -> None:
    recovered = allocator.recover(result, images)
    inputs = recovered.recovery.inputs if recovered.recovery else 0
    assert recovered.certificate.ok
    assert f"structure proven, weights refitted on {inputs} inputs" in str(recovered.certificate)
    again = allocator.verify(model, recovered.model, recovered.allocation, example_inputs=IMAGE)
    assert again == recovered.certificate
    assert allocator.verify(model, result.model, result.allocation, example_inputs=IMAGE) == result.certificate


def test_what_was_not_refitted_must_be_the_originals(
    model: nn.Module, result: allocator.Result, images: Tensor
) -> None:
    recovered = allocator.recover(result, images)
    assert recovered.recovery is not None
    assert "stem.weight" not in recovered.recovery.tensors
    with torch.no_grad():
        recovered.model.get_parameter("stem.weight")[0, 0, 0, 0] += 1
    made = allocator.verify(model, recovered.model, recovered.allocation, example_inputs=IMAGE)
    assert not made.ok
    assert made.weights is False


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files_carry_both(
    tmp_path: Path, model: nn.Module, result: allocator.Result, images: Tensor, suffix: str
) -> None:
    recovered = allocator.recover(result, images)
    path = tmp_path / f"small{suffix}"
    if suffix == ".pt":
        allocator.save_model(recovered.model, path)
        loaded = allocator.load_model(path, trust=True)
    else:
        allocator.save(recovered, path)
        loaded = allocator.load(path, model=model)
    assert recovery_of(loaded) == recovered.recovery
    torch.testing.assert_close(loaded(images), recovered.model(images), rtol=0, atol=0)
    assert allocator.verify(model, loaded, recovered.allocation, example_inputs=IMAGE) == recovered.certificate


@pytest.mark.parametrize("method", ["auto", "fold", "batch_norm"])
def test_a_second_recovery_adds_to_the_record(
    model: nn.Module, result: allocator.Result, images: Tensor, method: Any
) -> None:
    once = allocator.recover(result, images, "least_squares")
    twice = allocator.recover(once, images, method)
    assert once.recovery is not None
    assert twice.recovery is not None
    assert set(once.recovery.tensors) <= set(twice.recovery.tensors)
    again = allocator.verify(model, twice.model, twice.allocation, example_inputs=IMAGE)
    assert again.ok
    assert again == twice.certificate


def test_the_command_line_recovers_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    torch.save(torch.randn(24, 3, 64, 64), tmp_path / "inputs.pt")
    name, small = "torchvision:squeezenet1_1", str(tmp_path / "small.safetensors")
    size = ["--input-size", "1x3x64x64"]
    options = ["--flops", "60%", "--data", str(tmp_path / "inputs.pt"), "--recover", "least_squares", "-o", small]
    assert main(["allocate", name, *options, *size]) == 0
    assert "weights refitted on 18 inputs" in " ".join(capsys.readouterr().out.split())
    assert recovery_of(allocator.load(small)) is not None
    assert main(["allocate", name, "--flops", "60%", "--recover", "-o", str(tmp_path / "b.pt"), *size]) != 0
    assert "--recover needs --data" in " ".join(capsys.readouterr().err.split())


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    script = Path(recovering_ranks.__file__)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path)], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for dtype in recovering_ranks.PARTS:
        alone = recovering_ranks.recovered(None, dtype)
        cut = allocator.allocate(
            recovering_ranks.network().to(dtype), "50%", example_inputs=torch.zeros(1, 3, 6, 6).to(dtype)
        )
        assert any(not torch.equal(alone[name], tensor) for name, tensor in cut.model.state_dict().items())
        for mine in ranks:
            for name, tensor in alone.items():
                torch.testing.assert_close(mine[str(dtype)][name], tensor, rtol=1e-6, atol=1e-6, msg=f"{dtype} {name}")


def test_every_step_of_an_iteration_is_recovered(model: nn.Module, images: Tensor) -> None:
    seen: list[Any] = []

    def train(small: nn.Module) -> None:
        seen.append(recovery_of(small))

    done = allocator.iterate(model, "40%", steps=2, train=train, data=images, recover="least_squares")
    assert [record.method for record in seen] == ["least_squares"] * 2
    assert recovery_of(done.model) == seen[1]
    with pytest.raises(allocator.DataError, match="recover needs data"):
        allocator.iterate(model, "40%", steps=2, train=train, recover=True)


def test_what_is_allocated_again_was_not_refitted_itself(model: nn.Module, images: Tensor) -> None:
    once = allocator.allocate(model, "60%", data=images, recover=True, example_inputs=IMAGE)
    twice = allocator.allocate(once.model, "60%", example_inputs=IMAGE)
    assert recovery_of(once.model) is not None
    assert recovery_of(twice.model) is None
    again = allocator.verify(once.model, twice.model, twice.allocation, example_inputs=IMAGE)
    assert again.ok
    assert again.refitted is None
