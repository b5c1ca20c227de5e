"""The pieces that random networks are made of, written the way people write them.

Every piece is a module that takes one or several feature maps of shape (B, C, *sides) of rank 1, 2 or 3.
What a forward knows about channels it reads as real code does: from the tensor, from an attribute of the
module, or from a number in the code.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV: dict[int, type[Any]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[Any]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
BATCH_NORM: dict[int, type[Any]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM: dict[int, type[Any]] = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
MAX_POOL: dict[int, type[Any]] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG_POOL: dict[int, type[Any]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
GLOBAL_POOL: dict[int, type[Any]] = {
    1: nn.AdaptiveAvgPool1d,
    2: nn.AdaptiveAvgPool2d,
    3: nn.AdaptiveAvgPool3d,
}
GLOBAL_MAX: dict[int, type[Any]] = {
    1: nn.AdaptiveMaxPool1d,
    2: nn.AdaptiveMaxPool2d,
    3: nn.AdaptiveMaxPool3d,
}

ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda _: nn.ReLU(),
    "inplace": lambda _: nn.ReLU(inplace=True),
    "none": lambda _: nn.Identity(),
    "gelu": lambda _: nn.GELU(),
    "silu": lambda _: nn.SiLU(),
    "sigmoid": lambda _: nn.Sigmoid(),
    "hardswish": lambda _: nn.Hardswish(),
    "softplus": lambda _: nn.Softplus(),
    "leaky": lambda _: nn.LeakyReLU(0.1),
    "prelu": lambda channels: nn.PReLU(channels),
    "prelu_shared": lambda _: nn.PReLU(),
    "dropout": lambda _: nn.Dropout(0.1),
}


def make_norm(kind: str, rank: int, channels: int) -> nn.Module:
    """A normalisation layer: "batch", "plain" (no scale), "stats" (no running statistics), "group", "instance"."""
    if kind == "none":
        return nn.Identity()
    if kind == "group":
        return nn.GroupNorm(next(n for n in (4, 2, 1) if channels % n == 0), channels)
    if kind == "instance":
        return INSTANCE_NORM[rank](channels, affine=True)
    return BATCH_NORM[rank](channels, affine=kind != "plain", track_running_stats=kind != "stats")


class Unit(nn.Module):
    """Convolution, norm, activation; or norm, activation, convolution."""

    def __init__(
        self, rank: int, source: int, out: int, *, kernel: int = 3, stride: int = 1, groups: int = 1,
        dilation: int = 1, bias: bool = False, norm: str = "batch", act: str = "relu", first: bool = False,
        transposed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        keep = dilation * (kernel - 1) // 2
        if transposed:
            self.conv = TRANSPOSED[rank](source, out, stride, stride, groups=groups, bias=bias)
        else:
            self.conv = CONV[rank](source, out, kernel, stride, keep, dilation, groups, bias)
        self.norm = make_norm(norm, rank, source if first else out)
        self.act = ACTIVATIONS[act](source if first else out)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            return self.conv(self.act(self.norm(x)))
        return self.act(self.norm(self.conv(x)))


class Resize(nn.Module):
    """Pooling or resampling."""

    def __init__(self, rank: int, how: str) -> None:
        super().__init__()
        self.pool: nn.Module | None = None
        if how in ("max", "avg"):
            self.pool = (MAX_POOL if how == "max" else AVG_POOL)[rank](2, 2)
        elif how == "blur":
            self.pool = MAX_POOL[rank](3, 1, 1)
        self.how, self.linear = how, {1: "linear", 2: "bilinear", 3: "trilinear"}[rank]

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            return self.pool(x)
        if self.how == "linear":
            return F.interpolate(x, scale_factor=2, mode=self.linear, align_corners=False)
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Join(nn.Module):
    """Several maps become one: "cat", "add", "in place", "sub", "mul" or "max"; all are made to fit first."""

    def __init__(self, rank: int, sources: list[int], how: str, target: int | None = None) -> None:
        super().__init__()
        fits = [how == "cat" or c == sources[0] for c in sources]
        self.fit = nn.ModuleList(
            nn.Identity() if fit else Unit(rank, c, sources[0], kernel=1, act="none")
            for c, fit in zip(sources, fits, strict=True)
        )
        self.how = how
        self.after = None if target is None else BATCH_NORM[rank](target)

    def forward(self, *maps: Tensor) -> Tensor:
        sides = maps[0].shape[2:]
        maps = tuple(_resized(fit(x), sides) for fit, x in zip(self.fit, maps, strict=True))
        if self.how == "cat":
            joined = torch.cat(maps, dim=1)
        elif self.how == "in place":
            joined = maps[0]
            for other in maps[1:]:
                joined += other
        else:
            joined = maps[0]
            for other in maps[1:]:
                joined = _COMBINE[self.how](joined, other)
        return joined if self.after is None else self.after(joined)


_COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "max": torch.maximum,
}


def _resized(x: Tensor, sides: torch.Size) -> Tensor:
    if x.shape[2:] == sides:
        return x
    if x.shape[2] > sides[0]:
        pool = {3: F.adaptive_max_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_max_pool3d}[x.dim()]
        return cast(Tensor, pool(x, list(sides)))  # type: ignore[operator]
    return F.interpolate(x, size=sides, mode="nearest")


class SqueezeExcite(nn.Module):
    """Channels are weighed by what their means say."""

    def __init__(self, rank: int, channels: int, inner: int, *, linear: bool, pool: str = "module") -> None:
        super().__init__()
        make: Callable[[int, int], nn.Module] = nn.Linear if linear else lambda a, b: CONV[rank](a, b, kernel_size=1)
        self.pool = (GLOBAL_MAX if pool == "max" else GLOBAL_POOL)[rank](1)
        self.mean = pool == "mean"
        self.down, self.up = make(channels, inner), make(inner, channels)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        dims = tuple(range(2, x.dim()))
        gate = x.mean(dims, keepdim=True) if self.mean else self.pool(x)
        if self.linear:
            gate = gate.flatten(1)
        gate = torch.sigmoid(self.up(F.relu(self.down(gate))))
        return x * gate.view(*gate.shape[:2], *[1] * len(dims))


class Shuffle(nn.Module):
    """Channels change places between groups; sizes from the tensor, from attributes, or torch's own."""

    def __init__(self, channels: int, groups: int, how: str) -> None:
        super().__init__()
        self.groups, self.width, self.how = groups, channels // groups, how
        self.own = nn.ChannelShuffle(groups)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "module" and x.dim() == 4:
            return self.own(x)
        batch, channels = x.shape[:2]
        width = self.width if self.how == "attribute" else channels // self.groups
        grouped = x.view(batch, self.groups, width, *x.shape[2:]).transpose(1, 2)
        return grouped.reshape(batch, -1, *x.shape[2:])


