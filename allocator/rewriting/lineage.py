"""A rewritten model remembers the allocation that leads to it from the network it was built as."""

from __future__ import annotations

from torch import nn

from allocator.modules import tensor_names
from allocator.rewriting.allocation import Allocation
from allocator.rewriting.materialise import gives

LINEAGE_ATTRIBUTE = "_allocator_lineage"
"""Attribute of a rewritten model: the allocation as JSON. Text is copied for free, and pickles as plain data."""
RECOVERY_ATTRIBUTE = "_allocator_recovery"
"""Attribute of a model that was refitted after it was rewritten: what was done, as JSON."""


def remember(small: nn.Module, model: nn.Module, allocation: Allocation) -> None:
    """Note on `small` how it came about: by `allocation` from `model`, after what led to `model` itself."""
    earlier = led_to(model)
    whole = allocation if earlier is None else earlier.compose(allocation)
    setattr(small, LINEAGE_ATTRIBUTE, whole.to_json())
    vars(small).pop(RECOVERY_ATTRIBUTE, None)  # what was done to `model` is no part of the cut that follows


def led_to(model: nn.Module) -> Allocation | None:
    """The allocation that leads to this model; None for one that was never rewritten, or was changed since."""
    text = getattr(model, LINEAGE_ATTRIBUTE, None)
    if not isinstance(text, str):
        return None
    allocation = Allocation.from_json(text)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensor_names(model).items()}
    return allocation if gives(allocation, shapes) else None
