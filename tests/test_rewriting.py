"""From a choice of neurons to a smaller network: maps, attributes, copies, and what the result remembers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_graphs import IMAGE, Net, allocation_of, channel_units, dropping, graph_of, net, random_choice, shrunk
from subjects import Branches, trained, untouched
from torch import Tensor, nn

from allocator import adapters
from allocator.adapters import Adapter, Kept
from allocator.cost.budget import Budget, Budgets
from allocator.errors import AllocationMismatchError
from allocator.flow.facts import Attribute
from allocator.graph.channel_graph import ChannelGraph
from allocator.planning.plan import Plan
from allocator.rewriting.allocation import Allocation, architecture_hash
from allocator.rewriting.describe import complete, describe, describe_maps
from allocator.rewriting.index_map import IndexMap, Maps, length, mapped_shape, maps_of, take, take_on_meta
from allocator.rewriting.kept import kept_by
from allocator.rewriting.lineage import LINEAGE_ATTRIBUTE, led_to, remember
from allocator.rewriting.materialise import check_fits, gives, materialise, reset_parameters
from allocator.rewriting.rewrite import rewrite


def concatenated(m: Any, x: Tensor) -> Tensor:
    x = m.norm(m.stem(x)).relu()
    return m.head(m.mix(torch.cat([m.left(x), m.right(x)], 1)).relu().flatten(1))


def conv(source: int, out: int, size: int = 3, **more: Any) -> nn.Module:
    return nn.Conv2d(source, out, size, padding=size // 2, **more)


def network() -> Any:
    """Branches, a grouped convolution over them, and a flattened map."""
    return net(
        concatenated,
        stem=conv(3, 6),
        norm=nn.BatchNorm2d(6),
        left=conv(6, 4, 1),
        right=conv(6, 4),
        mix=conv(8, 8, groups=4),
        head=nn.Linear(8 * 64, 3),
    )


# Maps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_maps_hold_per_dim_the_indices_whose_slot_stays(seed: int) -> None:
    graph = graph_of(network(), groups=("whole", "width")[seed % 2])
    kept = random_choice(graph, seed, share=(0.2, 0.5, 0.8, 1.0)[seed % 4])
    expected: dict[str, list[list[int] | None]] = {}
    for name, shape in graph.slots.shapes.items():
        units = [graph.unit_of_slot[label] for label in graph.slots.labels(name)]
        left = [[i for i, unit in enumerate(of_dim.tolist()) if unit < 0 or kept[unit]] for of_dim in units]
        if any(len(indices) < size for indices, size in zip(left, shape)):
            expected[name] = [None if len(indices) == n else indices for indices, n in zip(left, shape)]
    maps = maps_of(graph, kept)
    assert {name: [dim and dim.tolist() for dim in dims] for name, dims in maps.items()} == expected


def test_the_size_of_a_tensor_after_its_maps() -> None:
    maps = [IndexMap.of(np.array([4, 1])), None, IndexMap.of(np.array([0, 0, 2]))]
    assert mapped_shape((5, 4, 3), maps) == (2, 4, 3)
    assert [len(dim) for dim in maps if dim is not None] == [2, 3]
    orders: list[list[int]] = [[], [3], [1, 4, 6], [4, 1], [1, 1], [0, 2, 1]]
    assert [IndexMap.of(np.array(source, dtype=np.int64)).keeps_order for source in orders] == [True] * 3 + [False] * 3
    assert [length([]), length([1, 2]), length([[1, 2, 3]]), length([[], []])] == [0, 2, 3, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_taking_is_indexing(dtype: torch.dtype) -> None:
    x = torch.randint(0, 2, (4, 6, 3)).to(dtype)
    rows = [[5, 0], [1, 2]]
    cases: list[tuple[list[Any], Tensor]] = [
        ([None, None, None], x),
        ([[3, 0], None, [2]], x[[3, 0]][:, :, [2]]),
        ([[], None, None], x[:0]),
        ([[1, 3], rows, None], torch.stack([x[1][rows[0]], x[3][rows[1]]])),
        ([[1, 3], rows, [1, 1]], torch.stack([x[1][rows[0]], x[3][rows[1]]])[:, :, [1, 1]]),
    ]
    for sources, expected in cases:
        found = take(x, sources)
        assert torch.equal(found, expected)
        assert found.dtype == dtype
        meta = take_on_meta(x.to("meta"), sources)
        assert (meta.shape, meta.dtype, meta.is_meta) == (expected.shape, dtype, True)


@pytest.mark.parametrize(
    ("shape", "layout"), [((4, 6, 2, 2), torch.channels_last), ((4, 6, 2, 2, 2), torch.channels_last_3d)]
)
def test_a_tensor_keeps_its_memory_format(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    x = torch.randn(shape).to(memory_format=layout)
    for sources in ([[1, 2], None], [None, [0, 2, 4]], [[0, 1], [[0, 1, 2], [3, 4, 5]]]):
        found = take(x, [*sources, *[None] * (x.dim() - 2)])
        assert found.is_contiguous(memory_format=layout)
        assert not found.is_contiguous()
        plain = take(x.contiguous(), [*sources, *[None] * (x.dim() - 2)])
        assert plain.is_contiguous()
        assert torch.equal(found, plain)


# An allocation of a choice --------------------------------------------------------------------------


def plan_of(graph: ChannelGraph, kept: np.ndarray, **limits: float) -> Plan:
    budgets = Budgets([Budget(graph.metric(name), limit) for name, limit in limits.items()])
    return Plan(kept, budgets, "all", "global", "magnitude", {})


def test_a_choice_as_data() -> None:
    model = network()
    graph = graph_of(model)
    kept = dropping(graph, {"stem": [1, 4], "left": [2]})
    plan = plan_of(graph, kept, params=1500, activations=2e6)
    bare = describe(graph, plan, maps_of(graph, kept))
    assert (bare.costs, bare.blocks, bare.parts) == ({}, [], [])
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert bare.architecture == architecture_hash(shapes)
    assert (bare.policy, bare.criterion, bare.scope) == ("global", "magnitude", "all")
    assert (bare.groups, bare.norms, bare.input_shapes) == ("whole", "exact", [[1, 3, 8, 8]])
    loose = graph_of(model, groups="width", norms="loose")
    other = describe(loose, plan_of(loose, np.ones(loose.size, dtype=bool), params=1), {})
    assert (other.groups, other.norms, other.kept, other.attributes) == ("width", "loose", {}, {})

    whole = complete(bare, graph, plan)
    small = materialise(model, bare)
    assert whole.costs["params"] == {
        "asked": 1500.0,
        "before": sum(p.numel() for p in model.parameters()),
        "after": sum(p.numel() for p in small.parameters()),
    }
    assert whole.costs["activations"]["asked"] == 2e6
    assert whole.costs["flops"]["asked"] is None
    assert whole.costs["flops"]["before"] == graph.flops
    assert whole.costs["flops"]["after"] == graph_of(small).flops
    assert [block["kind"] for block in whole.blocks] == ["concat", "groups"]
    assert [row["after"] for row in whole.blocks[0]["branches"]] == [2, 4], "a channel goes with its group"
    assert replace(whole, costs={}, blocks=[]) == bare


def test_groups_are_counted_and_every_output_names_its_columns() -> None:
    graph = graph_of(network(), groups="width")
    kept = dropping(graph, {"left": [1]})
    allocation = allocation_of(graph, maps_of(graph, kept), kept)
    assert allocation.kept["mix.weight"] == [None, [[0]] * 8, None, None]
    assert allocation.attributes["mix"] == {"in_channels": 4}
    graph = graph_of(network())
    kept = dropping(graph, {"right": [2]})
    allocation = allocation_of(graph, maps_of(graph, kept), kept)
    assert allocation.kept["mix.weight"] == [[0, 1, 2, 3, 4, 5], None, None, None]
    assert allocation.attributes["mix"] == {"in_channels": 6, "out_channels": 6, "groups": 3}
    assert allocation.attributes["right"] == {"out_channels": 2}
    assert "left" not in allocation.attributes


class Holder(nn.Module):
    """Numbers of channels as attributes of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = conv(3, 6), conv(6, 2)
        self.width, self.sizes, self.pair, self.other = 6, [2, 4], (2, 4), 6

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).split(self.sizes, 1)
        return self.last(torch.cat([a.relu(), b], 1))


