"""Neurons are connected components; scopes, pools and branches of small networks, with the answers written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_graphs import IMAGE, Net, channel_units, dropping, graph_of, net, random_choice
from torch import Tensor, nn

import allocator
from allocator import adapters
from allocator.adapters import Adapter
from allocator.errors import InputError, UnknownNameError
from allocator.flow.facts import Facts, Frozen, Tie, Written
from allocator.flow.labels import FROZEN, Slots
from allocator.flow.options import Place
from allocator.graph.blocks import INPUT
from allocator.graph.channel_graph import ALL, BRANCHES, INNER, ChannelGraph
from allocator.graph.neurons import components, number_neurons
from allocator.graph.selection import as_groups, as_items, selected, unmatched

# Neurons --------------------------------------------------------------------------------------------


@st.composite
def ties(draw: st.DrawFn, total: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of equally shaped arrays of slots, of one dim or two, some of them empty."""
    shapes = draw(st.lists(st.sampled_from([(0,), (1,), (3,), (2, 2), (1, 3)]), max_size=6))
    slot = st.integers(0, total - 1)
    pairs = []
    for shape in shapes:
        size = int(np.prod(shape))
        a, b = (draw(st.lists(slot, min_size=size, max_size=size)) for _ in range(2))
        pairs.append((np.array(a, dtype=np.int64).reshape(shape), np.array(b, dtype=np.int64).reshape(shape)))
    return pairs


def linked(total: int, pairs: list[tuple[np.ndarray, np.ndarray]]) -> nx.Graph:
    """Slots as nodes, ties as edges."""
    links = nx.Graph()
    links.add_nodes_from(range(total))
    for a, b in pairs:
        links.add_edges_from(zip(a.reshape(-1).tolist(), b.reshape(-1).tolist()))
    return links


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_components_are_those_of_the_ties(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 14))
    pairs = data.draw(ties(total))
    component = components(total, pairs)
    found = {frozenset(np.flatnonzero(component == number).tolist()) for number in component}
    assert found == set(map(frozenset, nx.connected_components(linked(total, pairs))))


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_neurons_are_the_written_components_without_a_frozen_slot_in_the_order_of_writing(data: st.DataObject) -> None:
    slots = Slots.of({"weight": (data.draw(st.integers(1, 12)), 2)})
    pairs = data.draw(ties(slots.total))
    some = st.lists(st.integers(0, slots.total - 1), max_size=4).map(lambda label: np.array(label, dtype=np.int64))
    frozen, written = data.draw(st.lists(some, max_size=2)), data.draw(st.lists(some, max_size=4))
    facts = Facts(
        ties=[Tie(a, b) for a, b in pairs],
        frozen=[Frozen(label, "", "") for label in frozen],
        written=[Written(label, "") for label in written],
    )
    links = linked(slots.total, pairs)
    links.add_edges_from((slot, FROZEN) for label in frozen for slot in label.tolist())
    expected: dict[frozenset[int], int] = {}
    for slot in (slot for label in written for slot in label.tolist()):
        together = frozenset(nx.node_connected_component(links, slot))
        if FROZEN not in together:
            expected.setdefault(together, len(expected))

    _, unit_of_slot, size = number_neurons(slots, facts)

    assert size == len(expected)
    number = {slot: unit for together, unit in expected.items() for slot in together}
    assert unit_of_slot.tolist() == [number.get(slot, -1) for slot in range(slots.total)]


def test_nothing_written_gives_no_neurons() -> None:
    _, unit_of_slot, size = number_neurons(Slots.of({"weight": (3,)}), Facts())
    assert (size, unit_of_slot.tolist()) == (0, [-1] * 4)


# Scopes, pools, branches ----------------------------------------------------------------------------


def conv(source: int, out: int, groups: int = 1) -> nn.Module:
    return nn.Conv2d(source, out, 3, padding=1, groups=groups)


