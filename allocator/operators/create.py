"""Operators that make tensors out of sizes and numbers."""

from __future__ import annotations

from allocator.flow.flow import Flow
from allocator.operators.view import identity
from allocator.tracing.calls import Op
from allocator.tracing.operators import operator

operator("zeros_like", "ones_like", "full_like", "empty_like")(identity)


@operator("ones", "full", sized=True, creates=True)
@operator("scalar_tensor", creates=True)
@operator(
    "empty", "new_ones", "new_full", "new_empty", "empty_strided", "new_empty_strided",
    sized=True,
)  # fmt: skip
def constant(flow: Flow, op: Op) -> None:
    """The same value, or noise, everywhere: any channel of it can go with the channels it meets."""
    for index in op.outputs:
        flow.set(index, [None] * len(flow.shape(index)))
        flow.uniform.add(index)


@operator("zeros", sized=True, creates=True)
@operator("new_zeros", sized=True)
def zeros(flow: Flow, op: Op) -> None:
    """A constant of which no sum holds anything: a product with it reads no neuron."""
    constant(flow, op)
    flow.zeros.update(op.outputs)


@operator("arange", creates=True)
@operator("linspace", "eye", "randperm", "tril_indices", "triu_indices")
def counted(flow: Flow, op: Op) -> None:
    """Values that depend on their place, so whatever meets them stays."""
    for index in op.outputs:
        flow.set(index, [None] * len(flow.shape(index)))
