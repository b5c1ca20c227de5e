"""Refusals say why, and what would help; what only looks like a reason for one is none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_graphs import net
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import allocator
from allocator.errors import (
    BudgetError,
    CostMismatchError,
    NothingToAllocateError,
    TraceError,
    UnsupportedModelError,
)

IMAGE = torch.zeros(1, 3, 8, 8)


def allocate(model: nn.Module, flops: str = "60%", x: Any = IMAGE, **options: Any) -> allocator.Result:
    return allocator.allocate(model, flops, example_inputs=x, criterion="magnitude", **options)


def test_a_budget_that_cannot_be_met_says_what_stays() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.LayerNorm([16, 6, 6]), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)
    )
    with pytest.raises(BudgetError, match=r"of the model's 57,600 FLOPs; what stays: [a-z]") as caught:
        allocate(model, "10%")
    assert any("layer_norm" in reason and " in 1 (" in reason for reason in caught.value.reasons)
    assert caught.value.reachable is not None
    assert caught.value.asked is not None


UNDONE: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "weight_norm": (parametrizations.weight_norm, "remove_parametrizations(model.get_submodule('0'), 'weight')"),
    "spectral_norm": (parametrizations.spectral_norm, "remove_parametrizations(model.get_submodule('0'), 'weight')"),
    "old weight_norm": (weight_norm, "torch.nn.utils.remove_weight_norm(model.get_submodule('0'))"),
    "old spectral_norm": (spectral_norm, "torch.nn.utils.remove_spectral_norm(model.get_submodule('0'))"),
}


@pytest.mark.parametrize("kind", UNDONE)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_computes_a_weight_names_the_call_that_undoes_it(kind: str) -> None:
    wrap, said = UNDONE[kind]
    model = nn.Sequential(wrap(nn.Conv2d(3, 16, 3)), nn.ReLU(), wrap(nn.Conv2d(16, 4, 3)))
    with pytest.raises(NothingToAllocateError) as caught:
        allocate(model)
    assert str(caught.value).count(said) == 1
    assert f"{said} undoes it" in str(caught.value)


def _quantisation(prepare: Callable[[nn.Module, Any], nn.Module]) -> nn.Module:
    from torch.ao import quantization

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.qconfig = quantization.get_default_qat_qconfig()
        return prepare(model, quantization)


def test_a_model_prepared_for_quantisation_says_what_to_pass() -> None:
    model = _quantisation(lambda model, quantization: quantization.prepare_qat(model))
    with pytest.raises(UnsupportedModelError, match="allocate the model as it was before prepare_qat"):
        allocate(model)


def test_functional_modules_that_stand_among_quantised_ones_are_float() -> None:
    added = torch.ao.nn.quantized.FloatFunctional()
    layers = {"one": nn.Conv2d(3, 8, 1), "two": nn.Conv2d(3, 8, 1), "head": nn.Conv2d(8, 4, 1)}
    model = net(lambda m, x: m.head(m.added.add(m.one(x), m.two(x)).relu()), added=added, **layers)
    small: Any = allocate(model, scope="all").model
    assert small.head.in_channels < 8
    quantised = torch.ao.nn.quantized.QFunctional()
    with pytest.raises(UnsupportedModelError, match="added is quantised"):
        allocate(net(lambda m, x: x, added=quantised, **layers))


# fvcore does not have the last word ----------------------------------------------------------------


class Gram(torch.autograd.Function):
    """x @ x.T by a function of one's own, into which fvcore does not look."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x @ x.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Holder:
    """What torch's tracer does not take for an output."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def conv(m: Any, x: Tensor) -> Tensor:
    result: Tensor = m.two(m.one(x).relu())
    return result


def _pooled(m: Any, x: Tensor) -> Tensor:
    y, where = F.max_pool2d(m.one(x), 2, return_indices=True)
    result: Tensor = m.two(F.max_unpool2d(y, where, [2, 2]))
    return result


JUDGED: dict[str, Callable[[Any, Tensor], Any]] = {
    "a function of one's own": lambda m, x: m.head(Gram.apply(conv(m, x).flatten(2)).mean(1)),
    "pooling by indices": lambda m, x: m.head(_pooled(m, x).mean((2, 3))),
}


@pytest.mark.parametrize("kind", JUDGED)
def test_what_fvcore_cannot_count_is_counted_by_torch_too(kind: str) -> None:
    model = net(JUDGED[kind], one=nn.Conv2d(3, 16, 3, padding=1), two=nn.Conv2d(16, 16, 1), head=nn.Linear(16, 4))
    result = allocate(model, "80%")
    assert result.flops_after <= 0.8 * result.flops_before
    (note,) = (note for note in result.notes if "fvcore" in note)
    assert "multiply-adds torch's own counter finds too" in note


def test_outputs_in_objects_are_counted_by_fvcore() -> None:
    result = allocate(net(lambda m, x: Holder(conv(m, x)), one=nn.Conv2d(3, 16, 3), two=nn.Conv2d(16, 4, 1)))
    assert not any("fvcore" in note for note in result.notes)


def test_a_count_that_nobody_shares_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(conv, one=nn.Conv2d(3, 16, 3), two=nn.Conv2d(16, 4, 1))
    for counted in (10**12, 1):
        monkeypatch.setattr("allocator.pipeline.run.fvcore_flops", lambda *_, counted=counted, **__: (counted, {}))
        monkeypatch.setattr("allocator.pipeline.run.products_by_torch", lambda *_, **__: 7)
        with pytest.raises(CostMismatchError, match=f"fvcore counts {counted:,} FLOPs in the result, the cost model"):
            allocate(model)


def test_a_choice_between_functions_says_what_to_write_instead() -> None:
    def chosen(m: Any, x: Tensor) -> Tensor:
        y = m.one(x)
        return m.two(torch.cond(y.sum() > 0, lambda y: y * 2, lambda y: y * 3, (y,)))

    model = net(chosen, one=nn.Conv2d(3, 8, 3), two=nn.Conv2d(8, 4, 3))
    with pytest.raises(TraceError, match=r"calls torch's cond .*write the branch .*in Python, or .* torch\.where"):
        allocate(model)


class Unseen(nn.Module):
    """Computes what torch does not see."""

    def __init__(self, how: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), how

    def forward(self, x: Tensor) -> Any:
        return self.how(self.last(self.first(x)))


@pytest.mark.parametrize("how", [lambda y: torch.from_numpy(y.detach().numpy() * 2), lambda y: torch.ones(2, 4)])
def test_outputs_that_torch_did_not_compute_are_said_to_be_so(how: Callable[[Tensor], Any]) -> None:
    said = "that were seen is followed to what the forward returns: do in torch what is done in numpy"
    with pytest.raises(NothingToAllocateError, match=said):
        allocate(Unseen(how).eval())


def test_an_operator_without_a_rule_says_that_one_would_do() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Last(), nn.Conv2d(8, 4, 1))
    with pytest.raises(
        NothingToAllocateError, match=r"\(linalg_matrix_exp\).*\(8 channels; a rule of a few lines lets them go, as doc"
    ):
        allocate(model)


class Last(nn.Module):
    """An operator that nothing is known of."""

    def forward(self, x: Tensor) -> Tensor:
        return x.matrix_exp()
