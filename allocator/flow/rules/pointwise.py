"""Operators that treat every element alone: labels pass, and operands must keep the same indices."""

from __future__ import annotations

import numpy as np

from allocator.flow.flow import Flow, Label
from allocator.flow.rules.registry import rule
from allocator.tracing.record import Op

_SUMS = frozenset({"add", "sub", "rsub", "add_", "sub_"})
_PRODUCTS = frozenset({"mul", "mul_"})


@rule(
    "add", "copy", "dropout", "native_dropout", "bernoulli", "_prelu_kernel", "masked_fill", "where", "relu",
    "relu6", "hardswish", "hardsigmoid", "hardtanh", "rrelu_with_noise", "lerp", "clamp", "threshold", "softplus",
)  # fmt: skip
def pointwise(flow: Flow, op: Op) -> None:
    """Broadcast the operands: on every dim, those that are not repeated must keep the same indices.

    Any operator that torch tags as pointwise takes this rule.
    """
    out = flow.shape(op.outputs[0])
    inputs = op.inputs()
    operands = [i for i in inputs if i not in flow.uniform] or inputs
    result: list[Label] = []
    for dim, size in enumerate(out):
        present = []
        for i in operands:
            own = dim - len(out) + len(flow.shape(i))
            if own >= 0 and flow.shape(i)[own] == size:
                present.append((i, flow.labels(i)[own]))
        result.append(flow.unify_all([label for _, label in present], op))
        _note_join(flow, op, dim, present)
    uniform = bool(inputs) and flow.uniform.issuperset(inputs)
    for index in op.outputs:
        flow.set(index, result)
    if uniform:
        flow.uniform.update(op.outputs)


def _note_join(flow: Flow, op: Op, dim: int, present: list[tuple[int, Label]]) -> None:
    """A sum or product of two activations whose labels differ is where branches meet."""
    kind = "sum" if op.name in _SUMS else "product" if op.name in _PRODUCTS else None
    labelled = [(i, label) for i, label in present if label is not None and i in flow.active]
    if kind is None or len(labelled) < 2:
        return
    first, second = labelled[0][1], labelled[1][1]
    if kind == "product" and np.array_equal(first, second):
        return
    flow.join(kind, op, dim, [i for i, _ in labelled])
