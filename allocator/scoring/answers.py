"""Losses for a gradient pass: the caller's, or one that the model's own answers stand in for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.nn import functional

from allocator.errors import DataError, a_kind, in_words
from allocator.scoring.batches import Batch
from allocator.torch_private import tree_map
from allocator.tracing.outputs import tensors_in

Loss = Callable[[Any, Any], torch.Tensor]
"""(the model's output, the batch's target) to a scalar."""
Answer = Literal["likeliest", "shaken", "drawn"]
"""What stands in for a label: the class that the model takes for right; this, and every other class a little; or one
that is drawn."""


def loss_of(
    output: Any, batch: Batch, loss: Loss | None, generator: torch.Generator, answer: Answer = "likeliest"
) -> torch.Tensor:
    """A scalar whose gradient tells what a change of the output costs.

    Args:
        output: what the model gave.
        batch: what it was given.
        loss: the caller's, called with the output and the batch's target; None for the model's own answers.
        generator: of the noise that stands in for answers that are no classes, and of classes that are drawn.
        answer: as for `own_answers`.

    Raises:
        DataError: the loss raised, or is not a finite scalar.
    """
    if loss is None:
        value = own_answers(output, generator, answer)
    else:
        try:
            value = loss(output, tree_map(_own, batch.target))
        except Exception as error:
            said = f"the loss raised {in_words(error)}"
            raise DataError(f"{said}; {_called_with(output, batch.target)}") from error
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise DataError(f"the loss gave {got}, expected a scalar: take the mean over the batch")
    if not bool(torch.isfinite(value)):
        raise DataError(_not_finite(float(value.detach()), output, loss))
    return value.reshape(())


def _own(leaf: Any) -> Any:
    """A copy, which a loss may write into."""
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _called_with(output: Any, target: Any) -> str:
    """What a loss was called with, in words."""
    if target is None:
        return f"it was called with {_shown(output)}, and None for a target, as the data yield none"
    whole = ", which is the whole batch" if isinstance(target, dict) else ""
    return f"it was called with {_shown(output)} and the target, {_shown(target)}{whole}"


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"{a_kind(value)} of {', '.join(map(str, value))}" if isinstance(value, dict) else a_kind(value)


def _not_finite(value: float, output: Any, loss: Loss | None) -> str:
    """Who is to blame for a loss that is no number: the model's answers, or else the caller's function."""
    finite = all(bool(tensor.isfinite().all()) for tensor in tensors_in(output) if tensor.is_floating_point())
    if loss is None or not finite:
        answers = "" if finite else ", as the model's answers are not finite"
        return f"the loss is {value}{answers}: check the data, and the model's weights"
    name = getattr(loss, "__name__", type(loss).__name__)
    return f"the loss is {value}, and the model's answers are finite: check the function {name!r}, and the targets"


def own_answers(output: Any, generator: torch.Generator, answer: Answer = "likeliest") -> torch.Tensor:
    """A loss without labels: how far the output is from what it is.

    Of logits, cross-entropy with the class that the model takes for right. Where the logits are to be "shaken", noise
    whose mean square is one over all classes is added: a few inputs show a few classes, of which the model is certain,
    and its gradient would be that of these alone. Or, where the answer is to be "drawn", cross-entropy with a class
    that is as likely as the model says, so that the mean square of its gradient is what the divergence from the model
    bends. Of anything else, the output times noise, whose squared gradient is, on average, what the sum of squared
    errors loses (Gauss-Newton).
    """
    logits = getattr(output, "logits", None)
    tensors = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
    if not tensors:
        raise DataError(f"the model's output, {a_kind(output)}, has no floating-point tensor to learn from")
    if isinstance(logits, torch.Tensor) and logits.dim() >= 2:
        return _of_logits(logits.reshape(-1, logits.shape[-1]), generator, answer)
    if len(tensors) == 1 and tensors[0].dim() == 2 and tensors[0].shape[1] > 1:
        return _of_logits(tensors[0], generator, answer)
    total = tensors[0].new_zeros(())
    for tensor in tensors:
        noise = _noise(tensor, generator)
        spread = tensor.detach().float().std().clamp_min(1e-12) if tensor.numel() > 1 else 1.0
        total = total + (tensor * noise).sum() / (spread * max(tensor.numel(), 1) ** 0.5)
    return total


def _of_logits(logits: torch.Tensor, generator: torch.Generator, answer: Answer) -> torch.Tensor:
    """Mean over (n, classes) rows."""
    if answer == "drawn":
        likely = logits.detach().float().softmax(-1).cpu()
        classes = torch.multinomial(likely, 1, generator=generator)[:, 0]
        return functional.cross_entropy(logits, classes.to(logits.device))
    value = functional.cross_entropy(logits, logits.detach().argmax(-1))
    if answer == "shaken":
        noise = _noise(logits, generator)
        noise = noise - noise.mean(1, keepdim=True)  # all logits raised alike say the same
        allowed = torch.where(logits.isfinite(), logits, 0)  # a class that is ruled out stays so
        wide = allowed.to(torch.promote_types(logits.dtype, torch.float32))  # the sum may be too large for half
        value = value + (wide * noise).sum() / logits.shape[1] ** 0.5 / len(logits)
    return value


def _noise(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Standard normal, drawn on the CPU for any device."""
    return torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
