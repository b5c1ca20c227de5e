"""Where a rewritten forward does not fit at first: what goes nevertheless, what stays, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fitting_cases import Block, fitted, outputs_kept
from small_graphs import Net
from torch import Tensor, nn
from torch.nn import functional as F

from allocator.fitting import counted
from allocator.fitting.fit import Fitted
from allocator.flow.options import Place

Middle = Callable[[Any, Tensor], Tensor]
ROW = torch.zeros(2, 4)


class Written(Block):
    """A block whose middle is given."""

    run: Middle

    def between(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def block(run: Middle, drop: tuple[int, ...] = (1, 4), **numbers: Any) -> Fitted:
    """A block of six channels in a sequence, of which some are dropped."""
    return fitted(nn.Sequential(Written(run=run, **numbers)), {"0.first": drop})


def kept(found: Fitted, layer: str) -> list[int]:
    """Which outputs a layer keeps."""
    dims = found.allocation.kept.get(f"{layer}.weight")
    rows: list[int] = list(range(outputs_kept(found, layer))) if dims is None or dims[0] is None else dims[0]
    return rows


def turned(x: Tensor) -> Tensor:
    """With the channels last, and back."""
    return x.transpose(1, 3)


# Attributes -----------------------------------------------------------------------------------------

PARTS: dict[str, tuple[Middle, int]] = {
    "the first": (lambda m, x: torch.cat([x[:, : m.part].sigmoid(), x[:, m.part :]], 1), 2),
    "all but the first": (lambda m, x: torch.cat([x[:, m.part :].sigmoid(), x[:, : m.part]], 1), 2),
    "the last": (lambda m, x: torch.cat([x[:, -m.part :].sigmoid(), x[:, : -m.part]], 1), 2),
    "all but the last": (lambda m, x: torch.cat([x[:, : -m.part].sigmoid(), x[:, -m.part :]], 1), 2),
    "of the last dim": (
        lambda m, x: turned(torch.cat([(y := turned(x))[..., : m.part].sigmoid(), y[..., m.part :]], 3)),
        2,
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_number_that_a_slice_reads_counts_the_channels_before_it_or_behind(part: str) -> None:
    run, number = PARTS[part]
    found = block(run, (0, 5), number=6, part=number)
    assert outputs_kept(found, "0.first") == 4
    assert found.allocation.attributes["0"] == {"part": 1}
    assert found.notes == ["'part' of Written follows the kept channels"]


def test_a_number_in_a_mapping_follows_by_its_name_whatever_else_the_mapping_holds() -> None:
    sizes = {3: 6, "a.b": 6, "width": 6, "deep": {"width": 6}}
    found = block(lambda m, x: x.view(len(x), m.sizes["width"], -1).view(len(x), m.sizes["width"], 4, 4), sizes=sizes)
    assert found.allocation.attributes["0"] == {"sizes.width": 4}
    assert outputs_kept(found, "0.first") == 4
    found = block(lambda m, x: x.view(len(x), m.sizes[3], -1).view(len(x), m.sizes[3], 4, 4), sizes={3: 6, "a.b": 6})
    assert outputs_kept(found, "0.first") == 6


@pytest.mark.parametrize("sizes", [(16, 4, 4), [16, 16], [2, 16, 16], (4, 4, 4), [4, 16]])
def test_sizes_in_a_row_are_those_of_the_dims_in_their_order(sizes: Any) -> None:
    """As many channels as pixels: by a number alone nothing tells which is meant."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = x.view(m.sizes) if m.sizes[0] == 2 else x.view(len(x), *m.sizes)
        return y.sigmoid().view(len(x), -1, 4, 4)

    which = 1 if sizes[0] == 2 else 0
    channels = sizes[which]
    empty: dict[str, Any] = {"none": [], "halves": [16.0, 16.0]}
    found = fitted(nn.Sequential(Written(channels, run=run, **empty, sizes=sizes)), {"0.first": [1]})
    expected = [channels - 1 if i == which else n for i, n in enumerate(sizes)]
    assert found.allocation.attributes["0"] == {"sizes": expected}
    assert outputs_kept(found, "0.first") == channels - 1


def test_one_width_in_a_list_follows_and_those_of_other_layers_stay() -> None:
    found = block(lambda m, x: x.view(len(x), m.widths[1], -1).view(len(x), m.widths[1], 4, 4), widths=[9, 6, 10, 8])
    assert found.allocation.attributes["0"] == {"widths": [9, 4, 10, 8]}


