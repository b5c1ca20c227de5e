"""What stands in for a tensor where a forward is recorded: one without values, a fake one, or a copy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import nn

from allocator.logs import hidden
from allocator.torch_private import FAKE_LOGGER, fake_tensors
from allocator.tracing import meta_kernels
from allocator.tracing.inputs import device_of


def converter(model: nn.Module, mode: str, stack: contextlib.ExitStack) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Gives what stands in for a tensor of this name.

    Args:
        model: whose forward it is.
        mode: "meta", "fake" or "real".
        stack: entered with what has to hold while the forward runs.
    """
    if mode == "meta":
        return lambda _, t: _without_values(t)
    if mode == "fake":
        fake = fake_tensors()
        stack.enter_context(hidden(FAKE_LOGGER))  # what raises is said by us
        stack.enter_context(fake)
        device = device_of(model)

        def convert(_: str, t: torch.Tensor) -> torch.Tensor:
            if t.is_meta and device.type != "meta":  # a size without values
                return torch.empty(t.shape, dtype=t.dtype, device=device)
            return fake.from_tensor(t.data)  # `detach` would share its count of writes

        return convert
    return lambda _, t: t.detach().clone()


def _without_values(t: torch.Tensor) -> torch.Tensor:
    if t.is_meta and t.layout is torch.strided:
        return meta_kernels.like(t, t.dtype)  # torch's own way takes several times as long
    return torch.empty_like(t, device="meta")
