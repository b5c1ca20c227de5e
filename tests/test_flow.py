"""Labels and the words in which rules speak of them, and attributes that hold sizes; each alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from declarations import with_rule
from small_graphs import Net, net
from torch import Tensor, nn
from torch.nn import functional as F

import allocator.operators  # noqa: F401  (declares the operators)
from allocator import adapters
from allocator.flow.attributes import attributes_of_groups, attributes_of_sizes
from allocator.flow.facts import AtLeast, Facts, Frozen, Gamma, Tie, Written
from allocator.flow.flow import Flow, Join
from allocator.flow.follow import RuleError, run_rules, value_dependent
from allocator.flow.labels import FROZEN, Slots
from allocator.flow.options import Options, Place, places_of
from allocator.modules import shapes_of
from allocator.tracing.calls import Op, Trace
from allocator.tracing.inputs import as_inputs
from allocator.tracing.record import trace_forward


def traced(model: nn.Module, *x: Tensor) -> tuple[Trace, Slots]:
    return trace_forward(model, as_inputs(x, model)), Slots.of(shapes_of(model))


def bare(model: nn.Module, *x: Tensor, **options: Any) -> Flow:
    """The flow of a model whose rules were not run."""
    trace, slots = traced(model, *x)
    return Flow(trace, slots, Facts(), Options(**options))


def followed(model: nn.Module, *x: Tensor, **options: Any) -> Flow:
    trace, slots = traced(model, *x)
    return run_rules(trace, slots, Facts(), Options(**options))


def call(flow: Flow, name: str, which: int = 0) -> Op:
    """A call by its operator's name."""
    return [op for op in flow.trace.ops if op.name == name][which]


def frozen(flow: Flow) -> list[tuple[list[int], str, str]]:
    return [(label.tolist(), module, reason) for label, module, reason in flow.facts.frozen]


# Slots ----------------------------------------------------------------------------------------------

SHAPES = {"a.weight": (3, 2), "a.bias": (3,), "count": (), "empty": (0, 2), "b.weight": (2, 1, 2)}


def test_slots_number_every_index_of_every_dim_once() -> None:
    slots = Slots.of(SHAPES)
    assert slots.base == {"a.weight": (1, 4), "a.bias": (6,), "count": (), "empty": (9, 9), "b.weight": (11, 13, 14)}
    assert slots.total == 16
    assert [label.tolist() for label in slots.labels("b.weight")] == [[11, 12], [13], [14, 15]]
    assert [label.tolist() for label in slots.labels("empty")] == [[], [9, 10]]
    assert slots.labels("count") == ()
    every = [slot for name in SHAPES for label in slots.labels(name) for slot in label.tolist()]
    assert every == list(range(1, slots.total))


def test_a_slot_is_looked_up() -> None:
    slots = Slots.of({name: shape for name, shape in SHAPES.items() if name != "empty"})
    assert slots.names == [
        (1, "a.weight", 0), (4, "a.weight", 1), (6, "a.bias", 0), (9, "b.weight", 0), (11, "b.weight", 1),
        (12, "b.weight", 2),
    ]  # fmt: skip
    assert slots.starts.tolist() == [start for start, _, _ in slots.names]
    assert slots.name_of(FROZEN) == ""
    for name in slots.shapes:
        for label in slots.labels(name):
            assert {slots.name_of(slot) for slot in label.tolist()} == {name}


# Options and places ---------------------------------------------------------------------------------


def repeated(m: Any, x: Tensor) -> Tensor:
    return m.two(m.one(x.relu()).relu()).relu() + m.one(x)


def test_a_place_counts_the_calls_of_an_operator_in_a_module() -> None:
    trace, _ = traced(net(repeated, one=nn.Linear(2, 2), two=nn.Linear(2, 2)), torch.zeros(1, 2))
    assert places_of(trace) == [
        Place("", "relu", 0), Place("one", "linear", 0), Place("", "relu", 1), Place("two", "linear", 0),
        Place("", "relu", 2), Place("one", "linear", 1), Place("", "add", 0),
    ]  # fmt: skip
    flow = bare(net(repeated, one=nn.Linear(2, 2), two=nn.Linear(2, 2)), torch.zeros(1, 2))
    assert flow.places == places_of(trace)


