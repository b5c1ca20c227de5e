"""Attributes that follow the kept channels, where the one that is tried first is the wrong one or not enough."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import allocator
from allocator.fitting.mends import Mends
from allocator.flow.options import Pair


def test_an_attribute_that_stops_the_forward_before_is_taken_back_before_anything_else_is_mended() -> None:
    label = np.arange(3)
    mends: Any = Mends({("a", "x"): (label,), ("a", "y"): (label,)})
    mends.trial = (0, 4), [("a", "x")]
    assert mends.judge((0, 3)), "it stopped before the call that did not fit"
    mends.trial = (0, 4), [("a", "y")]
    assert not mends.judge((0, 4)), "it got there"
    assert mends.wrong == {("a", "x"): [(label,)], ("a", "y"): [(label,)]}
    assert mends.together((0, 3)) == []
    assert mends.together((0, 4)) == [("a", "x"), ("a", "y")]
    assert mends.trial == ((0, 4), [("a", "x"), ("a", "y")])
    mends.judge((0, 4))
    assert mends.together((0, 4)) == [], "they were tried together"
    assert mends.pieces == {}


def test_one_attribute_that_did_not_help_is_not_tried_again_by_itself() -> None:
    mends: Any = Mends({("a", "x"): (np.arange(3),)})
    mends.trial = (0, 4), [("a", "x")]
    mends.judge((0, 4))
    assert mends.together((0, 4)) == []
    assert mends.was_wrong(("a", "x"), (np.arange(3),))
    others = [("a", "y"), (np.arange(3),)], [("a", "x"), (np.arange(1, 4),)], [("a", "x"), (np.arange(3), np.arange(3))]
    assert not any(mends.was_wrong(*each) for each in others)


def test_a_tie_is_in_vain_where_the_forward_got_no_further() -> None:
    for place, vain in (((0, 3), True), ((0, 4), True), ((0, 5), False), ((1, 0), False)):
        mends, notes = Mends(), ["one", "tied", "two"]
        pairs: set[Pair] = {((1, 2), (3, 4))}
        mends.tied = (0, 4), pairs, "tied"
        assert mends.ties_in_vain(place, notes) == (pairs if vain else set())
        assert mends.apart == (pairs if vain else set())
        assert notes == (["one", "two"] if vain else ["one", "tied", "two"])
        assert mends.ties_in_vain(place, notes) == set(), "it is asked of once"


class Checked(nn.Module):
    """Attention that says what it takes, and has an attribute for that which comes before the one of its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = 16, 4, 4
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] != self.embed_dim:
            raise ValueError(f"expected {self.embed_dim} features, found {x.shape[2]}")
        weights = (self.heads(self.query(x)) @ self.heads(self.key(x)).transpose(-2, -1)).softmax(-1)
        y = (weights @ self.heads(self.value(x))).transpose(1, 2)
        out: Tensor = self.out(y.reshape(*x.shape[:2], self.num_heads * self.head_dim))
        return out


class SideBySide(Checked):
    """As some write it: samples and heads in one dim, and the width of a head computed from two attributes."""

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, self.embed_dim // self.num_heads).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        steps, samples = x.shape[:2]
        width = self.embed_dim // self.num_heads
        q, k, v = (
            layer(x).view(steps, samples * self.num_heads, width).transpose(0, 1)
            for layer in (self.query, self.key, self.value)
        )
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        out: Tensor = self.out(y.transpose(0, 1).reshape(steps, samples, self.embed_dim)).transpose(0, 1)
        return out


@pytest.mark.parametrize("kind", [Checked, SideBySide])
def test_heads_go_where_the_attribute_that_is_tried_first_does_not_help(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    result = allocator.allocate(model, "60%", example_inputs=torch.randn(2, 5, 16))
    small: Any = result.model
    assert (small.num_heads, small.query.out_features) == (2, 8)
    assert small.embed_dim == (16 if kind is Checked else 8)
    assert not any("stay" in note for note in result.notes)
    followed = ["num_heads"] if kind is Checked else ["embed_dim", "num_heads", "head_dim"]
    assert result.notes[:-1] == [f"{name!r} of {kind.__name__} follows the kept channels" for name in followed]
    small(torch.randn(3, 7, 16))


class Decoder(nn.Module):
    """Reads one width of a list, where another call reads the same number for other channels."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = [4, 8, 16]
        self.encode, self.middle = nn.Conv2d(4, 16, 4), nn.Linear(16, 64)
        self.decode = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encode(x).relu().view(len(x), -1)
        out: Tensor = self.decode(self.middle(x).relu().view(len(x), self.channels[-1], 2, 2))
        return out


def test_one_number_of_a_list_follows() -> None:
    torch.manual_seed(0)
    model = Decoder().eval()
    result = allocator.allocate(model, "50%", example_inputs=torch.randn(1, 4, 4, 4), policy="uniform")
    small: Any = result.model
    assert small.channels == [4, 8, small.decode.in_channels]
    assert small.decode.in_channels < 16
    assert small.middle.out_features == 4 * small.decode.in_channels
    assert model.channels == [4, 8, 16]
    small(torch.randn(2, 4, 4, 4))


class FirstState(nn.Module):
    """A recurrent layer whose first state is made before the call at which the forward stops."""

    def __init__(self) -> None:
        super().__init__()
        self.units, self.part = 12, 4
        self.split, self.rnn = nn.Linear(6, 8), nn.GRU(4, 12, batch_first=True)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(1, x.shape[0], self.units)
        y = self.split(x)
        first, second = y[..., : self.part], y[..., self.part : 2 * self.part]
        out: Tensor = self.out(torch.cat([self.rnn(first, state)[0], second], -1))
        return out


def test_zeros_that_met_no_channels_yet_are_not_to_blame_where_a_forward_stops() -> None:
    torch.manual_seed(0)
    model = FirstState().eval()
    result = allocator.allocate(model, "70%", params="60%", example_inputs=torch.randn(2, 5, 6))
    small: Any = result.model
    assert small.units == small.rnn.hidden_size < 12
    assert small.rnn.input_size == small.part < 4
    assert not any("zeros" in note for note in result.notes)
    small(torch.randn(1, 7, 6))
