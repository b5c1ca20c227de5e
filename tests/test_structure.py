"""The structural check sees every way in which a rewritten forward can differ, and nothing where it does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from declarations import with_rule
from small_graphs import Net, dropping, graph_of, net, random_choice, shrunk
from subjects import untouched
from torch import Tensor, nn
from torch.nn import functional as F

from allocator.graph.build import elsewhere
from allocator.graph.channel_graph import ChannelGraph
from allocator.rewriting.index_map import IndexMap, Maps
from allocator.tracing.calls import Ref
from allocator.verifying.structure import Mismatch, find_mismatch, numbers_in

Run = Callable[[Any, Tensor], Any]


def forward(
    m: Any,
    x: Tensor,
    *,
    activation: Callable[[Tensor], Tensor] = torch.relu,
    joined: Callable[[Tensor, Tensor], list[Tensor]] = lambda a, b: [a, b],
    paths: str = "left right",
    scale: float = 0.5,
    literal: float = 8.0,
    groups: int = 2,
    parts: int = 2,
    start: int = 1,
    late: Callable[[Tensor], Tensor] = lambda x: x,
    returned: Callable[[Tensor, Tensor], Any] = lambda y, z: (y, z),
) -> Any:
    """A stem, two paths that are concatenated, a grouped convolution, a shuffle, halves, and two outputs."""
    x = activation(m.norm(m.stem(x)))
    first, second = (getattr(m, name)(x) for name in paths.split())
    x = torch.cat(joined(first, second), 1)
    x = F.conv2d(x, m.weight, None, 1, 1, 1, m.groups)
    n, c, h, w = x.shape
    x = x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)
    x = x * scale + torch.tensor(literal)
    y = torch.stack([part.sigmoid() for part in x.chunk(parts, 1)]).sum(0)
    z = late(m.head(x[:, start : start + 1].mean((2, 3))))
    return returned(y.mean(1), z)


def network(run: Run = forward) -> Any:
    return net(
        run,
        stem=nn.Conv2d(3, 6, 3, padding=1),
        norm=nn.BatchNorm2d(6),
        left=nn.Conv2d(6, 4, 1),
        right=nn.Conv2d(6, 4, 1),
        weight=nn.Parameter(torch.randn(8, 2, 3, 3)),
        head=nn.Linear(1, 3),
        groups=4,
    )


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    return graph_of(network())


@pytest.fixture(scope="module")
def shrunken(graph: ChannelGraph) -> tuple[Maps, Any]:
    kept = np.ones(graph.size, dtype=bool)
    kept[graph.unit_of_slot[graph.slots.labels("stem.weight")[0][[1, 4]]]] = False
    return shrunk(graph, kept)


def with_forward(model: Any, run: Callable[..., Any]) -> Any:
    other = copy.deepcopy(model)
    other.run = run
    return other


def changed(**options: Any) -> Run:
    return lambda m, x: forward(m, x, **options)


def test_the_rewritten_forward_passes(graph: ChannelGraph, shrunken: tuple[Maps, Any]) -> None:
    maps, small = shrunken
    assert maps
    with untouched(small), untouched(graph.model):
        assert find_mismatch(graph, maps, small) is None
    assert find_mismatch(graph, {}, graph.model) is None


def fail(x: Tensor) -> Tensor:
    raise KeyError("no such thing")


# Per change of the forward: what is said, and the operator and module that it is said of.
CHANGES: dict[str, tuple[Run, str, str]] = {
    "a call more": (changed(activation=lambda x: x.relu().relu()), "became aten.relu.default in the model", "conv"),
    "a call less": (changed(activation=lambda x: x), "became aten.convolution.default in left", "relu"),
    "another call": (changed(activation=torch.tanh), "became aten.tanh.default in the model", "relu"),
    "a call more at the end": (changed(late=torch.tanh), "became aten.tanh", "mean"),
    "another number": (changed(scale=0.25), "has the number 0.25, expected 0.5", "mul"),
    "another kind of number": (changed(scale=float("nan")), "has the number nan, expected 0.5", "mul"),
    "another literal": (changed(literal=4.0), "has the number 4.0, expected 8.0", "lift_fresh"),
    "another order": (changed(joined=lambda a, b: [b, a]), "reads another tensor, expected the same as before", "cat"),
    "one tensor twice": (changed(joined=lambda a, b: [a, a]), "became aten.cat.default", "convolution"),
    "a tensor more": (changed(joined=lambda a, b: [a, b, b]), "reads 3 tensors, expected 2", "cat"),
    "another module": (changed(paths="right left"), "became aten.convolution.default in right", "convolution"),
    "other parts": (changed(parts=1), "gives 1 tensors, expected 2", "split"),
    "another channel": (changed(start=2), "dim 1 holds other channels, or in another order", "slice"),
    "another one of those that go together": (changed(start=0), "takes other places of dim 1, from 0 on", "slice"),
    "another shuffle": (changed(groups=4), "shape (1, 4, 2, 8, 8), expected (1, 2, 4, 8, 8)", "view"),
    "the outputs exchanged": (changed(returned=lambda y, z: (z, y)), "the model returns other tensors", "mean"),
    "an output more": (changed(returned=lambda y, z: (y, z, y)), "the model returns other tensors", "mean"),
    "an output less": (changed(returned=lambda y, z: y), "became aten.mean.dim", "slice"),
    "rows repeated by strides": (
        changed(late=lambda x: x.as_strided((2, 3), (0, 1))),
        "became aten.as_strided",
        "mean",
    ),
    "an error": (changed(late=fail), "the rewritten forward raised KeyError: 'no such thing'", "mean"),
    "an error midway": (changed(activation=fail), "the rewritten forward raised KeyError: 'no such thing'", "relu"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_forward(change: str, graph: ChannelGraph, shrunken: tuple[Maps, Any]) -> None:
    maps, small = shrunken
    run, what, where = CHANGES[change]
    found = find_mismatch(graph, maps, with_forward(small, run))
    assert found is not None
    assert found.what.startswith(what)
    assert found.op is not None
    assert found.op.name.startswith(where)
    assert str(found) == f"{found.op}: {found.what}"
    whole = find_mismatch(graph, {}, with_forward(graph.model, run))
    assert whole is not None


def test_mismatches_are_alike_where_they_say_the_same(graph: ChannelGraph) -> None:
    first, second = graph.flow.trace.ops[:2]
    one = Mismatch(first, "what", misplaced=np.arange(3))
    assert one == Mismatch(first, "what", misplaced=np.arange(2))
    assert one != Mismatch(second, "what", misplaced=np.arange(3))
    assert one != Mismatch(first, "what", module="norm")
    assert "misplaced" not in repr(one)


# What makes no difference ---------------------------------------------------------------------------

SAME: dict[str, Run] = {
    "a copy more": changed(activation=lambda x: x.relu().clone()),
    "a view of all": changed(activation=lambda x: x.detach().relu().contiguous()),
    "a call that nothing reads": changed(late=lambda x: (x.tanh(), x)[1]),
    "sizes written out": lambda m, x: forward(m, x, activation=lambda x: x.relu().view(*x.shape).view(x.shape)),
    "strides written out": changed(activation=lambda x: x.relu().as_strided(x.shape, x.stride())),
    "an expression of the same value": changed(scale=1 / 2, literal=2.0**3),
}


@pytest.mark.parametrize("change", SAME)
def test_what_makes_no_difference(change: str, graph: ChannelGraph, shrunken: tuple[Maps, Any]) -> None:
    maps, small = shrunken
    run = SAME[change]
    if change == "sizes written out":  # two views more are two calls more
        assert find_mismatch(graph, maps, with_forward(small, run)) is not None
        graph = graph_of(network(run))
        maps, small = shrunk(graph, dropping(graph, {"stem": [0]}))
    assert find_mismatch(graph, maps, with_forward(small, run)) is None


@pytest.mark.parametrize("seed", range(6))
def test_any_choice_of_neurons_passes(seed: int, graph: ChannelGraph) -> None:
    maps, small = shrunk(graph, random_choice(graph, seed))
    assert maps
    assert find_mismatch(graph, maps, small) is None


def test_a_copy_without_values_is_as_good_and_used_up(graph: ChannelGraph) -> None:
    kept = dropping(graph, {"stem": [3]})
    maps, small = shrunk(graph, kept)
    fewer = dict(maps, **{"stem.weight": [IndexMap.of(np.arange(4)), None, None, None]})
    for given, right in ((maps, True), (fewer, False)):
        found = find_mismatch(graph, given, copy.deepcopy(small).to("meta"), copied=True)
        assert (found is None) == right


# Layers that were changed by hand -------------------------------------------------------------------


def plain(m: Any, x: Tensor) -> Tensor:
    return m.last(m.norm(m.up(m.grouped(m.first(x)).relu())))


def layers() -> Any:
    return net(
        plain,
        first=nn.Conv2d(3, 8, 3, padding=1),
        grouped=nn.Conv2d(8, 8, 3, 1, 1, groups=4),
        up=nn.ConvTranspose2d(8, 6, 2, 2),
        norm=nn.GroupNorm(3, 6),
        last=nn.Conv2d(6, 2, 3, 2, 1, 1),
    )


def _set(path: str, **values: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for name, value in values.items():
            setattr(model.get_submodule(path), name, value)

    return change


LAYERS: dict[str, tuple[Callable[[Any], None], str]] = {
    "stride": (_set("first", stride=(2, 2)), "has stride (2, 2), expected (1, 1)"),
    "padding": (_set("first", padding=(0, 0)), "has padding (0, 0), expected (1, 1)"),
    "dilation": (_set("first", dilation=(2, 2)), "has dilation (2, 2), expected (1, 1)"),
    "padding and dilation": (_set("last", dilation=(2, 2), padding=(2, 2)), "has padding (2, 2), expected (1, 1)"),
    "output padding": (_set("up", output_padding=(1, 1)), "has output_padding (1, 1), expected (0, 0)"),
    "groups": (_set("grouped", groups=1), "the rewritten forward raised RuntimeError"),
    "groups of the norm": (_set("norm", num_groups=1), "shape (1, 1), expected (1, 2)"),
    "eps": (_set("norm", eps=1e-3), "has the number 0.001, expected 1e-05"),
    "another layer": (_set("", grouped=nn.Conv2d(6, 6, 3, 1, 1, groups=2)), "has 2 groups, expected 3"),
    "no bias": (_set("last", bias=None), "reads 2 tensors, expected 3"),
    "a weight of another layer": (
        lambda m: setattr(m.norm, "bias", m.norm.weight),
        "reads norm.weight, expected norm.bias",
    ),
    "another mode": (lambda m: setattr(m, "norm", nn.Identity()), "became aten.convolution.default in last"),
}


@pytest.mark.parametrize("change", LAYERS)
def test_a_changed_layer(change: str) -> None:
    graph = graph_of(layers())
    kept = dropping(graph, {"first": [2], "norm": [0]})
    maps, small = shrunk(graph, kept)
    assert find_mismatch(graph, maps, small) is None
    alter, what = LAYERS[change]
    alter(small)
    found = find_mismatch(graph, maps, small)
    assert found is not None
    assert found.what.startswith(what)


def test_tensors_that_are_not_there_or_of_another_size() -> None:
    graph = graph_of(layers())
    maps, small = shrunk(graph, dropping(graph, {"first": [2]}))
    other = shrunk(graph, dropping(graph, {"first": [4, 6]}))[1]
    assert find_mismatch(graph, maps, other) is not None
    assert find_mismatch(graph, maps, graph.model) is not None
    assert find_mismatch(graph, {}, small) is not None
    small.first.weight = nn.Parameter(small.first.weight[:, :, 1:])
    found = find_mismatch(graph, maps, small)
    assert found is not None
    assert found.what == "shape (1, 6, 9, 8), expected (1, 6, 8, 8)"


# Numbers and tensors that a call is given -----------------------------------------------------------

TwoInputs = Callable[[Any, Tensor, Tensor], Tensor]
# Two forwards each, of which one must not pass for the other; and what is said where the second is the changed one.
DIFFERENT: dict[str, tuple[TwoInputs, TwoInputs, str]] = {
    "an argument at its default": (
        lambda m, x, y: m.last(F.leaky_relu(m.one(x))),
        lambda m, x, y: m.last(F.leaky_relu(m.one(x), 0.2)),
        "has the number 0.2, expected 0.01",
    ),
    "a bound more": (
        lambda m, x, y: m.last(m.one(x).clamp(min=0.0)),
        lambda m, x, y: m.last(m.one(x).clamp(min=0.0, max=1.0)),
        "has the number 1.0, expected None",
    ),
    "a factor": (
        lambda m, x, y: m.last(torch.add(m.one(x), m.two(y))),
        lambda m, x, y: m.last(torch.add(m.one(x), m.two(y), alpha=2)),
        "has the number 2, expected 1",
    ),
    "a word": (
        lambda m, x, y: m.last(F.gelu(m.one(x))),
        lambda m, x, y: m.last(F.gelu(m.one(x), approximate="tanh")),
        "has the number tanh, expected none",
    ),
    "fewer dims": (
        lambda m, x, y: m.last(m.one(x)).sum((0, 1)),
        lambda m, x, y: m.last(m.one(x)).sum((1,)).sum(),
        "has the number 1, expected 0",
    ),
    "one input twice": (
        lambda m, x, y: m.last(m.one(x) + m.two(y)),
        lambda m, x, y: m.last(m.one(x) + m.two(x)),
        "reads another tensor, expected the same as before",
    ),
    "pixels further on": (
        lambda m, x, y: m.last(m.one(x))[1:3],
        lambda m, x, y: m.last(m.one(x))[0:2],
        "takes other places of dim 0, from 0 on",
    ),
    "every second": (
        lambda m, x, y: m.last(m.one(x))[0:2],
        lambda m, x, y: m.last(m.one(x))[0:3:2],
        "takes other places of dim 0, from 0 on",
    ),
    "another dim": (
        lambda m, x, y: m.last(m.one(x)).narrow(0, 0, 3).t().narrow(0, 0, 2),
        lambda m, x, y: m.last(m.one(x)).narrow(1, 0, 2).t().narrow(0, 0, 2),
        "slices dim 1, expected 0",
    ),
    "a dim more": (
        lambda m, x, y: m.last(m.one(x)).flip(0),
        lambda m, x, y: m.last(m.one(x)).flip(0, 1),
        "has 2 numbers, expected 1",
    ),
    "a value that fills": (
        lambda m, x, y: m.last(m.one(x) + torch.full((6,), 2.0)),
        lambda m, x, y: m.last(m.one(x) + torch.full((6,), 3.0)),
        "has the number 3.0, expected 2.0",
    ),
    "a whole value that fills": (
        lambda m, x, y: m.last(m.one(x) + torch.full((6,), 2)),
        lambda m, x, y: m.last(m.one(x) + torch.full((6,), 3)),
        "has the number 3, expected 2",
    ),
    "a literal in a list": (
        lambda m, x, y: m.last(m.one(x)) * torch.tensor([1.0, 2.0]),
        lambda m, x, y: m.last(m.one(x)) * torch.tensor([2.0, 1.0]),
        "has the number 2.0, expected 1.0",
    ),
    "another dtype": (
        lambda m, x, y: m.last(m.one(x)).double(),
        lambda m, x, y: m.last(m.one(x)).half(),
        "has the number torch.float16, expected torch.float64",
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_a_call_is_given(name: str) -> None:
    first, second, said = DIFFERENT[name]
    model = net(first, one=nn.Linear(4, 6), two=nn.Linear(4, 6), last=nn.Linear(6, 2))
    graph = graph_of(model, (torch.zeros(3, 4), torch.zeros(3, 4)))
    maps, small = shrunk(graph, dropping(graph, {}))
    found = find_mismatch(graph, maps, with_forward(small, second))
    assert found is not None
    assert found.what == said
    other = graph_of(with_forward(model, second), (torch.zeros(3, 4), torch.zeros(3, 4)))
    assert find_mismatch(other, {}, model) is not None
    assert find_mismatch(other, {}, with_forward(model, second)) is None


def test_a_number_less_is_a_change_too() -> None:
    model = net(lambda m, x: m.last(m.one(x)).flip(0, 1), one=nn.Linear(4, 6), last=nn.Linear(6, 2))
    graph = graph_of(model, torch.zeros(3, 5, 4))
    found = find_mismatch(graph, {}, with_forward(model, lambda m, x: m.last(m.one(x)).flip(0)))
    assert found is not None
    assert found.what == "has 1 numbers, expected 2"


def test_a_number_that_is_none_is_the_same_as_itself() -> None:
    model = net(lambda m, x: m.last(m.one(x).nan_to_num(float("nan"))), one=nn.Linear(4, 6), last=nn.Linear(6, 2))
    graph = graph_of(model, torch.zeros(3, 4))
    maps, small = shrunk(graph, dropping(graph, {"one": [0]}))
    assert find_mismatch(graph, maps, small) is None


def test_slices_of_what_lost_channels() -> None:
    """Both halves of a flattened map, by sizes that the forward reads off its tensors."""

    def halves(m: Any, x: Tensor) -> Tensor:
        x = m.one(x).flatten(1)
        middle = x.shape[1] // 2
        return m.last(torch.cat([x[:, middle:].relu(), x[:, :middle]], 1))

    def unequal(m: Any, x: Tensor) -> Tensor:
        x = m.one(x).flatten(1)
        middle = x.shape[1] // 2
        return m.last(torch.cat([x[:, middle + 1 :].relu(), x[:, : middle + 1]], 1))

    model = net(halves, one=nn.Conv2d(3, 4, 1), last=nn.Linear(16, 2))
    graph = graph_of(model, torch.zeros(1, 3, 2, 2))
    maps, small = shrunk(graph, dropping(graph, {"one": [0, 3]}))
    assert find_mismatch(graph, maps, small) is None
    assert find_mismatch(graph, maps, with_forward(small, unequal)) is not None
    maps, small = shrunk(graph, dropping(graph, {"one": [0, 1]}))
    assert find_mismatch(graph, maps, small) is not None, "the first half has no channels left"


def test_numbers_are_found_in_order_whatever_they_are_nested_in() -> None:
    tree: Any = (Ref(0), (1, (2.5, Ref(1)), []), {"a": [True, None], "b": Ref(2), "c": "x"})
    assert numbers_in(tree) == [1, 2.5, True, None, "x"]


# Branches that are gone, and other modes ------------------------------------------------------------


def test_a_branch_that_lost_all_its_channels_is_gone_with_its_calls() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        paths = [path(x).relu() for path in (m.left, m.right) if path is not None and len(path.weight)]
        return m.last(torch.cat(paths, 1) if m.always or len(paths) > 1 else paths[0])

    model = net(run, left=nn.Conv2d(3, 4, 1), right=nn.Conv2d(3, 2, 1), last=nn.Conv2d(6, 2, 1), always=True)
    graph = graph_of(model)
    maps, small = shrunk(graph, dropping(graph, {"right": [0, 1], "left": [2]}))
    assert find_mismatch(graph, maps, small) is None
    small.always = False
    found = find_mismatch(graph, maps, small)
    assert found is not None
    assert found.what == "became aten.convolution.default in last"


def test_a_branch_that_is_gone_has_no_counter_of_batches_either() -> None:
    """In train mode a batch norm counts; that call reads no channel."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(torch.cat([path(x) for path in (m.left, m.right) if path is not None], 1))

    left, right = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) for _ in range(2))
    graph = elsewhere(graph_of(net(run, left=left, right=right, last=nn.Conv2d(8, 2, 1))))
    assert any(flow.trace.training for flow in graph.flows)
    maps, small = shrunk(graph, dropping(graph, {"left.0": [0, 1, 2, 3]}))
    small.left = None
    assert find_mismatch(graph, maps, small) is None
    assert find_mismatch(graph, {}, small) is not None
    small.right[1] = nn.BatchNorm2d(4, track_running_stats=False)
    found = find_mismatch(graph, maps, small)
    assert found is not None, "the counter of a branch that stays has to count"


