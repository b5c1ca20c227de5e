"""Where branches meet in small forwards, block by block as stated by hand; sizes against torch's own gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from meetings import ONE, THREE, Meeting, Way, check_meetings, meeting
from small_graphs import Net, graph_of, net, random_choice
from torch import Tensor, nn

from allocator.graph.blocks import describe_blocks, mean_gamma

IMAGE = torch.zeros(1, 4, 16, 16)
Run = Callable[[Any, Tensor], Tensor]
Rows = dict[str, tuple[Run, dict[str, nn.Module], list[Meeting]]]


def conv(source: int, out: int, size: int = 3, **more: Any) -> nn.Module:
    return nn.Conv2d(source, out, size, padding=more.pop("padding", size // 2), **more)


# Forwards ------------------------------------------------------------------------------------------


def beside(m: Any, x: Tensor) -> Tensor:
    return m.last(torch.cat([m.left(x), m.right(m.middle(x))], 1))


def with_the_entry(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.last(torch.cat([x, m.right(x)], 1))


def nested_sums(m: Any, x: Tensor) -> Tensor:
    """Of three addends two are added first, and nothing else reads that sum."""
    x = m.stem(x)
    return m.last((m.a(x) + m.b(x)) + m.c(x))


def read_between(m: Any, x: Tensor) -> Tensor:
    """The inner sum is read by a layer too, so that it is a meeting of its own."""
    x = m.stem(x)
    y = m.a(x) + m.b(x)
    return m.last(y + m.c(y))


def nested_concats(m: Any, x: Tensor) -> Tensor:
    return m.last(torch.cat([torch.cat([m.a(x), m.b(x)], 1), m.c(x)], 1))


def sum_of_concats(m: Any, x: Tensor) -> Tensor:
    return m.last(torch.cat([m.a(x), m.b(x)], 1) + m.c(x))


def dense(m: Any, x: Tensor) -> Tensor:
    """Each layer reads all before it, anew concatenated."""
    features = [m.stem(x)]
    for layer in (m.a, m.b, m.c):
        features.append(layer(torch.cat(features, 1)))
    return m.last(torch.cat(features, 1))


def growing(m: Any, x: Tensor) -> Tensor:
    """The same with what was concatenated before, to which one more is appended."""
    x = m.stem(x)
    for layer in (m.a, m.b, m.c):
        x = torch.cat([x, layer(x)], 1)
    return m.last(x)


def split(m: Any, x: Tensor) -> Tensor:
    a, b, c = m.stem(x).split([2, 2, 2], 1)
    return m.last(torch.cat([a, m.b(b), m.c(c)], 1))


def chunked(m: Any, x: Tensor) -> Tensor:
    a, b = m.stem(x).chunk(2, 1)
    return m.last(torch.cat([m.b(b), a], 1))


def sliced(m: Any, x: Tensor) -> Tensor:
    """Slices are calls of their own: what meets came from the layer, not from a split."""
    x = m.stem(x)
    return m.last(torch.cat([x[:, :3], m.b(x[:, 3:])], 1))


def gated(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.last(x * m.gate(m.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid())


def stacked(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.last(torch.stack([m.a(x), m.b(x)], 1).sum(1))


def scales(m: Any, x: Tensor) -> Tensor:
    """A branch at half the resolution, one at a quarter, and one that grows on its way."""
    up = nn.functional.interpolate
    half = up(m.coarse(nn.functional.max_pool2d(x, 2)), scale_factor=2)
    quarter = up(m.coarser(nn.functional.avg_pool2d(x, 4)), scale_factor=4)
    return m.last(torch.cat([m.fine(x), half, quarter, m.down(m.up(x))], 1))


def downwards(m: Any, x: Tensor) -> Tensor:
    return m.last(m.a(x) + m.b(m.pool(x)))


def grouped(m: Any, x: Tensor) -> Tensor:
    return m.last(m.groups(m.stem(x)))


def twice(m: Any, x: Tensor) -> Tensor:
    x = m.a(x) + m.b(x)
    x = m.c(x) + x
    return m.last(x + m.d(x))


class Unit(nn.Module):
    """Two branches in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.path, self.other = nn.Sequential(conv(4, 4), nn.ReLU(), conv(4, 4, 1)), conv(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.path(x) + self.other(x)


def units(m: Any, x: Tensor) -> Tensor:
    return m.last(m.body(x))


FORWARDS: Rows = {
    "beside one another": (
        beside,
        {"left": conv(4, 3, 1), "middle": conv(4, 5), "right": conv(5, 2), "last": conv(5, 1)},
        [meeting("model", "concat", Way("left", 3, (ONE,)), Way("right", 2, (THREE, THREE)))],
    ),
    "the entry itself": (
        with_the_entry,
        {"stem": conv(4, 4), "right": conv(4, 2), "last": conv(6, 1)},
        [meeting("model", "concat", Way("identity", 4), Way("right", 2, (THREE,)))],
    ),
    "nested sums": (
        nested_sums,
        {"stem": conv(4, 4), "a": conv(4, 3), "b": conv(4, 3, 1), "c": conv(4, 3), "last": conv(3, 1)},
        [meeting("model", "sum", Way("a", 3, (THREE,)), Way("b", 3, (ONE,)), Way("c", 3, (THREE,)))],
    ),
    "a sum that is read": (
        read_between,
        {"stem": conv(4, 4), "a": conv(4, 3), "b": conv(4, 3, 1), "c": conv(3, 3), "last": conv(3, 1)},
        [
            meeting("model", "sum", Way("a", 3, (THREE,)), Way("b", 3, (ONE,))),
            meeting("model#2", "sum", Way("identity", 3), Way("c", 3, (THREE,))),
        ],
    ),
    "nested concatenations": (
        nested_concats,
        {"a": conv(4, 1), "b": conv(4, 2, 1), "c": conv(4, 3), "last": conv(6, 1)},
        [meeting("model", "concat", Way("a", 1, (THREE,)), Way("b", 2, (ONE,)), Way("c", 3, (THREE,)))],
    ),
    "a concatenation in a sum": (
        sum_of_concats,
        {"a": conv(4, 1), "b": conv(4, 2, 1), "c": conv(4, 3), "last": conv(3, 1)},
        [
            meeting("model", "concat", Way("a", 1, (THREE,)), Way("b", 2, (ONE,))),
            meeting("model#2", "sum", Way("b", 3, (THREE, ONE)), Way("c", 3, (THREE,))),
        ],
    ),
    "dense": (
        dense,
        {"stem": conv(4, 4), "a": conv(4, 2), "b": conv(6, 2), "c": conv(8, 2), "last": conv(10, 1)},
        [
            meeting(
                "model", "concat",
                Way("identity", 4), Way("a", 2, (THREE,)), Way("b", 2, (THREE,)), Way("c", 2, (THREE,)),
            )
        ],
    ),
    "growing": (
        growing,
        {"stem": conv(4, 4), "a": conv(4, 2), "b": conv(6, 2), "c": conv(8, 2), "last": conv(10, 1)},
        [
            meeting("model", "concat", Way("identity", 4), Way("a", 2, (THREE,))),
            meeting("model#2", "concat", Way("identity", 6), Way("b", 2, (THREE,))),
            meeting("model#3", "concat", Way("identity", 8), Way("c", 2, (THREE,))),
        ],
    ),
    "split": (
        split,
        {"stem": conv(4, 6), "b": conv(2, 2), "c": conv(2, 2, 1), "last": conv(6, 1)},
        [meeting("model", "split", Way("identity", 2), Way("b", 2, (THREE,)), Way("c", 2, (ONE,)))],
    ),
    "chunked": (
        chunked,
        {"stem": conv(4, 6), "b": conv(3, 3), "last": conv(6, 1)},
        [meeting("model", "split", Way("b", 3, (THREE,)), Way("identity", 3))],
    ),
    "sliced": (
        sliced,
        {"stem": conv(4, 6), "b": conv(3, 3), "last": conv(6, 1)},
        [meeting("model", "concat", Way("identity", 3), Way("b", 3, (THREE,)))],
    ),
    "gate": (
        gated,
        {"stem": conv(4, 6), "squeeze": conv(6, 2, 1), "gate": conv(2, 6, 1), "last": conv(6, 1)},
        [meeting("model", "product", Way("identity", 6), Way("gate", 6, (ONE, ONE), stride=16, scale=16))],
    ),
    "stacked": (
        stacked,
        {"stem": conv(4, 4), "a": conv(4, 3), "b": conv(4, 3, 1), "last": conv(3, 1)},
        [meeting("model", "stack", Way("a", 3, (THREE,)), Way("b", 3, (ONE,)))],
    ),
    "scales": (
        scales,
        {
            "fine": conv(4, 1), "coarse": conv(4, 2), "coarser": conv(4, 3, 1),
            "up": nn.ConvTranspose2d(4, 3, 2, 2), "down": conv(3, 2, stride=2, dilation=2, padding=2),
            "last": conv(8, 1),
        },
        [
            meeting(
                "model", "concat",
                Way("fine", 1, (THREE,)),
                Way("coarse", 2, (THREE,), scale=2),
                Way("coarser", 3, (ONE,), scale=4),
                Way("down", 2, ((2, 2), THREE), dilation=2),
            )
        ],
    ),
    "downwards": (
        downwards,
        {"a": conv(4, 2, stride=2), "pool": nn.MaxPool2d(2), "b": conv(4, 2, 1), "last": conv(2, 1)},
        [meeting("model", "sum", Way("a", 2, (THREE,), stride=2), Way("b", 2, (ONE,), stride=2))],
    ),
    "groups": (
        grouped,
        {"stem": conv(4, 6), "groups": conv(6, 9, groups=3), "last": conv(9, 1)},
        [meeting("groups", "groups", *(Way(f"group{i}", 3, (THREE,)) for i in range(3)))],
    ),
    "several in one module": (
        twice,
        {"a": conv(4, 3), "b": conv(4, 3, 1), "c": conv(3, 3), "d": conv(3, 3, 1), "last": conv(3, 1)},
        [
            meeting("model", "sum", Way("a", 3, (THREE,)), Way("b", 3, (ONE,))),
            meeting("model#2", "sum", Way("c", 3, (THREE,)), Way("identity", 3)),
            meeting("model#3", "sum", Way("identity", 3), Way("d", 3, (ONE,))),
        ],
    ),
    "in modules of their own": (
        units,
        {"body": nn.Sequential(Unit(), Unit()), "last": conv(4, 1)},
        [
            meeting("body.0", "sum", Way("path.2", 4, (THREE, ONE)), Way("other", 4, (ONE,))),
            meeting("body.1", "sum", Way("path.2", 4, (THREE, ONE)), Way("other", 4, (ONE,))),
        ],
    ),
    "a chain": (lambda m, x: m.last(m.stem(x)), {"stem": conv(4, 4), "last": conv(4, 1)}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARDS)
def test_blocks_are_the_stated_ones(name: str) -> None:
    run, layers, expected = FORWARDS[name]
    check_meetings(graph_of(net(run, **layers), IMAGE).blocks, expected)


def test_a_block_begins_at_the_call_that_all_its_branches_come_from() -> None:
    found = {name: graph_of(net(run, **layers), IMAGE).blocks for name, (run, layers, _) in FORWARDS.items()}
    entries = {name: [block.entry for block in blocks] for name, blocks in found.items()}
    assert entries["beside one another"] == ["the input"]
    assert entries["nested sums"] == ["aten.convolution.default in stem"]
    assert entries["split"] == ["aten.split_with_sizes.default in the model"]
    assert entries["a sum that is read"] == ["aten.convolution.default in stem", "aten.add.Tensor in the model"]
    assert entries["in modules of their own"] == ["the input", "aten.add.Tensor in body.0"]
    assert entries["groups"] == ["aten.convolution.default in stem"]


def test_what_lies_inside_a_branch() -> None:
    """`middle` writes 5 channels that only `right` reads; of a nested sum no layer lies inside another."""
    run, layers, _ = FORWARDS["beside one another"]
    graph = graph_of(net(run, **layers), IMAGE)
    (block,) = graph.blocks
    assert [branch.inner for branch in block.branches] == [0, 5]
    assert [[graph.flow.trace.ops[i].module for i in branch.calls] for branch in block.branches] == [
        ["left"],
        ["middle", "right"],
    ]
    assert block.branches[1].kernel == (3, 3)
    assert [branch.flops for branch in block.branches] == [256 * 4 * 3, 256 * 9 * (4 * 5 + 5 * 2)]
    run, layers, _ = FORWARDS["the entry itself"]
    identity = graph_of(net(run, **layers), IMAGE).blocks[0].branches[0]
    assert (identity.kernel, identity.calls, identity.flops, identity.inner) == ((), (), 0, 0)


def test_a_group_has_its_share_of_the_cost() -> None:
    run, layers, _ = FORWARDS["groups"]
    (block,) = graph_of(net(run, **layers), IMAGE).blocks
    assert [branch.flops for branch in block.branches] == [256 * 9 * 2 * 3] * 3
    assert [branch.receptive_field for branch in block.branches] == [(3, 3)] * 3


# Sizes, against gradients ---------------------------------------------------------------------------

CHAINS: dict[str, tuple[int, list[nn.Module]]] = {
    "one": (2, [nn.Conv2d(2, 2, 3, padding=1)]),
    "two": (2, [nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 5, padding=2)]),
    "rows and columns": (2, [nn.Conv2d(2, 2, (1, 7), padding=(0, 3)), nn.Conv2d(2, 2, (3, 1), padding=(1, 0))]),
    "strides": (2, [nn.Conv2d(2, 2, 3, 2, 1), nn.Conv2d(2, 2, 3, 2, 1), nn.Conv2d(2, 2, 3, 1, 1)]),
    "a stride per axis": (2, [nn.Conv2d(2, 2, 3, (2, 1), 1), nn.Conv2d(2, 2, 3, 1, 1)]),
    "dilation": (2, [nn.Conv2d(2, 2, 3, 1, 2, 2), nn.Conv2d(2, 2, 3, 1, 3, 3)]),
    "pooling": (2, [nn.AvgPool2d(2), nn.Conv2d(2, 2, 3, 1, 1), nn.AvgPool2d(3, 1, 1)]),
    "powers": (2, [nn.Conv2d(2, 2, 3, 1, 1), nn.LPPool2d(2.0, 2)]),
    "a signal": (1, [nn.Conv1d(2, 2, 5, 2, 2), nn.Conv1d(2, 2, 3, 1, 1)]),
    "a volume": (3, [nn.Conv3d(2, 2, (1, 3, 3), (1, 2, 2), (0, 1, 1)), nn.Conv3d(2, 2, 3, 1, 1)]),
}


def seen_by_one(chain: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Per axis how far the pixels of the input reach that have a gradient from one pixel inside the output."""
    x = x.clone().requires_grad_()
    out = chain(x)
    middle = tuple(n // 2 for n in out.shape[2:])
    out[(slice(None), slice(None), *middle)].sum().backward()
    assert x.grad is not None
    places = x.grad.abs().sum((0, 1)).nonzero()
    first, last = places.min(0).values, places.max(0).values
    return tuple((last - first + 1).tolist())


@pytest.mark.parametrize("name", CHAINS)
def test_receptive_fields_and_strides_are_those_of_the_gradient(name: str) -> None:
    rank, layers = CHAINS[name]
    chain = nn.Sequential(*layers)
    model = Net(lambda m, x: torch.cat([m.one(x), m.two(x)], 1), one=chain, two=nn.Sequential(*layers)).eval()
    side = {1: 64, 2: 32, 3: 16}[rank]
    x = torch.rand(1, 2, *[side] * rank) + 0.5
    for parameter in chain.parameters():
        nn.init.constant_(parameter, 1.0)  # nothing cancels
    (block,) = graph_of(model, x).blocks
    sizes = chain(x).shape[2:]
    for branch in block.branches:
        assert branch.receptive_field == seen_by_one(chain, x)
        assert branch.stride == pytest.approx(math.prod(side / n for n in sizes) ** (1 / rank), abs=0.01)


# Scales of batch norms ------------------------------------------------------------------------------


def normed(m: Any, x: Tensor) -> Tensor:
    return m.last(torch.cat([m.left_norm(m.left(x)), m.right(x)], 1))


def with_norms() -> Any:
    model = net(normed, left=conv(4, 3), left_norm=nn.BatchNorm2d(3), right=conv(4, 2), last=conv(5, 1))
    model.left_norm.weight.data = torch.tensor([0.5, -2.0, 1.0])
    return model


def test_the_scales_of_a_branch() -> None:
    (block,) = graph_of(with_norms(), IMAGE).blocks
    assert [branch.gamma for branch in block.branches] == [(3.5 / 3, 0.5, 2.0), None]


def test_mean_gamma_is_over_all_norms_of_a_channel() -> None:
    """Two norms scale the same stream: `before` and, tied to it by the sum, `after`."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.before(m.stem(x))
        return m.last(x + m.after(m.inner(x)))

    norms = {"before": nn.BatchNorm2d(3), "after": nn.BatchNorm2d(3)}
    model = net(run, stem=conv(4, 3), inner=conv(3, 3), last=conv(3, 1), **norms)
    graph = graph_of(model, IMAGE)
    found = mean_gamma(graph.component, graph.facts.gammas, graph.tensors)
    mean = (model.before.weight.detach().abs() + model.after.weight.detach().abs()) / 2
    for label in (graph.slots.labels("stem.weight")[0], graph.slots.labels("inner.weight")[0]):
        np.testing.assert_allclose(found[label], mean.numpy(), rtol=1e-6)
    assert np.isnan(found[graph.slots.labels("last.weight")[0]]).all()
    assert np.isnan(found[0])
    graph.tensors["before.weight"] = model.before.weight.to("meta")
    alone = mean_gamma(graph.component, graph.facts.gammas, graph.tensors)
    np.testing.assert_allclose(alone[graph.slots.labels("stem.weight")[0]], model.after.weight.detach().abs().numpy())


# As data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["beside one another", "nested sums", "dense", "split", "groups", "scales"])
def test_blocks_as_data_count_what_stays(name: str) -> None:
    run, layers, expected = FORWARDS[name]
    graph = graph_of(net(run, **layers), IMAGE)
    stays = graph.stays(random_choice(graph, 3))
    for row, block, stated in zip(describe_blocks(graph.blocks, stays), graph.blocks, expected, strict=True):
        assert (row["name"], row["kind"]) == (stated.name, stated.kind)
        for found, branch, way in zip(row["branches"], block.branches, stated.branches, strict=True):
            inside = branch.inner_labels
            assert found == {
                "name": way.name,
                "before": way.channels,
                "after": sum(bool(stays[slot]) for slot in branch.label),
                "kernel": list(max(way.kernels, key=math.prod, default=())),
                "scale": way.scale,
                "stride": way.stride,
                "inner_before": sum(map(len, inside)),
                "inner_after": sum(bool(stays[slot]) for label in inside for slot in label),
            }
