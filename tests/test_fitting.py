"""From a plan to an allocation that runs: what is repaired and how, one thing at a time, on modules made by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fitting_cases import Block, X, fitted, outputs_kept, planner
from small_graphs import graph_of
from torch import Tensor, nn

import allocator
from allocator import adapters
from allocator.errors import NothingToAllocateError, RewriteError
from allocator.fitting import check as checking
from allocator.fitting import fit as fitting
from allocator.fitting.fit import MAX_ROUNDS, fit
from allocator.fitting.mends import Mends
from allocator.fitting.scene import alike_modules
from allocator.flow.options import Place
from allocator.graph.build import elsewhere
from allocator.graph.channel_graph import ChannelGraph
from allocator.planning.plan import Plan

# An attribute that follows --------------------------------------------------------------------------


class ReadsWidth(Block):
    """Flattens its pixels and says how many channels there are."""

    def between(self, x: Tensor) -> Tensor:
        return x.view(len(x), self.width, -1).sigmoid().view(len(x), self.width, *x.shape[2:])


def test_an_attribute_that_the_forward_reads_follows() -> None:
    found = fitted(nn.Sequential(ReadsWidth(width=6)), {"0.first": [1, 4]})
    assert found.allocation.attributes["0"] == {"width": 4}
    assert found.notes == ["'width' of ReadsWidth follows the kept channels"]
    assert outputs_kept(found, "0.first") == 4
    assert found.graph.options.frozen == frozenset()


def test_it_follows_in_every_module_of_the_class() -> None:
    model = nn.Sequential(ReadsWidth(width=6), ReadsWidth(width=6), ReadsWidth(5, width=5))
    found = fitted(model, {"0.first": [1], "1.first": [0, 2, 5], "2.first": [3]})
    assert [found.allocation.attributes[str(i)]["width"] for i in range(3)] == [5, 3, 4]
    assert found.notes == ["'width' of ReadsWidth follows the kept channels"]


def test_it_follows_only_where_channels_go() -> None:
    model = nn.Sequential(ReadsWidth(width=6), ReadsWidth(width=6))
    found = fitted(model, {"1.first": [0]})
    assert found.allocation.attributes["1"] == {"width": 5}
    assert "0" not in found.allocation.attributes


class ReadsShape(Block):
    """The shape of all that it views, samples first, or of a part of it."""

    def between(self, x: Tensor) -> Tensor:
        y = x.view(self.sizes) if len(self.sizes) == 3 else x.view(len(x), *self.sizes)
        return y.sigmoid().view(len(x), -1, 4, 4)


@pytest.mark.parametrize("before", [[2], []])
@pytest.mark.parametrize("make", [list, tuple])
def test_a_shape_follows_in_the_size_of_its_channels_alone(before: list[int], make: Callable[[Any], Any]) -> None:
    found = fitted(nn.Sequential(ReadsShape(sizes=make([*before, 6, 16]))), {"0.first": [1, 4]})
    assert found.allocation.attributes["0"] == {"sizes": [*before, 4, 16]}
    assert found.notes == ["'sizes' of ReadsShape follows the kept channels"]
    assert outputs_kept(found, "0.first") == 4


class ReadsTwoWidths(Block):
    """One attribute for each of two views of another module's channels."""

    def between(self, x: Tensor) -> Tensor:
        x = x.view(len(x), self.wide, -1)
        return x.view(len(x), self.wide, 4, 4)


def test_attributes_of_several_classes_follow_one_by_one() -> None:
    model = nn.Sequential(ReadsWidth(width=6), ReadsTwoWidths(wide=6))
    found = fitted(model, {"0.first": [1], "1.first": [2, 3]})
    assert found.allocation.attributes["0"] == {"width": 5}
    assert found.allocation.attributes["1"] == {"wide": 4}
    assert found.notes == [
        "'width' of ReadsWidth follows the kept channels",
        "'wide' of ReadsTwoWidths follows the kept channels",
    ]


# An attribute that only happens to be equal ---------------------------------------------------------


