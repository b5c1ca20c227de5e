"""What is said where arguments do not mean what they were meant to: each message names what to do next."""

from __future__ import annotations

import re
from typing import Any

import pytest
from subjects import IMAGE, trained, untouched
from torch import nn

import allocator
from allocator import InputError, UnmatchedPatternWarning

pytestmark = pytest.mark.filterwarnings("error::allocator.AllocatorWarning")


def allocate(model: Any, flops: Any = "60%", inputs: Any = IMAGE, **options: Any) -> allocator.Result:
    return allocator.allocate(model, flops, example_inputs=inputs, **options)


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
