"""Fits of small networks from which given channels are dropped, and blocks whose middle a test writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from small_graphs import channel_units, graph_of
from subjects import untouched
from torch import Tensor, nn

from allocator.cost.budget import Budget, Budgets
from allocator.fitting.check import check_structure
from allocator.fitting.fit import Fitted, fit
from allocator.graph.channel_graph import ChannelGraph
from allocator.planning.plan import Plan
from allocator.rewriting.materialise import materialise

X = torch.zeros(2, 3, 4, 4)
Drop = Mapping[str, Sequence[int]]


def planner(drop: Drop) -> Callable[[ChannelGraph], Plan]:
    """Drops these output channels per layer, as far as they may go."""

    def plan(graph: ChannelGraph) -> Plan:
        kept = graph.everything
        for layer, indices in drop.items():
            for unit in np.array(channel_units(graph, layer))[list(indices)]:
                if unit >= 0:
                    kept[unit] = False
        metric = graph.metric("flops")
        return Plan(kept, Budgets([Budget(metric, metric.whole)]), "all", "", "", {})

    return plan


def fitted(model: nn.Module, drop: Drop, x: Tensor = X, **options: Any) -> Fitted:
    """A fit whose result runs and keeps what it says; the model is as it was."""
    model.eval()
    with untouched(model):
        found = fit(graph_of(model, x, **options), planner(drop))
    assert check_structure(found.graph, found.maps, found.allocation) is None
    small = materialise(model, found.allocation).eval()
    with torch.no_grad():
        assert small(x).shape == model(x).shape
    return found


def outputs_kept(found: Fitted, layer: str) -> int:
    """How many outputs a layer keeps."""
    dims = found.allocation.kept.get(f"{layer}.weight")
    size = found.graph.slots.shapes[f"{layer}.weight"][0]
    return size if dims is None or dims[0] is None else len(dims[0])


class Block(nn.Module):
    """Two layers of 1x1 convolutions, and between them what a subclass does; attributes come in the order given."""

    width: Any
    wide: Any
    size: Any
    sizes: Any

    def __init__(self, hidden: int = 6, **numbers: Any) -> None:
        super().__init__()
        for name, value in numbers.items():
            setattr(self, name, value)
        self.first, self.second = nn.Conv2d(3, hidden, 1), nn.Conv2d(hidden, 3, 1)

    def between(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))