def test_a_place_without_a_number_means_all_calls_and_one_without_a_part_both() -> None:
    parts = [Place("c", "relu", 0, "reads"), Place("d", "relu", None, "gives")]
    options = Options().freezing([Place("a", "view", 1), Place("b", "view"), *parts])
    expected = {
        Place("a", "view", 0): "",
        Place("a", "view", 1): "reads gives",
        Place("a", "relu", 1): "",
        Place("b", "view", 0): "reads gives",
        Place("b", "view", 7): "reads gives",
        Place("c", "view", 0): "",
        Place("c", "relu", 0): "reads",
        Place("c", "relu", 1): "",
        Place("d", "relu", 3): "gives",
    }
    found = {each: " ".join(part for part in ("reads", "gives") if options.freezes(each, part)) for each in expected}
    assert found == expected


def test_options_grow_and_leave_the_old_ones_alone() -> None:
    first = Options(groups="width", exclude=("stem",))
    second = first.freezing([Place("a", "view", 0)]).equalising(["b"])
    third = second.freezing(iter([Place("a", "view")])).equalising({"b", "c"})
    assert (first.frozen, first.equal_parts) == (frozenset(), frozenset())
    assert second.frozen == {Place("a", "view", 0)}
    assert third.frozen == {Place("a", "view", 0), Place("a", "view")}
    assert third.equal_parts == {"b", "c"}
    assert (third.groups, third.exclude) == ("width", ("stem",))
    pair = ((1, 2), (3, 4))
    assert first.tying([pair]).untying([pair]) == first
    assert hash(first) == hash(Options(groups="width", exclude=("stem",), heads={Place("a", "view", 0): 1}))


# Attributes that hold sizes -------------------------------------------------------------------------


class Holder(nn.Module):
    def __init__(self, **values: Any) -> None:
        super().__init__()
        for name, value in values.items():
            setattr(self, name, value)


def pieces(*sizes: int) -> list[np.ndarray]:
    return np.split(np.arange(1, sum(sizes) + 1), np.cumsum(sizes)[:-1])


# What a module holds, what a split is called with, its parts; and per attribute the parts that it follows, or None.
SIZES: dict[str, tuple[dict[str, Any], object, Sequence[int], dict[str, list[int]] | None]] = {
    "one size for all": ({"half": 3}, 3, (3, 3), {"half": [0, 1]}),
    "of a last part that is smaller": ({"half": 4}, 4, (4, 2), {"half": [0, 1]}),
    "two names of one size": ({"half": 3, "other": 3}, 3, (3, 3), {"half": [0, 1], "other": [0, 1]}),
    "another size": ({"half": 2}, 3, (3, 3), None),
    "no whole number": ({"half": 3.0}, 3, (3, 3), None),
    "a truth value": ({"half": True}, 1, (1, 1), None),
    "one size for all in a list": ({"sizes": [3, 3]}, 3, (3, 3), None),
    "a list": ({"sizes": [2, 4]}, [2, 4], (2, 4), {"sizes": [0, 1]}),
    "a tuple for a list": ({"sizes": (2, 4)}, [2, 4], (2, 4), {"sizes": [0, 1]}),
    "a list for a tuple": ({"sizes": [2, 4]}, (2, 4), (2, 4), {"sizes": [0, 1]}),
    "a list in another order": ({"sizes": [4, 2]}, [2, 4], (2, 4), None),
    "a number each": ({"first": 2, "second": 4}, [2, 4], (2, 4), {"first": [0], "second": [1]}),
    "the first of two that fit": ({"a": 2, "b": 2, "c": 4}, [2, 4], (2, 4), {"a": [0], "c": [1]}),
    "the list before its numbers": ({"first": 2, "sizes": [2, 4], "second": 4}, [2, 4], (2, 4), {"sizes": [0, 1]}),
    "a number for one of two": ({"first": 2}, [2, 4], (2, 4), None),
    "one number for two parts": ({"both": 3}, [3, 3], (3, 3), None),
    "two numbers for two equal parts": ({"a": 3, "b": 3}, [3, 3], (3, 3), None),
    "three parts": ({"a": 1, "b": 2, "c": 3}, [2, 3, 1], (2, 3, 1), {"b": [0], "c": [1], "a": [2]}),
    "one number for two parts of three": ({"w": 4, "s": 2}, [4, 2, 2], (4, 2, 2), {"w": [0], "s": [1]}),
    "a number for two parts and none for the third": ({"s": 2}, [4, 2, 2], (4, 2, 2), None),
    "nothing": ({}, [2, 4], (2, 4), None),
}