class Auxiliary(nn.Module):
    """A second head in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.aux, self.scale = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2), 0.5

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return (self.head(x), self.aux(x * self.scale)) if self.training else self.head(x)


def test_what_runs_in_train_mode_only_is_compared_too() -> None:
    graph = graph_of(Auxiliary().eval(), torch.zeros(3, 4))
    maps, small = shrunk(graph, dropping(graph, {"stem": [1]}))
    assert find_mismatch(graph, maps, small) is None
    small.scale = 0.25
    found = find_mismatch(graph, maps, small)
    assert found is not None
    assert str(found) == "aten.mul.Tensor in the model: has the number 0.25, expected 0.5"
    assert any(found.op is op for op in graph.flows[1].trace.ops)
    assert found.forward == 1
    assert not small.training


def test_maps_that_put_what_meets_into_different_orders() -> None:
    parts = {"one": nn.Linear(4, 3), "two": nn.Linear(4, 3), "last": nn.Linear(3, 2)}
    model = net(lambda m, x: m.last(m.one(x) + m.two(x)), **parts)
    graph = graph_of(model, torch.zeros(2, 4))
    order, other = IndexMap.of(np.array([2, 0, 1])), IndexMap.of(np.array([1, 0, 2]))
    alike: Maps = {name: [order, *[None] * (len(graph.slots.shapes[name]) - 1)] for name in ("one.weight", "one.bias")}
    alike |= {"two.weight": [order, None], "two.bias": [order], "last.weight": [None, order]}
    assert find_mismatch(graph, alike, model) is None, "the sizes are the same, and so are the calls"
    torn: Maps = {**alike, "two.weight": [other, None], "two.bias": [other]}
    found = find_mismatch(graph, torn, model)
    assert found is not None
    assert str(found) == "aten.add.Tensor in the model: what meets here is put into different orders"
    assert found.forward == 0


def test_a_call_whose_sizes_do_not_go_together_counts_as_one_that_raised() -> None:
    """Tensors without values let through what a rule then finds wrong."""
    graph = graph_of(layers())
    maps, small = shrunk(graph, dropping(graph, {"first": [2]}))

    def rule(flow: Any, op: Any) -> None:
        raise ValueError("sizes of some sort")

    with with_rule("relu", rule):
        found = find_mismatch(graph, maps, small)
    assert found is not None
    assert str(found).startswith("aten.relu.default in the model: ")


def test_the_mode_of_the_original_is_the_mode_of_the_comparison() -> None:
    """A forward that reads a value runs for real, and so does the rewritten one: it takes the other path."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.one(x)
        return m.last(y.relu() if float(m.switch(x).sum()) > 0 else y.tanh())

    model = net(run, one=nn.Linear(4, 6), switch=nn.Linear(4, 1), last=nn.Linear(6, 2))
    model.switch.bias.data.fill_(100.0)
    graph = graph_of(model, torch.randn(3, 4))
    assert graph.flow.trace.mode == "real"
    maps, small = shrunk(graph, dropping(graph, {"one": [0]}))
    assert find_mismatch(graph, maps, small) is None
    small.switch.bias.data.fill_(-100.0)
    found = find_mismatch(graph, maps, small)
    assert found is not None
    assert found.what == "became aten.tanh.default in the model"


