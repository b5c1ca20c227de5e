"""fvcore's own count, the measure that every budget is held against."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections import Counter
from collections.abc import Collection
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from allocator import adapters
from allocator.errors import TraceError, in_words
from allocator.logs import hidden, unwarned
from allocator.modules import modules_of, set_training, skeleton, tensor_names
from allocator.torch_private import called_straight
from allocator.tracing.inputs import Inputs
from allocator.tracing.isolation import apart, undisturbed
from allocator.tracing.outputs import holds_itself, tensors_in
from allocator.tracing.uncomputed import Uncomputed

# Convolutions and linear layers, as fvcore calls them.
_LAYERS = ("conv", "linear", "addmm", "mm")


def fvcore_flops(
    model: nn.Module, inputs: Inputs, written: Collection[str] | None = None, *, computed: bool = True
) -> tuple[int, dict[str, int]]:
    """FLOPs of one eval-mode forward by `fvcore.nn.FlopCountAnalysis`.

    Args:
        model: any module; a copy of it is run.
        inputs: positional example inputs.
        written: names of the parameters that the forward writes into, where that is known: no others are copied.
        computed: False where sizes depend on no numbers, which then nobody computes; on the CPU alone.

    Returns:
        (total FLOPs, operators that fvcore does not count with the number of their calls). A product of a matrix
        and a vector, at which fvcore itself raises IndexError, counts one FLOP per element of the matrix; a
        convolution whose padding is a word ("same"), which fvcore itself leaves out, counts as any other.

    Raises:
        TraceError: fvcore cannot follow or count the forward.
    """
    counts, unsupported = _count(model, inputs, written, computed=computed)
    return sum(counts.values()), unsupported


def fvcore_layer_flops(model: nn.Module, inputs: Inputs) -> int:
    """`fvcore_flops` of convolutions and linear layers alone.

    Raises:
        TraceError: as for `fvcore_flops`.
    """
    counts, _ = _count(model, inputs)
    return sum(counts.get(name, 0) for name in _LAYERS)


def _count(
    model: nn.Module, inputs: Inputs, written: Collection[str] | None = None, *, computed: bool = True
) -> tuple[dict[str, int], dict[str, int]]:
    with unwarned():  # its import touches parts of torch that are deprecated
        import fvcore.nn  # noqa: F401

    try:
        return _analyse(model, inputs, written, plain=True, computed=computed)
    except Exception:  # of what a model returns, torch's tracer takes tensors in plain containers only
        try:
            return _analyse(model, inputs, written, plain=False, computed=computed)
        except Exception as error:
            raise TraceError(
                f"fvcore cannot count {type(model).__name__}: {in_words(error)}; check that "
                "torch.jit.trace follows model(*example_inputs)"
            ) from error


def _analyse(
    model: nn.Module, inputs: Inputs, written: Collection[str] | None, *, plain: bool, computed: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """`plain`: the model returns what it returns itself; else the tensors alone of that."""

    def own(name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A forward may write into buffers, and, where nothing is known of it, into parameters."""
        shared = written is not None and isinstance(tensor, nn.Parameter) and name not in written
        return tensor.detach() if shared else tensor.detach().clone()

    inputs = inputs.map(torch.clone)  # a forward may write into its inputs
    copied = set_training(skeleton(model, own), False)
    mode = None if computed else Uncomputed(tensor_names(copied).values())
    called, straight = _Whole(copied, inputs.kwargs, plain, mode), called_straight(modules_of(copied).values())
    as_traced = contextlib.nullcontext() if computed else adapters.while_tracing()
    silent = hidden("fvcore.nn.jit_analysis", logging.WARNING)
    with torch.no_grad(), unwarned(), undisturbed(model), as_traced, straight, silent:
        analysis = _analysis()(called, tuple(inputs.args))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.set_op_handle("aten::matmul", _matmul_flops, "aten::_convolution_mode", _convolution_flops)
        counts = {name: int(flops) for name, flops in analysis.by_operator().items()}
    if mode is not None and mode.failed:
        raise TraceError(f"the forward of {type(model).__name__} cannot be counted without its numbers")
    return counts, dict(analysis.unsupported_ops())


@functools.cache
def _analysis() -> Any:
    """fvcore's own class, which leaves the process's filters of warnings alone."""
    from fvcore.nn import FlopCountAnalysis, jit_analysis

    def nothing(*_: Any, **__: Any) -> None:
        return None

    unfiltered = SimpleNamespace(catch_warnings=contextlib.nullcontext, simplefilter=nothing, filterwarnings=nothing)
    analyse = FunctionType(FlopCountAnalysis._analyze.__code__, {**vars(jit_analysis), "warnings": unfiltered})
    return type(FlopCountAnalysis.__name__, (FlopCountAnalysis,), {"_analyze": analyse})


class _Whole(nn.Module):
    """A model as one module: fvcore passes positional arguments only, and would keep a count for every part of it."""

    def __init__(
        self, model: nn.Module, kwargs: dict[str, object], plain: bool, mode: Uncomputed | None = None
    ) -> None:
        super().__init__()
        self.within: Any = contextlib.nullcontext() if mode is None else mode
        self.network, self.kwargs, self.plain = (model,), kwargs, plain  # in a tuple it is no part of this module
        for i, tensor in enumerate(tensor_names(model).values()):
            fields: dict[str, Any] = self._parameters if isinstance(tensor, nn.Parameter) else self._buffers
            fields[str(i)] = tensor

    def forward(self, *args: object) -> object:
        with self.within:
            output = apart(self.network[0], *args, **self.kwargs)
        return output if self.plain and not holds_itself(output) else tuple(tensors_in(output))


def _convolution_flops(inputs: list[Any], outputs: list[Any]) -> Any:
    from fvcore.nn.jit_handles import conv_flop_count, get_shape

    return Counter({"conv": conv_flop_count(get_shape(inputs[0]), get_shape(inputs[1]), get_shape(outputs[0]))})


def _matmul_flops(inputs: list[Any], outputs: list[Any]) -> Any:
    from fvcore.nn.jit_handles import get_shape, matmul_flop_jit

    a, b = (get_shape(value) for value in inputs)
    return math.prod(a) if len(b) == 1 else matmul_flop_jit(inputs, outputs)
