"""Parameters and activations, as sums of the same products that FLOPs are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from allocator.cost.terms import Term, elements
from allocator.flow.flow import Flow
from allocator.flow.labels import Slots
from allocator.tracing.calls import Op
from allocator.tracing.operators import FUNCTIONS


def parameter_terms(slots: Slots, tensors: Mapping[str, torch.Tensor]) -> list[Term]:
    """Numbers in all parameters, each counted once; a layer that is left without neurons has none.

    Args:
        slots: numbers of the model's parameters and buffers.
        tensors: the model's parameters and buffers by their first names.
    """
    parameters = [name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)]
    return [Term(1, slots.labels(name), module=name.rpartition(".")[0]) for name in parameters]


def activation_terms(flow: Flow, flops: Iterable[Term]) -> list[Term]:
    """Numbers that convolutions and matrix products write in one forward, as fvcore counts them.

    Args:
        flow: labels of the forward.
        flops: what `flops_terms` gave for it; fvcore counts the same calls.
    """
    ops = flow.trace.ops
    last_of_call = {id(op.call): op for op in ops if op.call is not None}
    written: dict[int, Op] = {}
    for term in flops:
        op = ops[term.op]
        function = None if op.call is None else FUNCTIONS[op.call.name]
        if function is not None and function.flops is not None:  # counted as a whole
            if not function.multiplies:
                continue
            op = last_of_call[id(op.call)]
        elif not op.declared.multiplies:
            continue
        written[op.outputs[0]] = op
    return [Term.of(elements(flow, value), op.module, op.index) for value, op in written.items()]
