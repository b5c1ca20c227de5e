"""An allocation applied to a model: checked, materialised, and remembered by the result."""

from __future__ import annotations

from torch import nn

from allocator import adapters
from allocator.model_checks import check_model
from allocator.rewriting.allocation import Allocation
from allocator.rewriting.lineage import remember
from allocator.rewriting.materialise import check_fits, materialise, reset_parameters


def rewrite(model: nn.Module, allocation: Allocation, weights: str = "keep") -> nn.Module:
    """Copy `model` with only the neurons that the allocation keeps.

    Args:
        model: the network that the allocation was made for, or a fresh build of it; not changed. One in a wrapper
            that an adapter knows comes back in its like.
        allocation: what to keep.
        weights: "keep", or "reset" to train from scratch.

    Raises:
        AllocationMismatchError: the allocation was made for another architecture.
    """
    network = check_model(model)
    check_fits(network, allocation)
    in_parts = allocation.widens and allocation.parts
    small = _in_parts(network, allocation) if in_parts else materialise(network, allocation)
    remember(small, network, allocation)
    if weights == "reset":
        reset_parameters(small)
    return adapters.wrapped_like(model, small)


def _in_parts(model: nn.Module, allocation: Allocation) -> nn.Module:
    """One part after the other, as each that adds neurons says what it fills them with."""
    for part in allocation.parts:
        model = materialise(model, Allocation.from_dict(part))
    return model