def test_a_model_on_the_meta_device_is_compared() -> None:
    graph = graph_of(layers())
    kept = dropping(graph, {"first": [2]})
    maps, small = shrunk(graph, kept)
    assert find_mismatch(graph, maps, copy.deepcopy(small).to("meta")) is None


# What is returned -----------------------------------------------------------------------------------


class Returns(nn.Module):
    """Returns tensors that no call has read: an input, a buffer, a parameter; and others in their place."""

    def __init__(self, returned: str) -> None:
        super().__init__()
        self.one, self.last, self.returned = nn.Linear(3, 6), nn.Linear(6, 2), returned
        self.scale, self.other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        self.register_buffer("anchors", torch.ones(4))

    def forward(self, x: Tensor, mask: Tensor, mark: Tensor) -> Any:
        y = self.last(self.one(x).relu())
        named = {"x": x, "y": y, "mask": mask, "mark": mark, "anchors": self.anchors}
        return tuple({**named, "scale": self.scale, "other": self.other}[name] for name in self.returned.split())


INPUTS = (torch.zeros(2, 3), torch.zeros(4), torch.zeros(4))


@pytest.mark.parametrize("returned", ["y mask", "y anchors", "scale y", "y mask mark", "y x", "y y", "mask y mask"])
def test_what_no_call_reads_may_be_returned(returned: str) -> None:
    graph = graph_of(Returns(returned).eval(), INPUTS)
    maps, small = shrunk(graph, dropping(graph, {"one": [2]}))
    assert find_mismatch(graph, maps, small) is None
    for other in ("y", "y other", "other y", "y mark mark", "y y y", "mark y mask"):
        small.returned = other
        found = find_mismatch(graph, maps, small)
        assert found is not None, other
        assert found.what == "the model returns other tensors"


def test_a_forward_without_calls() -> None:
    model = Net(lambda m, x, y: (x, y))
    graph = graph_of(model, (torch.zeros(2), torch.zeros(2)))
    assert find_mismatch(graph, {}, model) is None
    found = find_mismatch(graph, {}, Net(lambda m, x, y: (x, x)))
    assert str(found) == "a forward without calls: the model returns other tensors"
    found = find_mismatch(graph, {}, Net(lambda m, x, y: (x, y.relu())))
    assert str(found) == "a forward without calls: 1 calls follow, expected 0"
    found = find_mismatch(graph, {}, Net(lambda m, x, y: fail(x)))
    assert str(found) == "a forward without calls: the rewritten forward raised KeyError: 'no such thing'"


def test_a_forward_that_makes_no_call_any_more(graph: ChannelGraph, shrunken: tuple[Maps, Any]) -> None:
    maps, small = shrunken
    found = find_mismatch(graph, maps, with_forward(small, lambda m, x: (x, x)))
    assert found is not None
    assert found.what.startswith("0 calls follow, expected ")