@pytest.mark.parametrize("name", SIZES)
def test_attributes_that_hold_the_sizes_of_a_split(name: str) -> None:
    values, sizes, parts, expected = SIZES[name]
    labels = pieces(*parts)
    found = attributes_of_sizes("body.0", Holder(**values), sizes, labels)
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert {attribute.module for attribute in found} == {"body.0"}
    by_name = {attribute.name: [id(piece) for piece in attribute.pieces] for attribute in found}
    assert by_name == {name: [id(labels[i]) for i in indices] for name, indices in expected.items()}


@pytest.fixture
def _known() -> Iterator[None]:
    adapters.register(Holder)(lambda module, kept: {"parts": module.parts})
    yield
    adapters.unregister(Holder)


@pytest.mark.usefixtures("_known")
def test_sizes_that_an_adapter_declares_need_no_attribute_to_follow() -> None:
    module = Holder(parts=[2, 4])
    assert attributes_of_sizes("", module, [2, 4], pieces(2, 4)) == []
    assert attributes_of_sizes("", module, 4, pieces(4, 2)) == []
    assert attributes_of_sizes("", module, [2, 3], pieces(2, 3)) is None


GROUPS: dict[str, tuple[nn.Module, bool, list[str]]] = {
    "an attribute of a module": (Holder(groups=4), False, ["groups"]),
    "with its own weight": (Holder(num_groups=4), True, ["num_groups"]),
    "several of them": (Holder(groups=4, gn_groups=4, other=4), False, ["groups", "gn_groups"]),
    "another number": (Holder(groups=2), False, []),
    "no whole number": (Holder(groups=4.0), False, []),
    "a convolution": (nn.Conv2d(8, 8, 1, groups=4), True, []),
    "a transposed convolution": (nn.ConvTranspose2d(8, 8, 1, groups=4), True, []),
    "a group norm": (nn.GroupNorm(4, 8), True, []),
    "a group norm without scale": (nn.GroupNorm(4, 8, affine=False), False, ["num_groups"]),
}


@pytest.mark.parametrize("name", GROUPS)
def test_attributes_that_count_groups(name: str) -> None:
    module, owns_weight, expected = GROUPS[name]
    representatives = np.array([1, 3, 5, 7])
    found = attributes_of_groups("m", module, representatives, owns_weight=owns_weight)
    assert [attribute.name for attribute in found] == expected
    assert all(attribute.module == "m" and attribute.pieces[0] is representatives for attribute in found)


# The words of rules ---------------------------------------------------------------------------------


def small() -> Net:
    return net(lambda m, x: m.two(m.one(x).relu()), one=nn.Linear(3, 4), two=nn.Linear(4, 2))


X = torch.zeros(5, 3)


def test_labels_of_a_value_are_its_own_slots_or_none() -> None:
    flow = bare(small(), X)
    x, weight, bias = call(flow, "linear").inputs()
    assert flow.labels(x) == (None, None)
    assert [label is not None and label.tolist() for label in flow.labels(weight)] == [[1, 2, 3, 4], [5, 6, 7]]
    assert flow.labels(weight)[0] is flow.labels(weight)[0]
    assert flow.shape(bias) == (4,)
    out = call(flow, "linear").outputs[0]
    label = flow.labels(weight)[0]
    flow.set(out, [None, label])
    assert flow.labels(out) == (None, label)


