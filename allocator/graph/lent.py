"""A graph for functions of others: what they write into its model is written into a copy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from allocator.errors import AllocatorError
from allocator.graph.channel_graph import ChannelGraph
from allocator.modules import skeleton, tensor_names

_OF_THE_MODEL = ("model", "modules", "tensors", "wider")


class LentGraph(ChannelGraph):
    """The same graph of a copy of the model, which is made once it is asked for."""

    def __init__(self, graph: ChannelGraph) -> None:
        vars(self).update({name: each for name, each in vars(graph).items() if name not in _OF_THE_MODEL})
        self._lender = graph

    def __getattr__(self, name: str) -> Any:
        if name != "model":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.model = skeleton(self._lender.model, lambda _, tensor: own(tensor))
        for name, tensor in tensor_names(self.model).items():
            tensor.grad = _gradient(self._lender.tensors[name])
        return self.model


def own(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor of the model with its gradient, into which a function of the caller's may write."""
    copied = tensor.detach().clone()
    copied.grad = _gradient(tensor)
    return copied


def _gradient(tensor: torch.Tensor) -> torch.Tensor | None:
    gradient = tensor.grad if tensor.is_leaf else None
    return None if gradient is None else gradient.clone()


@contextlib.contextmanager
def left_alone(graph: ChannelGraph, who: str, error: type[AllocatorError]) -> Iterator[None]:
    """Within, a function of the caller's is called, which may reach the model's weights without being lent them.

    Args:
        graph: of the model.
        who: the function, in words.
        error: what to raise where it wrote into them, also where torch does not count that (`.data`).
    """
    before = {name: _digest(tensor) for name, tensor in graph.tensors.items()}
    yield
    written = [name for name, tensor in graph.tensors.items() if _digest(tensor) != before[name]]
    if written:
        raise error(
            f"{who} wrote into {', '.join(written[:3])} of the model itself: load the model anew, and let the function "
            "write into nothing but what it is given"
        )


_AS_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _digest(tensor: torch.Tensor) -> int:
    """A number that is another one after most writes into a tensor: a sum of its bits; 0 where it holds none."""
    if tensor.is_meta or tensor.layout is not torch.strided or type(tensor) not in (torch.Tensor, nn.Parameter):
        return 0
    plain = tensor.detach()
    bits = (torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain.resolve_neg()).contiguous()
    return int(bits.view(_AS_WHOLE[bits.element_size()]).sum(dtype=torch.int64))
