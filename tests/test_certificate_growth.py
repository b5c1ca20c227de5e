"""The parts of a wider network's certificate: how often each neuron is there, and which are the original's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_graphs import channel_units, graph_of, net
from torch import Tensor, nn

from allocator.graph.channel_graph import ChannelGraph
from allocator.rewriting.index_map import IndexMap, Maps, maps_of
from allocator.verifying.growth import _copies, _originals, _times


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    layers = {"first": nn.Conv2d(3, 5, 3), "norm": nn.BatchNorm2d(5), "last": nn.Conv2d(5, 4, 1)}
    return graph_of(net(lambda m, x: m.last(m.norm(m.first(x)).relu()), **layers))


@pytest.mark.parametrize("seed", range(3))
def test_how_many_there_are_of_each_is_read_off_the_maps(seed: int, graph: ChannelGraph) -> None:
    times = np.random.default_rng(seed).integers(1, 4, graph.size)
    assert _times(graph, maps_of(graph, times)).tolist() == times.tolist()
    assert _times(graph, {}).tolist() == [1] * graph.size


def test_what_stays_counts_once_whatever_a_map_repeats(graph: ChannelGraph) -> None:
    """Inputs are no neurons."""
    maps: Maps = {"first.weight": [None, IndexMap.of(np.array([0, 0, 1, 2])), None, None]}
    assert _times(graph, maps).tolist() == [1] * graph.size


def test_of_two_places_with_one_source_the_first_is_the_originals(graph: ChannelGraph) -> None:
    """Seen from the wider network, of which the second and fourth neurons repeat the first and third."""
    source = IndexMap.of(np.array([0, 0, 1, 1, 2]))
    whole: Maps = {name: [source] for name in ("first.bias", "norm.weight", "norm.bias")}
    whole |= {name: [source] for name in ("norm.running_mean", "norm.running_var")}
    whole |= {"first.weight": [source, None, None, None], "last.weight": [None, source, None, None]}
    units = graph.unit_of_slot[graph.slots.labels("first.weight")[0]]
    kept = _originals(graph, whole)
    assert kept is not None
    assert kept[units].tolist() == [True, False, True, False, True]
    assert _originals(graph, {name: dims for name, dims in whole.items() if name != "norm.bias"}) is None, "in part"
    outputs: Maps = {"last.weight": [IndexMap.of(np.array([0, 1, 2, 2])), source, None, None]}
    assert _originals(graph, {**whole, **outputs}) is None, "an output is no neuron that could go"
    everything = _originals(graph, {})
    assert everything is not None
    assert everything.all()


def test_a_neuron_of_one_index_is_one_like_others() -> None:
    """Nothing reads it, and it has no bias."""

    def run(m: Any, x: Tensor) -> Tensor:
        m.dead(x)
        y: Tensor = m.last(m.first(x))
        return y

    layers = {"first": nn.Linear(3, 4), "dead": nn.Linear(3, 5, bias=False), "last": nn.Linear(4, 2)}
    graph = graph_of(net(run, **layers), torch.zeros(2, 3))
    maps = maps_of(graph, np.full(graph.size, 2))
    assert [len(dim) for dim in maps["dead.weight"] if dim is not None] == [10]
    everything = _originals(graph, {})
    assert everything is not None
    assert everything.all()
    one = _originals(graph, {"dead.weight": [IndexMap.of(np.array([0, 0, 1, 2, 3])), None]})
    assert one is not None
    assert one[channel_units(graph, "dead")].tolist() == [True, False, True, True, True]


def test_copies_of_what_averages_are_taken_over_hold_what_the_first_does() -> None:
    source = IndexMap.of(np.array([0, 0, 1, 1, 2]))
    found = _copies({"a": [source, None], "b": [source]}, {"a": [[1, 3], None], "b": [None]})
    assert found["b"] == [None]
    rows, columns = found["a"]
    assert columns is None
    assert rows is not None
    assert rows.tolist() == [0, 0, 2, 2, 4]
