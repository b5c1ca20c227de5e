"""A misfit freezes no more than what does not fit; forwards that were frozen without need are followed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_graphs import Net, graph_of, net
from subjects import randomised_norms
from torch import Tensor, nn
from torch.nn import functional as F

import allocator

IMAGE = torch.zeros(1, 3, 8, 8)


def allocate(model: nn.Module, flops: Any = "50%", x: Any = IMAGE, **options: Any) -> allocator.Result:
    options = {"criterion": "magnitude", "scope": "all", **options}
    return allocator.allocate(model, flops, example_inputs=x, **options)


class Layer(nn.Module):
    """The wrapper that detectors use for every layer."""

    def __init__(self, i: int, o: int, k: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(i, o, k, padding=k // 2, bias=False), nn.BatchNorm2d(o)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Attention(nn.Module):
    """Heads over pixels, of which the sizes are numbers in the module and the input's."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.h, self.d, self.qkv, self.proj = 2, c // 2, Layer(c, 3 * c), Layer(c, c)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).view(b, self.h, 3 * self.d, h * w).split(self.d, dim=2)
        y: Tensor = self.proj((v @ (q.transpose(-2, -1) @ k).softmax(-1)).view(b, c, h, w))
        return y


def test_an_attention_of_wrapped_layers_freezes_no_other_wrapped_layer() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(Layer(3, 32, 3), Layer(32, 32, 3), Layer(32, 32, 3))
            self.named, self.attention, self.head = Layer(32, 32), Attention(32), nn.Conv2d(32, 10, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.named(self.stem(x))
            return self.head(x + self.attention(x))

    result = allocate(randomised_norms(Network()), criterion="bn_scale")
    assert result.flops_after <= 0.5 * result.flops_before
    small: Any = result.model
    assert max(len(layer.conv.weight) for layer in small.stem) < 32
    assert len(small.attention.qkv.conv.weight) == 96


def test_a_size_that_the_block_around_a_layer_asserts_follows() -> None:
    class Down(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.channels, self.conv = c, nn.Conv2d(c, c, 3, 2, 1)

        def forward(self, x: Tensor) -> Any:
            assert x.shape[1] == self.channels
            return self.conv(x)

    model = nn.Sequential(nn.Conv2d(3, 32, 3), Down(32), Down(32), nn.Conv2d(32, 8, 3))
    result = allocate(model, x=torch.zeros(1, 3, 20, 20))
    assert result.flops_after <= 0.5 * result.flops_before
    small: Any = result.model
    assert (small[1].channels, small[2].channels) == (small[0].out_channels, small[1].conv.out_channels)
    assert any("'channels' of Down follows the kept channels" in note for note in result.notes)


class Between(nn.Module):
    """Two wrapped layers with something between them."""

    def __init__(self, c: int, between: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.c, self.between = c, between
        self.first, self.second = Layer(c, c, 3), Layer(c, c, 3)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.between(self, self.first(x)))


def residual(*blocks: nn.Module) -> nn.Module:
    """Blocks of 32 channels, each added to what it reads, between others that are as they should be."""
    torch.manual_seed(0)
    usual = [nn.Sequential(Layer(32, 32, 3), Layer(32, 32, 3)) for _ in range(2)]
    layers = nn.ModuleList([usual[0], *blocks, usual[1]])

    def run(m: Any, x: Tensor) -> Any:
        x = m.stem(x)
        for layer in m.layers:
            x = x + layer(x)
        return m.head(x)

    return net(run, stem=Layer(3, 32, 3), layers=layers, head=nn.Conv2d(32, 10, 1))


def whole(model: nn.Module, result: allocator.Result) -> list[str]:
    """Convolutions that kept all their outputs."""
    old = dict(model.named_modules())
    kept = [(name, m) for name, m in result.model.named_modules() if isinstance(m, nn.Conv2d) and name != "head"]
    return [name for name, m in kept if m.out_channels == vars(old[name])["out_channels"]]


def require_exact(model: nn.Module, result: allocator.Result) -> None:
    """The result is the original without what reads a dropped channel, by the allocation alone."""
    cut, small = (copy.deepcopy(each).double() for each in (model, result.model))
    for name, parameter in cut.named_parameters():
        stay = result.allocation.kept.get(name, [None, None])
        if parameter.dim() > 1 and stay[1] is not None:
            parameter.data.index_fill_(1, torch.tensor([i for i in range(parameter.shape[1]) if i not in stay[1]]), 0)
    for shape in ((1, 3, 8, 8), (3, 3, 6, 12)):
        x = torch.randn(shape, dtype=torch.float64)
        assert (cut(x) - small(x)).abs().max() <= 1e-9 * cut(x).abs().max()


def _asserted(m: Any, x: Tensor) -> Tensor:
    assert x.shape[1] == 32, "32 channels, please"
    return x


@pytest.mark.parametrize("count", [1, 2])
def test_a_check_before_a_layer_says_nothing_of_what_the_layer_gives(count: int) -> None:
    model = residual(*(Between(32, _asserted) for _ in range(count)))
    result = allocate(model, "40%")
    assert whole(model, result) == [f"layers.{1 + i}.first.conv" for i in range(count)]
    require_exact(model, result)


def _viewed_as_another(m: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    result: Tensor = m.key(x).flatten(2).view(b, c, h, w)
    return result


def _attended(m: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    q, k, v = (t.reshape(b, m.h, m.d, h * w) for t in m.qkv(x).chunk(3, 1))
    return (v @ (q.transpose(2, 3) @ k * m.d**-0.5).softmax(-1).transpose(2, 3)).reshape(b, c, h, w)


def _largest(m: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    result: Tensor = m.pieces(x).view(b, c, 2, h, w).amax(2)
    return result


SIZED: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[], dict[str, Any]]]] = {
    "a view": (_viewed_as_another, lambda: {"key": Layer(32, 32)}),
    "view_as": (lambda m, x: m.key(x).view_as(x), lambda: {"key": Layer(32, 32)}),
    "attention": (_attended, lambda: {"h": 4, "d": 8, "qkv": Layer(32, 96)}),
    "a maximum of pieces": (_largest, lambda: {"pieces": nn.Conv2d(32, 64, 1)}),
}


@pytest.mark.parametrize("kind", SIZED)
def test_channels_that_take_their_number_from_others_go_with_them(kind: str) -> None:
    between, parts = SIZED[kind]
    model = residual(*(Between(32, between, **parts()) for _ in range(2)))
    result = allocate(model, "40%")
    assert whole(model, result) == []
    assert any("go together with others that a size of theirs is read from" in note for note in result.notes)
    if kind != "attention":  # there nothing reads a query's channel alone
        require_exact(model, result)


def _reshaped(m: Any, x: Tensor) -> Tensor:
    result: Tensor = m.last(F.relu(m.first(x).view(-1, *m.shape)))
    return result


IMAGES: dict[str, Callable[[], nn.Module]] = {
    "Unflatten": lambda: nn.Sequential(
        nn.Linear(16, 512), nn.Unflatten(1, (32, 4, 4)), nn.ReLU(), nn.ConvTranspose2d(32, 8, 4, 2, 1)
    ),
    "a tuple": lambda: net(_reshaped, first=nn.Linear(16, 512), last=nn.Conv2d(32, 8, 3), shape=(32, 4, 4)),
    "a batch norm": lambda: nn.Sequential(
        nn.Linear(16, 512), nn.BatchNorm1d(512), nn.Unflatten(1, (32, 4, 4)), nn.BatchNorm2d(32), nn.Conv2d(32, 8, 1)
    ),
    "a view of the forward's": lambda: net(
        lambda m, x: m.last(m.first(x).view(len(x), -1, 4, 4)), first=nn.Linear(16, 512), last=nn.Conv2d(32, 8, 3)
    ),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_a_linear_layer_whose_result_becomes_an_image(kind: str) -> None:
    result = allocate(randomised_norms(IMAGES[kind]()), "60%", torch.zeros(2, 16))
    layer = next(module for module in result.model.modules() if isinstance(module, nn.Linear))
    assert layer.out_features < 512
    assert layer.out_features % 16 == 0
    result.model(torch.rand(3, 16))


class Written(nn.Module):
    """A norm over the last dim as papers write it."""

    def __init__(self, kind: str, d: int) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms":
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        if self.kind == "layer":
            u = x.mean(-1, keepdim=True)
            return self.weight * ((x - u) / torch.sqrt((x - u).pow(2).mean(-1, keepdim=True) + 1e-6))
        if self.kind == "length":
            return self.weight * x / x.norm(dim=-1, keepdim=True)
        return x * x.mean(-1, keepdim=True).sigmoid()  # a gate, and no norm


@pytest.mark.parametrize("kind", ["rms", "layer", "length", "RMSNorm"])
def test_loose_norms_hold_for_norms_written_by_hand(kind: str) -> None:
    norm = nn.RMSNorm(64) if kind == "RMSNorm" else Written(kind, 64)
    model = nn.Sequential(nn.Linear(8, 64), norm, nn.Linear(64, 8))
    result = allocate(model, x=torch.randn(2, 8), norms="loose")
    assert result.flops_after <= 0.5 * result.flops_before
    assert "inexact by nature" in str(result.certificate)
    with pytest.raises(allocator.NothingToAllocateError, match=r"norm over the channels .* norms='loose' lets them go"):
        allocate(model, x=torch.randn(2, 8))


def test_a_gate_over_all_channels_is_no_norm() -> None:
    model = nn.Sequential(nn.Linear(8, 64), Written("gate", 64), nn.Linear(64, 8))
    with pytest.raises(allocator.NothingToAllocateError, match="a reduction runs over these channels"):
        allocate(model, x=torch.randn(2, 8), norms="loose")


def test_a_depthwise_convolution_by_a_view_of_its_weight() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.i(x)
        return m.o(F.conv1d(y, m.c.weight.squeeze(1).unsqueeze(1), m.c.bias, padding=1, groups=y.shape[1]))

    layers = {"i": nn.Conv1d(8, 32, 1), "c": nn.Conv1d(32, 32, 3, groups=32, padding=1), "o": nn.Conv1d(32, 8, 1)}
    small: Any = allocate(net(run, **layers), x=torch.randn(1, 8, 9)).model
    assert small.c.groups == small.c.out_channels == small.i.out_channels < 32


def test_strides_of_memory_are_refused_where_dims_are_merged() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.one(x)
        return m.two(y.as_strided((1, y.shape[1], 64), (y.shape[1] * 64, 64, 1)).view_as(y))

    graph = graph_of(net(run, one=nn.Conv2d(3, 8, 1), two=nn.Conv2d(8, 4, 1)))
    assert graph.unsupported == {"as_strided": [""]}
    assert not graph.neurons


# Attention ------------------------------------------------------------------------------------------


def attention(m: Any, x: Tensor) -> Any:
    b, n, _ = x.shape
    q, k, v = (layer(x).view(b, n, -1, 8).transpose(1, 2) for layer in (m.q, m.k, m.v))
    if m.rotary:
        angle = torch.arange(n, device=x.device)[:, None] * torch.ones(8, device=x.device)
        q, k = (t * angle.cos() + torch.cat([-t[..., 4:], t[..., :4]], -1) * angle.sin() for t in (q, k))
    mask = torch.ones(n, n, dtype=torch.bool).tril() if m.mask else None
    return x + m.o(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(b, n, -1))


@pytest.mark.parametrize(("mask", "rotary"), [(True, False), (False, True), (True, True)])
def test_heads_go_whole_beside_masks_made_on_the_cpu_and_turned_queries(mask: bool, rotary: bool) -> None:
    layers = {name: nn.Linear(64, 64) for name in "qkvo"}
    model = Net(attention, mask=mask, rotary=rotary, **layers).eval()
    graph = allocator.trace(model, torch.randn(1, 6, 64))
    assert not graph.unsupported
    assert len(graph.neurons) == 8
    assert {neuron.scope for neuron in graph.neurons} == {"inner"}


# Train mode and loops -------------------------------------------------------------------------------


def test_a_buffer_that_is_used_in_train_mode_only_is_cut_too() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.one(x).relu()
        if m.training:
            m.mean.lerp_(y.detach().mean((0, 2, 3)), 0.1)
        return m.two(y)

    model = net(run, one=nn.Conv2d(3, 16, 3), two=nn.Conv2d(16, 4, 1))
    model.register_buffer("mean", torch.zeros(16))
    small: Any = allocate(model).model
    assert small.mean.shape == (small.one.out_channels,)
    small.train()(torch.rand(2, 3, 8, 8)).sum().backward()


def _cells(m: Any, x: Tensor) -> Any:
    y, h = m.net(x).transpose(1, 2), None
    for t in range(y.shape[1]):
        h = m.rec(y[:, t], h)
    return m.head(h)


RECURRENT: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Any]]] = {
    "GRU": (lambda: nn.GRU(16, 16, batch_first=True), lambda m, x: m.head(m.rec(m.net(x).transpose(1, 2))[0][:, -1])),
    "LSTM": (lambda: nn.LSTM(16, 16, batch_first=True), lambda m, x: m.head(m.rec(m.net(x).transpose(1, 2))[0][:, -1])),
    "cells": (lambda: nn.GRUCell(16, 16), _cells),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_rounds_of_a_loop_take_linear_time(kind: str) -> None:
    make, run = RECURRENT[kind]

    def seconds(length: int) -> float:
        convolutions = nn.Sequential(nn.Conv1d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 16, 3, padding=1))
        graph = allocator.trace(
            net(run, net=convolutions, rec=make(), head=nn.Linear(16, 4)), torch.zeros(1, 8, length)
        )
        start = time.perf_counter()
        assert len(graph.blocks) > length
        return time.perf_counter() - start

    assert min(seconds(192), seconds(192)) < 9 * max(seconds(48), seconds(48))  # squared, it would be 16 times


