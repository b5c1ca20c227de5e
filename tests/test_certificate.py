"""The certificate can be believed: it fails when one index, number or call is wrong, and says which check saw it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from declarations import with_rule
from subjects import IMAGE, Branches, randomised_norms, trained, untouched
from torch import Tensor, nn
from torch.nn import functional as F

import allocator
from allocator import Allocation, Certificate, CertificateError, Result
from allocator.rewriting.materialise import materialise
from allocator.verifying.comparison import MEASURABLE, TOLERANCE


class Shuffled(nn.Module):
    """Two branches of different kinds, channels shuffled as ShuffleNet does, then split and scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.left, self.left_norm = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.right, self.right_norm = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.BatchNorm2d(16)
        self.last, self.last_norm = nn.Conv2d(32, 16, 1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)
        self.groups, self.scale, self.linear = 2, 0.25, False

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem_norm(self.stem(x)))
        x = torch.cat([F.silu(self.left_norm(self.left(x))), self.right_norm(self.right(x))], 1)
        n, c, h, w = x.shape
        x = x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        x = self.last_norm(self.last(x)) * self.scale
        return self.head((x if self.linear else F.silu(x)).mean((2, 3)))


def allocate(model: nn.Module, flops: str = "50%", **options: Any) -> Result:
    return allocator.allocate(model, flops, example_inputs=IMAGE, **{"scope": "all", **options})


@pytest.fixture(scope="module", params=["whole", "width"])
def result(request: pytest.FixtureRequest) -> Result:
    torch.manual_seed(0)
    return allocate(trained(Shuffled()), "40%", groups=request.param)


@pytest.fixture
def small(result: Result) -> Any:
    return copy.deepcopy(result.model)


def verify(result: Result, small: nn.Module | None = None, allocation: Allocation | None = None) -> Certificate:
    return allocator.verify(
        result.graph.model, small or result.model, allocation or result.allocation, example_inputs=IMAGE
    )


def differs(certificate: Certificate) -> bool:
    """Whether the numeric check noticed."""
    assert certificate.relative_error is not None
    return certificate.relative_error > TOLERANCE


# --------------------------------------------------------------------------------------------- it holds


def test_a_right_result_passes_every_check(result: Result) -> None:
    found = result.certificate
    assert found.structural
    assert found.weights is True
    assert found.relative_error is not None
    assert found.relative_error < 1e-12
    assert found.effect is not None
    assert found.effect > 0.01
    assert found.exact
    assert not found.drawn
    assert found.ok
    assert str(found).startswith("passed: every index accounted for, weights the original's bit for bit, float64")
    kept = result.allocation.kept
    assert all(kept[f"{name}.weight"][0] for name in ("stem", "left", "right"))


def test_anyone_can_compute_it_again(result: Result, tmp_path: Path) -> None:
    result.allocation.save(tmp_path / "a.json")
    model = result.graph.model
    with untouched(model), untouched(result.model):
        again = allocator.verify(model, result.model, tmp_path / "a.json")
    assert again == result.certificate
    assert json.loads(json.dumps(again.to_dict()))["ok"] is True
    other = allocator.verify(model, result.model, result.allocation, seed=7, example_inputs=torch.zeros(2, 3, 9, 9))
    assert other.ok
    assert other.seed == 7
    assert other.input_shapes == ((2, 3, 9, 9),)


def test_its_numbers_are_those_of_a_computation_by_hand() -> None:
    result = allocate(trained())
    kept: dict[str, Any] = result.allocation.kept
    original, cut = (copy.deepcopy(result.graph.model).double() for _ in range(2))
    with torch.no_grad():
        for name in ("narrow", "wide", "head"):
            weight = cut.get_parameter(f"{name}.weight")
            gone = [i for i in range(weight.shape[1]) if i not in kept[f"{name}.weight"][1]]
            weight[:, gone] = 0
        x = torch.randn(IMAGE.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        whole, expected, got = original(x), cut(x), copy.deepcopy(result.model).double()(x)
    assert float((expected - got).abs().max() / expected.abs().max()) < 1e-14
    effect = float((whole - expected).abs().max() / whole.abs().max())
    assert result.certificate.effect == pytest.approx(effect, rel=1e-5)


def test_the_structural_check_can_be_made_alone(result: Result, small: Any) -> None:
    with torch.no_grad():
        small.last.weight += 0.01  # as training would
    assert not verify(result, small).ok
    model = result.graph.model
    alone = allocator.verify(model, small, result.allocation, example_inputs=IMAGE, numeric=False)
    assert alone.ok
    assert alone.weights is alone.relative_error is alone.effect is None
    assert str(alone) == "passed: every index accounted for, outputs not compared"


def test_a_loose_norm_is_said_to_be_inexact() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 4, 1))
    found = allocate(model, criterion="magnitude", norms="loose").certificate
    assert found.ok
    assert found.weights
    assert not found.exact
    assert differs(found)
    assert "inexact by nature" in str(found)