class Split(nn.Module):
    """One map becomes several; the sizes are an int, a list, two ints, numbers in the code, or a number of parts."""

    def __init__(self, sizes: tuple[int, ...], how: str) -> None:
        super().__init__()
        self.how, self.parts = how, len(sizes)
        self.literal = (*sizes,)
        if how == "int":
            self.width = max(sizes)
        elif how == "list":
            self.sizes = list(sizes)
        elif how == "pair":
            self.left, self.right = sizes[0], sum(sizes[1:])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.how == "int":
            return tuple(torch.split(x, self.width, dim=1))
        if self.how == "list":
            return tuple(x.split(self.sizes, dim=1))
        if self.how == "pair":
            return tuple(x.split([self.left, self.right], dim=1))
        if self.how == "chunk":
            return tuple(x.chunk(self.parts, dim=1))
        if self.how == "tensor_split":
            return tuple(x.tensor_split(self.parts, dim=1))
        bounds = [sum(self.literal[:i]) for i in range(self.parts + 1)]
        return tuple(x[:, a:b] for a, b in pairwise(bounds))


class Hierarchy(nn.Module):
    """A map is split, the parts are transformed one after the other, each with the last one's result (Res2Net)."""

    def __init__(self, rank: int, channels: int, parts: int, groups: int = 1) -> None:
        super().__init__()
        self.width, self.parts = channels // parts, parts
        self.units = nn.ModuleList(Unit(rank, self.width, self.width, groups=groups) for _ in range(parts - 1))

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(x, self.width, 1)
        done = [pieces[0]]
        for i, unit in enumerate(self.units):
            done.append(unit(pieces[i + 1] if i == 0 else pieces[i + 1] + done[-1]))
        return torch.cat(done, 1)