def attributes(graph: ChannelGraph, kept: np.ndarray, *args: Any) -> dict[str, Any]:
    found = describe_maps(graph, maps_of(graph, kept), graph.stays(kept), *args)[1]
    return found.get("", {})


def test_attributes_follow_the_parts_that_they_are_the_sizes_of() -> None:
    model = Holder().eval()
    graph = graph_of(model)
    parts = np.split(graph.slots.labels("stem.weight")[0], [2])
    kept = dropping(graph, {"stem": [1, 2, 5]})
    # Both `sizes` and `pair` hold what the split was given.
    assert attributes(graph, kept) == {"sizes": [1, 2], "pair": [1, 2]}
    assert attributes(graph, graph.everything) == {}
    assert attributes(graph, kept, (), {("", "pair")}) == {"sizes": [1, 2]}
    label = graph.slots.labels("stem.weight")[0]
    mends = [Attribute("", "width", (label,)), Attribute("", "other", tuple(parts))]
    assert attributes(graph, kept, mends, {("", "pair"), ("", "sizes")}) == {"width": 3, "other": [1, 2]}
    alike = dropping(graph, {"stem": [2, 3]})
    assert attributes(graph, alike, mends) == {"sizes": [2, 2], "pair": [2, 2], "width": 4, "other": 2}
    small: Any = materialise(model, Allocation(attributes={"": {"pair": [1, 2], "sizes": [1, 2], "width": 3}}))
    assert (small.pair, small.sizes, small.width) == ((1, 2), [1, 2], 3)
    assert (model.pair, model.sizes, model.width) == ((2, 4), [2, 4], 6)


