"""Networks of which one layer alone loses neurons."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

import allocator


def drop(model: nn.Module, example: Tensor, weight: str, kept: int, **options: Any) -> allocator.Result:
    """The network with the first outputs of one layer alone."""
    graph = allocator.trace(model, example, **options)
    scores = np.ones(graph.size)
    label = graph.units(graph.slots.labels(weight)[0])
    scores[label[kept:]] = 0.001
    least = graph.everything.copy()
    least[label[kept:]] = False
    budget = graph.metric("flops").value(least)
    return allocator.allocate(model, budget, criterion=scores, policy="global", example_inputs=example, **options)
