"""Losses for a gradient pass: the caller's, or one that the model's own answers stand in for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from allocator.errors import DataError, a_kind
from allocator.scoring.batches import Batch
from allocator.tracing.record import tensors_in

Loss = Callable[[Any, Any], torch.Tensor]
"""(the model's output, the batch's target) to a scalar."""


def loss_of(
    output: Any, batch: Batch, loss: Loss | None, generator: torch.Generator, *, drawn: bool = False
) -> torch.Tensor:
    """A scalar whose gradient tells what a change of the output costs.

    Args:
        output: what the model gave.
        batch: what it was given.
        loss: the caller's, called with the output and the batch's target; None for the model's own answers.
        generator: of the noise that stands in for answers that are no classes, and of classes that are drawn.
        drawn: as for `own_answers`.

    Raises:
        DataError: the loss raised, or is not a finite scalar.
    """
    if loss is None:
        value = own_answers(output, generator, drawn=drawn)
    else:
        try:
            value = loss(output, batch.target)
        except Exception as error:
            hint = "" if batch.target is not None else "; the data yield no target"
            raise DataError(f"the loss raised {type(error).__name__}: {error}{hint}") from error
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise DataError(f"the loss gave {got}, expected a scalar: take the mean over the batch")
    if not bool(torch.isfinite(value)):
        raise DataError(f"the loss is {float(value.detach())}: check the data, and the model's weights")
    return value.reshape(())


def own_answers(output: Any, generator: torch.Generator, *, drawn: bool = False) -> torch.Tensor:
    """A loss without labels: how far the output is from what it is.

    Of logits, cross-entropy with the class that the model takes for right; or, where it is `drawn`, with one that is as
    likely as the model says, so that the mean square of its gradient is what the divergence from the model bends. Of
    anything else, the output times noise, whose squared gradient is, on average, what the sum of squared errors loses
    (Gauss-Newton).
    """
    logits = getattr(output, "logits", None)
    tensors = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
    if not tensors:
        raise DataError(f"the model's output, {a_kind(output)}, has no floating-point tensor to learn from")
    if isinstance(logits, torch.Tensor) and logits.dim() >= 2:
        return _cross_entropy(logits.reshape(-1, logits.shape[-1]), generator if drawn else None)
    if len(tensors) == 1 and tensors[0].dim() == 2 and tensors[0].shape[1] > 1:
        return _cross_entropy(tensors[0], generator if drawn else None)
    total = tensors[0].new_zeros(())
    for tensor in tensors:
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
        spread = tensor.detach().float().std().clamp_min(1e-12) if tensor.numel() > 1 else 1.0
        total = total + (tensor * noise).sum() / (spread * max(tensor.numel(), 1) ** 0.5)
    return total


def _cross_entropy(logits: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """With the likeliest class, or with one that is drawn."""
    if generator is None:
        return functional.cross_entropy(logits, logits.detach().argmax(-1))
    likely = logits.detach().float().softmax(-1).cpu()
    classes = torch.multinomial(likely, 1, generator=generator)[:, 0]
    return functional.cross_entropy(logits, classes.to(logits.device))