def test_an_attribute_that_does_not_help_is_taken_back() -> None:
    """`number` comes first and equals the size too; it counts something else."""
    found = fitted(nn.Sequential(ReadsWidth(number=6, width=6)), {"0.first": [1, 4]})
    assert found.allocation.attributes["0"] == {"width": 4}
    assert found.notes == ["'width' of ReadsWidth follows the kept channels"]
    assert outputs_kept(found, "0.first") == 4


class Fixed(Block):
    """A size written down in the forward."""

    def between(self, x: Tensor) -> Tensor:
        return x.view(len(x), 6, -1).sigmoid().view(len(x), 6, 4, 4)


def test_where_no_attribute_helps_the_neurons_stay_and_attributes_with_them() -> None:
    others: dict[str, Any] = {"count": 11, "word": "6", "several": [11, 13], "many": [6, 13], "_hidden": 6, "on": True}
    found = fitted(nn.Sequential(Fixed(number=6, other=6, **others)), {"0.first": [1]})
    assert "0" not in found.allocation.attributes
    assert found.allocation.kept == {}
    assert found.graph.options.frozen == {Place("0", "view", 0, "reads")}
    (stays,) = found.notes
    assert stays.startswith("the neurons at aten.view.default in 0 stay: the rewritten forward raised RuntimeError")
    assert "; its forward may read number=6, other=6, many=[6, 13]; to let them go, say what follows: " in stays
    assert stays.endswith(f"register('{__name__}.Fixed'), docs/extending.md")


class ReadsWidthOnce(Block):
    """An attribute at first, then a size written down."""

    def between(self, x: Tensor) -> Tensor:
        return x.view(len(x), self.width, -1).sigmoid().view(len(x), 6, 4, 4)


def test_what_follows_no_longer_is_not_noted() -> None:
    found = fitted(nn.Sequential(ReadsWidthOnce(width=6)), {"0.first": [1]})
    assert found.allocation.attributes == {}
    (note,) = found.notes
    assert note.startswith("the neurons at aten.view.default in 0 stay: ")
    assert found.graph.options.frozen == {Place("0", "view", 1, "reads")}


@pytest.mark.parametrize("name", ["groups", "num_heads", "stride", "kernel_size"])
def test_attributes_that_count_something_else_never_follow(name: str) -> None:
    found = fitted(nn.Sequential(Fixed(**{name: 6})), {"0.first": [1]})
    assert not [note for note in found.notes if "follows the kept" in note]
    assert found.allocation.kept == {}


@pytest.mark.parametrize("value", [True, 6.0, "6", [6], None])
def test_only_whole_numbers_follow(value: Any) -> None:
    found = fitted(nn.Sequential(Fixed(width=value)), {"0.first": [1]})
    assert not [note for note in found.notes if "follows the kept" in note]


class Declared(Block):
    """An adapter says what follows; its forward reads a size that the adapter does not know."""

    def between(self, x: Tensor) -> Tensor:
        return x.view(len(x), self.size, -1).view(len(x), 6, 4, 4)


@pytest.fixture
def _known() -> Iterator[None]:
    adapters.register(Declared)(lambda module, kept: {"size": int(kept("first.weight", 0).sum())})
    yield
    adapters.unregister(Declared)


@pytest.mark.usefixtures("_known")
def test_what_an_adapter_declares_is_left_to_it() -> None:
    found = fitted(nn.Sequential(Declared(size=6)), {"0.first": [1]})
    assert not [note for note in found.notes if "follows the kept" in note]
    assert found.allocation.attributes == {}
    assert outputs_kept(found, "0.first") == 6


# Parts of a split -----------------------------------------------------------------------------------


