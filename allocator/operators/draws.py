"""Operators that draw random numbers: how channels pass, and what stands in where two networks are compared.

Of fewer channels another number would fall to each, so that outputs would differ though the networks do not. Where they
do, a number that could have been drawn is there instead, which does not depend on how many are drawn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from allocator.flow.flow import Flow
from allocator.operators.create import constant
from allocator.operators.pointwise import pointwise
from allocator.tracing.calls import Op
from allocator.tracing.meta_kernels import like
from allocator.tracing.operators import function, operator

_PLACE = 0.75
"""Of a uniform number between its ends, and of a normal one how many deviations above its mean."""
_MAYBE = 1 - _PLACE
"""The probability from which on a thing happens, where each has one of its own."""


def _place(given: dict[str, Any]) -> float:
    return _PLACE


def _normal(given: dict[str, Any]) -> Any:
    return given["mean"] + _PLACE * given["std"]


def _uniform(given: dict[str, Any]) -> float:
    return float(given["from"] + _PLACE * (given["to"] - given["from"]))


def _whole(given: dict[str, Any]) -> Any:
    """Of the whole numbers from the first to the one before the last; 1 where there is no last."""
    low, high = given.get("low", given.get("from")) or 0, given.get("high", given.get("to"))
    if high is None:
        return low + 1
    return low + (_PLACE * (high - low)).floor() if isinstance(high, torch.Tensor) else low + int(_PLACE * (high - low))


def _one(given: dict[str, Any]) -> float:
    """Which each of these may draw."""
    return 1.0


def _bernoulli(given: dict[str, Any]) -> Any:
    """True for any probability that is one for all; each of its own decides."""
    p = given.get("p")
    return float(p > 0) if isinstance(p, float) else (given["self"] if p is None else p) >= _MAYBE


def _dropout(given: dict[str, Any]) -> Any:
    """Nothing dropped, and the mask that says so."""
    x, p = given["input"], given["p"]
    x = x.clone() if given["train"] is False or p in (0, 1) else x / (1 - p)
    mask = torch.ones_like(x, dtype=torch.bool)
    return (x, mask) if p != 1 else (x.zero_(), mask.zero_())


def _undropped(given: dict[str, Any]) -> Any:
    return _dropout(given)[0]


def _leaky(given: dict[str, Any]) -> torch.Tensor:
    return functional.leaky_relu(given["self"], float(given["lower"] + given["upper"]) / 2)


def _counted(given: dict[str, Any]) -> torch.Tensor:
    """About the mean number of what happens at a rate, or so often with a probability."""
    mean: torch.Tensor = given["count"] * given["prob"] if "prob" in given else given["self"]
    return (mean + _PLACE).floor() if "prob" not in given else mean.round()


def _gamma(given: dict[str, Any]) -> torch.Tensor:
    alpha: torch.Tensor = given["self"]
    return alpha


def _shares(given: dict[str, Any]) -> torch.Tensor:
    alpha: torch.Tensor = given["self"]
    return alpha / alpha.sum(-1, keepdim=True)


def _as_large(x: torch.Tensor, *others: Any) -> torch.Tensor | None:
    same = all(other.shape == x.shape for other in others if isinstance(other, torch.Tensor))
    return like(x, x.dtype) if same else None


@operator("rand", "randn", sized=True, draws=True, alike=_place)
@operator("randint", sized=True, draws=True, alike=_whole)
@operator("normal", sized=True, draws=True, alike=_normal)
def drawn(flow: Flow, op: Op) -> None:
    """Of a size, it may go with whatever it meets; of a tensor's, or by its numbers, it has that one's channels."""
    (constant if op.arg("size") is not None else pointwise)(flow, op)


for _names, _alike in {
    ("rand_like", "randn_like"): _place,
    ("randint_like", "random"): _whole,
    ("normal_functional",): _normal,
    ("uniform",): _uniform,
    ("exponential", "geometric", "cauchy", "log_normal"): _one,
    ("bernoulli",): _bernoulli,
    ("native_dropout",): _dropout,
    ("dropout",): _undropped,  # it arrives as its parts, but where autograd is off
    ("rrelu_with_noise",): _leaky,
    ("poisson",): _counted,
}.items():
    operator(*_names, draws=True, alike=_alike)(pointwise)


operator("binomial", draws=True, alike=_counted, on_meta=_as_large)(pointwise)
operator("_standard_gamma", draws=True, alike=_gamma, on_meta=_as_large)(pointwise)


@operator("_sample_dirichlet", draws=True, alike=_shares, on_meta=_as_large)
def shares(flow: Flow, op: Op) -> None:
    """Along the last dim they come to one, so that each depends on all."""
    labels = flow.labels(op.inputs()[0])
    flow.freeze(labels[-1], op, "every channel depends on all others here")
    flow.set(op.outputs[0], labels)


@operator("multinomial", draws=True)
def drawn_places(flow: Flow, op: Op) -> None:
    """Places along the last dim, by how likely each is; they are left to be drawn."""
    *rows, places = flow.labels(op.inputs()[0])
    flow.freeze(places, op, "one of all of them is drawn")
    flow.set(op.outputs[0], [*rows, None])


# By these names a thread is seen to draw.
for _name in (
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "uniform", "random"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"),
    *(
        "native_dropout",
        "exponential",
        "geometric",
        "cauchy",
        "log_normal",
        "bernoulli",
        "binomial",
        "poisson",
        "rrelu",
    ),
    *("multinomial", "gumbel_softmax", "fractional_max_pool2d", "fractional_max_pool3d"),
    *("standard_gamma", "sample_dirichlet", "rrelu_with_noise", "normal_functional"),
):
    function(_name, whole=False, draws=True)
# Torch's distributions ask it of their parameters, and raise where it is not so.
function("is_all_true", whole=False, asserts=True)