# ------------------------------------------------------------------------------------- one wrong index


def wrong_indices(result: Result) -> Iterator[tuple[str, int]]:
    """Every (tensor, dim) that the allocation cuts."""
    for name, dims in result.allocation.kept.items():
        for dim, indices in enumerate(dims):
            if indices is not None:
                yield name, dim


def with_wrong_index(result: Result, name: str, dim: int) -> Allocation:
    """The allocation with one index of one dim of one tensor replaced by a dropped one."""
    wrong = Allocation.from_dict(json.loads(json.dumps(result.allocation.to_dict())))
    indices: Any = wrong.kept[name][dim]
    rows = indices if isinstance(indices[0], list) else [indices]
    size = dict(result.graph.model.state_dict())[name].shape[dim]
    rows[0][-1] = next(i for i in range(size - 1, -1, -1) if i not in rows[0])
    return wrong


def test_one_wrong_index_is_noticed_wherever_it_is(result: Result) -> None:
    model, checked = result.graph.model, 0
    for name, dim in wrong_indices(result):
        wrong = with_wrong_index(result, name, dim)
        small = allocator.rewrite(model, wrong)
        found = verify(result, small)
        assert found.structural, "shapes and calls are right"
        assert found.weights is False, f"{name}, dim {dim}: weights"
        assert differs(found), f"{name}, dim {dim}: numbers"
        assert not found.ok
        assert "weights NOT the original's" in str(found)
        assert not verify(result, small, wrong).structural, "this allocation keeps a neuron in part"
        assert not verify(result, result.model, wrong).structural
        checked += 1
    assert checked >= 20


def test_two_kept_indices_in_the_wrong_order_are_noticed(result: Result) -> None:
    for name, dim in wrong_indices(result):
        wrong = Allocation.from_dict(json.loads(json.dumps(result.allocation.to_dict())))
        indices: Any = wrong.kept[name][dim]
        for row in indices if isinstance(indices[0], list) else [indices]:
            row[0], row[1] = row[1], row[0]
        with pytest.raises(allocator.AllocationMismatchError, match="not in ascending order"):
            allocator.rewrite(result.graph.model, wrong)
        with pytest.raises(allocator.AllocationMismatchError, match="not in ascending order"):
            verify(result, result.model, wrong)
        small = copy.deepcopy(result.model)
        tensor = small.state_dict()[name]
        tensor.copy_(tensor.index_select(dim, torch.tensor([1, 0, *range(2, tensor.shape[dim])])))
        found = verify(result, small)
        assert found.weights is False, f"{name}, dim {dim}"
        assert differs(found), f"{name}, dim {dim}"


def test_an_allocation_that_leaves_a_tensor_out_or_repeats_an_index(result: Result) -> None:
    fewer = copy.deepcopy(result.allocation)
    del fewer.kept["left_norm.running_var"]
    assert not verify(result, allocation=fewer).structural
    twice = copy.deepcopy(result.allocation)
    indices: Any = twice.kept["left.weight"][0]
    indices[1] = indices[0]
    with pytest.raises(allocator.AllocationMismatchError, match="adds indices"):
        verify(result, allocation=twice)


def test_a_wrong_slice_is_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrongly(model: nn.Module, plan: Allocation) -> Any:
        small: Any = materialise(model, plan)
        small.wide.weight.data = small.wide.weight.data.flip(0)
        return small

    monkeypatch.setattr("allocator.pipeline.run.materialise", wrongly)
    with pytest.raises(CertificateError, match=r"FAILED: every index.*weights NOT the original's, float64 outputs"):
        allocate(trained())


# ----------------------------------------------------------------------- wrong numbers in the right place


def test_a_wrong_batch_norm_statistic_is_noticed(result: Result, small: Any) -> None:
    small.left_norm.running_var[0], small.left_norm.running_var[1] = small.left_norm.running_var[[1, 0]].clone()
    found = verify(result, small)
    assert found.weights is False
    assert differs(found)


@pytest.mark.parametrize("name", ["right_norm.num_batches_tracked", "stem.bias", "last.weight"])
def test_the_smallest_change_of_any_tensor_is_noticed(name: str, result: Result, small: Any) -> None:
    tensor = small.state_dict()[name]
    first = tensor.reshape(-1)[:1]
    first.copy_(first + 1 if not tensor.is_floating_point() else torch.nextafter(first, first + 1))
    found = verify(result, small)
    assert found.structural
    assert found.weights is False
    assert not found.ok


