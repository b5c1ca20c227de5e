"""How far a smaller network's outputs are from the original's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from allocator.recovering.samples import size_of
from allocator.scoring import ranks
from allocator.scoring.batches import outputs_of
from allocator.tracing.inputs import Inputs
from allocator.tracing.outputs import tensors_in


@torch.no_grad()
def distances(model: nn.Module, smalls: Sequence[nn.Module], parts: Sequence[Inputs]) -> list[float]:
    """Per smaller network, mean over the inputs, and over all ranks, of how far its outputs are from the original's.

    Of logits (N, classes), or what a language model calls so, Kullback-Leibler divergence in nats. Of other outputs the
    squared difference as a share of the original's square.

    Args:
        model, smalls: in eval mode.
        parts: inputs.
    """
    sums = torch.zeros(1 + len(smalls), dtype=torch.float64)
    for inputs in parts:
        weight = size_of(inputs)
        original = outputs_of(model, inputs)
        sums[0] += weight
        for place, small in enumerate(smalls, start=1):
            found = apart(original, outputs_of(small, inputs))
            sums[place] += weight * (float(found) if bool(found.isfinite()) else torch.inf)
    ranks.add_up(sums)
    return (sums[1:] / sums[0]).tolist()


def apart(original: Any, small: Any) -> torch.Tensor:
    """A scalar: how far two outputs are from each other, as `distances` has it."""
    known, given = logits_of(original), logits_of(small)
    if known is not None and given is not None and known.shape == given.shape:
        return functional.kl_div(
            functional.log_softmax(given.double().flatten(0, -2), 1),
            functional.log_softmax(known.double().flatten(0, -2), 1),
            reduction="batchmean",
            log_target=True,
        )
    total, count = torch.zeros((), dtype=torch.float64), 0
    for a, b in zip(tensors_in(original), tensors_in(small), strict=False):
        if a.is_floating_point() and a.shape == b.shape:
            scale = a.double().square().sum().clamp_min(1e-30)
            total, count = total + ((a.double() - b.double()).square().sum() / scale).cpu(), count + 1
    return total / max(count, 1)


def logits_of(output: Any) -> torch.Tensor | None:
    """The logits of an output that has such."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor) and logits.dim() >= 2:
        return logits
    tensors = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
    alone = len(tensors) == 1 and tensors[0].dim() == 2 and tensors[0].shape[1] > 1
    return tensors[0] if alone else None