def test_a_list_of_strides_is_none_of_widths() -> None:
    found = block(lambda m, x: x.view(len(x), 6, -1).view(len(x), 6, 4, 4), stride=[6, 2], padding=(6,))
    assert found.allocation.attributes == {}
    assert not [note for note in found.notes if "follows the kept" in note]


@pytest.mark.parametrize("how", ["one after the other", "side by side"])
def test_a_number_counts_channels_once_that_are_there_twice(how: str) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = x.repeat(1, 2, 1, 1) if how == "one after the other" else x.repeat_interleave(2, 1)
        y = y.reshape(len(x), 2 * m.width, 16).relu()
        y = y.view(len(x), 2, -1, 16) if how == "one after the other" else y.view(len(x), -1, 2, 16).transpose(1, 2)
        return y[:, 0].reshape(len(x), -1, 4, 4)

    found = block(run, width=6)
    assert found.allocation.attributes["0"] == {"width": 4}
    assert outputs_kept(found, "0.first") == 4


def test_a_slice_at_a_place_that_is_written_down_keeps_its_neurons() -> None:
    found = block(lambda m, x: torch.cat([x[:, :2].sigmoid(), x[:, 2:].relu()], 1), (0,))
    assert outputs_kept(found, "0.first") == 6
    assert [note.partition(":")[0] for note in found.notes] == ["the neurons at aten.slice.Tensor in 0 stay"]
    assert found.graph.options.tied == frozenset()


@pytest.mark.parametrize("name", ["groups", "num_heads", "kernel_size", "stride"])
def test_what_is_named_after_something_else_is_not_taken_for_a_width(name: str) -> None:
    numbers: dict[str, Any] = {name: 6}
    found = block(lambda m, x: x.view(len(x), getattr(m, name), -1).view_as(x), **numbers)
    assert found.allocation.attributes == {}
    assert outputs_kept(found, "0.first") == 6


class Wide(Block):
    def between(self, x: Tensor) -> Tensor:
        return x.view(len(x), self.wide, -1).view(len(x), self.wide, 4, 4)


class WideInParts(Block):
    """Another class with an attribute of the same name, which holds the sizes of a split."""

    def between(self, x: Tensor) -> Tensor:
        return torch.cat([part.relu() for part in x.split(self.wide, 1)], 1)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_attributes_of_one_name_follow_in_each_class(order: str) -> None:
    class Other(Wide):
        pass

    def run(m: Any, x: Tensor) -> Tensor:
        for name in order:
            x = m.get_submodule(name)(m.get_submodule(f"parts_{name}")(x))
        return x

    parts = {f"parts_{name}": WideInParts(wide=[2, 4]) for name in "ab"}
    model = Net(run, a=Wide(wide=6), b=Other(wide=6), **parts)
    found = fitted(model, {"a.first": [0, 1], "b.first": [2], "parts_a.first": [0], "parts_b.first": [3, 4]})
    assert [found.allocation.attributes[name]["wide"] for name in ("a", "b", "parts_a", "parts_b")] == [
        *(4, 5),
        *([1, 4], [2, 2]),
    ]
    assert not [note for note in found.notes if " stay" in note]


