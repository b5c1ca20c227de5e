"""fvcore's own count, the measure that every budget is held against."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from allocator.errors import TraceError
from allocator.isolation import undisturbed
from allocator.modules import set_training, skeleton
from allocator.tracing.inputs import Inputs

# Convolutions and linear layers, as fvcore calls them.
_LAYERS = ("conv", "linear", "addmm", "mm")


def fvcore_flops(model: nn.Module, inputs: Inputs) -> tuple[int, dict[str, int]]:
    """FLOPs of one eval-mode forward by `fvcore.nn.FlopCountAnalysis`.

    Args:
        model: any module; a copy of it is run.
        inputs: positional example inputs.

    Returns:
        (total FLOPs, operators that fvcore does not count with the number of their calls). A product of a matrix
        and a vector, at which fvcore itself raises IndexError, counts one FLOP per element of the matrix; a
        convolution whose padding is a word ("same"), which fvcore itself leaves out, counts as any other.

    Raises:
        TraceError: fvcore cannot follow or count the forward.
    """
    counts, unsupported = _count(model, inputs)
    return sum(counts.values()), unsupported


def fvcore_layer_flops(model: nn.Module, inputs: Inputs) -> int:
    """`fvcore_flops` of convolutions and linear layers alone.

    Raises:
        TraceError: as for `fvcore_flops`.
    """
    counts, _ = _count(model, inputs)
    return sum(counts.get(name, 0) for name in _LAYERS)


def _count(model: nn.Module, inputs: Inputs) -> tuple[dict[str, int], dict[str, int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import touches parts of torch that are deprecated
        from fvcore.nn import FlopCountAnalysis

    # Parameters are copied too: a forward may write into them.
    copied = set_training(skeleton(model, lambda _, t: t.detach().clone()), False)
    inputs = inputs.map(torch.clone)  # a forward may write into its inputs
    args = tuple(inputs.args)
    with torch.no_grad(), undisturbed(model), _quiet():
        analysis = FlopCountAnalysis(copied if not inputs.kwargs else _Bound(copied, inputs.kwargs), args)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        analysis.set_op_handle("aten::matmul", _matmul_flops, "aten::_convolution_mode", _convolution_flops)
        try:
            counts = {name: int(flops) for name, flops in analysis.by_operator().items()}
            return counts, dict(analysis.unsupported_ops())
        except Exception as error:
            raise TraceError(
                f"fvcore cannot count {type(model).__name__}: {type(error).__name__}: {error}; check that "
                "torch.jit.trace follows model(*example_inputs)"
            ) from error


def _convolution_flops(inputs: list[Any], outputs: list[Any]) -> Any:
    from fvcore.nn.jit_handles import conv_flop_count, get_shape

    return Counter({"conv": conv_flop_count(get_shape(inputs[0]), get_shape(inputs[1]), get_shape(outputs[0]))})


def _matmul_flops(inputs: list[Any], outputs: list[Any]) -> Any:
    from fvcore.nn.jit_handles import get_shape, matmul_flop_jit

    a, b = (get_shape(value) for value in inputs)
    return math.prod(a) if len(b) == 1 else matmul_flop_jit(inputs, outputs)


class _Bound(nn.Module):
    """A module with its keyword arguments set, since fvcore passes positional ones only."""

    def __init__(self, model: nn.Module, kwargs: dict[str, object]) -> None:
        super().__init__()
        self.model, self.kwargs = model, kwargs

    def forward(self, *args: object) -> object:
        return self.model(*args, **self.kwargs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """fvcore logs what it skips; the report lists it instead."""
    logger = logging.getLogger("fvcore.nn.jit_analysis")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
