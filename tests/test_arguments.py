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
from allocator import FileError, InputError, UnknownNameError, UnsupportedModelError
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
        "name is the class Linear, and takes text",
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
    "a generator for the budget": (
        lambda m, r: allocator.allocate(m, (n for n in [1])),  # type: ignore[arg-type]
        allocator.BudgetError,
        "flops=a generator is not a number: pass FLOPs such as",
    ),
    "an array for a choice": (
        lambda m, r: allocator.allocate(m, "50%", groups=np.zeros((2, 2))),  # type: ignore[arg-type]
        UnknownNameError,
        "no groups an ndarray (there are auto, whole, width)",
    ),
    "a list for a policy": (
        lambda m, r: allocator.plan(r.graph, allocator.score(r.graph), "50%", policy=["global"]),  # type: ignore[arg-type]
        UnknownNameError,
        "no policy ['global'] (there are auto",
    ),
    "a word without end for a choice": (
        lambda m, r: allocator.allocate(m, "50%", norms="x" * 5000),  # type: ignore[arg-type]
        UnknownNameError,
        "xxx ... (there are exact, loose)",
    ),
    "an array for a proof": (
        lambda m, r: allocator.allocate(m, "50%", certify=np.ones((2, 2))),  # type: ignore[arg-type]
        InputError,
        "certify=an ndarray is none of 'small', 'full', True or False",
    ),
    "a number for a pattern": (
        lambda m, r: allocator.allocate(m, "50%", exclude=["layer1", 7]),
        InputError,
        "exclude is 7: pass name patterns, module classes or modules",
    ),
    "a tensor of one number for a pattern": (
        lambda m, r: allocator.allocate(m, "50%", same=torch.tensor(3.0)),
        InputError,
        "same is a Tensor: pass name patterns, module classes or modules",
    ),
    "a layer of another model": (
        lambda m, r: allocator.allocate(m, "50%", include=nn.Conv2d(1, 1, 1)),
        InputError,
        "include: this Conv2d is no module of the model",
    ),
    "a width of hundreds of digits": (
        lambda m, r: allocator.allocate(m, "50%", multiple=10**400),
        InputError,
        "0 ... is no whole number above zero, such as 8",
    ),
    "a number for a criterion": (
        lambda m, r: allocator.score(r.graph, 1.0),
        allocator.CriterionError,
        "criterion is 1.0, and takes a name such as 'group_norm'",
    ),
    "numbers beyond floats for a criterion": (
        lambda m, r: allocator.score(r.graph, [10**400]),
        allocator.CriterionError,
        "the scores of 'own' are not an array of numbers",
    ),
    "a number for a parameter's name": (
        lambda m, r: allocator.score(r.graph, {1: 2}),
        UnknownNameError,
        "the criterion has scores for 1, which is no parameter of the model",
    ),
    "a number for a criterion's name": (
        lambda m, r: allocator.criterion(3),  # type: ignore[arg-type]
        InputError,
        "name is 3, and takes text",
    ),
    "a list for an architecture's arguments": (
        lambda m, r: allocator.load_model("m.pt", arch_kwargs=[1]),  # type: ignore[arg-type]
        InputError,
        "arch_kwargs is [1], and takes a dict",
    ),
    "a number for a fresh model": (
        lambda m, r: allocator.load("m.safetensors", model=3),  # type: ignore[arg-type]
        UnsupportedModelError,
        "model is 3, and takes a torch.nn.Module or a function",
    ),
    "a number for a result": (
        lambda m, r: allocator.save(3, "m.safetensors"),
        InputError,
        "result is 3, and takes what allocator.allocate gave, a model that came of it, or a pair",
    ),
    "a number for a model to save": (
        lambda m, r: allocator.save_model(3, "m.pt"),  # type: ignore[arg-type]
        UnsupportedModelError,
        "the model is of type int: pass a torch.nn.Module",
    ),
    "nothing for the smaller model": (
        lambda m, r: allocator.verify(m, None, r.allocation),  # type: ignore[arg-type]
        UnsupportedModelError,
        "small is of type NoneType: pass a torch.nn.Module",
    ),
    "no time to measure in": (
        lambda m, r: allocator.latency(m, seconds=None),  # type: ignore[arg-type]
        InputError,
        "seconds is None, and takes a number",
    ),
    "an array for a factor": (
        lambda m, r: allocator.widen(m, factor=np.ones((2, 2))),  # type: ignore[arg-type]
        InputError,
        "factor is an ndarray, and takes a number",
    ),
    "a word for a tolerance": (
        lambda m, r: allocator.export(m, "m.pt2", tolerance="small"),  # type: ignore[arg-type]
        InputError,
        "tolerance is 'small', and takes a number",
    ),
    "no number for a tolerance": (
        lambda m, r: allocator.export(m, "m.pt2", tolerance=float("nan")),
        InputError,
        "tolerance=nan is no number above zero, such as 0.0001",
    ),
    "a number for batches": (
        lambda m, r: allocator.export(m, "m.pt2", batches=3),  # type: ignore[arg-type]
        InputError,
        "batches=3 are no whole numbers from 1 to 1,000,000, such as (1, 2, 5)",
    ),
    "a word without end for a format": (
        lambda m, r: allocator.export(m, "m.pt2", to="x" * 5000),
        UnknownNameError,
        "xxx ... to export to; there are onnx and pt2",
    ),
    "steps without end": (
        lambda m, r: allocator.iterate(m, "50%", steps=10**9, train=print),
        InputError,
        "steps=1000000000 is no whole number above zero and up to 10,000",
    ),
    "a path without a name": (lambda m, r: allocator.load_model(""), FileError, "the path is empty"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_was_passed_and_what_would_fit_is_said(case: str, model: nn.Module, result: allocator.Result) -> None:
    call, error, said = WRONG[case]
    with pytest.raises(error) as raised:
        call(model, result)
    assert said in str(raised.value)
    assert len(str(raised.value)) < 300
    assert "\n" not in str(raised.value)


def test_no_message_moves_a_terminals_cursor(tmp_path: Path) -> None:
    with pytest.raises(FileError) as raised:
        allocator.load_model(tmp_path / "a\x1b[2J\udc80\tb.pt")
    assert str(raised.value).endswith(r"a\x1b[2J\udc80\tb.pt")
    assert str(allocator.ConfigurationError("two\nlines \u0416")) == "two\nlines \u0416"


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