class TalkingHeads(nn.Module):
    """Attention with a layer between its heads, so that those of the values are others than those of the queries."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (channels // heads) ** -0.5
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))
        self.talk, self.answer = nn.Conv2d(heads, heads, 1), nn.Conv2d(heads, heads, 1)

    def forward(self, x: Tensor) -> Tensor:
        places = x.shape[-2] * x.shape[-1]
        q, k, v = (layer(x).reshape(len(x), self.num_heads, -1, places) for layer in (self.q, self.k, self.v))
        weights = self.answer(self.talk(q.transpose(-1, -2) @ k * self.scale).softmax(-1))
        mixed = (weights @ v.transpose(-1, -2)).transpose(-1, -2).reshape(len(x), -1, *x.shape[2:])
        result: Tensor = x + self.out(mixed.relu())
        return result


def test_heads_that_one_attribute_counts_go_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), TalkingHeads(32, 8), TalkingHeads(32, 8), nn.Conv2d(32, 4, 1)
    ).eval()
    result = allocator.allocate(model, "50%", example_inputs=torch.zeros(1, 3, 6, 6), criterion="magnitude")
    assert not [note for note in result.notes if " stay: " in note]
    small: Any = result.model
    for block in small[1:3]:
        assert block.q.out_channels == block.v.out_channels == 4 * block.num_heads
    assert min(block.num_heads for block in small[1:3]) < 8
    assert any("neurons that one attribute counts go together" in note for note in result.notes)


class Octave(nn.Conv2d):
    """A convolution of two resolutions, which takes its parts of one weight by numbers that it holds."""

    def __init__(self, high: int, low: int, out_high: int, out_low: int) -> None:
        super().__init__(high + low, out_high + out_low, 3, padding=1)
        self.high, self.out_high = high, out_high

    def forward(self, x: Tensor, low: Tensor) -> Any:  # type: ignore[override]
        a, b = self.weight[: self.out_high], self.weight[self.out_high :]
        to_high, to_low = self.bias[: self.out_high], self.bias[self.out_high :]  # type: ignore[index]
        high = F.conv2d(x, a[:, : self.high], to_high, padding=1)
        high = high + F.interpolate(F.conv2d(low, a[:, self.high :], padding=1), scale_factor=2)
        down = F.conv2d(F.avg_pool2d(x, 2), b[:, : self.high], to_low, padding=1)
        return high.relu(), (down + F.conv2d(low, b[:, self.high :], padding=1)).relu()


@pytest.mark.parametrize("parts", [((12, 8), (16, 4), (6, 10)), ((8, 8), (8, 8), (8, 8))])
def test_numbers_that_a_layer_of_ones_own_slices_its_weight_by_follow(parts: Any) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            (high, low), *others = parts
            self.stem, self.small = Layer(3, high, 3), Layer(3, low, 3)
            self.first, self.second = Octave(high, low, *others[0]), Octave(*others[0], *others[1])
            self.heads = nn.ModuleList(nn.Conv2d(n, 5, 1) for n in others[1])

        def forward(self, x: Tensor) -> Any:
            given = self.second(*self.first(self.stem(x), self.small(F.avg_pool2d(x, 2))))
            return [head(each) for head, each in zip(self.heads, given)]

    result = allocate(randomised_norms(Network()), "40%", policy="uniform", criterion="group_norm")
    assert not [note for note in result.notes if " stay" in note or "go together" in note], result.notes
    first: Any = result.model.first
    assert 0 < first.out_high < parts[1][0]
    assert first.out_channels < sum(parts[1])
    assert result.graph.share() > 0.8


def test_a_view_that_would_not_tell_a_single_channel_from_other_dims_keeps_two() -> None:
    def steps(m: Any, x: Tensor) -> Tensor:
        y = m.first(x.flatten(0, 1)).relu().mean((2, 3))
        y = m.second(y.view(len(y), 1, -1)).relu().view(x.shape[0], x.shape[1], -1)
        return m.last(y.transpose(1, 2))

    model = net(steps, first=nn.Conv2d(3, 2, 3), second=nn.Linear(2, 64), last=nn.Conv1d(64, 4, 1))
    x = torch.zeros(2, 4, 3, 8, 8)
    with pytest.raises(allocator.BudgetError) as raised:
        allocate(model, "1%", x)
    small: Any = allocate(model, raised.value.reachable, x).model
    assert small.second.out_features == 2, "a view of (8, 1, C) as (2, 4, C) tells two from dims of one, and one not"
