"""Operators that make tensors out of sizes and numbers."""

from __future__ import annotations

from allocator.flow.flow import Flow
from allocator.flow.rules.registry import rule
from allocator.flow.rules.view import identity
from allocator.tracing.record import Op

rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")(identity)


@rule("zeros", "ones", "full", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full", "new_empty",
      "scalar_tensor", "empty_strided", "new_empty_strided")  # fmt: skip
def constant(flow: Flow, op: Op) -> None:
    """The same value, or noise, everywhere: any channel of it can go with the channels it meets."""
    for index in op.outputs:
        flow.set(index, [None] * len(flow.shape(index)))
        flow.uniform.add(index)


@rule("arange", "linspace", "eye", "randperm", "tril_indices", "triu_indices", "randint")
def counted(flow: Flow, op: Op) -> None:
    """Values that depend on their place, so whatever meets them stays."""
    for index in op.outputs:
        flow.set(index, [None] * len(flow.shape(index)))
