"""Index maps of every kind: subsets, other orders, and what must not pass for one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from subjects import trained
from torch import Tensor, nn

import allocator
from allocator.graph.channel_graph import ChannelGraph
from allocator.rewriting.allocation import Allocation
from allocator.rewriting.describe import describe_maps
from allocator.rewriting.index_map import IndexMap, Maps, maps_of, take, take_on_meta
from allocator.rewriting.materialise import materialise
from allocator.verifying.certificate import certify, names_and_shapes_match, weights_match
from allocator.verifying.structure import find_mismatch

IMAGE = torch.zeros(1, 3, 8, 8)


class Net(nn.Module):
    """A layer whose channels are read pixel by pixel, and two that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 5, 3, padding=1, stride=1)
        self.depthwise = nn.Conv2d(9, 9, 3, padding=1, groups=9)
        self.head = nn.Linear(9 * 64, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = torch.cat([self.left(x), self.right(x)], 1)
        return self.head(self.depthwise(x).relu().flatten(1))


def reordered(graph: ChannelGraph, layer: str, order: np.ndarray) -> Maps:
    """The maps by which a layer's output channels come in another order, wherever they are."""
    units = graph.unit_of_slot[graph.slots.labels(f"{layer}.weight")[0]]
    rank = {int(unit): place for place, unit in enumerate(units[order])}
    maps: Maps = {}
    for name, shape in graph.slots.shapes.items():
        for dim, label in enumerate(graph.slots.labels(name)):
            of_dim = graph.unit_of_slot[label]
            places = np.flatnonzero(np.isin(of_dim, units))
            if not len(places):
                continue
            source = np.arange(len(label))
            by_rank = sorted(places.tolist(), key=lambda place: (rank[int(of_dim[place])], place))
            source[places] = by_rank
            maps.setdefault(name, [None] * len(shape))[dim] = IndexMap.of(source)
    return maps


def rewritten(graph: ChannelGraph, maps: Maps) -> nn.Module:
    kept, attributes, absent = describe_maps(graph, maps, np.ones(graph.slots.total, dtype=bool))
    return materialise(graph.model, Allocation(kept, attributes, absent))


@pytest.mark.parametrize("layer", ["first", "left", "right"])
def test_channels_in_another_order_pass_every_check(layer: str) -> None:
    model = trained(Net())
    graph = allocator.trace(model, IMAGE)
    channels = graph.slots.shapes[f"{layer}.weight"][0]
    maps = reordered(graph, layer, np.random.default_rng(0).permutation(channels))
    small = rewritten(graph, maps)
    own = dict(model.named_parameters())[f"{layer}.weight"]
    assert not torch.equal(small.get_parameter(f"{layer}.weight"), own)
    assert names_and_shapes_match(graph, maps, small)
    assert find_mismatch(graph, maps, small) is None
    certificate = certify(graph, np.ones(graph.size, dtype=bool), maps, small)
    assert certificate.ok
    assert certificate.weights
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(small.eval()(x), model(x))


@pytest.mark.parametrize("forgotten", ["norm.weight", "norm.running_mean", "left.weight", "right.weight"])
def test_an_order_that_one_tensor_does_not_follow_is_noticed(forgotten: str) -> None:
    graph = allocator.trace(trained(Net()), IMAGE)
    maps = reordered(graph, "first", np.array([3, 1, 0, 5, 4, 2]))
    partial = {name: dims for name, dims in maps.items() if name != forgotten}
    small = rewritten(graph, partial)
    assert find_mismatch(graph, partial, small) is not None, "the maps disagree with one another"
    assert not weights_match(graph, maps, small)


def test_pixels_of_one_channel_in_another_order_are_noticed() -> None:
    """All labels of a channel's pixels are the same: only what they meet tells them apart."""
    graph = allocator.trace(trained(Net()), IMAGE)
    source = np.arange(9 * 64)
    source[[0, 1]] = source[[1, 0]]
    maps: Maps = {"head.weight": [None, IndexMap.of(source)]}
    assert find_mismatch(graph, maps, rewritten(graph, maps)) is not None


def test_other_weights_in_place_of_others_are_noticed() -> None:
    graph = allocator.trace(trained(Net()), IMAGE)
    maps = reordered(graph, "first", np.array([3, 1, 0, 5, 4, 2]))
    other = reordered(graph, "first", np.array([3, 1, 0, 5, 2, 4]))
    assert not weights_match(graph, maps, rewritten(graph, other))


def test_a_choice_of_neurons_is_a_map_that_keeps_the_order() -> None:
    graph = allocator.trace(trained(Net()), IMAGE)
    kept = np.ones(graph.size, dtype=bool)
    kept[graph.unit_of_slot[graph.slots.labels("first.weight")[0][[1, 4]]]] = False
    maps = maps_of(graph, kept)
    assert {
        name: [dim and dim.tolist() for dim in dims] for name, dims in maps.items() if name.startswith("first")
    } == {
        "first.weight": [[0, 2, 3, 5], None, None, None],
        "first.bias": [[0, 2, 3, 5]],
    }
    assert all(dim is None or dim.keeps_order for dims in maps.values() for dim in dims)


def test_a_tensor_is_taken_by_indices_and_by_rows_of_them() -> None:
    x = torch.arange(24.0).view(4, 6)
    assert take(x, [[2, 0], None]).tolist() == x[[2, 0]].tolist()
    rows = [[0, 5], [1, 4]]
    assert take(x, [[3, 1], rows]).tolist() == [[18.0, 23.0], [7.0, 10.0]]
    meta = x.to("meta")
    assert take_on_meta(meta, [[3, 1], rows]).shape == (2, 2)
    assert take_on_meta(meta, [None, [1]]).shape == (4, 1)


def test_a_tensor_keeps_its_memory_format() -> None:
    x = torch.randn(4, 6, 2, 2).to(memory_format=torch.channels_last)
    assert take(x, [[1, 2], None, None, None]).is_contiguous(memory_format=torch.channels_last)
