"""How many numbers are really alive at once while a forward runs."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Alive(TorchDispatchMode):
    """Counts the numbers in storages that calls made and that still exist."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.known: dict[int, int] = {}
        self.most = 0
        for tensor in given:
            self._watch(tensor)

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self.known or not tensor.numel():
            return
        self.known[key] = storage.nbytes() // tensor.element_size()
        weakref.finalize(storage, self.known.pop, key, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor)
        self.most = max(self.most, sum(self.known.values()))
        return result


def alive_at_once(model: nn.Module, *inputs: Tensor) -> int:
    """The most numbers in activations at any time of a forward without gradients, the inputs among them."""
    parameters = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    with torch.no_grad(), _Alive(*inputs) as counted:
        counted.known.update(dict.fromkeys(parameters, 0))
        model(*inputs)
    return counted.most
