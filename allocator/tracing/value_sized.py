"""Calls whose result's size depends on values that a trace does not have: they give the largest there can be.

A detector keeps the boxes that its scores and overlaps allow. How many these are changes with the image and
with every weight, so that shapes and cost of one forward would say little of the next. At their largest both
are properties of the network and its settings, and nothing has to be computed to know them.
"""

from __future__ import annotations

import math

import torch

from allocator.torch_private import FakeTensor
from allocator.tracing.calls import Op, Trace

MASKS = (torch.bool, torch.uint8)
"""Dtypes of tensors that name elements by a truth value, so that how many they name is no matter of shape."""


def value_sized(trace: Trace) -> list[Op]:
    """Recorded calls that gave their largest result."""
    if trace.mode == "real":
        return []
    return [op for op in trace.ops if op.declared.value_sized is not None and op.declared.value_sized(trace, op)]


def without_values(tensor: torch.Tensor | None) -> bool:
    """Whether there is a tensor here that has a shape and nothing else."""
    return tensor is not None and (tensor.is_meta or isinstance(tensor, FakeTensor))


def everywhere(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Indices of all n elements of a tensor, one (n,) tensor per dim."""
    places = torch.arange(tensor.numel(), device=tensor.device)
    return [places // math.prod(tensor.shape[d + 1 :]) % max(size, 1) for d, size in enumerate(tensor.shape)]
