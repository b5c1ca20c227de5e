"""A count by torch itself, where fvcore cannot count a model or does not look into all of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from allocator.cost.metric import Metric
from allocator.cost.terms import Term
from allocator.flow.flow import Flow
from allocator.modules import set_training, skeleton
from allocator.tracing.inputs import Inputs
from allocator.tracing.isolation import apart, undisturbed


def products_by_torch(model: nn.Module, inputs: Inputs, *, on_meta: bool) -> int:
    """Multiply-adds of the convolutions and matrix products of one eval-mode forward, as torch's own counter has them.

    Args:
        model: any module; a copy of it is run.
        inputs: example inputs.
        on_meta: run it on tensors without storage.
    """

    def copied(_: str, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device="meta") if on_meta else tensor.detach().clone()

    network = set_training(skeleton(model, copied), False)
    given = inputs.map(lambda t: copied("", t))
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _OneModule()  # type: ignore[assignment]
    with torch.no_grad(), undisturbed(model), counter:
        apart(network, *given.args, **given.kwargs)
    return int(counter.get_total_flops()) // 2


class _OneModule:
    """In place of what tells modules apart, by hooks that a forward which takes gradients does not run with."""

    parents = frozenset({"Global"})

    def __enter__(self) -> _OneModule:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def products_by_the_trace(flow: Flow, unit_of_slot: np.ndarray, kept: np.ndarray) -> int:
    """The same from a recorded forward, when the neurons with `kept` true are kept."""
    terms = []
    for op in flow.trace.ops:
        if op.declared.multiplies and op.declared.flops is not None:
            terms += [Term.of(product, op.module, op.index) for product in op.declared.flops(flow, op)]
    return int(Metric("products", "", terms, unit_of_slot, len(kept)).value(kept))