@pytest.mark.parametrize("sizes", [[3, 4], [5, 3], [5], [5, 4, 1], []])
def test_labels_of_another_size_are_an_error_of_the_rule(sizes: list[int]) -> None:
    flow = bare(small(), X)
    with pytest.raises(ValueError, match=r"a rule gave labels of sizes \[.*\] for a tensor of shape \(5, 4\)"):
        flow.set(call(flow, "linear").outputs[0], [np.zeros(n, dtype=np.int64) for n in sizes])


def test_setting_labels_ends_uniformity() -> None:
    flow = bare(small(), X)
    out = call(flow, "relu").outputs[0]
    flow.uniform.add(out)
    flow.set(out, [None, None])
    assert out not in flow.uniform


def test_ties_broadcast_and_nothing_is_tied_to_itself() -> None:
    flow = bare(small(), X)
    op = call(flow, "linear")
    a, b = np.arange(6).reshape(2, 3), np.array([[7], [8]])
    flow.tie(a, a, op)
    assert flow.facts.ties == []
    flow.tie(a, b, op)
    (tie,) = flow.facts.ties
    assert (tie.a.tolist(), tie.b.tolist(), tie.op) == ([[0, 1, 2], [3, 4, 5]], [[7, 7, 7], [8, 8, 8]], op.index)
    assert flow.facts.computed_ties == [], "the call reads the input"
    flow.active.clear()
    flow.tie(b, b + 2, op)
    assert flow.facts.computed_ties == flow.facts.ties[1:]
    assert len(flow.facts.computed_ties) == 1


def test_dims_that_meet_are_tied_or_stay() -> None:
    flow = bare(small(), X)
    op = call(flow, "linear")
    a, b = np.array([1, 2]), np.array([5, 6])
    assert flow.unify(a, b, op) is a
    assert [(tie.a is a, tie.b is b) for tie in flow.facts.ties] == [(True, True)]
    assert flow.unify(None, None, op) is None
    assert frozen(flow) == []
    assert flow.unify(None, b, op) is b
    assert flow.unify(a, None, op) is a
    reason = "meets a dim that must keep its size (linear)"
    assert frozen(flow) == [([5, 6], "one", reason), ([1, 2], "one", reason)]


def test_any_number_of_dims_that_meet() -> None:
    flow = bare(small(), X)
    op = call(flow, "relu")
    a, b, c = np.array([1, 2]), np.array([3, 4]), np.array([5, 6])
    assert flow.unify_all([None, None], op) is None
    assert flow.unify_all([], op) is None
    assert flow.unify_all([a, b, c], op) is a
    assert [(tie.a.tolist(), tie.b.tolist()) for tie in flow.facts.ties] == [([1, 2], [3, 4]), ([1, 2], [5, 6])]
    assert flow.unify_all([None, b, None, b], op) is b
    assert [label for label, _, _ in frozen(flow)] == [[3, 4], [3, 4]]


def test_what_a_call_touches_stays_where_it_is_refused() -> None:
    flow = bare(small(), X)
    op = call(flow, "linear")
    flow.refuse(op, "no reason")
    assert [label for label, _, _ in frozen(flow)] == [[1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11]]
    assert {reason for _, _, reason in frozen(flow)} == {"no reason (linear)"}
    assert flow.facts.refused == {"linear": ["one"]}
    assert flow.labels(op.outputs[0]) == (None, None)
    relu = call(flow, "relu")
    flow.refuse(relu, "no reason")
    assert flow.facts.refused == {"linear": ["one"]}, "what has no channels is not worth a word"


def test_joins_floors_and_outputs_are_noted() -> None:
    flow = bare(small(), X)
    op = call(flow, "linear", 1)
    label = np.array([1, 2])
    flow.join("sum", op, 1, [3, 4])
    flow.floor(label, op)
    flow.floor(label, op, minimum=2)
    flow.freeze(None, op, "nothing")
    assert flow.joins == [Join("sum", op.index, 1, (3, 4))]
    assert flow.facts.at_least == [AtLeast(label, "two", 1), AtLeast(label, "two", 2)]
    assert flow.facts.frozen == []
    flow.set(op.outputs[0], [None, label])
    flow.freeze_output(op.outputs[0])
    assert frozen(flow) == [([1, 2], "", "an output of the model")]


