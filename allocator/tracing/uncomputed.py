"""Forwards that torch's tracer records without their arithmetic: tensors that have memory, and no numbers in it.

A graph of torch.jit holds sizes alone. What it records has to be tensors with memory (on those without, the tracer may
end the process), but nobody has to compute what is in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from allocator.torch_private import (
    TorchDispatchMode,
    is_being_recorded,
    map_arguments,
    of_the_processor,
    parts_recorded,
    tree_flatten,
)
from allocator.tracing import meta_kernels
from allocator.tracing.operators import operator_of

_MARK = "_allocator_uncomputed"


class Uncomputed(TorchDispatchMode):
    """Gives results of the right sizes; those that nothing uncomputed went into are computed as ever.

    Attributes:
        failed: a number was asked for that nobody computed, or a call was made that the tracer may not have recorded.
    """

    failed = False

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        """`weights`: one's own tensors on the CPU; their numbers count for nothing, nor do those made with them."""
        super().__init__()
        _mark(weights)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, operator = kwargs or {}, operator_of(func)
        recorded = not is_being_recorded()  # or part of a call that was
        if not recorded and operator.declared.multiplies:  # graphs have none of this name, but those it is made of
            with self, parts_recorded():
                return of_the_processor(func, args, kwargs)
        if not any(map(_is_uncomputed, (*args, *kwargs.values()))):
            return func(*args, **kwargs)
        out = None if kwargs else _sized(func, args)
        if out is None:
            if not (operator.gives_views or operator.writes):  # what lies in memory may be no number, and no place
                args, kwargs = map_arguments(_zeros, (args, kwargs))
            out = func(*args, **kwargs)
            for tensor in () if operator.gives_views else _tensors(out):
                if not tensor.is_floating_point():
                    tensor.zero_()  # they may be indices, and have to be some that there are
        known = recorded or operator.gives_views
        self.failed = self.failed or not known or not _tensors(out)  # where there are none, a number was read
        _mark(_tensors(out))
        return out


def _mark(tensors: Iterable[torch.Tensor]) -> None:
    """Note on these that nobody computed their numbers."""
    for tensor in tensors:
        setattr(tensor, _MARK, True)


def _is_uncomputed(given: Any) -> bool:
    """Whether there is a tensor here, or in a list, whose numbers nobody computed."""
    return any(map(_is_uncomputed, given)) if type(given) in (list, tuple) else hasattr(given, _MARK)


def _sized(func: Any, args: Any) -> Any:
    """What a call gives, by its sizes; None for one that has to be made: a view, or an operator that is not known."""
    operator = operator_of(func)
    declared = operator.declared
    in_place = operator.writes and operator.pointwise
    known = operator.pointwise or declared.on_meta is not None or declared.multiplies or declared.window is not None
    if not known or (operator.gives_views and not in_place):
        return None
    try:
        found = meta_kernels.run(func, map_arguments(_without_memory, args), {})
    except Exception:  # as on tensors that do not lie on the CPU alone: the call itself will tell
        return None
    return args[0] if in_place else map_arguments(_with_memory, found)


def _zeros(leaf: Any) -> Any:
    return torch.zeros_like(leaf) if isinstance(leaf, torch.Tensor) and hasattr(leaf, _MARK) else leaf


def _without_memory(leaf: Any) -> Any:
    return meta_kernels.like(leaf, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf


def _with_memory(found: Any) -> Any:
    if not isinstance(found, torch.Tensor):
        return found
    out = torch.empty_strided(found.shape, found.stride(), dtype=found.dtype, device="cpu")
    return out if found.is_floating_point() else out.zero_()


def _tensors(out: Any) -> list[torch.Tensor]:
    leaves = [out] if isinstance(out, torch.Tensor) else tree_flatten(out)[0]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
