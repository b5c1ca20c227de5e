"""A graph for functions of others: what they write into its model is written into a copy."""

from __future__ import annotations

from typing import Any

import torch

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