class Slice(nn.Module):
    """Part of the channels: the first, the last, or every other one, in several ways of writing it."""

    def __init__(self, channels: int, count: int, how: str) -> None:
        super().__init__()
        self.count, self.how, self.rest = count, how, channels - count

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "first":
            return x[:, : self.count]
        if self.how == "last":
            return x[:, self.rest :]
        if self.how == "negative":
            return x[:, -self.count :]
        if self.how == "list":
            return x[:, list(range(0, self.count + self.rest, 2))]
        if self.how == "narrow":
            return x.narrow(1, self.rest, self.count)
        return x[:, ::2]


class Reorder(nn.Module):
    """Channels in another order, or mixed: by an index, by views, by sums over them, padded, or repeated."""

    order: Tensor

    def __init__(self, channels: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("order", torch.arange(channels).flip(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        spatial = [0, 0] * (x.dim() - 2)
        table: dict[str, Callable[[], Tensor]] = {
            "flip": lambda: x.flip(1),
            "roll": lambda: x.roll(1, 1),
            "index": lambda: x[:, self.order],
            "cumsum": lambda: x.cumsum(1),
            "pad": lambda: F.pad(x, [*spatial, 1, 1]),
            "repeat": lambda: x.repeat(1, 2, *[1] * (x.dim() - 2)),
            "interleave": lambda: x.repeat_interleave(2, dim=1),
            "softmax": lambda: x.softmax(1),
            "normalise": lambda: F.normalize(x, dim=1),
            "fft": lambda: torch.fft.fft(x, dim=1).real,
            "unbind": lambda: torch.stack(x.unbind(1)[::-1], 1),
            "where": lambda: torch.where(x > 0, x, 0.1 * x.flip(1)),
            "stack": lambda: torch.stack([x, x.roll(1, 2)]).sum(0),
            "swap": lambda: x.transpose(1, 2),
            "maxout": lambda: x.view(len(x), -1, 2, *x.shape[2:]).amax(2),
            "groups": lambda: x.view(len(x), 2, -1, *x.shape[2:]).softmax(1).flatten(1, 2),
            "bilinear": lambda: x @ x.mT / x.shape[-1],
            "crop": lambda: F.pad(x[..., 1:], [0, 1]),
        }
        return table[self.how]()


class PerChannel(nn.Module):
    """One convolution for every channel alone, which are a batch to it."""

    def __init__(self, rank: int, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = CONV[rank](1, 1, 3, padding=1), BATCH_NORM[rank](channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.flatten(0, 1).unsqueeze(1))
        return self.norm(y.view(len(x), -1, *y.shape[2:]))


class Scale(nn.Module):
    """A learned scale and shift per channel, and a fixed mean to subtract (a buffer)."""

    mean: Tensor

    def __init__(self, rank: int, channels: int) -> None:
        super().__init__()
        shape = (1, channels, *[1] * rank)
        self.gain, self.shift = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape[1:]))
        self.register_buffer("mean", torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.gain + self.shift


class Gate(nn.Module):
    """A product of two halves: gated linear units by chunk or by torch's own, or a map and its own gate."""

    def __init__(self, rank: int, channels: int, how: str) -> None:
        super().__init__()
        self.how = how
        wide = channels if how == "own" else 2 * channels
        self.unit = Unit(rank, channels, wide, kernel=1, act="none")

    def forward(self, x: Tensor) -> Tensor:
        y = self.unit(x)
        if self.how == "own":
            return x * torch.sigmoid(y)
        if self.how == "glu":
            return F.glu(y, dim=1)
        a, b = y.chunk(2, dim=1)
        return a * torch.sigmoid(b)


class Spatial(nn.Module):
    """Places are weighed by the mean and the maximum over channels (CBAM)."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.conv = CONV[rank](2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.conv(both))


class Selective(nn.Module):
    """Two branches, mixed per channel by a softmax over them (SKNet)."""

    def __init__(self, rank: int, channels: int, out: int) -> None:
        super().__init__()
        self.near, self.far = Unit(rank, channels, out), Unit(rank, channels, out, dilation=2)
        self.pool, self.out = GLOBAL_POOL[rank](1), out
        self.mix = CONV[rank](out, 2 * out, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.near(x), self.far(x)], dim=1)
        share = self.mix(self.pool(both.sum(1)))
        share = share.view(len(x), 2, share.shape[1] // 2, *share.shape[2:])
        return (both * share.softmax(1)).sum(1)


class Mixer(nn.Module):
    """Two linear layers over channels, which come last in between."""

    def __init__(self, channels: int, inner: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels) if norm else nn.Identity()
        self.up, self.down = nn.Linear(channels, inner), nn.Linear(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.movedim(1, -1))
        return x + self.down(F.gelu(self.up(y))).movedim(-1, 1)


class NonLocal(nn.Module):
    """Places look at one another: a product of two activations over their channels."""

    def __init__(self, rank: int, channels: int, inner: int, scaled: bool) -> None:
        super().__init__()
        make = CONV[rank]
        self.query, self.key = make(channels, inner, 1), make(channels, inner, 1)
        self.value = make(channels, channels, 1)
        self.scaled = scaled

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x).flatten(2), self.key(x).flatten(2), self.value(x).flatten(2)
        seen = q.transpose(1, 2) @ k
        if self.scaled:
            seen = seen / k.shape[1] ** 0.5
        return x + (v @ seen.softmax(-1).transpose(1, 2)).view_as(x)


class PixelShuffle(nn.Module):
    """Channels become pixels, or pixels channels."""

    def __init__(self, up: bool) -> None:
        super().__init__()
        self.layer: nn.Module = nn.PixelShuffle(2) if up else nn.PixelUnshuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Standardised(nn.Module):
    """A convolution whose weight is standardised in the forward."""

    def __init__(self, rank: int, channels: int, out: int) -> None:
        super().__init__()
        self.conv, self.norm = CONV[rank](channels, out, 3, padding=1), BATCH_NORM[rank](out)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        dims = tuple(range(1, weight.dim()))
        weight = (weight - weight.mean(dims, keepdim=True)) / (weight.std(dims, keepdim=True) + 0.1)
        run = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
        return F.relu(self.norm(run(x, weight, self.conv.bias, padding=1)))


class Project(nn.Module):
    """A matrix over channels that is a bare parameter: multiplied, or by einsum."""

    def __init__(self, channels: int, out: int, how: str) -> None:
        super().__init__()
        self.weight, self.how = nn.Parameter(torch.randn(channels, out) / channels**0.5), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "einsum":
            y = torch.einsum("bcn,cd->bdn", x.flatten(2), self.weight)
            return y.view(len(x), -1, *x.shape[2:])
        return (x.movedim(1, -1) @ self.weight).movedim(-1, 1)


class Attention(nn.Module):
    """torch's own multi-head attention over places."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        seen = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return x + seen.transpose(1, 2).view_as(x)


class Flat(nn.Module):
    """Channels and pixels become features of a linear layer, and its outputs pixels again."""

    def __init__(self, shape: tuple[int, ...], inner: int) -> None:
        super().__init__()
        size = 1
        for n in shape:
            size *= n
        self.down, self.norm, self.up = nn.Linear(size, inner), nn.BatchNorm1d(inner), nn.Linear(inner, size)
        self.back = nn.Unflatten(1, shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.up(F.relu(self.norm(self.down(x.flatten(1))))))


class Head(nn.Module):
    """Logits: pooled or flattened, with or without a hidden layer."""

    def __init__(self, shape: tuple[int, ...], how: str, classes: int = 3, hidden: int = 0) -> None:
        super().__init__()
        rank = len(shape) - 1
        flat = 1
        for n in shape if how == "flatten" else shape[:1]:
            flat *= n
        self.pool: nn.Module = nn.Identity() if how == "flatten" else GLOBAL_POOL[rank](1)
        layers: list[nn.Module] = [nn.Linear(flat, classes)]
        if hidden:
            layers = [nn.Linear(flat, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, classes)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(torch.flatten(self.pool(x), 1))
