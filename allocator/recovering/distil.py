"""Training on the original's outputs, for those who have the minutes: what is left to gain after the closed form."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from allocator.clock import Progress, bar
from allocator.errors import RecoveryError, first_line
from allocator.recovering.compare import apart, distances
from allocator.recovering.moments import average
from allocator.recovering.samples import Samples
from allocator.scoring.batches import outputs_of
from allocator.tracing.inputs import Inputs

EPOCHS = 30
RATE = 1e-3
"""Of Adam, at first; it falls along a cosine."""


def distil(model: nn.Module, small: nn.Module, samples: Samples, progress: Progress | None = None) -> list[str]:
    """Train `small`, in place, to give what the original gives; names of what was changed.

    Batch norms keep their statistics. What was best on the inputs held back is what stays.

    Args:
        model: the original, in eval mode.
        small: what is left of it, in eval mode.
        samples: inputs.
        progress: called with how far it is.
    """
    parameters = {name: each for name, each in small.named_parameters() if each.is_floating_point()}
    learning = {name: each.requires_grad for name, each in parameters.items()}
    for each in parameters.values():
        each.requires_grad_(True)
    optimiser = torch.optim.Adam(parameters.values(), RATE)
    best, least = copy.deepcopy(small.state_dict()), distances(model, [small], samples.held)[0]
    with bar("distilling", progress, EPOCHS) as advance:
        for epoch in range(EPOCHS):
            for group in optimiser.param_groups:
                group["lr"] = RATE * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2
            for inputs in samples.seen:
                _step(model, small, inputs, optimiser)
            now = distances(model, [small], samples.held)[0]
            if now < least:
                best, least = copy.deepcopy(small.state_dict()), now
            advance(f"epoch {epoch + 1}, {now:.3g} from the original")
    small.load_state_dict(best)
    for name, each in parameters.items():
        each.requires_grad_(learning[name])
        each.grad = None
    return list(parameters)


def _step(model: nn.Module, small: nn.Module, inputs: Inputs, optimiser: torch.optim.Optimizer) -> None:
    """One step down the distance of the outputs, by the gradient of all ranks."""
    with torch.no_grad():
        wanted = outputs_of(model, inputs)
    with torch.enable_grad():
        loss = apart(wanted, outputs_of(small, inputs))
        optimiser.zero_grad()
        if not loss.requires_grad or not bool(loss.isfinite()):
            return
        try:
            loss.backward()
        except RuntimeError as error:
            said = f"the network cannot be trained ({first_line(error)}): method='least_squares' takes no gradient"
            raise RecoveryError(said) from error
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                average(parameter.grad)
    optimiser.step()