class Paths(nn.Module):
    """Two paths of two layers that are added up, and do without either; a norm without tensors in each."""

    def __init__(self, *, normed: bool = True) -> None:
        super().__init__()
        norm = nn.InstanceNorm2d if normed else nn.Identity
        self.stem, self.total, self.last = conv(3, 4), 8, conv(8, 2)
        self.paths = nn.ModuleList(nn.Sequential(conv(4, 3), norm(3), conv(3, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(torch.cat([path(x) for path in self.paths if path is not None], 1))


@pytest.fixture
def _paths() -> Iterator[None]:
    def sizes(module: nn.Module, kept: Kept) -> Mapping[str, Any]:
        return {"total": int(kept("last.weight", 1).sum())}

    def optional(module: nn.Module) -> dict[str, tuple[str, ...]]:
        return {f"paths.{i}.2": (f"paths.{i}",) for i in range(2)}

    adapters.register(Paths, Adapter(sizes=sizes, optional_branches=optional))
    yield
    adapters.unregister(Paths)


@pytest.mark.usefixtures("_paths")
@pytest.mark.parametrize("normed", [False, True])
def test_a_path_that_is_left_without_channels_is_gone_with_all_that_is_in_it(normed: bool) -> None:
    model = Paths(normed=normed).eval()
    graph = graph_of(model)
    kept = dropping(graph, {"paths.1.2": [0, 1, 2, 3], "paths.0.2": [1], "paths.1.0": [0], "paths.0.0": [2]})
    allocation = allocation_of(graph, maps_of(graph, kept), kept)
    assert allocation.absent == ["paths.1"]
    assert not [name for name in (*allocation.kept, *allocation.attributes) if name.startswith("paths.1")]
    assert allocation.attributes[""] == {"total": 3}
    check_fits(model, allocation)
    small: Any = materialise(model, allocation)
    assert small.paths[1] is None
    assert small.total == 3
    assert small.eval()(IMAGE).shape == (1, 2, 8, 8)
    assert kept_by(graph, allocation) is not None
    remember(small, model, allocation)
    assert led_to(small) == allocation


@pytest.mark.usefixtures("_paths")
def test_a_path_that_goes_in_a_second_round_takes_its_first_allocation_along() -> None:
    model = Paths(normed=False).eval()
    graph = graph_of(model)
    kept = dropping(graph, {"paths.1.0": [0], "paths.1.2": [3], "stem": [2]})
    first = allocation_of(graph, maps_of(graph, kept), kept)
    between = rewrite(model, first)
    again = graph_of(between)
    kept = dropping(again, {"paths.1.2": [0, 1, 2]})
    second = allocation_of(again, maps_of(again, kept), kept)
    small = rewrite(between, second)
    both = led_to(small)
    assert both is not None
    at_once = rewrite(model, both)
    assert_same(at_once, small)


# Copies ---------------------------------------------------------------------------------------------


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    a, b = found.state_dict(), expected.state_dict()
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("seed", range(4))
def test_a_copy_holds_what_is_kept_and_leaves_the_original_alone(seed: int) -> None:
    model = network().train()
    graph = graph_of(model, groups=("whole", "width")[seed % 2])
    model.left.weight.requires_grad_(False)
    with untouched(model):
        maps, small = shrunk(graph, random_choice(graph, seed))
    storages = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    found = dict((*small.named_parameters(), *small.named_buffers()))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        expected = tensor.detach()
        for dim, index_map in enumerate(maps.get(name, ())):
            if index_map is not None:
                expected = expected.index_select(dim, torch.as_tensor(index_map.source))
        assert torch.equal(found[name], expected), name
        assert found[name].requires_grad == tensor.requires_grad
        assert type(found[name]) is type(tensor)
        assert found[name].untyped_storage().data_ptr() not in storages
        assert found[name].is_leaf
    assert small.training
    assert small.norm.training
    assert [type(module) for module in small.modules()] == [type(module) for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for tensor in (*small.parameters(), *small.buffers()):
            tensor.add_(1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_tensors_that_are_shared_stay_shared() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.first(x).relu() + m.again(x) + m.offset.view(1, -1, 1, 1) + m.kept_too.view(1, -1, 1, 1)
        return m.last(m.same(y))

    first, again, last = conv(3, 6), conv(3, 6), conv(6, 2)
    again.weight = first.weight
    model: Any = Net(run, first=first, again=again, last=last, same=nn.ReLU())
    model.other = model.same
    offset = torch.arange(6.0)
    model.register_buffer("offset", offset)
    model.register_buffer("kept_too", offset)
    model.plain = offset  # as an attribute
    model.listed = [first.weight, {"deep": 1}]
    model.eval()
    graph = graph_of(model)
    kept = dropping(graph, {"first": [0, 3]})
    with untouched(model):
        _, small = shrunk(graph, kept)
    assert small.again.weight is small.first.weight
    assert small.listed[0] is small.first.weight
    assert small.offset is small.kept_too is small.plain
    assert small.offset.tolist() == [1, 2, 4, 5]
    assert small.other is small.same is not model.same
    assert (small.again.out_channels, small.last.in_channels) == (4, 4)
    assert [name for name, _ in small.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_formats_and_dtypes_are_the_originals() -> None:
    model = network().to(memory_format=torch.channels_last)
    model.left.bfloat16()
    graph = graph_of(network())
    graph.model = model
    kept = dropping(graph, {"stem": [1, 4], "left": [0]})
    small = materialise(model, allocation_of(graph, maps_of(graph, kept), kept))
    for layer in ("stem", "left", "right"):
        weight = small.get_parameter(f"{layer}.weight")
        assert weight.is_contiguous(memory_format=torch.channels_last), layer
    assert small.get_parameter("left.weight").dtype == small.get_parameter("left.bias").dtype == torch.bfloat16
    assert small.get_parameter("right.weight").dtype == torch.float32


def test_a_copy_for_tracing_has_sizes_and_no_values() -> None:
    model = network()
    graph = graph_of(model)
    kept = random_choice(graph, 0)
    allocation = allocation_of(graph, maps_of(graph, kept), kept)
    real, meta = materialise(model, allocation), materialise(model, allocation, take_on_meta)
    assert all(tensor.is_meta for tensor in (*meta.parameters(), *meta.buffers()))
    assert {n: t.shape for n, t in meta.state_dict().items()} == {n: t.shape for n, t in real.state_dict().items()}


# What does not fit ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allocation", "said"),
    [
        (Allocation({"nowhere.weight": [[0]]}), "names nowhere.weight, which Branches does not have"),
        (Allocation({"stem.weight": [[0], None]}), r"stem.weight: .*expects 2 dims, the model has \(16, 3, 3, 3\)"),
        (Allocation({"stem.weight": [[0, 16], None, None, None]}), "stem.weight, dim 0: .*keeps index 16.* has 16"),
        (Allocation({"stem.weight": [[-1, 3], None, None, None]}), "stem.weight, dim 0: .*keeps index -1.* has 16"),
        (Allocation({"stem.weight": [[0], [[0, 3]], None, None]}), "stem.weight, dim 1: .*keeps index 3.* has 3"),
        (Allocation({"stem.weight": [None, [[0], [1]], None, None]}), "dim 1: .* 2 rows of indices, .* each of the 16"),
        (Allocation({"stem.weight": [[4], [[0], [1]], None, None]}), "dim 1: .* 2 rows of indices, .* each of the 1 "),
        (Allocation({"stem.weight": [[[0], [1]], None, None, None]}), "dim 0: .* 2 rows of indices"),
        (Allocation({"stem.weight": [None, None, [[0]] * 16, None]}), "dim 2: .* 16 rows of indices"),
        (Allocation(attributes={"trunk": {"out_channels": 3}}), "names the module 'trunk', which Branches"),
        (Allocation(absent=["stem.0"]), "names the module 'stem.0', which Branches"),
        (Allocation(attributes={"stem": {"out_channels": "16"}}), "sets stem.out_channels to '16', where .* has 16"),
        (Allocation(attributes={"stem": {"padding_mode": 3}}), "sets stem.padding_mode to 3, where .* has 'zeros'"),
        (Allocation(attributes={"stem": {"nothing": 3}}), "sets stem.nothing to 3, where the model has None"),
        (Allocation(architecture="0" * 16), r"made for another architecture \(0{16}, this Branches is .*as it was"),
    ],
)
def test_an_allocation_of_another_model_is_refused(allocation: Allocation, said: str) -> None:
    model = trained()
    with untouched(model), pytest.raises(AllocationMismatchError, match=said):
        rewrite(model, allocation)


def test_what_may_be_set() -> None:
    model: Any = Holder().eval()
    model.table = {"a": 1, "b": [2, 3.5]}
    check_fits(
        model, Allocation(attributes={"": {"width": [3, 3], "pair": [1, 2], "table": {"a": 2}, "sizes": (1, 1)}})
    )
    for value in ({1: 2}, {"a": "b"}, ["x"], None):
        with pytest.raises(AllocationMismatchError, match=r"sets \.table to"):
            check_fits(model, Allocation(attributes={"": {"table": value}}))


def test_whether_a_model_is_what_an_allocation_leads_to() -> None:
    allocation = Allocation({"a.weight": [[0, 2], None], "b.weight": [None, [[0], [1]]]}, absent=["c"])
    shapes = {"a.weight": (2, 5), "b.weight": (2, 1), "other": (7,)}
    assert gives(allocation, shapes)
    assert not gives(allocation, {**shapes, "a.weight": (3, 5)})
    assert not gives(allocation, {**shapes, "a.weight": (2,)})
    assert not gives(allocation, {**shapes, "b.weight": (2, 2)})
    assert not gives(allocation, {"a.weight": (2, 5)})
    assert not gives(allocation, {**shapes, "c.weight": (1,)})
    assert not gives(allocation, {**shapes, "c.0.weight": (1,)})
    assert gives(allocation, {**shapes, "cc.weight": (1,)})


# Which neurons an allocation keeps ------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["whole", "width"])
@pytest.mark.parametrize("seed", range(6))
def test_the_choice_can_be_read_off_its_allocation(seed: int, mode: str) -> None:
    graph = graph_of(network(), groups=mode)
    kept = random_choice(graph, seed)
    found = kept_by(graph, allocation_of(graph, maps_of(graph, kept), kept))
    assert found is not None
    assert found.tolist() == kept.tolist()
    everything = kept_by(graph, Allocation())
    assert everything is not None
    assert everything.all()


@pytest.mark.usefixtures("_paths")
@pytest.mark.parametrize("seed", range(3))
def test_the_choice_can_be_read_off_where_layers_are_gone(seed: int) -> None:
    graph = graph_of(Paths(normed=False).eval())
    kept = random_choice(graph, seed)
    gone = [unit for layer in ("paths.0.0", "paths.0.2") for unit in channel_units(graph, layer)]
    kept[gone] = False
    allocation = allocation_of(graph, maps_of(graph, kept), kept)
    assert allocation.absent == ["paths.0"]
    found = kept_by(graph, allocation)
    assert found is not None
    assert found.tolist() == kept.tolist()


def _without(kept: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in kept.items() if key != name}


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "a tensor left out": lambda kept: _without(kept, "norm.running_var"),
    "one index more": lambda kept: {**kept, "norm.bias": [[0, 2, 3, 4, 5]]},
    "another index": lambda kept: {**kept, "norm.bias": [[0, 2, 3, 4]]},
    "another order": lambda kept: {**kept, "norm.bias": [[2, 0, 3, 5]]},
    "an index twice": lambda kept: {**kept, "norm.bias": [[0, 0, 2, 3, 5]]},
    "rows that differ": lambda kept: {**kept, "mix.weight": [None, [[0, 1]] * 7 + [[1, 0]], None, None]},
    "what has to stay": lambda kept: {**kept, "head.weight": [[0, 1], kept["head.weight"][1]]},
    "only one tensor": lambda kept: {"norm.bias": kept["norm.bias"]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_neuron_in_part_or_in_another_order_is_no_choice(change: str) -> None:
    graph = graph_of(network())
    kept = dropping(graph, {"stem": [1, 4], "right": [0]})
    allocation = allocation_of(graph, maps_of(graph, kept), kept)
    assert allocation.kept["norm.bias"] == [[0, 2, 3, 5]]
    changed = replace(allocation, kept=CHANGES[change](allocation.kept))
    assert kept_by(graph, allocation) is not None
    assert kept_by(graph, changed) is None


# What a rewritten model remembers -------------------------------------------------------------------


def halves(model: nn.Module, seed: int) -> Allocation:
    graph = graph_of(model)
    kept = random_choice(graph, seed)
    return describe(graph, plan_of(graph, kept, params=1), maps_of(graph, kept))


def test_a_rewritten_model_knows_how_it_came_about() -> None:
    model = network()
    assert led_to(model) is None
    first = halves(model, 0)
    with untouched(model):
        small = rewrite(model, first)
    assert led_to(small) == first
    second = halves(small, 1)
    smaller = rewrite(small, second)
    whole = led_to(smaller)
    assert whole == first.compose(second)
    assert_same(rewrite(model, whole), smaller)
    assert led_to(small) == first
    for copied in (copy.deepcopy(smaller), reloaded(smaller)):
        assert led_to(copied) == whole
    assert isinstance(getattr(smaller, LINEAGE_ATTRIBUTE), str)
    assert LINEAGE_ATTRIBUTE not in smaller.state_dict()


def reloaded(model: Any) -> Any:
    stream = io.BytesIO()
    model.run = None  # a function of a test, which is no matter here
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def test_a_model_that_was_changed_since_is_of_nobodys_making() -> None:
    small: Any = rewrite(network(), halves(network(), 0))
    small.head = nn.Linear(small.head.in_features, 9)
    assert led_to(small) is not None, "its head is none of the allocation's business"
    small.stem = conv(3, small.stem.out_channels + 1)
    assert led_to(small) is None
    small = rewrite(network(), halves(network(), 0))
    del small.norm
    assert led_to(small) is None
    setattr(small, LINEAGE_ATTRIBUTE, 7)
    assert led_to(small) is None


def test_a_model_remembers_what_led_to_the_one_it_was_made_of() -> None:
    first, second = Allocation({"0.weight": [[0, 1], None]}), Allocation({"0.weight": [[1], None]})
    models = [nn.Sequential(nn.Linear(2, n, bias=False)) for n in (3, 2, 1)]
    remember(models[1], models[0], first)
    remember(models[2], models[1], second)
    whole = led_to(models[2])
    assert whole is not None
    assert whole.kept == {"0.weight": [[1], None]}
    assert len(whole.parts) == 2


# Fresh weights --------------------------------------------------------------------------------------


def test_weights_are_kept_or_fresh() -> None:
    model = network()
    allocation = halves(model, 0)
    kept = rewrite(model, allocation)
    assert_same(kept, materialise(model, allocation))
    with untouched(model):
        fresh: Any = rewrite(model, allocation, "reset")
    assert {n: t.shape for n, t in fresh.state_dict().items()} == {n: t.shape for n, t in kept.state_dict().items()}
    for layer in ("stem", "left", "right", "mix", "head"):
        assert not torch.equal(fresh.get_parameter(f"{layer}.weight"), kept.get_parameter(f"{layer}.weight"))
    assert fresh.norm.weight.eq(1).all()
    assert fresh.norm.running_var.eq(1).all()
    assert led_to(fresh) == allocation


def test_modules_without_a_way_to_reset_are_passed_over() -> None:
    model = Branches()
    model.register_parameter("shift", nn.Parameter(torch.full((3,), 7.0)))
    model.reset_parameters = 3  # type: ignore[assignment]
    before = model.stem.weight.detach().clone()
    reset_parameters(model)
    assert model.get_parameter("shift").eq(7).all()
    assert not torch.equal(model.stem.weight, before)


def test_maps_of_everything_change_nothing() -> None:
    graph = graph_of(network())
    maps: Maps = maps_of(graph, graph.everything)
    assert maps == {}
    assert describe_maps(graph, maps, graph.stays(graph.everything)) == ({}, {}, [])
