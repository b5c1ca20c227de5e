"""Wrong and swapped arguments: each is named, with what was passed, what is taken, and what at hand would fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import allocator
from allocator import InputError, UnsupportedModelError
from allocator.errors import AllocationMismatchError, AllocatorError, a_kind


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return allocator.build("recipe:scalenet-small")


@pytest.fixture(scope="module")
def result(model: nn.Module) -> allocator.Result:
    return allocator.allocate(model, "50%", certify=False)


Call = Callable[[Any, Any], Any]
"""Of the model and of a result made from it."""

WRONG: dict[str, tuple[Call, type[AllocatorError], str]] = {
    "a result for a model": (
        lambda m, r: allocator.allocate(r, "50%"),
        UnsupportedModelError,
        "model is a Result, and takes a torch.nn.Module; pass its .model",
    ),
    "a graph for a model": (
        lambda m, r: allocator.trace(r.graph),
        UnsupportedModelError,
        "model is a ChannelGraph, and takes a torch.nn.Module; pass its .model",
    ),
    "a model for a graph": (
        lambda m, r: allocator.score(m),
        InputError,
        "graph is a ScaleNet, and takes ChannelGraph; pass what allocator.trace gave",
    ),
    "a budget for scores": (
        lambda m, r: allocator.plan(r.graph, "50%"),  # type: ignore[arg-type]
        InputError,
        "scores is '50%', and takes Scores; pass what allocator.score gave",
    ),
    "scores before the graph": (
        lambda m, r: allocator.plan(allocator.score(r.graph), r.graph),  # type: ignore[arg-type]
        InputError,
        "graph and scores are the wrong way round",
    ),
    "the allocation before the model": (
        lambda m, r: allocator.rewrite(r.allocation, m),
        UnsupportedModelError,
        "model and allocation are the wrong way round",
    ),
    "a result for its allocation": (
        lambda m, r: allocator.apply(m, r),
        InputError,
        "allocation is a Result, and takes Allocation or a path; pass its .allocation",
    ),
    "the smaller model first": (
        lambda m, r: allocator.verify(r.model, m, r.allocation),
        AllocationMismatchError,
        "model and small are the wrong way round",
    ),
    "the path before the model": (
        lambda m, r: allocator.save_model("small.pt", m),  # type: ignore[arg-type]
        UnsupportedModelError,
        "model and path are the wrong way round",
    ),
    "the path before a result": (
        lambda m, r: allocator.save("small.safetensors", r),
        InputError,
        "path is a Result, and takes a path",
    ),
    "no path": (lambda m, r: r.report().save(3), InputError, "path is 3, and takes a path"),
    "a model for its file": (lambda m, r: allocator.load(m), InputError, "path is a ScaleNet, and takes a path"),
    "a class for a name": (
        lambda m, r: allocator.build(nn.Linear),  # type: ignore[arg-type]
        InputError,
        "name is a type, and takes text",
    ),
    "text for a seed": (
        lambda m, r: allocator.allocate(m, "50%", seed="a"),  # type: ignore[arg-type]
        InputError,
        "seed is 'a', and takes a whole number",
    ),
    "text for a truth value": (
        lambda m, r: allocator.allocate(m, "50%", fill="no"),  # type: ignore[arg-type]
        InputError,
        "fill is 'no', and takes True or False",
    ),
    "a word for the loss": (
        lambda m, r: allocator.allocate(m, "50%", data=torch.zeros(2), loss="ce"),  # type: ignore[arg-type]
        InputError,
        "loss is 'ce', and takes a function",
    ),
    "True for progress": (
        lambda m, r: allocator.score(r.graph, progress=True),  # type: ignore[arg-type]
        InputError,
        "progress is True, and takes a function",
    ),
    "a number for evaluate": (
        lambda m, r: allocator.sweep(m, ["50%"], evaluate=3),  # type: ignore[arg-type]
        InputError,
        "evaluate is 3, and takes a function",
    ),
    "an image for the budget": (
        lambda m, r: allocator.allocate(m, torch.rand(1, 3, 8, 8)),  # type: ignore[arg-type]
        allocator.BudgetError,
        "is not a number: pass FLOPs such as",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_was_passed_and_what_would_fit_is_said(case: str, model: nn.Module, result: allocator.Result) -> None:
    call, error, said = WRONG[case]
    with pytest.raises(error) as raised:
        call(model, result)
    assert said in str(raised.value)
    assert len(str(raised.value)) < 300
    assert "\n" not in str(raised.value)


def test_numbers_of_numpy_and_paths_of_any_kind_are_taken(
    model: nn.Module, result: allocator.Result, tmp_path: Path
) -> None:
    made = allocator.allocate(model, "50%", seed=np.int64(3), fill=np.bool_(True))  # type: ignore[arg-type]
    assert made.certificate.seed == 3
    result.allocation.save(tmp_path / "a.json")
    assert allocator.apply(model, str(tmp_path / "a.json")) is not None


def test_missing_and_unknown_arguments_are_errors_of_this_package(model: nn.Module, result: allocator.Result) -> None:
    with pytest.raises(allocator.ArgumentsError, match=r"^verify: missing a required argument: 'all") as raised:
        allocator.verify(model, model)  # type: ignore[call-arg]
    assert isinstance(raised.value, TypeError)
    with pytest.raises(UnsupportedModelError, match=r"small is a Result.*pass its \.model; verify: missing"):
        allocator.verify(model, result)  # type: ignore[call-arg, arg-type]
    with pytest.raises(allocator.ArgumentsError, match=r"allocate: got an unexpected keyword .*; did you mean flops\?"):
        allocator.allocate(model, flop="50%")  # type: ignore[call-arg]
    with pytest.raises(allocator.ArgumentsError, match="apply: too many positional arguments"):
        allocator.apply(model, result.allocation, "keep", "reset")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("value", "said"), [(np.zeros(1), "an ndarray"), (1, "an int"), ("", "a str"), (torch.zeros(1), "a Tensor")]
)
def test_articles(value: object, said: str) -> None:
    assert a_kind(value) == said