def test_a_number_of_the_block_around_follows_where_the_block_refuses() -> None:
    class Inner(Block):
        def between(self, x: Tensor) -> Tensor:
            return x.relu()

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.inner, self.channels = nn.Conv2d(3, 6, 1), Inner(), 6
            self.inner.first = nn.Conv2d(6, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.before(x)
            if x.shape[1] != self.channels:
                raise ValueError(f"{self.channels} channels, please")
            y: Tensor = self.inner(x)
            return y

    for model, path in ((nn.Sequential(Around()), "0"), (Around(), "")):
        found = fitted(model, {f"{path}.before".strip("."): [1, 4]})
        assert found.allocation.attributes[path] == {"channels": 4}
        assert outputs_kept(found, f"{path}.before".strip(".")) == 4
        assert found.notes == ["'channels' of Around follows the kept channels"]


# Ties -----------------------------------------------------------------------------------------------

SHARES: dict[str, Middle] = {
    "halves": lambda m, x: torch.cat([x[:, : x.shape[1] // 2].sigmoid(), x[:, x.shape[1] // 2 :].relu()], 1),
    "halves of the last dim": lambda m, x: turned(
        torch.cat([(y := turned(x))[..., : y.shape[3] // 2].sigmoid(), y[..., y.shape[3] // 2 :]], 3)
    ),
}


@pytest.mark.parametrize("share", SHARES)
def test_shares_of_a_dim_lose_the_same_places(share: str) -> None:
    found = block(SHARES[share], (4,))
    (note,) = found.notes
    assert "go from all shares of the dim alike" in note
    assert kept(found, "0.first") == [0, 2, 3, 5]
    assert len(found.graph.options.tied) == 1
    assert found.graph.size == 3


def test_three_shares_of_a_dim_lose_the_same_places() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        third = x.shape[1] // 3
        return torch.cat([x[:, third:].sigmoid(), x[:, :third].relu()], 1)

    found = block(run, (4,))
    assert kept(found, "0.first") == [1, 3, 5]
    assert [note.partition(":")[0] for note in found.notes] == [
        "neurons at aten.slice.Tensor in 0 go from all shares of the dim alike"
    ]


def test_shares_of_a_weight_lose_the_same_rows() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        half = len(m.a.weight) // 2
        y: Tensor = m.b(torch.cat([F.linear(x, m.a.weight[:half]).relu(), F.linear(x, m.a.weight[half:])], 1))
        return y

    model = Net(run, a=nn.Linear(4, 6, bias=False), b=nn.Linear(6, 3))
    found = fitted(model, {"a": [4]}, ROW)
    assert kept(found, "a") == [0, 2, 3, 5]


def test_slots_that_one_number_counts_at_both_ends_go_together() -> None:
    found = block(lambda m, x: torch.cat([x[:, : m.part], x[:, -m.part :].relu()], 1), (0, 1, 4), part=3)
    assert kept(found, "0.first") == [2, 5]
    assert found.allocation.attributes["0"] == {"part": 1}
    first, second = found.notes
    assert first == "'part' of Written follows the kept channels"
    assert second.startswith("of Written, neurons that one attribute counts go together, place by place: shape ")
    assert len(found.graph.options.tied) == 1


def test_shares_of_one_channel_stay() -> None:
    found = block(lambda m, x: torch.cat([x[:, :1].sigmoid(), x[:, x.shape[1] - 5 :]], 1), (1,))
    assert outputs_kept(found, "0.first") == 6
    assert not [note for note in found.notes if "alike" in note]
    assert found.graph.options.tied == frozenset()


def three(run: Callable[[Any, Tensor], Tensor], inside: bool = False, **parts: Any) -> nn.Module:
    """Three layers of eight channels each, and one that reads what becomes of them."""
    layers = {name: nn.Conv2d(3, 8, 1) for name in "abc"}
    inner = Net(run, **layers, out=nn.Conv2d(24, 3, 1), **parts)
    return nn.Sequential(inner) if inside else inner


def viewed(m: Any, x: Tensor) -> Tensor:
    b, a, c = m.b(x), m.a(x), m.c(x)
    a = a.flatten(2).sigmoid().view(b.shape)
    y: Tensor = m.out(torch.cat([a, b.relu(), c], 1))
    return y


@pytest.mark.parametrize("inside", [False, True])
def test_a_size_that_is_read_from_another_tensor_ties_these_two_alone(inside: bool) -> None:
    path = "0." if inside else ""
    found = fitted(three(viewed, inside), {f"{path}a": [0, 1], f"{path}b": [2], f"{path}c": [0, 1, 2, 3]})
    assert kept(found, f"{path}a") == kept(found, f"{path}b") == [3, 4, 5, 6, 7]
    assert kept(found, f"{path}c") == [4, 5, 6, 7]
    (note,) = found.notes
    assert "go together with others that a size of theirs is read from" in note
    assert len(found.graph.options.tied) == 1


def test_a_tie_that_does_not_help_is_given_up_for_the_next() -> None:
    """As many are left of `c` as of `b`, and `c` was made last."""
    found = fitted(three(viewed), {"a": [0, 1], "b": [2], "c": [7]})
    assert kept(found, "a") == kept(found, "b") == [3, 4, 5, 6, 7]
    assert kept(found, "c") == [0, 1, 2, 3, 4, 5, 6]
    (note,) = found.notes
    assert "go together" in note
    assert len(found.graph.options.tied) == 1


def test_a_tie_holds_where_it_makes_an_attribute_follow_before() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        b, c = m.b(x), m.c(x)
        b = b.view(len(x), m.width, -1).sigmoid().view(len(x), m.width, 4, 4)
        a = m.a(x).flatten(2).sigmoid().view(b.shape)
        y: Tensor = m.out(torch.cat([a, b.relu(), c], 1))
        return y

    found = fitted(three(run, width=8), {"a": [0, 1]})
    assert kept(found, "a") == kept(found, "b") == [2, 3, 4, 5, 6, 7]
    assert found.allocation.attributes[""] == {"width": 6}
    assert len(found.graph.options.tied) == 1
    assert len(found.notes) == 2


def test_a_tie_that_helped_stays_where_another_call_does_not_fit() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        b, a = m.b(x), m.a(x)
        a = a.flatten(2).sigmoid().view(b.shape)
        c = m.c(x).view(len(x), 8, -1).sigmoid().view(len(x), 8, 4, 4)
        y: Tensor = m.out(torch.cat([a, b.relu(), c], 1))
        return y

    found = fitted(three(run), {"a": [0, 1], "b": [2], "c": [0]})
    assert kept(found, "a") == kept(found, "b") == [3, 4, 5, 6, 7]
    assert kept(found, "c") == list(range(8))
    assert [note.split(" ")[0] for note in found.notes] == ["neurons", "the"]


def test_two_channels_go_with_two_others() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        b, a = m.b(x), m.a(x)
        y: Tensor = m.out(a.flatten(2).sigmoid().view(b.shape) + m.back(b.relu()))
        return y

    layers = {"a": nn.Conv2d(3, 2, 1), "b": nn.Conv2d(3, 2, 1), "back": nn.Conv2d(2, 2, 1), "out": nn.Conv2d(2, 3, 1)}
    found = fitted(Net(run, **layers), {"a": [0]})
    assert kept(found, "a") == kept(found, "b") == [1]


def test_what_stays_anyway_is_nothing_to_go_with() -> None:
    found = fitted(three(viewed), {"a": [0, 1], "c": [0]}, exclude=("b",))
    assert kept(found, "a") == list(range(8))
    assert kept(found, "c") == [1, 2, 3, 4, 5, 6, 7]
    assert not [note for note in found.notes if "go together" in note]
    assert found.notes[0].startswith("the neurons at aten.view.default in the model stay: ")


# What stays -----------------------------------------------------------------------------------------


class Strict(nn.Module):
    """Takes one width, and makes no call of its own."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.takes = (str(width),)

    def forward(self, x: Tensor) -> Tensor:
        if str(x.shape[1]) not in self.takes:
            raise ValueError("not so")
        return x


def guarded(run: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """Two layers and a module that takes six channels only, each in a block of its own."""
    parts = {"a": nn.Linear(4, 6), "b": nn.Linear(4, 6), "strict": Strict(), "out": nn.Linear(12, 3)}
    return Net(run, **{name: nn.Sequential(part) for name, part in parts.items()})


def test_of_what_was_made_before_a_module_refused_the_last_stays() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x), m.b(x)
        m.strict(b)
        y: Tensor = m.out(torch.cat([m.tail(a), b], 1))
        return y

    model: Any = guarded(run)
    model.tail = nn.Sequential(nn.Linear(6, 6))
    found = fitted(model, {"a.0": [0], "b.0": [1]}, ROW)
    assert (outputs_kept(found, "a.0"), outputs_kept(found, "b.0")) == (5, 6)
    assert found.graph.options.frozen == {Place("b.0", "linear", 0, "gives")}
    (note,) = found.notes
    assert note.startswith("the neurons at aten.linear.default in b.0 stay: strict.0 is given them, and the rewritten")
    assert note.endswith("register('test_repair.Strict'), docs/extending.md")


def test_what_a_module_refused_may_have_been_made_some_calls_before() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x), m.b(x)
        y = m.tail(x).relu().sigmoid()
        m.strict(b)
        z: Tensor = m.out(torch.cat([a, b], 1)) + y
        return z

    model: Any = guarded(run)
    model.tail = nn.Sequential(nn.Linear(4, 3, bias=False))
    found = fitted(model, {"a.0": [0], "b.0": [1]}, ROW)
    assert outputs_kept(found, "b.0") == 6


def test_a_module_that_refuses_comes_after_a_number_that_does_not_fit() -> None:
    """The number is mended by itself: the layer whose channels are scaled goes."""

    def run(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x), m.b(x)
        b = b * a.shape[1] ** -0.5
        m.strict(a)
        y: Tensor = m.out(torch.cat([a, b], 1))
        return y

    found = fitted(guarded(run), {"a.0": [0], "b.0": [1]}, ROW)
    assert (outputs_kept(found, "a.0"), outputs_kept(found, "b.0")) == (6, 5)


def counts(m: Any, x: Tensor) -> Tensor:
    a = m.a(x)
    b = m.b(x)
    y: Tensor = m.out(torch.cat([a.relu(), b.relu()], 1)) * float(a.shape[1])
    return y


@pytest.mark.parametrize("most", [48, 0])
def test_where_no_layer_is_found_in_time_the_last_before_the_number_stays(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counted, "MOST_CHECKS", most)
    model = Net(counts, a=nn.Linear(4, 6), b=nn.Linear(4, 6), out=nn.Linear(12, 3))
    found = fitted(model, {"a": [0], "b": [1]}, ROW)
    assert outputs_kept(found, "a") == 6
    assert outputs_kept(found, "b") == (5 if most else 6), "a concatenation holds both"
    assert ("which" in found.notes[0]) is bool(most)


def test_a_size_that_counts_another_layer_keeps_that_alone() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x), m.b(x)
        y = x.repeat(1, a.shape[1])[:, :4]
        z: Tensor = m.out(torch.cat([a, b], 1)) + m.tail(y)
        return z

    model = Net(run, a=nn.Linear(4, 6), b=nn.Linear(4, 6), out=nn.Linear(12, 3), tail=nn.Linear(4, 3))
    found = fitted(model, {"a": [0], "b": [1]}, ROW)
    assert (outputs_kept(found, "a"), outputs_kept(found, "b")) == (6, 5)
    (note,) = found.notes
    assert "in a stay, which aten.repeat.default in the model counts: shape (2, 20), expected (2, 24)" in note


def test_of_a_module_what_it_made_itself_stays_before_what_others_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "MOST_CHECKS", 0)

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.back = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor, given: nn.Module) -> tuple[Tensor, Tensor]:
            y = self.hidden(x)
            width, y = y.shape[1], self.back(y)
            other = given(x)
            return y * float(width), other

    def run(m: Any, x: Tensor) -> Tensor:
        y, other = m.inner(x, m.a)
        z: Tensor = y + m.b(other)
        return z

    found = fitted(Net(run, a=nn.Linear(4, 6), b=nn.Linear(6, 4), inner=Inner()), {"a": [0], "inner.hidden": [1]}, ROW)
    assert (outputs_kept(found, "a"), outputs_kept(found, "inner.hidden")) == (5, 6)


def test_of_a_call_that_was_not_made_what_it_would_have_given_goes() -> None:
    """A check in the forward of the block, before its layer."""

    class Asserts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1] == 6, "no"
            y: Tensor = self.conv(x)
            return y

    model = nn.Sequential(nn.Conv2d(3, 6, 1), Asserts(), nn.Conv2d(8, 3, 1))
    found = fitted(model, {"0": [1], "1.conv": [2, 3]})
    assert (outputs_kept(found, "0"), outputs_kept(found, "1.conv")) == (6, 6)
    (note,) = found.notes
    assert note.startswith("the neurons at aten.convolution.default in 1.conv stay: the rewritten forward raised")


def test_of_a_call_that_gives_other_sizes_only_these_dims_stay() -> None:
    """Half of the channels are as many numbers as a view of twice as many with half of the pixels each."""
    found = block(lambda m, x: x.view(len(x), 6, -1).sigmoid().view(len(x), 6, 4, 4), (0, 1, 2))
    assert outputs_kept(found, "0.first") == 6
    assert found.graph.options.frozen == {Place("0", "view", 0, "gives 0, 1")}
    assert found.notes[0].startswith("the neurons at aten.view.default in 0 stay: shape (2, 6, 8), expected (2, 3, 16)")


# What a note says -----------------------------------------------------------------------------------


def test_a_note_names_numbers_that_may_be_sizes_and_none_that_are_not() -> None:
    numbers: dict[str, Any] = {"nothing": 0, "one": 1, "pair": 2, "half": 0.5, "on": True, "word": "6", "far": 77}
    found = block(lambda m, x: x.view(len(x), 6, -1).view(len(x), 6, 4, 4), (1,), **numbers)
    (note,) = found.notes
    assert "its forward may read pair=2; to let them go" in note
