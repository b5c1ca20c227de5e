"""Functions that draw random numbers, and what stands in for what they draw where two networks are compared.

Of fewer channels another number would fall to each, so that outputs would differ though the networks do not. Where they
do, what is drawn is the same number everywhere instead, one that could have been drawn, and no generator is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from allocator.tracing.operators import function

_PLACE = 0.75
"""Of a uniform number between its ends, and of a normal one how many deviations above its mean."""


def _made_by(make: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def alike(*args: Any, generator: Any = None, **kwargs: Any) -> torch.Tensor:
        return make(*args, **kwargs).fill_(_PLACE)

    return alike


def _normal(mean: Any = 0.0, std: Any = 1.0, size: Any = None, *, out: Any = None, **kwargs: Any) -> Any:
    """`torch.normal` of tensors or numbers."""
    if size is None:
        made = mean + _PLACE * std
        return made if out is None else out.resize_(made.shape).copy_(made)
    if out is not None:
        return out.resize_(tuple(size)).fill_(mean + _PLACE * std)
    given = {name: value for name, value in kwargs.items() if name in ("dtype", "device") and value is not None}
    return torch.full(tuple(size), mean + _PLACE * std, **given)


def _normal_in_place(tensor: torch.Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> torch.Tensor:
    return tensor.fill_(mean + _PLACE * std)


def _uniform_in_place(tensor: torch.Tensor, low: float = 0.0, high: float = 1.0, **given: Any) -> torch.Tensor:
    low, high = given.get("from", low), given.get("to", high)
    return tensor.fill_(low + _PLACE * (high - low))


def _bernoulli(input: torch.Tensor, p: Any = None, *, out: Any = None, **_: Any) -> torch.Tensor:
    """True where its probability, as `p` or in the tensor, is above a quarter."""
    made = (torch.as_tensor(input if p is None else p) >= 1 - _PLACE).to(input.dtype).expand_as(input)
    return made.clone() if out is None else out.resize_(made.shape).copy_(made)


def _bernoulli_in_place(tensor: torch.Tensor, p: Any = 0.5, **_: Any) -> torch.Tensor:
    return tensor.copy_(_bernoulli(tensor, p))


def _one(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Which each of these may draw."""
    return tensor.fill_(1.0)


def _undropped(input: torch.Tensor, p: float = 0.5, trains: bool = True, *_: Any, **given: Any) -> torch.Tensor:
    return input.clone() if given.get("training", given.get("train", trains)) else input


def _rrelu(
    input: torch.Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
    **_: Any,
) -> torch.Tensor:
    return functional.leaky_relu(input, (lower + upper) / 2, inplace)


def _rrelu_in_place(input: torch.Tensor, lower: float = 1 / 8, upper: float = 1 / 3, *_: Any, **__: Any) -> Any:
    return _rrelu(input, lower, upper, inplace=True)


for _name in ("rand", "randn"):
    function(_name, whole=False, draws=True, alike=_made_by(torch.empty))
for _name in ("rand_like", "randn_like"):
    function(_name, whole=False, draws=True, alike=_made_by(torch.empty_like))
for _kind in (
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "feature_dropout",
    "feature_alpha_dropout",
):
    function(_kind, whole=False, draws=True, alike=_undropped, alike_in_place=_undropped)
for _name in ("exponential", "geometric", "cauchy", "log_normal"):
    function(_name, whole=False, draws=True, alike_in_place=_one)
function("normal", whole=False, draws=True, alike=_normal, alike_in_place=_normal_in_place)
function("uniform", whole=False, draws=True, alike_in_place=_uniform_in_place)
function("bernoulli", whole=False, draws=True, alike=_bernoulli, alike_in_place=_bernoulli_in_place)
function("rrelu", whole=False, draws=True, alike=_rrelu, alike_in_place=_rrelu_in_place)
# What these draw are places, or has an order; they are left to draw.
for _name in (
    *("randint", "randperm", "randint_like", "multinomial", "poisson", "gumbel_softmax"),
    *("fractional_max_pool2d", "fractional_max_pool3d"),
):
    function(_name, whole=False, draws=True)