# A followed forward ---------------------------------------------------------------------------------


def test_facts_of_a_chain() -> None:
    flow = followed(small(), X)
    slots = flow.slots
    one, read_one = slots.labels("one.weight")
    two, read_two = slots.labels("two.weight")
    pairs = {(tuple(tie.a.tolist()), tuple(tie.b.tolist())) for tie in flow.facts.ties}
    assert pairs == {
        (tuple(one), tuple(slots.labels("one.bias")[0])),
        (tuple(two), tuple(slots.labels("two.bias")[0])),
        (tuple(one), tuple(read_two)),
    }
    assert [(w.label.tolist(), w.module) for w in flow.facts.written] == [(one.tolist(), "one"), (two.tolist(), "two")]
    assert [label.tolist() for label in flow.facts.read] == [read_one.tolist(), read_two.tolist()]
    assert [(f.label.tolist(), f.module, f.minimum) for f in flow.facts.at_least] == [
        (one.tolist(), "one", 1),
        (two.tolist(), "two", 1),
    ]
    assert frozen(flow) == [
        (read_one.tolist(), "one", "meets a dim that must keep its size (linear)"),
        (two.tolist(), "", "an output of the model"),
    ]
    assert (flow.facts.multiplied, flow.facts.gammas, flow.facts.refused, flow.joins) == ([], [], {}, [])


