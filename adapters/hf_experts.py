"""Mixtures of experts in transformers, in calls that can be followed, counted, and computed in any dtype.

The library sorts tokens by their expert and multiplies each group with its expert's matrix in one fused call. How large
the groups are depends on values, fvcore does not count the call, and there is none in float64. All of it takes as many
products, whichever experts are chosen: tokens times experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from allocator.adapters.library import library
from allocator.adapters.stand_ins import in_parts

_MODULE = "transformers.integrations.moe"
Forward = Callable[..., torch.Tensor]


def _implementation(_interface: Any, _name: str | None, _default: Forward) -> Forward:
    """The forward of a module of experts, whichever is configured."""
    return _forward


def _forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Without values every token gets the matrices of its experts; with them that would take far too much memory."""
    form = "batched_mm_experts_forward" if hidden_states.is_meta else "grouped_mm_experts_forward"
    result: torch.Tensor = getattr(library(_MODULE), form)(self, hidden_states, *args, **kwargs)
    return result


def _grouped_product(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """One product per expert.

    Args:
        input: (rows, k), sorted by expert.
        weight: (experts, k, m).
        offs: (experts,) the row at which each expert's rows end.

    Returns:
        (rows, m)
    """
    parts, start = [], 0
    for i, end in enumerate(offs.tolist()):
        if end > start:
            parts.append(input[start:end] @ weight[i])
        start = end
    return torch.cat(parts)


_ALIGNED = 8
"""Numbers of two bytes in the sixteen that the fused call wants the rows of its operands to be multiples of."""


def aligned(module: nn.Module) -> Mapping[tuple[str, int], int]:
    """The dims along which rows of the experts' matrices lie in memory; none of a module that is no such mixture."""
    if not hasattr(module, "has_gate"):
        return {}
    read = 1 if getattr(module, "is_transposed", False) else 2
    names = ("gate_up_proj", "up_proj", "down_proj")
    return {(name, dim): _ALIGNED for name in names if name in module._parameters for dim in (1, 2)[read - 1 :]}


in_parts.add(_MODULE, "ExpertsInterface.get_interface", _implementation)
in_parts.add(_MODULE, "_grouped_mm", _grouped_product)
