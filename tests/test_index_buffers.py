"""Channels that a buffer names by number: they go, and what it holds is counted anew."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_graphs import net
from torch import Tensor, nn

import allocator

IMAGE = torch.zeros(1, 3, 8, 8)
NUMBERS = {
    "a permutation": torch.randperm(16, generator=torch.Generator().manual_seed(0)),
    "some twice": torch.tensor([3, 3, 1, 0, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14, 0, 1, 2]),
    "some never": torch.tensor([14, 3, 1, 9, 5, 7, 2, 11]),
}
PICK: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "index_select": lambda m, y: y.index_select(1, m.index),
    "of a copy": lambda m, y: y.index_select(1, torch.autograd.Variable(m.index).clone()),
    "advanced": lambda m, y: y[:, m.index],
    "gather": lambda m, y: y.gather(1, m.index.view(1, -1, 1, 1).expand(len(y), -1, *y.shape[2:])),
    "take_along_dim": lambda m, y: torch.take_along_dim(y, m.index.view(1, -1, 1, 1), 1),
    "on the last dim": lambda m, y: y.permute(0, 2, 3, 1)[..., m.index].permute(0, 3, 1, 2),
}


def picking(index: Tensor, pick: Callable[[Any, Tensor], Tensor], groups: int = 1) -> Any:
    torch.manual_seed(0)
    layers = {"first": nn.Conv2d(3, 16, 3), "norm": nn.BatchNorm2d(16), "head": nn.Conv2d(12, 4, 1)}
    model = net(
        lambda m, x: m.head(m.read(pick(m, m.norm(m.first(x)).relu())).relu()),
        read=nn.Conv2d(len(index), 12, 1, groups=groups),
        **layers,
    )
    model.register_buffer("index", index.clone())
    return model


def require_same(model: Any, result: Any) -> None:
    """By hand: of what is left, every place of the index still names the channel that it named."""
    kept = result.allocation.kept
    channels, places = kept["first.weight"][0], kept["index"][0]
    assert [channels[i] for i in result.model.index.tolist()] == model.index[places].tolist()
    one, other = copy.deepcopy(model).double(), copy.deepcopy(result.model).double()
    with torch.no_grad():
        weight, reads = one.read.weight, one.read.in_channels // one.read.groups
        for row in range(12):
            group = row // (12 // one.read.groups)
            for column in range(reads):
                if group * reads + column not in places:
                    weight[row, column] = 0
        rows = kept.get("read.weight", [None])[0]
        if rows is not None:
            one.head.weight[:, [i for i in range(12) if i not in rows]] = 0
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    assert torch.allclose(one(x), other(x), atol=1e-12)


@pytest.mark.parametrize("pick", PICK)
@pytest.mark.parametrize("numbers", NUMBERS)
def test_channels_named_by_a_buffer_go(numbers: str, pick: str) -> None:
    model = picking(NUMBERS[numbers], PICK[pick])
    before = model.index.clone()
    result = allocator.allocate(model, "50%", example_inputs=IMAGE, criterion="magnitude", scope="all")
    assert result.certificate.ok
    assert torch.equal(model.index, before)
    small: Any = result.model
    assert small.first.out_channels < 16
    require_same(model, result)


def test_groups_of_what_is_picked_go_whole(tmp_path: Path) -> None:
    model = picking(NUMBERS["a permutation"], PICK["index_select"], groups=4)
    result = allocator.allocate(model, "60%", example_inputs=IMAGE, criterion="magnitude", scope="all")
    require_same(model, result)
    small: Any = result.model
    assert small.read.groups < 4
    result.allocation.save(tmp_path / "choice.json")
    again = allocator.apply(model, tmp_path / "choice.json")
    assert torch.equal(again.get_buffer("index"), result.model.get_buffer("index"))
    assert allocator.verify(model, again, result.allocation, example_inputs=IMAGE).ok


@pytest.mark.parametrize("along", [False, True])
def test_gathered_places_leave_the_channels_free(along: bool) -> None:
    """Of a vision transformer's tokens, those that score best, each with all of its channels."""

    def run(m: Any, x: Tensor) -> Tensor:
        tokens = m.first(x).flatten(2).transpose(1, 2)
        best = m.score(tokens).squeeze(-1).topk(5, dim=1).indices
        if along:
            return m.head(tokens.take_along_dim(best[..., None], 1).relu().mean(1))
        return m.head(tokens.gather(1, best[..., None].expand(-1, -1, tokens.shape[-1])).relu().mean(1))

    torch.manual_seed(0)
    model = net(run, first=nn.Conv2d(3, 16, 3), score=nn.Linear(16, 1), head=nn.Linear(16, 4))
    result = allocator.allocate(model, "60%", example_inputs=IMAGE, criterion="magnitude")
    assert not result.graph.unsupported
    small: Any = result.model
    kept = result.allocation.kept["head.weight"][1]
    assert small.first.out_channels == len(kept or ()) < 16
    for columns in (model.score.weight, model.head.weight):
        columns.data.index_fill_(1, torch.tensor([i for i in range(16) if i not in (kept or ())]), 0)
    x = torch.randn(2, 3, 9, 9)
    assert torch.allclose(model(x), small(x), atol=1e-5)


def test_a_second_allocation_composes_with_the_first() -> None:
    model = picking(NUMBERS["some twice"], PICK["advanced"])
    first = allocator.allocate(model, "70%", example_inputs=IMAGE, criterion="magnitude", scope="all")
    second = allocator.allocate(first.model, "60%", example_inputs=IMAGE, criterion="magnitude", scope="all")
    both = allocator.apply(model, first.allocation.compose(second.allocation))
    assert torch.equal(both.get_buffer("index"), second.model.get_buffer("index"))
    assert len(both.get_buffer("index")) < len(first.model.get_buffer("index")) < 20


def test_an_index_that_names_another_channel_is_noticed() -> None:
    model = picking(NUMBERS["a permutation"], PICK["index_select"])
    result = allocator.allocate(model, "60%", example_inputs=IMAGE, criterion="magnitude", scope="all")
    result.model.get_buffer("index")[:2] = result.model.get_buffer("index")[:2].flip(0)
    assert not allocator.verify(model, result.model, result.allocation, example_inputs=IMAGE).structural


@pytest.mark.parametrize("index", [torch.tensor([-1, *range(15)]), torch.arange(16)[None].expand(2, 16)])
def test_other_indices_keep_what_they_pick_from(index: Tensor) -> None:
    model = picking(index[0] if index.dim() > 1 else index, lambda m, y: y[:, index].flatten(1, index.dim())[:, :16])
    graph = allocator.trace(model, IMAGE)
    assert (graph.unit_of_slot[graph.slots.labels("first.weight")[0]] < 0).all()


def test_a_wider_network_leaves_them() -> None:
    model = picking(NUMBERS["a permutation"], PICK["index_select"])
    wide: Any = allocator.widen(model, factor=2, example_inputs=IMAGE).model
    assert wide.first.out_channels == 16
    assert wide.read.out_channels == 24


def test_numbers_that_are_no_plain_copy_of_a_buffer_are_not_taken_for_it() -> None:
    model = picking(NUMBERS["a permutation"], lambda m, y: y.index_select(1, m.index[:1].expand(16).detach()))
    graph = allocator.trace(model, IMAGE)
    assert any("picked by an index tensor" in reason for reason, _ in graph.reasons())
