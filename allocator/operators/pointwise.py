"""Operators that treat every element alone: labels pass, and operands must keep the same indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from allocator.flow.flow import SEEDED, Flow
from allocator.flow.labels import Label
from allocator.tracing.calls import Op
from allocator.tracing.operators import AS_ONE_CALL, operator

_JOINS = {"add": "sum", "sub": "sum", "rsub": "sum", "mul": "product"}
"""What kind of aggregation point two activations meet at, by the operator that makes them one."""


def _activation_as_one_call(name: str) -> Callable[..., tuple[Any, tuple[Any, ...]] | None]:
    """`torch.nn.functional`'s function of this name as one ATen call; None on values."""
    func, in_place = (getattr(torch.ops.aten, each).default for each in (name, f"{name}_"))

    def call(input: torch.Tensor, inplace: bool = False) -> tuple[Any, tuple[Any, ...]] | None:
        return (in_place if inplace else func, (input,)) if input.is_meta else None

    return call


for _name in ("relu", "silu", "hardswish", "hardsigmoid"):
    AS_ONE_CALL[getattr(functional, _name)] = _activation_as_one_call(_name)


@operator("add", for_pointwise=True)
@operator(
    "copy", "_prelu_kernel", "masked_fill", "where", "relu",
    "relu6", "hardsigmoid", "hardtanh", "lerp", "clamp", "threshold", "softplus",
)  # fmt: skip
@operator("hardswish", pointwise=True)
def pointwise(flow: Flow, op: Op) -> None:
    """Broadcast the operands: on every dim, those that are not repeated must keep the same indices.

    Any operator that torch tags as pointwise takes this rule.
    """
    out = flow.shape(op.outputs[0])
    inputs = op.inputs()
    operands = [i for i in inputs if i not in flow.uniform] or inputs
    result: list[Label] = []
    repeated: list[list[tuple[int, int]]] = []
    for dim, size in enumerate(out):
        present, alike = [], []
        for i in operands:
            own = dim - len(out) + len(flow.shape(i))
            if own >= 0 and flow.shape(i)[own] == size and flow.is_repeated(i, own):
                alike.append((i, own))
            elif own >= 0 and flow.shape(i)[own] == size:
                present.append((i, flow.labels(i)[own]))
            elif own >= 0 and flow.options.grows:  # of a single one that goes with all others, there cannot be two
                flow.freeze(flow.labels(i)[own], op, "a dim of size 1 is repeated")
        if any(label is None and i in flow.seeded for i, label in present):
            flow.freeze_all([label for _, label in present], op, SEEDED)
        result.append(label := flow.unify_all([label for _, label in present], op))
        for i, own in alike:
            flow.repeat(i, own, label, op)
        repeated.append([] if present else alike)
        _note_join(flow, op, dim - len(out), present)
    uniform = bool(inputs) and flow.uniform.issuperset(inputs)
    if not uniform:
        for i in flow.uniform.intersection(inputs):
            adopt(flow, op, i, result)
    for index in op.outputs:
        flow.set(index, result)
        flow.repeats.computed(index, repeated, tuple(result))
    if uniform:
        flow.uniform.update(op.outputs)


@operator("log_sigmoid_forward", pointwise=True)
def log_sigmoid(flow: Flow, op: Op) -> None:
    """Number by number; what is kept beside for the gradient may be empty."""
    source = op.inputs()[0]
    for index in op.outputs:
        same = flow.shape(index) == flow.shape(source)
        flow.set(index, flow.labels(source) if same else [None] * len(flow.shape(index)))


def adopt(flow: Flow, op: Op, index: int, labels: list[Label]) -> None:
    """A tensor that is the same everywhere has the channels that it meets: as many as are left of these, wherever."""
    for memory in flow.same_everywhere(index):
        _take(flow, op, memory, labels)


def _take(flow: Flow, op: Op, index: int, labels: list[Label]) -> None:
    own, shape = list(flow.labels(index)), flow.shape(index)
    for back in range(1, min(len(shape), len(labels)) + 1):
        label = labels[-back]
        if label is None or len(label) == 1 or shape[-back] == 1:
            continue
        if len(label) != shape[-back] or (index, len(shape) - back) in flow.numbered:
            flow.freeze(label, op, "a part of a constant is written")
        if len(label) != shape[-back]:
            continue
        if own[-back] is None:
            own[-back] = label
        else:
            flow.unify(own[-back], label, op)
    flow.set(index, own)
    flow.uniform.add(index)


def _note_join(flow: Flow, op: Op, dim: int, present: list[tuple[int, Label]]) -> None:
    """A sum or product of two activations whose labels differ is where branches meet; `dim` counts from the last."""
    kind = _JOINS.get(op.name.rstrip("_"))
    labelled = [(i, label) for i, label in present if label is not None and i in flow.active]
    if kind is None or len(labelled) < 2:
        return
    first, second = labelled[0][1], labelled[1][1]
    if kind == "product" and np.array_equal(first, second):
        return
    flow.join(kind, op, dim, [i for i, _ in labelled])