class Branching(nn.Module):
    """An input, a buffer, a number, and a weight that is computed from another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 1))
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        weight = self.weight * self.factor.sigmoid()
        z = F.linear(x, weight) + self.get_buffer("shift")
        return z.relu() * y + torch.zeros(4) + torch.tensor(2.0)


def test_active_values_are_those_that_depend_on_the_inputs() -> None:
    flow = followed(Branching().eval(), X, torch.zeros(5, 4))
    trace = flow.trace
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(trace.values)))
    graph.add_edges_from((i, o) for op in trace.ops for i in op.inputs() for o in op.outputs)
    # The two inputs are the only tensors of five rows that no call gave.
    given = {o for op in trace.ops for o in op.outputs}
    inputs = [i for i, value in enumerate(trace.values) if i not in given and value.shape[:1] == (5,)]
    assert len(inputs) == 2
    expected = set(inputs).union(*(nx.descendants(graph, i) for i in inputs))
    assert flow.active == expected


def test_ties_among_parameters_alone_are_told_apart() -> None:
    flow = followed(Branching().eval(), X, torch.zeros(5, 4))
    computed = {tie.op for tie in flow.facts.computed_ties}
    assert computed == {call(flow, "mul").index}
    assert len(flow.facts.computed_ties) < len(flow.facts.ties)


def test_channels_that_a_computed_number_depends_on_stay() -> None:
    """Of a spectral norm's kind: a sum over a layer's outputs scales them."""

    def run(m: Any, x: Tensor) -> Tensor:
        scale = m.direction @ m.weight
        return m.last(F.linear(x, m.weight / scale.sum()))

    weight, direction = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
    flow = followed(Net(run, weight=weight, direction=direction, last=nn.Linear(4, 2)).eval(), X)
    outputs = flow.slots.labels("weight")[0].tolist()
    assert (outputs, "", "a weight is computed from all of these channels (mm)") in frozen(flow)


@pytest.mark.parametrize("factor", [lambda: 2.0, lambda: torch.tensor(2.0), lambda: torch.full((1,), 2.0)])
def test_a_weight_times_a_number_is_still_a_weight(factor: Callable[[], Any]) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(F.linear(x, m.weight * factor()))

    weight = nn.Parameter(torch.randn(4, 3))
    flow = followed(Net(run, weight=weight, last=nn.Linear(4, 2)).eval(), X)
    assert [(w.label.tolist(), w.module) for w in flow.facts.written] == [([1, 2, 3, 4], ""), ([8, 9], "last")]
    assert len(flow.facts.read) == 2
    assert flow.facts.multiplied == []


def test_numbers_that_an_input_is_added_to_depend_on_it() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        total = torch.tensor([0.0, 0.0, 0.0])
        total += x
        return m.last(total)

    flow = followed(Net(run, last=nn.Linear(3, 2)).eval(), torch.zeros(3))
    assert [op.name for op in flow.trace.ops if not flow.active.isdisjoint(op.inputs())] == ["add_", "linear"]


def test_norms_note_what_scales_which_channels() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(m.norm(m.one(x)))

    model = net(run, one=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), last=nn.Linear(4, 2))
    flow = followed(model, X)
    (gamma,) = flow.facts.gammas
    assert isinstance(gamma, Gamma)
    assert gamma.name == "norm.weight"
    assert gamma.label.tolist() == flow.slots.labels("norm.weight")[0].tolist()


def test_joins_are_noted_in_order() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        a, b = m.one(x), m.two(x)
        y = torch.cat([a, b], 1) * torch.cat([b, a], 1)
        return m.last(y + y.relu() if m.plain else torch.stack([y, y.relu()]).sum(0))

    for plain, last in ((True, "sum"), (False, "stack")):
        model = Net(run, one=nn.Linear(3, 4), two=nn.Linear(3, 4), last=nn.Linear(8, 2), plain=plain).eval()
        flow = followed(model, X)
        assert [join.kind for join in flow.joins] == ["concat", "concat", "product", last]
        assert [join.dim for join in flow.joins] == [1, 1, -1, -1 if plain else 1]
        assert flow.joins[1].inputs == flow.joins[0].inputs[::-1]


def test_groups_that_come_and_go_whole_have_a_slot_each() -> None:
    model = net(lambda m, x: m.body(m.one(x)), one=nn.Conv2d(3, 8, 1), body=nn.Conv2d(8, 4, 1, groups=4))
    flow = followed(model, torch.zeros(1, 3, 2, 2))
    one = flow.slots.labels("one.weight")[0]
    assert {name: slots.tolist() for name, slots in flow.facts.groups.items()} == {"body.weight": one[::2].tolist()}
    assert flow.facts.attributes == []
    width = followed(model, torch.zeros(1, 3, 2, 2), groups="width")
    assert width.facts.groups == {}


class Split(nn.Module):
    def __init__(self, **numbers: Any) -> None:
        super().__init__()
        for name, value in numbers.items():
            setattr(self, name, value)
        self.one, self.last = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.one(x).split([2, 4], 1)
        return self.last(torch.cat([a, b.relu()], 1))


def test_parts_of_a_split_are_free_where_an_attribute_has_their_sizes() -> None:
    flow = followed(nn.Sequential(Split(sizes=[2, 4])).eval(), X)
    (attribute,) = flow.facts.attributes
    one = flow.slots.labels("0.one.weight")[0].tolist()
    assert (attribute.module, attribute.name) == ("0", "sizes")
    assert [piece.tolist() for piece in attribute.pieces] == [one[:2], one[2:]]
    floors = [floor.label.tolist() for floor in flow.facts.at_least]
    assert one[:2] in floors
    assert one[2:] in floors
    assert flow.facts.advice == {}


@pytest.mark.parametrize("options", [{}, {"equal_parts": frozenset({"0"})}])
def test_parts_of_a_split_stay_where_none_has_or_they_must_be_equal(options: dict[str, Any]) -> None:
    flow = followed(nn.Sequential(Split(**({"sizes": [2, 4]} if options else {}))).eval(), X, **options)
    assert flow.facts.attributes == []
    one = flow.slots.labels("0.one.weight")[0].tolist()
    assert (one, "0", "a split into fixed sizes [2, 4] (split_with_sizes)") in frozen(flow)
    (advice,) = flow.facts.advice.items()
    assert advice[0] == f"{__name__}.Split"
    assert advice[1].startswith("the neurons at aten.split_with_sizes.default in 0 stay: a split into fixed sizes")
    assert advice[1].endswith(f"register('{__name__}.Split'), docs/extending.md")


class Attention(nn.Module):
    """Two heads of three; its values are multiplied by nothing else where `mixed` is false."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.mixed, self.qk, self.last = mixed, nn.Linear(3, 12), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).view(2, 5, 2, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ k if self.mixed else q + k
        return self.last(y.transpose(1, 2).reshape(2, 5, 6))