def concatenated(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.last(m.read(torch.cat([m.left(x), m.right(x)], 1)))


def residual(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.last(x + m.outer(m.inner(x).relu()))


def gated(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.last(x * m.gate(m.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid())


def concatenated_and_added(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.last(torch.cat([m.left(x), m.right(x)], 1) + m.other(x))


def dense(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    x = torch.cat([x, m.first(x)], 1)
    x = torch.cat([x, m.second(x)], 1)
    return m.last(m.read(x))


def shared_by_two(m: Any, x: Tensor) -> Tensor:
    """`b` is concatenated twice, with `a` and with `c`."""
    x = m.stem(x)
    a, b, c = m.a(x), m.b(x), m.c(x)
    return m.last(m.earlier(torch.cat([a, b], 1)) + m.later(torch.cat([b, c], 1)))


def chain(m: Any, x: Tensor) -> Tensor:
    return m.last(m.middle(m.stem(x)))


# Per network: its forward, its layers, the scope of every output channel (None: it stays), and the pools with two
# layers or more; every other layer is a pool of its own.
NETWORKS: dict[str, tuple[Callable[..., Any], dict[str, nn.Module], dict[str, Any], list[set[str]]]] = {
    "concatenation": (
        concatenated,
        {"stem": conv(3, 2), "left": conv(2, 2), "right": conv(2, 1), "read": conv(3, 2), "last": conv(2, 2)},
        {"stem": INNER, "left": BRANCHES, "right": BRANCHES, "read": INNER, "last": None},
        [{"left", "right"}],
    ),
    "residual": (
        residual,
        {"stem": conv(3, 2), "inner": conv(2, 3), "outer": conv(3, 2), "last": conv(2, 1)},
        {"stem": ALL, "inner": INNER, "outer": ALL, "last": None},
        [{"stem", "outer"}],
    ),
    "gate": (
        gated,
        {"stem": conv(3, 4), "squeeze": nn.Conv2d(4, 2, 1), "gate": nn.Conv2d(2, 4, 1), "last": conv(4, 1)},
        {"stem": INNER, "squeeze": INNER, "gate": INNER, "last": None},
        [{"stem", "gate"}],
    ),
    "a sum of a concatenation": (
        concatenated_and_added,
        {"stem": conv(3, 2), "left": conv(2, 2), "right": conv(2, 2), "other": conv(2, 4), "last": conv(4, 1)},
        {"stem": INNER, "left": BRANCHES, "right": BRANCHES, "other": BRANCHES, "last": None},
        [{"left", "right", "other"}],
    ),
    "dense": (
        dense,
        {"stem": conv(3, 2), "first": conv(2, 2), "second": conv(4, 1), "read": conv(5, 2), "last": conv(2, 1)},
        {"stem": BRANCHES, "first": BRANCHES, "second": BRANCHES, "read": INNER, "last": None},
        [{"stem", "first", "second"}],
    ),
    "concatenated twice": (
        shared_by_two,
        {
            "stem": conv(3, 2), "a": conv(2, 1), "b": conv(2, 2), "c": conv(2, 1),
            "earlier": conv(3, 2), "later": conv(3, 2), "last": conv(2, 1),
        },
        {"stem": INNER, "a": BRANCHES, "b": BRANCHES, "c": BRANCHES, "earlier": ALL, "later": ALL, "last": None},
        [{"b", "c"}, {"earlier", "later"}],
    ),
    "whole groups": (
        chain,
        {"stem": conv(3, 4), "middle": conv(4, 6, 2), "last": conv(6, 1)},
        {"stem": BRANCHES, "middle": BRANCHES, "last": None},
        [{"stem", "middle"}],
    ),
    "depthwise": (
        chain,
        {"stem": conv(3, 4), "middle": conv(4, 8, 4), "last": conv(8, 1)},
        {"stem": INNER, "middle": INNER, "last": None},
        [{"stem", "middle"}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_scopes_and_pools(name: str) -> None:
    run, layers, scopes, pools = NETWORKS[name]
    graph = graph_of(net(run, **layers))
    by_pool: dict[int, set[str]] = {}
    for layer, scope in scopes.items():
        units = channel_units(graph, layer)
        assert [None if unit < 0 else graph.scope_of[unit] for unit in units] == [scope] * len(units), layer
        pooled = {int(graph.pool_of[unit]) for unit in units if unit >= 0}
        assert len(pooled) == (scope is not None), layer
        for pool in pooled:
            by_pool.setdefault(pool, set()).add(layer)
    shared = [layers for layers in by_pool.values() if len(layers) > 1]
    assert sorted(map(sorted, shared)) == sorted(map(sorted, pools))


class Centred(nn.Module):
    """A sum of two activations of which one has no samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        return self.head((self.second(y) - y.mean(0)).relu())


def test_a_sum_over_samples_meets_by_its_last_dims() -> None:
    x = torch.zeros(4, 6)
    graph = allocator.trace(Centred().eval(), x)
    assert graph.size == 16
    assert set(graph.scope_of.tolist()) == {ALL}
    (block,) = graph.blocks
    assert [branch.channels for branch in block.branches] == [16, 16]
    assert allocator.allocate(graph.model, "60%", example_inputs=x).certificate.ok


@pytest.mark.parametrize("name", NETWORKS)
def test_a_neurons_branch_is_the_first_that_writes_it(name: str) -> None:
    run, layers, _, _ = NETWORKS[name]
    graph = graph_of(net(run, **layers))
    order = [written.module for written in graph.facts.written]
    for neuron in graph.neurons:
        writers = [layer for layer in layers if neuron.index in channel_units(graph, layer)]
        expected = min(order.index(layer) for layer in writers)
        assert graph.branch_of[neuron.index] == expected


def test_groups_that_narrow_alike_are_branches_with_what_they_give() -> None:
    model = net(chain, stem=conv(3, 4), middle=conv(4, 6, 2), last=conv(6, 1))
    graph = graph_of(model, groups="width")
    assert channel_units(graph, "stem") == [0, 1, 0, 1]
    assert channel_units(graph, "middle") == [2, 3, 4, 2, 3, 4]
    assert graph.scope_of.tolist() == [BRANCHES] * 5
    assert graph.pool_of[0] == graph.pool_of[1] != graph.pool_of[2] == graph.pool_of[3] == graph.pool_of[4]


# Neurons of a network -------------------------------------------------------------------------------


def flattened(m: Any, x: Tensor) -> Tensor:
    return m.head(m.norm(m.stem(x)).flatten(1))


def flat_net() -> ChannelGraph:
    """Two channels of 2 x 2 pixels, flattened."""
    model = net(flattened, stem=nn.Conv2d(3, 2, 1), norm=nn.BatchNorm2d(2), head=nn.Linear(8, 3))
    return graph_of(model, torch.zeros(1, 3, 2, 2))


def test_neurons_list_every_index_that_they_hold() -> None:
    graph = flat_net()
    norms = ("norm.weight", "norm.bias")
    statistics = ("norm.running_mean", "norm.running_var")
    for channel, neuron in enumerate(graph.neurons):
        pixels = [("head.weight", 1, 4 * channel + pixel) for pixel in range(4)]
        own = [("stem.weight", 0, channel), ("stem.bias", 0, channel), *((name, 0, channel) for name in norms)]
        assert neuron.members == (*own, *pixels, *((name, 0, channel) for name in statistics))
        assert (neuron.index, neuron.scope) == (channel, "inner")
    assert len(graph.neurons) == graph.size == 2


@pytest.mark.parametrize("name", NETWORKS)
def test_members_are_all_the_slots_of_a_neuron(name: str) -> None:
    run, layers, _, _ = NETWORKS[name]
    graph = graph_of(net(run, **layers))
    for neuron in graph.neurons:
        slots = [graph.slots.base[name][dim] + index for name, dim, index in neuron.members]
        assert slots == np.flatnonzero(graph.unit_of_slot == neuron.index).tolist()


def test_what_stays_is_what_is_kept_and_what_is_no_neurons() -> None:
    graph = graph_of(net(dense, **NETWORKS["dense"][1]))
    kept = random_choice(graph, 0)
    assert 0 < kept.sum() < graph.size
    expected = [unit < 0 or bool(kept[unit]) for unit in graph.unit_of_slot.tolist()]
    assert graph.stays(kept).tolist() == expected
    label = np.array([0, *graph.slots.labels("first.weight")[0], 0])
    assert graph.units(label).tolist() == channel_units(graph, "first")
    assert graph.units(None).tolist() == []


def test_reasons_count_channels_and_the_most_come_first() -> None:
    graph = graph_of(net(chain, stem=conv(3, 4), middle=conv(4, 4), last=conv(4, 2)), exclude=("stem.weight",))
    assert graph.reasons() == [
        ("excluded by the caller", 4),  # of all dims of its tensors, those that are written
        ("meets a dim that must keep its size (convolution) in stem", 3),  # the image's channels
        ("an output of the model", 2),
    ]
    assert channel_units(graph, "stem") == [-1] * 4
    assert graph.share() == 4 / (4 + 4 + 2)


def test_a_network_without_layers_has_no_share() -> None:
    graph = graph_of(net(lambda m, x: x.relu()))
    assert (graph.size, graph.share(), graph.neurons, graph.blocks) == (0, 0.0, [], [])


# Costs ----------------------------------------------------------------------------------------------


def test_metrics_of_a_chain_are_those_of_the_arithmetic() -> None:
    graph = graph_of(net(chain, stem=conv(3, 4), middle=conv(4, 5), last=conv(5, 2)))
    kept = dropping(graph, {"stem": [1], "middle": [0, 4]})
    pixels = 64
    flops = graph.metric("flops")
    assert flops.whole == graph.flops == pixels * 9 * (3 * 4 + 4 * 5 + 5 * 2)
    assert flops.value(kept) == graph.certain_flops(kept) == pixels * 9 * (3 * 3 + 3 * 3 + 3 * 2)
    assert graph.metric("params").value(kept) == 9 * (3 * 3 + 3 * 3 + 3 * 2) + 3 + 3 + 2
    assert graph.metric("activations").value(kept) == pixels * (3 + 3 + 2)
    assert graph.metric("flops") is flops
    with pytest.raises(
        UnknownNameError, match=r"no metric 'time' \(there are flops, params, activations, peak_activations, latency\)"
    ):
        graph.metric("time")


def test_flops_after_a_result_whose_size_depends_on_values_are_not_certain() -> None:
    def run(m: Any, x: Tensor) -> Any:
        rows = m.first(x)
        return m.second(rows[rows.sum(1) > 0])

    graph = graph_of(net(run, first=nn.Linear(4, 6), second=nn.Linear(6, 2)), torch.randn(5, 4))
    everything = np.ones(graph.size, dtype=bool)
    assert graph.flops == 5 * (4 * 6 + 6 * 2)
    assert graph.certain_flops(everything) == 5 * 4 * 6
    assert graph.notes == ["results whose size depends on values count at their largest (index)"]


# The graph of calls ---------------------------------------------------------------------------------


def test_calls_are_nodes_and_tensors_are_edges() -> None:
    graph = graph_of(net(residual, **NETWORKS["residual"][1]))
    calls = graph.to_networkx()
    names = {INPUT: "input", **{i: op.name for i, op in calls.nodes(data="op") if i != INPUT}}
    assert [names[i] for i in sorted(calls)] == [
        "input", "convolution", "convolution", "relu", "convolution", "add", "convolution",
    ]  # fmt: skip
    assert set(calls.edges) == {(INPUT, 0), (0, 1), (1, 2), (2, 3), (0, 4), (3, 4), (4, 5)}
    assert calls.edges[1, 2]["shape"] == (1, 3, 8, 8)
    assert calls.edges[INPUT, 0]["shape"] == (1, 3, 8, 8)


# Building -------------------------------------------------------------------------------------------


class Auxiliary(nn.Module):
    """A second head that runs in train mode only."""

    def __init__(self, message: str = "") -> None:
        super().__init__()
        self.stem, self.head = conv(3, 4), nn.Linear(4, 2)
        self.hidden, self.aux = nn.Linear(4, 6), nn.Linear(6, 2)
        self.message = message

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).mean((2, 3))
        if not self.training:
            return self.head(x)
        if self.message:
            raise RuntimeError(self.message)
        return self.head(x), self.aux(self.hidden(x).relu())


def test_heads_that_run_in_train_mode_only_have_a_flow_of_their_own() -> None:
    graph = graph_of(Auxiliary().eval())
    assert graph.training_flow is not None
    assert graph.flows == [graph.flow, graph.training_flow]
    assert [flow.trace.training for flow in graph.flows] == [False, True]
    stem = channel_units(graph, "stem")
    read = graph.unit_of_slot[graph.slots.labels("hidden.weight")[1]].tolist()
    assert stem == read
    assert -1 not in stem
    assert len(set(channel_units(graph, "hidden"))) == 6
    assert channel_units(graph, "aux") == [-1, -1]
    assert graph_of(net(chain, **NETWORKS["depthwise"][1])).flows[1:] == []


def test_a_forward_that_fails_in_train_mode_is_noted() -> None:
    graph = graph_of(Auxiliary("no such luck").eval())
    assert graph.training_flow is None
    assert graph.notes == ["parameters and buffers used in train mode only stay as they are: no such luck"]
    assert channel_units(graph, "hidden") == [-1] * 6


def two_parts(m: Any, x: Tensor) -> Tensor:
    return m.last(m.body(m.stem(x)))


def nested() -> Any:
    body = nn.Sequential(conv(4, 5), nn.ReLU(), conv(5, 6))
    return net(two_parts, stem=conv(3, 4), body=body, last=conv(6, 2))


@pytest.mark.parametrize(
    ("excluded", "stay"),
    [
        ((), ""),
        (("stem",), "stem"),
        (("stem.weight",), "stem"),
        (("stem.bias",), "stem"),
        (("body",), "body.0 body.2"),
        (("body.*",), "body.0 body.2"),
        (("body.2", "stem"), "stem body.2"),
        (("*",), "stem body.0 body.2"),
        (("st?m",), "stem"),
        ((nn.Conv2d,), "stem body.0 body.2"),
        ((nn.Linear, "nowhere"), ""),
        (("0",), ""),
    ],
)
def test_what_is_excluded_stays(excluded: tuple[Any, ...], stay: str) -> None:
    graph = graph_of(nested(), exclude=excluded)
    frozen = [layer for layer in ("stem", "body.0", "body.2") if set(channel_units(graph, layer)) == {-1}]
    free = [layer for layer in ("stem", "body.0", "body.2") if -1 not in channel_units(graph, layer)]
    # All dims of an excluded weight stay, and so does the layer that gives what it reads.
    before = {"body.0": "stem", "body.2": "body.0"}
    expected = {*stay.split()}
    expected |= {before[layer] for layer in expected if layer in before}
    assert set(frozen) == expected
    assert {*frozen, *free} == {"stem", "body.0", "body.2"}


@pytest.mark.parametrize(
    ("included", "free"),
    [
        ((), "stem body.0 body.2"),
        (("body",), "body.0 body.2"),
        (("body.2", "stem.weight"), "stem body.2"),
        ((nn.Linear,), ""),
        (("*",), "stem body.0 body.2"),
    ],
)
def test_what_is_included_alone_may_go(included: tuple[Any, ...], free: str) -> None:
    graph = graph_of(nested(), include=included)
    assert [layer for layer in ("stem", "body.0", "body.2") if -1 not in channel_units(graph, layer)] == free.split()
    if free != "stem body.0 body.2":
        assert any(reason == "not included by the caller" for reason, _ in graph.reasons())


def test_layers_that_are_to_stay_alike_share_their_neurons() -> None:
    model = net(concatenated, stem=conv(3, 4), left=conv(4, 3), right=conv(4, 3), read=conv(6, 4), last=conv(4, 2))
    apart = graph_of(model)
    assert set(channel_units(apart, "left")).isdisjoint(channel_units(apart, "right"))
    for group in (("left", "right"), [model.left, model.right]):
        graph = graph_of(model, same=(group,))
        assert channel_units(graph, "left") == channel_units(graph, "right")
        assert set(channel_units(graph, "stem")).isdisjoint(channel_units(graph, "read"))
        assert graph.size == apart.size - 3
    both = graph_of(model, same=(("left", "right"), ("stem", "read")))
    assert channel_units(both, "stem") == channel_units(both, "read")
    with pytest.raises(InputError, match=r"stem.weight writes 4 channels and left.weight 3; only layers of one width"):
        graph_of(model, same=(("stem", "left"),))


def test_a_list_of_layers_that_are_to_stay_alike_is_one_group() -> None:
    model = net(concatenated, stem=conv(3, 4), left=conv(4, 3), right=conv(4, 3), read=conv(6, 4), last=conv(4, 2))
    for same in (["left", "right"], [model.left, model.right], [["left", "right"]], [["left", "right"], "stem"]):
        graph = allocator.trace(model, IMAGE, same=same)
        assert channel_units(graph, "left") == channel_units(graph, "right")
    with pytest.raises(InputError, match="only layers of one width can stay alike"):
        allocator.trace(model, IMAGE, same=["stem", "left"])
    assert as_groups(None, "same") == ()
    assert as_groups("left", "same") == (("left",),)
    assert as_groups(nn.Sequential(nn.ReLU()), "same")[0][0].__class__ is nn.Sequential


def test_what_matches_nothing_is_noted_and_what_is_no_pattern_refused() -> None:
    model = nested()
    modules, tensors = dict(model.named_modules()), [name for name, _ in model.named_parameters()]
    assert unmatched(modules, tensors, "exclude", ("stem", "body.*", nn.Conv2d, [nn.ReLU, "body.2"])) == [
        "exclude=ReLU matches no module of the model"
    ]
    assert unmatched(modules, tensors, "same", (["sten", "last"], nn.Linear)) == [
        "same='sten' matches no module or parameter; did you mean 'stem'?",
        "same=Linear matches no module of the model",
    ]
    assert selected(modules, tensors, (model.body,), "exclude") == {
        f"body.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")
    }
    assert selected(modules, tensors, (model,), "exclude") == set(tensors)
    assert as_items(None, "exclude") == ()
    assert as_items("stem", "exclude") == ("stem",)
    assert as_items(model.stem, "exclude") == (model.stem,)
    assert as_items(["a", "b"], "exclude") == ("a", "b")
    with pytest.raises(InputError, match=r"exclude: this Conv2d is no module of the model: pass one of model\.modules"):
        graph_of(model, exclude=(nn.Conv2d(1, 1, 1),))
    with pytest.raises(InputError, match="exclude is 7: pass name patterns, module classes or modules"):
        graph_of(model, exclude=as_items(7, "exclude"))


def test_calls_that_a_repair_named_keep_what_they_touch() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(m.second(m.first(x).relu()).relu())

    model = net(run, first=conv(3, 4), second=conv(4, 5), last=conv(5, 2))
    graph = graph_of(model, frozen=frozenset({Place("", "relu", 1)}))
    assert channel_units(graph, "second") == [-1] * 5
    assert -1 not in channel_units(graph, "first")
    assert ("the rewritten forward did not fit here (relu)", 5) in graph.reasons()
    graph = graph_of(model, frozen=frozenset({Place("", "relu")}))
    assert graph.size == 0
    training = graph_of(Auxiliary().eval(), frozen=frozenset({Place("", "relu", 0)}))
    assert channel_units(training, "hidden") == [-1] * 6, "the call is one of train mode"


class Scaled(nn.Module):
    """A norm of its own making, with a head beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gain = conv(3, 4), nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 4.0]))
        self.second, self.boxes, self.classes = conv(4, 3), conv(3, 4), conv(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.stem(x) * self.gain.view(1, -1, 1, 1))
        return (self.boxes(x)[:, :1] * self.classes(x)[:, :1]).relu()


@pytest.fixture
def _known() -> Iterator[None]:
    adapters.register(Scaled, Adapter(norm_scale="gain", outputs=lambda m: ["boxes", "classes", "stem.nothing"]))
    yield
    adapters.unregister(Scaled)


@pytest.mark.usefixtures("_known")
def test_adapters_name_scales_and_heads() -> None:
    graph = graph_of(Scaled().eval())
    (gamma,) = graph.facts.gammas
    assert gamma.name == "gain"
    assert np.array_equal(gamma.label, graph.slots.labels("gain")[0])
    assert channel_units(graph, "boxes") == [-1] * 4
    assert ("a head of the model in boxes", 4) in graph.reasons()
    assert ("a head of the model in classes", 2) in graph.reasons()


def test_heads_of_an_attention_are_followed_in_a_second_pass() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj, self.heads = nn.Linear(8, 24), nn.Linear(8, 8), 4

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).reshape(1, 5, 3, self.heads, 2).permute(2, 0, 3, 1, 4).unbind(0)
            return self.proj(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(1, 5, 8))

    model = nn.Sequential(Attention()).eval()
    graph = graph_of(model, torch.zeros(1, 5, 8))
    assert graph.options.heads == {Place("0", "view", 0): 3}
    rows = np.array(channel_units(graph, "0.qkv")).reshape(3, 4, 2)
    assert [set(rows[:, head].ravel().tolist()) for head in range(4)] == [{0}, {1}, {2}, {3}]
    undivided = graph_of(model, torch.zeros(1, 5, 8), heads={})
    assert undivided.options.heads == {}
    rows = np.array(channel_units(undivided, "0.qkv")).reshape(3, 4, 2)
    assert all(len(set(rows[0, :, place].tolist())) == 1 for place in range(2)), "every head keeps the same places"


def test_a_graph_says_what_it_was_made_with() -> None:
    model = net(chain, **NETWORKS["depthwise"][1])
    graph = graph_of(model)
    assert graph.example_inputs.args[0] is IMAGE
    assert (graph.assumptions, graph.unsupported, graph.exact) == ([], {}, True)
    assert not graph_of(model, norms="loose").exact
    assumed = graph_of(model, None)
    assert assumed.assumptions == ["input 1x3x224x224, from the first convolution and the field's usual size"]
    assert graph.modules["middle"] is model.middle
    assert graph.tensors["middle.weight"] is model.middle.weight
    assert isinstance(graph.model, Net)


def test_an_operator_without_a_rule_keeps_what_it_touches() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(m.second(m.stem(x).matrix_exp()))

    graph = graph_of(net(run, stem=conv(3, 4), second=conv(4, 5), last=conv(5, 1)))
    assert graph.unsupported == {"linalg_matrix_exp": [""]}
    assert channel_units(graph, "stem") == [-1] * 4
    assert -1 not in channel_units(graph, "second")
