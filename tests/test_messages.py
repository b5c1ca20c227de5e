"""What is said where arguments do not mean what they were meant to: each message names what to do next."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from subjects import IMAGE, Branches, trained, untouched
from torch import Tensor, nn
from torch.nn import functional as F

import allocator
from allocator import DataError, InputError, UnmatchedPatternWarning

pytestmark = pytest.mark.filterwarnings("error::allocator.AllocatorWarning")


def allocate(model: Any, flops: Any = "60%", inputs: Any = IMAGE, **options: Any) -> allocator.Result:
    return allocator.allocate(model, flops, example_inputs=inputs, **options)


IMAGES = torch.randn(16, *IMAGE.shape[1:], generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 10


# ------------------------------------------------------------------------------------------- losses


def _sweep(model: nn.Module, **options: Any) -> Any:
    return allocator.sweep(model, flops=["80%", "60%"], example_inputs=IMAGE, **options)


def _iterate(model: nn.Module, **options: Any) -> Any:
    return allocator.iterate(model, "60%", steps=2, train=id, example_inputs=IMAGE, **options)


def _score(model: nn.Module, **options: Any) -> Any:
    return allocator.score(allocator.trace(model, IMAGE), **options)


@pytest.mark.parametrize("call", [allocate, _sweep, _iterate, _score])
def test_a_loss_without_data_is_refused(call: Callable[..., Any]) -> None:
    said = r"^loss needs data, whose targets it is called with: pass data=loader of \(inputs, target\) pairs beside it"
    model = trained()
    with untouched(model), pytest.raises(DataError, match=said):
        call(model, loss=F.cross_entropy)


@pytest.mark.parametrize(
    ("item", "target", "of"),
    [
        (IMAGES, type(None), "and None for a target, as the data yield none"),
        ((IMAGES, LABELS), Tensor, r"and the target, a tensor of \(8,\) int64"),
        ((IMAGES, LABELS, LABELS), tuple, "and the target, a tuple"),
        ({"x": IMAGES, "y": LABELS}, dict, "and the target, a dict of x, y, which is the whole batch"),
    ],
)
def test_what_a_loss_is_given_is_said_where_it_raises(item: Any, target: type, of: str) -> None:
    given: list[Any] = []

    def loss(output: Tensor, found: Any) -> Tensor:
        given.append(found)
        raise KeyError("label")

    said = rf"^the loss raised KeyError: 'label'; it was called with a tensor of \(8, 10\) float32,? {of}$"
    with pytest.raises(DataError, match=said):
        allocate(trained(), data=[item], loss=loss)
    assert isinstance(given[0], target)


def test_a_loss_that_writes_into_its_target_leaves_the_data_alone() -> None:
    labels = LABELS.clone()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target.clamp_(max=3))

    graph = allocator.trace(trained(), IMAGE)
    scores = allocator.score(graph, "fisher", [(IMAGES, labels)], loss)
    assert torch.equal(labels, LABELS)
    again = allocator.score(graph, "fisher", [(IMAGES, labels.clamp(max=3))], F.cross_entropy)
    assert scores.values.tolist() == again.values.tolist()


class NotFinite(Branches):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) / 0


def _spoilt(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target) * math.nan


@pytest.mark.parametrize(
    ("model", "loss", "said"),
    [
        (Branches, _spoilt, "the model's answers are finite: check the function '_spoilt', and the targets"),
        (NotFinite, _spoilt, "as the model's answers are not finite: check the data, and the model's weights"),
        (NotFinite, None, "as the model's answers are not finite: check the data, and the model's weights"),
    ],
)
def test_who_is_to_blame_for_a_loss_that_is_no_number(model: Any, loss: Any, said: str) -> None:
    with pytest.raises(DataError, match=rf"^the loss is nan, (and )?{said}$"):
        allocate(trained(model()), data=[(IMAGES, LABELS)], loss=loss)


# ------------------------------------------------------------------------------------------- floors


@pytest.mark.parametrize(("pattern", "near"), [("narow.*", "; did you mean 'narrow'?"), ("stem_norm*x", "")])
def test_a_floor_under_no_layer_is_noted(pattern: str, near: str) -> None:
    model = trained()
    said = f"at_least='{pattern}' matches no layer that writes channels{near}"
    with pytest.warns(UnmatchedPatternWarning, match=f"^{re.escape(said)}$"):
        assert said in allocate(model, at_least={"stem": 4, pattern: 8}).notes
    graph = allocator.trace(model, IMAGE)
    with pytest.warns(UnmatchedPatternWarning, match=re.escape(said)):
        allocator.plan(graph, flops="70%", at_least={pattern: 8})
    assert allocator.plan(graph, flops="70%", at_least={"stem": 4, "*": 1}), "of what matches there is no warning"


def test_floors_are_named_by_patterns_alone() -> None:
    model = trained()
    with untouched(model), pytest.raises(InputError, match=r"at_least has the key <class .*Conv2d'>, a type: its keys"):
        allocate(model, at_least={nn.Conv2d: 8})