def test_heads_are_found_where_their_width_is_multiplied_by_another_activations() -> None:
    x = torch.zeros(2, 5, 3)
    found = followed(Attention(mixed=True).eval(), x).found_heads()
    assert found == {Place("", "view", 0): 3}
    assert followed(Attention(mixed=False).eval(), x).found_heads() == {}
    heads = followed(Attention(mixed=True).eval(), x, heads=found)
    view = next(op for op in heads.trace.ops if op.name == "view")
    assert heads.heads_at(view) == 3
    counted = heads.labels(view.outputs[0])[3]
    assert counted is not None
    assert heads.counts_heads(counted)
    assert not heads.counts_heads(heads.slots.labels("last.weight")[0])
    assert any(floor.minimum == 2 and floor.label is counted for floor in heads.facts.at_least)
    assert heads.labels(view.outputs[0])[4] is None
    without = followed(Attention(mixed=True).eval(), x, heads={})
    assert without.heads_at(view) is None
    assert without.labels(view.outputs[0])[4] is not None
    assert without.labels(view.outputs[0])[3] is None


def test_products_of_two_activations_are_told_apart_from_weights_that_read() -> None:
    flow = followed(Attention(mixed=True).eval(), torch.zeros(2, 5, 3))
    assert flow.facts.multiplied
    owners = {flow.slots.name_of(int(slot)) for label in flow.facts.multiplied for slot in label if slot}
    assert owners == {"qk.weight"}
    read = {flow.slots.name_of(int(slot)) for label in flow.facts.read for slot in label}
    assert read == {"qk.weight", "last.weight"}


# Running the rules ----------------------------------------------------------------------------------


def test_a_rule_that_does_not_fit_the_shapes_says_at_which_call() -> None:
    def rule(flow: Flow, op: Op) -> None:
        np.zeros(3).reshape(2, 2)

    said = r"aten\.relu\.default in the model: cannot reshape"
    with with_rule("relu", rule):
        trace, slots = traced(small(), X)
        with pytest.raises(RuleError, match=said) as caught:
            run_rules(trace, slots, Facts())
    assert caught.value.op is trace.ops[1]
    before = caught.value.flow.labels(trace.ops[0].outputs[0])
    assert before[1] is not None
    assert isinstance(caught.value.__cause__, ValueError)


def test_facts_of_several_traces_add_up() -> None:
    trace, slots = traced(small(), X)
    facts = Facts()
    run_rules(trace, slots, facts)
    once = len(facts.ties), len(facts.written)
    run_rules(trace, slots, facts)
    assert (len(facts.ties), len(facts.written)) == (2 * once[0], 2 * once[1])
    assert all(isinstance(tie, Tie) for tie in facts.ties)
    assert all(isinstance(each, Written) for each in facts.written)
    assert all(isinstance(each, Frozen) for each in facts.frozen)


def test_calls_that_depend_on_values_are_those_after_one_whose_size_does() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.one(x)
        picked = y[y.sum(1) > 0]
        return m.two(picked).relu(), m.two(y)

    model = Net(run, one=nn.Linear(3, 4), two=nn.Linear(4, 2)).eval()
    trace, _ = traced(model, X)
    found = {trace.ops[i].name for i in value_dependent(trace)}
    assert found == {"index", "linear", "relu"}
    linear = [op.index for op in trace.ops if op.name == "linear"]
    assert [i in value_dependent(trace) for i in linear] == [False, True, False]
    assert value_dependent(traced(small(), X)[0]) == set()


def test_a_rule_that_does_not_fit_a_call_freezes_what_it_touches() -> None:
    def broken(flow: Flow, op: Op) -> None:
        flow.labels(op.inputs()[0])[7]

    with with_rule("flip", broken):
        flow = followed(Net(lambda m, x: m.last(m.one(x).flip(1)), one=nn.Linear(3, 4), last=nn.Linear(4, 2)).eval(), X)
    assert flow.facts.refused == {"flip": [""]}
    assert any(
        "the rule of this operator raised IndexError: tuple index" in frozen.reason for frozen in flow.facts.frozen
    )
