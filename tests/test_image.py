"""How slots of a rewritten model correspond to the original's, against maps that are followed index by index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from small_graphs import IMAGE, graph_of, net, random_choice, shrunk
from torch import Tensor, nn

from allocator.flow.facts import Tie
from allocator.flow.labels import FROZEN, Slots
from allocator.graph.channel_graph import ChannelGraph
from allocator.modules import shapes_of
from allocator.rewriting.index_map import IndexMap, Maps, mapped_shape
from allocator.verifying.image import Image

Draw = Callable[[np.random.Generator, int], np.ndarray]
DRAWS: dict[str, Draw] = {
    "subset": lambda g, n: np.flatnonzero(g.random(n) < 0.6),
    "another order": lambda g, n: g.permutation(n),
    "repeats": lambda g, n: g.integers(0, n, n + 2),
    "nothing": lambda g, n: np.zeros(0, dtype=np.int64),
    "a part in another order": lambda g, n: g.permutation(n)[: max(n // 2, 1)],
}


def mixed(m: Any, x: Tensor) -> Tensor:
    return m.last(m.norm(m.first(x)).relu())


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    return graph_of(net(mixed, first=nn.Conv2d(3, 5, 3), norm=nn.BatchNorm2d(5), last=nn.Conv2d(5, 4, 1)))


def random_maps(graph: ChannelGraph, kinds: list[str], seed: int) -> Maps:
    """Every dim has a map of one of these kinds, or none."""
    generator = np.random.default_rng(seed)
    maps: Maps = {}
    for name, shape in graph.slots.shapes.items():
        dims: list[IndexMap | None] = []
        for size in shape:
            draw = DRAWS[kinds[generator.integers(len(kinds))]]
            dims.append(IndexMap.of(draw(generator, size)) if generator.random() < 0.7 else None)
        maps[name] = dims
    return maps


def sources_of(graph: ChannelGraph, maps: Maps, name: str, dim: int) -> list[int]:
    """The old slots of a new dim."""
    label, index_map = graph.slots.labels(name)[dim], maps.get(name, [None] * 9)[dim]
    indices = range(len(label)) if index_map is None else index_map.source.tolist()
    return [int(label[i]) for i in indices]


def new_slots(graph: ChannelGraph, maps: Maps) -> Slots:
    return Slots.of({n: mapped_shape(s, maps[n]) if n in maps else s for n, s in graph.slots.shapes.items()})


CASES = [(kinds, seed) for seed in range(6) for kinds in ([kind] for kind in DRAWS)]
CASES += [([*DRAWS], seed) for seed in range(6)]


@pytest.mark.parametrize(("kinds", "seed"), CASES)
def test_every_slot_comes_from_where_its_map_says(kinds: list[str], seed: int, graph: ChannelGraph) -> None:
    maps = random_maps(graph, kinds, seed)
    slots = new_slots(graph, maps)
    image = Image(graph, maps, slots)
    assert image.origin[FROZEN] == FROZEN
    count = dict.fromkeys(range(graph.slots.total), 0)
    count[FROZEN] = 1
    for name, shape in slots.shapes.items():
        for dim in range(len(shape)):
            expected = sources_of(graph, maps, name, dim)
            assert image.origin[slots.labels(name)[dim]].tolist() == expected
            for slot in expected:
                count[slot] += 1
    assert image.copies.tolist() == list(count.values())


def parts_of(graph: ChannelGraph, generator: np.random.Generator) -> list[tuple[str, int, int]]:
    """What labels may be made of: some dims one after the other, each slot so many times (a channel's pixels)."""
    dims = [(name, dim) for name, shape in graph.slots.shapes.items() for dim in range(len(shape))]
    chosen = generator.permutation(len(dims))[: generator.integers(1, 4)]
    return [(*dims[i], int(generator.integers(1, 4))) for i in chosen]


@pytest.mark.parametrize(("kinds", "seed"), CASES)
def test_the_image_of_labels(kinds: list[str], seed: int, graph: ChannelGraph) -> None:
    maps = random_maps(graph, kinds, seed)
    slots = new_slots(graph, maps)
    image = Image(graph, maps, slots)
    generator = np.random.default_rng(seed + 100)
    for _ in range(10):
        parts = parts_of(graph, generator)
        old = np.concatenate([np.repeat(graph.slots.labels(name)[dim], times) for name, dim, times in parts])
        new = np.concatenate([np.repeat(slots.labels(name)[dim], times) for name, dim, times in parts])
        places, start = [], 0
        for name, dim, times in parts:
            first = int(graph.slots.labels(name)[dim][0])
            for slot in sources_of(graph, maps, name, dim):
                places += [start + times * (slot - first) + k for k in range(times)]
            start += times * graph.slots.shapes[name][dim]
        assert image.size(old) == len(places) == len(new)
        assert image.positions(old).tolist() == places
        assert image.holds(old, new)
        assert image.holds(old, new), "the answer is remembered"
        if len(new):
            assert not image.holds(old, new[:-1])
            assert not image.holds(old, np.append(new, new[-1]))
        for i in range(1, len(new)):
            swapped = new.copy()
            swapped[[i - 1, i]] = swapped[[i, i - 1]]
            assert image.holds(old, swapped) == (image.origin[new[i - 1]] == image.origin[new[i]])


def test_a_label_that_is_none_is_the_image_of_none_alone(graph: ChannelGraph) -> None:
    image = Image(graph, {}, graph.slots)
    label = graph.slots.labels("first.weight")[0]
    assert image.holds(None, None)
    assert not image.holds(None, label)
    assert not image.holds(label, None)
    assert image.holds(label, label)


def test_what_stays_stays_in_its_place(graph: ChannelGraph) -> None:
    """Frozen places among labels stay where they are, before and between runs of a dim in another order."""
    order = [2, 0, 1, 4, 3]
    maps: Maps = {"first.weight": [IndexMap.of(np.array(order)), None, None, None]}
    image = Image(graph, maps, graph.slots)
    own = graph.slots.labels("first.weight")[0]
    label = np.array([FROZEN, *own, FROZEN, FROZEN, *own[:2]])
    assert image.size(label) == len(label)
    # The second run holds the first two of the dim alone: they come in the order in which the map has them.
    assert image.positions(label).tolist() == [0, *(1 + i for i in order), 6, 7, 8, 9]
    assert image.positions(own[::-1].copy()).tolist() == [0, 1, 2, 3, 4], "each run of one slot stays where it is"


def test_what_stays_is_of_no_dim_whichever_dim_changes_its_order(graph: ChannelGraph) -> None:
    for name in graph.slots.shapes:
        own = graph.slots.labels(name)
        order = np.arange(len(own[0]))[::-1] if own else np.zeros(0, dtype=np.int64)
        if len(order) > 1:
            image = Image(graph, {name: [IndexMap.of(order), *[None] * (len(own) - 1)]}, graph.slots)
            assert image.positions(np.array([FROZEN, FROZEN])).tolist() == [0, 1]
            label = np.array([FROZEN, *own[0], FROZEN])
            assert image.positions(label).tolist() == [0, *(1 + order), len(order) + 1]


def test_a_tensor_of_another_size_is_the_image_of_nothing(graph: ChannelGraph) -> None:
    maps: Maps = {"first.bias": [IndexMap.of(np.array([0, 1]))]}
    image = Image(graph, maps, graph.slots)
    assert image.origin[graph.slots.labels("first.bias")[0]].tolist() == [-1] * 5
    assert image.origin[graph.slots.labels("norm.bias")[0]].tolist() == graph.slots.labels("norm.bias")[0].tolist()


def test_ties_hold_orders_together(graph: ChannelGraph) -> None:
    order, other = np.array([3, 0, 1, 4, 2]), np.array([3, 0, 4, 1, 2])
    weight, scale, bias = (graph.slots.labels(name)[0] for name in ("first.weight", "norm.weight", "norm.bias"))
    ties = [Tie(weight, scale, 1), Tie(np.stack([scale, weight]), np.stack([weight, scale]), 2), Tie(scale, bias, 3)]

    def torn(**orders: np.ndarray) -> Tie | None:
        maps: Maps = {}
        for name, source in orders.items():
            of_name = name.replace("_", ".")
            maps[of_name] = [IndexMap.of(source), *[None] * (len(graph.slots.shapes[of_name]) - 1)]
        return Image(graph, maps, graph.slots).keep_together(ties)

    assert torn() is None
    assert torn(first_weight=order, norm_weight=order, norm_bias=order) is None
    assert torn(first_weight=order, norm_weight=other, norm_bias=other) is ties[0]
    assert torn(first_weight=order, norm_weight=order, norm_bias=other) is ties[2]
    assert torn(first_weight=order, norm_weight=order) is ties[2]
    assert torn(norm_bias=order) is ties[2]
    assert torn(last_weight=np.array([1, 0, 2, 3])) is None, "no tie is about it"
    subset = np.array([0, 2])
    assert torn(first_weight=subset, norm_weight=subset) is None, "a subset in its order changes no order"


@pytest.mark.parametrize("seed", range(4))
def test_labels_of_a_rewritten_forward_are_the_image(seed: int, graph: ChannelGraph) -> None:
    maps, small = shrunk(graph, random_choice(graph, seed))
    slots = Slots.of(shapes_of(small))
    new = graph_of(small, IMAGE)
    image = Image(graph, maps, slots)
    for a, b in zip(graph.flow.trace.ops, new.flow.trace.ops, strict=True):
        labels = zip(graph.flow.labels(a.outputs[0]), new.flow.labels(b.outputs[0]), strict=True)
        assert all(image.holds(old, label) for old, label in labels)