class Halves(Block):
    """Splits by what it sees; an attribute happens to hold the sizes."""

    def between(self, x: Tensor) -> Tensor:
        a, b = x.split(x.shape[1] // 2, 1)
        return torch.cat([a.sigmoid(), b.relu()], 1)


def test_parts_of_a_split_are_made_equal() -> None:
    model = nn.Sequential(Halves(half=3), Halves(half=3))
    found = fitted(model, {"0.first": [0, 1, 3]})
    assert found.graph.options.equal_parts == {"0"}, "the other one fits"
    assert found.notes == [
        "the parts of aten.split.Tensor in 0 stay equal: "
        + found.notes[0].partition("equal: ")[2]
    ]  # fmt: skip
    assert found.allocation.kept["0.first.weight"][0] == [2, 5], "0 and 3, 1 and 4 go together"
    assert found.graph.options.frozen == frozenset()
    assert "0" not in found.allocation.attributes


def test_where_two_modules_of_a_class_do_not_fit_all_of_it_is_meant() -> None:
    model = nn.Sequential(*(Halves(half=3) for _ in range(4)))
    found = fitted(model, {"0.first": [0, 1, 3], "2.first": [0, 1, 3]})
    assert found.graph.options.equal_parts == {"0", "1", "2", "3"}
    assert [note.partition(" stay")[0][-1] for note in found.notes] == ["0", "2"]


class Unequal(Block):
    """Splits at a place that is written down; the attribute is not read."""

    def between(self, x: Tensor) -> Tensor:
        a, b = x.split([2, 4], 1)
        return torch.cat([a.sigmoid(), b.relu()], 1)


def test_where_equal_parts_do_not_help_the_neurons_stay() -> None:
    found = fitted(nn.Sequential(Unequal(sizes=[2, 4])), {"0.first": [0, 3]})
    assert found.allocation.kept == {}
    assert "stay equal" in found.notes[0]
    assert found.graph.size == 0


class ReadsSizes(Block):
    def between(self, x: Tensor) -> Tensor:
        a, b = x.split(self.sizes, 1)
        return torch.cat([a.sigmoid(), b.relu()], 1)


def test_an_attribute_with_the_sizes_of_a_split_that_is_not_read_is_left_alone() -> None:
    found = fitted(nn.Sequential(ReadsSizes(sizes=[2, 4], also=(2, 4))), {"0.first": [0, 3, 4]})
    assert found.allocation.attributes["0"] == {"sizes": [1, 2]}
    assert found.notes == []
    assert outputs_kept(found, "0.first") == 3


def test_it_is_left_alone_in_all_modules_of_the_class_or_in_none() -> None:
    """One of two modules reads it."""

    class Sometimes(ReadsSizes):
        def between(self, x: Tensor) -> Tensor:
            a, b = x.split(self.sizes if self.reads else [len(p) for p in x[0].split(self.other)], 1)
            return torch.cat([a.sigmoid(), b.relu()], 1)

    model = nn.Sequential(
        Sometimes(sizes=[2, 4], other=[2, 4], reads=True), Sometimes(sizes=[2, 4], other=[2, 4], reads=False)
    )
    found = fitted(model, {"0.first": [0, 3], "1.first": [1, 5]})
    assert found.allocation.attributes["0"] == {"sizes": [1, 3], "other": [1, 3]}
    assert found.allocation.attributes["1"] == {"sizes": [1, 3], "other": [1, 3]}


# Freezing -------------------------------------------------------------------------------------------


def test_a_call_is_frozen_in_the_module_that_does_not_fit() -> None:
    class FixedOnce(Fixed):
        """The first of them has a number written down, the others look at what they get."""

        def between(self, x: Tensor) -> Tensor:
            return super().between(x) if self.fixed else x.view(len(x), x.shape[1], 4, 4)

    model = nn.Sequential(FixedOnce(fixed=True), FixedOnce(fixed=False), FixedOnce(fixed=False))
    found = fitted(model, {"0.first": [1], "1.first": [2], "2.first": [3]})
    assert found.graph.options.frozen == {Place("0", "view", 0, "reads")}
    assert [outputs_kept(found, f"{i}.first") for i in range(3)] == [6, 5, 5]


def test_where_a_second_module_does_not_fit_the_call_is_frozen_in_all_of_the_class() -> None:
    model = nn.Sequential(Fixed(), Fixed(), Fixed(), Fixed(), ReadsWidth(width=6))
    found = fitted(model, {f"{i}.first": [i] for i in range(5)})
    assert found.graph.options.frozen == {Place(f"{i}", "view", 0, "reads") for i in range(4)}
    assert [outputs_kept(found, f"{i}.first") for i in range(5)] == [6, 6, 6, 6, 5]
    assert [note.partition(":")[0] for note in found.notes] == [
        "the neurons at aten.view.default in 0 stay",
        "the neurons at aten.view.default in 1 stay",
        "'width' of ReadsWidth follows the kept channels",
    ]


class FixedTwice(nn.Module):
    """The same call on three layers' channels, with a size written down in each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 6, 1) for _ in range(3))
        self.last = nn.Conv2d(18, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([layer(x).view(len(x), 6, 4, 4) for layer in self.layers], 1))


def test_where_a_second_call_does_not_fit_all_of_its_kind_are_frozen() -> None:
    model = nn.Sequential(FixedTwice())
    found = fitted(model, {"0.layers.0": [1]})
    assert found.graph.options.frozen == {Place("0", "view", 0, "reads")}
    assert [outputs_kept(found, f"0.layers.{i}") for i in range(3)] == [6, 6, 6]
    assert found.graph.size == 12, "the other two are free"
    found = fitted(model, {"0.layers.0": [1], "0.layers.1": [2]})
    assert found.graph.options.frozen == {Place("0", "view", 0, "reads"), Place("0", "view", None, "reads")}
    assert found.graph.size == 0


class Scaled(Block):
    """A number that is computed from a size."""

    def between(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True).relu() * x.shape[1] ** -0.5


def test_where_a_number_changed_the_neurons_of_the_call_stay() -> None:
    found = fitted(nn.Sequential(Scaled(one=1)), {"0.first": [0]})
    assert found.allocation.kept == {}
    assert "one=1" not in found.notes[0], "that is no number of channels"
    assert found.notes[0].startswith("the neurons at aten.mul.Tensor in 0 stay: has the number 0.4472")
    assert "expected 0.4082" in found.notes[0]


class Counts(nn.Module):
    """A number that is computed from another layer's size, at a call on what stays."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.read, self.last = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.read(y) + self.last(x) * float(y.shape[-1])


def test_where_the_call_lost_nothing_what_it_counts_is_frozen() -> None:
    found = fitted(nn.Sequential(Counts()), {"0.inner": [0]}, torch.zeros(2, 4))
    assert found.allocation.kept == {}
    (note,) = found.notes
    counts = "which aten.mul.Tensor in 0 counts: has the number 5.0, expected 6.0"
    assert note.startswith(f"the neurons at aten.linear.default in 0.inner stay, {counts}")
    (place,) = found.graph.options.frozen
    assert (place.module, place.operator, place.part) == ("0.inner", "linear", "gives")


class Strict(nn.Module):
    """Takes one width, and makes no call of its own."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 6:
            raise ValueError("six, please")
        return x


def test_where_a_module_refuses_what_it_is_given_the_call_that_made_it_is_frozen() -> None:
    found = fitted(nn.Sequential(nn.Linear(4, 6), Strict(), nn.Linear(6, 3)), {"0": [1]}, torch.zeros(2, 4))
    assert found.allocation.kept == {}
    (place,) = found.graph.options.frozen
    assert (place.module, place.operator) == ("0", "linear")


def test_a_forward_that_is_another_every_time_cannot_be_fitted() -> None:
    numbers = itertools.count()

    class Restless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) * (next(numbers) + 0.5))

    with pytest.raises(RewriteError, match=r"does not fit at aten\.mul\.Tensor in the model, though all its neurons"):
        fit(graph_of(Restless().eval(), torch.zeros(2, 4)), planner({}))
    with pytest.raises(RewriteError, match="though all its neurons stay"):
        fit(graph_of(Restless().eval(), torch.zeros(2, 4)), planner({"first": [1]}))


def test_where_nothing_is_left_to_plan_its_reasons_follow_what_was_done() -> None:
    def tired(graph: ChannelGraph) -> Plan:
        if graph.options.frozen:
            raise NothingToAllocateError("nothing", reasons=["one", "two"])
        return planner({"0": [1]})(graph)

    with pytest.raises(NothingToAllocateError) as caught:
        fit(graph_of(nn.Sequential(nn.Linear(4, 6), Strict(), nn.Linear(6, 3)).eval(), torch.zeros(2, 4)), tired)
    said = caught.value.reasons
    assert (len(said), said[1:]) == (3, ["one", "two"])
    assert "stay" in said[0]


# The rounds -----------------------------------------------------------------------------------------


def test_what_fits_at_once_needs_no_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "repair", None)
    graph = graph_of(nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 3, 1)).eval(), X)
    found = fit(graph, planner({"0": [1]}))
    assert found.graph is elsewhere(graph)
    assert found.notes == []
    assert found.allocation.costs["flops"]["after"] == graph.metric("flops").value(found.plan.kept)
    assert found.allocation.costs["flops"]["before"] == graph.flops


def test_a_result_is_traced_without_storage_where_the_original_is(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []

    def noting(name: str) -> Callable[..., Any]:
        own = getattr(checking, name)

        def take(*args: Any) -> Any:
            copied.append(name)
            return own(*args)

        return take

    for name in ("take", "take_on_meta"):
        monkeypatch.setattr(checking, name, noting(name))
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 3, 1)).eval()
    fit(graph_of(model, X), planner({"0": [1]}))
    assert set(copied) == {"take_on_meta"}
    copied.clear()

    class ReadsValues(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) if float(x.sum()) < 1 else x

    fit(graph_of(ReadsValues(*model), X), planner({"0": [1]}))
    assert "take" in copied


def test_the_plan_is_made_anew_on_what_was_frozen() -> None:
    seen: list[ChannelGraph] = []
    plan = planner({"0.first": [1]})

    def noting(graph: ChannelGraph) -> Plan:
        seen.append(graph)
        return plan(graph)

    model = nn.Sequential(Fixed()).eval()
    found = fit(graph_of(model, X), noting)
    assert [graph.size for graph in seen] == [6, 0]
    assert found.graph is seen[-1]
    assert found.plan.kept.tolist() == []


def test_after_too_many_rounds_the_error_says_where_it_did_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[Any] = []

    def nothing(graph: ChannelGraph, *args: Any) -> ChannelGraph:
        rounds.append(args)
        return graph

    monkeypatch.setattr(fitting, "repair", nothing)
    graph = graph_of(nn.Sequential(Fixed()).eval(), X)
    said = (
        rf"did not fit after {MAX_ROUNDS} plans; the last time at aten\.view\.default in 0: the rewritten forward "
        r"raised RuntimeError.*: exclude this module with exclude=\[\.\.\.\], or register an adapter for its class"
    )
    with pytest.raises(RewriteError, match=said):
        fit(graph, planner({"0.first": [1]}))
    assert len(rounds) == MAX_ROUNDS


def test_what_was_tried_is_told_where_nothing_is_left_to_allocate() -> None:
    plan = planner({"0.first": [1]})

    def strict(graph: ChannelGraph) -> Plan:
        if not graph.size:
            raise NothingToAllocateError("no neuron", reasons=["none is left"])
        return plan(graph)

    with pytest.raises(NothingToAllocateError) as caught:
        fit(graph_of(nn.Sequential(Fixed()).eval(), X), strict)
    first, last = caught.value.reasons
    assert first.startswith("the neurons at aten.view.default in 0 stay: ")
    assert last == "none is left"


class InTrainMode(nn.Module):
    """What does not fit runs in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.stem, self.head, self.aux = 6, nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        if not self.training:
            return self.head(x)
        return self.head(x), self.aux(x.view(len(x), 1, self.width)[:, 0])


def test_a_repair_in_the_forward_of_train_mode() -> None:
    found = fitted(nn.Sequential(InTrainMode()), {"0.stem": [1]}, torch.zeros(2, 4))
    assert found.allocation.attributes["0"] == {"width": 5}
    assert found.notes == ["'width' of InTrainMode follows the kept channels"]


# The parts of a repair ------------------------------------------------------------------------------


def test_modules_that_are_alike() -> None:
    body = [nn.Sequential(Halves(half=3), Fixed()), nn.Sequential(Halves(half=3), Fixed(), nn.Linear(2, 2))]
    modules = dict(nn.Sequential(*body, nn.Linear(2, 2), Fixed()).named_modules())
    assert alike_modules(modules, "0.0") == {"0.0", "1.0"}
    assert alike_modules(modules, "0.1") == {"0.1", "1.1", "3"}
    assert alike_modules(modules, "0.1.first") == {"0.1.first", "1.1.first", "3.first"}
    # A layer of torch's own in none but torch's own is alike to those of its own class.
    assert alike_modules(modules, "2") == {"2", "1.2"}
    assert alike_modules(modules, "1") == {"", "0", "1"}
    assert alike_modules(modules, "") == {"", "0", "1"}


def test_mends_that_got_no_further_are_taken_back() -> None:
    label, other = np.arange(3), np.arange(5)
    mends: Any = Mends({("a", "x"): (label,), ("b", "x"): (other,), ("b", "y"): (other,)})
    mends.trial = (False, 4), [("a", "x"), ("b", "x")]
    mends.judge((False, 5))
    assert set(mends.pieces) == {("a", "x"), ("b", "x"), ("b", "y")}, "the forward got further"
    assert mends.trial is None
    mends.judge((False, 0))
    assert len(mends.pieces) == 3, "nothing was on trial"
    for place, taken in (((True, 0), False), ((False, 4), True)):
        mends.trial = (False, 4), [("a", "x")]
        mends.judge(place)
        assert (("a", "x") in mends.wrong) == taken, "train mode comes after eval mode"
    assert [(each.module, each.name) for each in mends.attributes()] == [("b", "x"), ("b", "y")]
    assert mends.attributes()[0].pieces == (other,)
    mends.notes = {"x follows": [("b", "x"), ("c", "x")], "y follows": [("b", "y")]}
    notes = ["something else", "x follows", "y follows"]
    mends.retract(notes)
    assert len(notes) == 3
    del mends.pieces["b", "x"]
    mends.retract(notes)
    assert notes == ["something else", "y follows"]
    mends.forget({"b"})
    mends.retract(notes)
    assert notes == ["something else"]
    assert mends.attributes() == []
    assert mends.wrong.keys() == {("a", "x")}


class Selective(nn.Module):
    """Values, and two parts of one size that nothing else ties."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.state = 24, 10
        self.inner = self.width + 2 * self.state
        self.into = nn.Linear(6, self.inner)
        self.back, self.keys, self.queries = (
            nn.Linear(self.width, 5),
            nn.Linear(self.state, 5),
            nn.Linear(self.state, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        values, keys, queries = self.into(x).split([self.width, self.state, self.state], dim=-1)
        result: Tensor = self.back(values) + self.keys(keys) * self.queries(queries)
        return result


def test_parts_of_a_split_that_one_number_sizes_go_together() -> None:
    model = Selective().eval()
    x = torch.randn(2, 7, 6)
    result = allocator.allocate(model, "50%", example_inputs=x)
    small: Any = result.model
    assert result.certificate.ok
    rows = result.allocation.kept["into.weight"][0]
    assert rows is not None
    keys, queries = ([row - start for row in rows if 0 <= row - start < 10] for start in (24, 34))
    assert keys == queries
    assert len(keys) == small.state < 10
    assert small.width < 24
    assert small.inner == 44  # which no forward reads
    small(torch.randn(1, 3, 6)).sum().backward()


def test_layers_that_stay_already_are_not_kept_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.second(x)
            return self.last((y * (1 / y.shape[1])).sigmoid()) + self.first(x).sum(1, keepdim=True)

    def always_the_first(scene: Any, mismatch: Any) -> list[Any]:
        return [(mismatch, [next(op for op in scene.flow.trace.ops if op.module == "first")])]

    monkeypatch.setattr("allocator.fitting.stays.layers_counted", always_the_first)
    graph = graph_of(Scaled().eval(), torch.zeros(2, 4))
    found = fit(graph, planner({"first": (1,), "second": (2, 3)}))
    assert not found.allocation.kept