def test_bits_are_compared_not_values(result: Result) -> None:
    model: Any = copy.deepcopy(result.graph.model)
    model.left_norm.bias.data[:] = 0.0
    small: Any = allocator.rewrite(model, result.allocation)
    assert allocator.verify(model, small, result.allocation, example_inputs=IMAGE).ok
    small.left_norm.bias.data[0] = -0.0
    found = allocator.verify(model, small, result.allocation, example_inputs=IMAGE)
    assert not differs(found)
    assert found.weights is False


def test_another_dtype_is_noticed(result: Result, small: Any) -> None:
    assert not verify(result, small.double()).ok


# ------------------------------------------------------------------------------------- a wrong forward


def _set(path: str, name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.get_submodule(path), name, value)


CHANGES: dict[str, Callable[[Any], None]] = {
    "a shuffle of 4": _set("", "groups", 4),
    "no shuffle": _set("", "groups", 1),
    "another scale": _set("", "scale", 0.5),
    "a function left out": _set("", "linear", True),
    "another eps": _set("left_norm", "eps", 1e-4),
    "another padding": _set("stem", "padding", (2, 2)),
    "another dilation": _set("stem", "dilation", (2, 2)),
    "other groups": _set("right", "groups", 1),
    "a norm left out": _set("", "stem_norm", nn.Identity()),
    "a layer of another size": _set("", "left", nn.Conv2d(5, 6, 1)),
    "a further layer": _set("", "extra", nn.Linear(2, 2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_forward_is_seen_by_the_structural_check(change: str, result: Result, small: Any) -> None:
    CHANGES[change](small)
    found = verify(result, small)
    assert not found.structural
    assert not found.ok
    assert str(found).startswith("FAILED: ")


@pytest.mark.parametrize("other", [Branches, Shuffled, lambda: nn.Linear(3, 3)])
def test_an_unrelated_model_fails_without_an_exception(other: Callable[[], nn.Module], result: Result) -> None:
    assert not verify(result, other()).structural


# --------------------------------------------------------------------- what only the numeric check can see


class Flipped(Branches):
    """The channels are reversed before the classifier."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)).flip(1))


@pytest.fixture
def wrong_rule() -> Iterator[None]:
    """A rule for `flip` that forgets the order: what both flows are computed by, so that they agree."""
    with with_rule("flip", lambda flow, op: flow.set(op.outputs[0], flow.labels(op.inputs()[0]))):
        yield


@pytest.mark.usefixtures("wrong_rule")
def test_a_wrong_operator_rule_is_caught_by_the_numbers() -> None:
    with pytest.raises(CertificateError, match=r"weights the original's bit for bit, float64 outputs within \d"):
        allocate(trained(Flipped()))


def faint(model: nn.Module) -> Any:
    """Weights so small that the outputs are the last bias, as in a deep network before training."""
    for name, parameter in model.named_parameters():
        if not name.startswith("head"):
            parameter.data.mul_(1e-25 if name.endswith("weight") else 0)
    return model.eval()


@pytest.mark.usefixtures("wrong_rule")
def test_a_wrong_rule_is_caught_where_the_signal_has_died_away() -> None:
    with pytest.raises(CertificateError, match=r"bit for bit, float64 outputs within .* on drawn weights too"):
        allocate(faint(Flipped()), criterion="magnitude")


def test_a_network_whose_signal_dies_away_is_compared_on_drawn_weights() -> None:
    model = faint(Branches())
    with untouched(model):
        found = allocate(model, criterion="magnitude").certificate
    assert found.ok
    assert found.drawn
    assert found.effect is not None
    assert found.effect > MEASURABLE
    assert "on drawn weights too" in str(found)


def test_residual_branches_that_start_at_zero_are_compared_on_drawn_weights() -> None:
    model: Any = allocator.build("timm:resnet10t")
    assert not model.layer1[0].bn2.weight.any()
    result = allocator.allocate(
        model, "60%", example_inputs=torch.zeros(1, 3, 64, 64), scope="inner", criterion="magnitude"
    )
    assert result.certificate.ok
    assert result.certificate.drawn
    assert result.certificate.effect is not None
    assert result.certificate.effect > MEASURABLE
    randomised = randomised_norms(model)
    result = allocator.allocate(randomised, "60%", example_inputs=torch.zeros(1, 3, 64, 64), scope="inner")
    assert not result.certificate.drawn


def test_an_untrained_network_is_compared_on_drawn_weights() -> None:
    model = Branches()
    model.head.weight.data.zero_()
    found = allocate(model).certificate
    assert found.ok
    assert found.drawn


def test_drawn_weights_are_the_same_every_time() -> None:
    model = faint(Branches())
    first, second = (allocate(model, criterion="magnitude", seed=seed).certificate for seed in (3, 3))
    other = allocate(model, criterion="magnitude", seed=4).certificate
    assert first == second
    assert first.effect != other.effect
    assert other.ok
