"""Fourier transforms, and complex numbers beside their real and imaginary parts."""

from __future__ import annotations

from allocator.flow.flow import Flow
from allocator.operators.pointwise import pointwise
from allocator.tracing.calls import Op
from allocator.tracing.operators import operator


@operator("_fft_r2c", "_fft_c2r", "_fft_c2c")
def transform(flow: Flow, op: Op) -> None:
    """Every result along the transformed dims depends on all their indices; the others pass."""
    labels = list(flow.labels(op.inputs()[0]))
    for dim in op.arg("dim"):
        flow.freeze(labels[dim], op, "every channel depends on all others here")
        labels[dim] = None
    flow.set(op.outputs[0], labels)


@operator("view_as_complex")
def as_complex(flow: Flow, op: Op) -> None:
    """(..., 2) to (...): the last dim holds the two parts."""
    *labels, parts = flow.labels(op.inputs()[0])
    flow.freeze(parts, op, "a number's two parts go together")
    flow.set(op.outputs[0], labels)


@operator("view_as_real")
def as_real(flow: Flow, op: Op) -> None:
    """(...) to (..., 2)."""
    flow.set(op.outputs[0], [*flow.labels(op.inputs()[0]), None])


operator("complex", "polar")(pointwise)
