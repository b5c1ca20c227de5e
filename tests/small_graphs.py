"""Small networks whose forward is written where it is tested, their graphs, and choices of their neurons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from subjects import randomised_norms
from torch import Tensor, nn

from allocator.flow.options import Options
from allocator.graph.build import build_graph
from allocator.graph.channel_graph import ChannelGraph
from allocator.rewriting.allocation import Allocation
from allocator.rewriting.describe import describe_maps
from allocator.rewriting.index_map import Maps, maps_of
from allocator.rewriting.materialise import materialise
from allocator.tracing.inputs import as_inputs

IMAGE = torch.zeros(1, 3, 8, 8)
Run = Callable[..., Any]
Member = tuple[str, int, int]
"""(parameter or buffer, dim, index)."""


class Net(nn.Module):
    """Layers and numbers given by name, and a forward that is given too."""

    def __init__(self, run: Run, **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *x: Tensor) -> Any:
        return self.run(self, *x)


def net(run: Run, **parts: Any) -> Any:
    """A `Net` in eval mode whose batch norms hold numbers as after training."""
    return randomised_norms(Net(run, **parts))


def graph_of(model: nn.Module, x: Any = IMAGE, **options: Any) -> ChannelGraph:
    """The channel graph of a model."""
    return build_graph(model, as_inputs(x, model), Options(**options))


def channel_units(graph: ChannelGraph, layer: str) -> list[int]:
    """The neuron of every output channel of a layer, -1 where it stays."""
    units: list[int] = graph.unit_of_slot[graph.slots.labels(f"{layer}.weight")[0]].tolist()
    return units


def dropping(graph: ChannelGraph, channels: Mapping[str, Sequence[int]]) -> np.ndarray:
    """(neurons,) bool, false for the neurons of these output channels per layer."""
    kept = np.ones(graph.size, dtype=bool)
    for layer, indices in channels.items():
        units = channel_units(graph, layer)
        for index in indices:
            assert units[index] >= 0, f"channel {index} of {layer} stays"
            kept[units[index]] = False
    return kept


def random_choice(graph: ChannelGraph, seed: int, share: float = 0.5) -> np.ndarray:
    """(neurons,) bool, about this share of them, with as many in every layer and part as it needs."""
    generator = np.random.default_rng(seed)
    kept = generator.random(graph.size) < share
    for label, _, minimum in graph.facts.at_least:
        units = graph.unit_of_slot[label]
        loose = generator.permutation(np.unique(units[units >= 0]))
        for unit in loose:
            if (units < 0).sum() + kept[units[units >= 0]].sum() >= minimum:
                break
            kept[unit] = True
    return kept


def allocation_of(graph: ChannelGraph, maps: Maps, kept: np.ndarray | None = None) -> Allocation:
    """The allocation of these maps; `kept`, (neurons,) bool, where they leave some neurons out."""
    stays = np.ones(graph.slots.total, dtype=bool) if kept is None else graph.stays(kept)
    return Allocation(*describe_maps(graph, maps, stays))


def shrunk(graph: ChannelGraph, kept: np.ndarray) -> tuple[Maps, Any]:
    """The maps of a choice of neurons, and the smaller network."""
    maps = maps_of(graph, kept)
    return maps, materialise(graph.model, allocation_of(graph, maps, kept))


def by_members(graph: ChannelGraph, score_of: Callable[[Member], list[float]], combine: str) -> np.ndarray:
    """One number per neuron out of what each of its parameter indices has; NaN where none has any."""
    scores = []
    for neuron in graph.neurons:
        entries: list[float] = []
        for member in neuron.members:
            entries += score_of(member)
        total = sum(entries) if entries else float("nan")
        scores.append(total / len(entries) if entries and combine == "mean" else total)
    return np.array(scores)
