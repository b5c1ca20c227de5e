"""How much a loss bends along what a layer gives: the outer products of the gradients of its outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
import torch
from torch.autograd.graph import Node

Dim = tuple[str, int]
"""(name of a parameter, the dim of it along which activations are read)."""


class Curvature:
    """Sums of the outer products of gradients, per weight that multiplies.

    Attributes:
        sums: (outputs, outputs) by weight, over all samples and positions.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.sums: dict[Dim, np.ndarray] = {}

    def add(self, loss: torch.Tensor, dims: Iterable[Dim], size: int) -> None:
        """One backward.

        Args:
            loss: the mean over some samples; its graph is used up.
            dims: weights to watch, and where they read.
            size: how many samples.
        """
        watched = {id(self.tensors[name]): (name, dim) for name, dim in dims}
        for dim, node in _multiplying(loss, watched):
            node.register_prehook(partial(self._take, dim, size))
        learning = [tensor for tensor in self.tensors.values() if tensor.requires_grad]
        if learning:
            loss.backward(inputs=learning)
        for tensor in learning:
            tensor.grad = None

    def _take(self, dim: Dim, size: int, gradients: tuple[torch.Tensor | None, ...]) -> None:
        name, read = dim
        weight, gradient = self.tensors[name], gradients[0]
        if gradient is None:
            return
        wide = gradient.detach().movedim(1 if weight.dim() > 2 else -1, 0).flatten(1).float() * size
        if len(wide) == weight.shape[1 - read]:
            self.sums[dim] = self.sums.get(dim, 0.0) + (wide @ wide.T).double().cpu().numpy()


def _multiplying(loss: torch.Tensor, watched: Mapping[int, Dim]) -> list[tuple[Dim, Node]]:
    """The steps behind a loss that multiply by a watched parameter, as it is or as a view of it."""
    above: dict[Node, list[Node]] = {}
    leaves: list[tuple[Dim, Node]] = []
    waiting = [] if loss.grad_fn is None else [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        for child, _ in node.next_functions:
            if child is None:
                continue
            if child not in above:
                above[child] = []
                waiting.append(child)
                dim = watched.get(id(getattr(child, "variable", None)))
                if dim is not None:
                    leaves.append((dim, child))
            above[child].append(node)
    found = []
    for dim, leaf in leaves:
        for node in above[leaf]:
            while len(node.next_functions) == 1 and node in above:
                node = above[node][0]
            found.append((dim, node))
    return found
