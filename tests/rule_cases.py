"""The table of operator rules: per operator, uses of it for the oracle to judge.

Every rule has a row. A row's operator must be what its cases dispatch to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from oracle import Case, Data, below, positive, single, truth

aten = torch.ops.aten
IMAGE = Data((2, 6, 4, 4), (1,))
FEATURES = Data((3, 6), (1,))
TOKENS = Data((2, 3, 6), (2,))
SIGNAL = Data((2, 6, 5), (1,))
VOLUME = Data((2, 4, 4, 4, 4), (1,))
WHOLE, WIDTH = {"groups": "whole"}, {"groups": "width"}
LOOSE = {"norms": "loose"}


def image(channels: int = 6, side: int = 4, *, dims: tuple[int, ...] = (1,)) -> Data:
    """(2, channels, side, side)."""
    return Data((2, channels, side, side), dims)


def case(run: Callable[..., Any], *data: Data, **more: Any) -> Case:
    """A `Case` with its activations as plain arguments."""
    return Case(run, data, **more)


def each(function: Callable[..., Any], *data: Data, **more: Any) -> list[Case]:
    """One case that applies a function to the activations alone."""
    return [case(lambda m, *x: function(*x), *data, **more)]


def _conv(m: Any, x: torch.Tensor) -> torch.Tensor:
    run = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    return run(x, m.w, getattr(m, "b", None), padding=1, groups=m.groups)


def _conv_transposed(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.conv_transpose2d(x, m.w, getattr(m, "b", None), stride=2, groups=m.groups)


def conv(run: Callable[..., Any], x: Data, w: tuple[int, ...], b: int = 0, groups: int = 1, **more: Any) -> Case:
    """A convolution with weight `w`, a bias where `b` is its size."""
    weights = {"w": w, "b": (b,)} if b else {"w": w}
    return Case(run, [x], weights, {"groups": groups}, **{"contracts": groups == 1, **more})


def convolutions() -> list[Case]:
    """Dense, grouped, depthwise and transposed; with labelled, plain and wrongly labelled inputs."""
    x = image(side=3)
    grouped = {"x": x, "b": 6, "groups": 2}
    return [
        conv(_conv, x, (4, 6, 3, 3), 4),
        conv(_conv, x, (4, 6, 1, 1)),
        conv(_conv, SIGNAL, (4, 6, 3), 4),
        conv(_conv, VOLUME, (3, 4, 3, 3, 3)),
        conv(_conv, image(dims=(0, 1)), (4, 6, 3, 3)),
        conv(_conv, image(dims=()), (4, 6, 3, 3), 4, contracts=True),
        conv(_conv, image(dims=(2,)), (4, 6, 3, 3), contracts=True),
        conv(_conv, w=(6, 3, 3, 3), options=WHOLE, **grouped),  # type: ignore[arg-type]
        conv(_conv, w=(6, 3, 3, 3), options=WIDTH, contracts=True, **grouped),  # type: ignore[arg-type]
        conv(_conv, x, (6, 1, 3, 3), 6, 6, options=WHOLE),
        conv(_conv, x, (12, 1, 3, 3), 12, 6, options=WIDTH),
        conv(_conv, image(dims=()), (6, 3, 3, 3), 6, 2),
        conv(_conv_transposed, x, (6, 4, 2, 2), 4),
        conv(_conv_transposed, w=(6, 3, 2, 2), options=WHOLE, **grouped),  # type: ignore[arg-type]
        conv(_conv_transposed, w=(6, 3, 2, 2), options=WIDTH, contracts=True, **grouped),  # type: ignore[arg-type]
        conv(_conv_transposed, x, (6, 1, 2, 2), 6, 6),
        conv(_conv_transposed, x, (6, 2, 2, 2), 12, 6, options=WIDTH),
        conv(_conv_transposed, image(dims=()), (6, 3, 2, 2), 6, 2),
    ]


def _raw_conv(m: Any, x: torch.Tensor) -> torch.Tensor:
    zero, one = [0, 0], [1, 1]
    return aten._convolution(x, m.w, m.b, one, one, one, False, zero, m.groups, False, False, True, True)


def _mkldnn_conv(m: Any, x: torch.Tensor) -> torch.Tensor:
    return aten.mkldnn_convolution(x, m.w, m.b, [1, 1], [1, 1], [1, 1], m.groups)


def _int8(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.to(torch.int32) @ b.to(torch.int32)


_BYTES = Data((20, 8), (0, 1), below(9, torch.int8))
CONTRACTION = {
    "convolution": convolutions(),
    "_convolution": [conv(_raw_conv, image(), (4, 6, 3, 3), 4)],
    "mkldnn_convolution": [
        conv(_mkldnn_conv, Data((2, 6, 4, 4), (1,), single), (4, 6, 3, 3), 4, make=single, mode="real", tolerance=1e-5)
    ],
    "mm": [
        case(lambda m, x: x @ m.w, FEATURES, weights={"w": (6, 4)}, contracts=True),
        case(lambda m, x: m.w @ x, Data((6, 5), (0,)), weights={"w": (4, 6)}, contracts=True),
        case(lambda m, x: m.w @ x, Data((6, 5), (0, 1)), weights={"w": (4, 6)}, contracts=True),
        case(lambda m, x, y: x @ y, FEATURES, Data((6, 5), (0, 1)), contracts=True),
        case(lambda m, x: x @ m.w, Data((3, 6), (0,)), weights={"w": (6, 4)}, contracts=True),
    ],
    "_int_mm": [
        case(
            lambda m, x, y: aten._int_mm(x, y),
            _BYTES,
            Data((8, 16), (0, 1), below(9, torch.int8)),
            contracts=True,
            twin=lambda m, x, y: _int8(x, y),
        )
    ],
    "addmm": [
        case(
            lambda m, x: torch.addmm(m.b, x, m.w.t()),
            FEATURES,
            weights={"w": (4, 6), "b": (4,)},
            contracts=True,
        ),
        case(
            lambda m, x: torch.addmm(m.b, x, m.w),
            FEATURES,
            weights={"w": (6, 4), "b": (1, 4)},
            contracts=True,
        ),
        case(
            lambda m, x, y: torch.addmm(y, m.w, x, alpha=2),
            Data((6, 5), (0, 1)),
            Data((4, 5), (0, 1)),
            weights={"w": (4, 6)},
            contracts=True,
        ),
    ],
    "linear": [
        case(lambda m, x: F.linear(x, m.w, m.b), TOKENS, weights={"w": (4, 6), "b": (4,)}, contracts=True),
        case(lambda m, x: F.linear(x, m.w), Data((2, 3, 6), (1,)), weights={"w": (4, 6)}, contracts=True),
    ],
    "bmm": [
        case(lambda m, x, y: x @ y, Data((2, 3, 6), (1, 2)), Data((2, 6, 5), (1, 2)), contracts=True),
        case(lambda m, x, y: x @ y, Data((4, 3, 6), (0, 2)), Data((4, 6, 5), (0, 1)), contracts=True),
        case(lambda m, x: torch.bmm(x, m.w), TOKENS, weights={"w": (2, 6, 4)}, contracts=True),
        case(lambda m, x: torch.bmm(m.w, x), SIGNAL, weights={"w": (2, 4, 6)}, contracts=True),
    ],
    "baddbmm": [
        case(
            lambda m, b, x, y: torch.baddbmm(b, x, y),
            Data((2, 3, 5), (1, 2)),
            Data((2, 3, 6), (1, 2)),
            Data((2, 6, 5), (1, 2)),
            contracts=True,
        ),
        case(lambda m, x: torch.baddbmm(m.b, x, m.w), TOKENS, weights={"w": (2, 6, 4), "b": (4,)}, contracts=True),
    ],
    "mv": [
        case(lambda m, x: torch.mv(m.w, x), Data((6,), (0,)), weights={"w": (4, 6)}, contracts=True),
        case(lambda m, x: torch.mv(x, m.w), Data((4, 6), (0, 1)), weights={"w": (6,)}, contracts=True),
        case(lambda m, x, y: torch.mv(x, y), Data((4, 6), (0, 1)), Data((6,), (0,)), contracts=True),
    ],
    "dot": [case(lambda m, x: torch.dot(x, m.w), Data((6,), (0,)), weights={"w": (6,)}, contracts=True)],
    "vdot": [case(lambda m, x: torch.vdot(m.w, x), Data((6,), (0,)), weights={"w": (6,)}, contracts=True)],
    "embedding": [
        case(lambda m, x: F.embedding(x, m.w), Data((2, 5), (), below(7)), weights={"w": (7, 6)}),
        case(lambda m, x: F.embedding(x, m.w), Data((2, 5), (1,), below(7)), weights={"w": (7, 6)}),
    ],
}

# ------------------------------------------------------------------------------------------------- views

STRIPES = Data((2, 6, 1, 1), (1,))
ROWS = Data((2, 6, 4), (2,))


def _shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x.reshape(len(x), groups, -1, 4, 4).transpose(1, 2).reshape(x.shape)


VIEWS = {
    "alias": each(aten.alias, IMAGE),
    "detach": each(torch.detach, IMAGE),
    "clone": each(torch.clone, IMAGE),
    "contiguous": each(lambda x: x.transpose(1, 2).contiguous(), IMAGE),
    "_to_copy": each(lambda x: x.to(torch.float32), IMAGE),
    "to": each(lambda x: x.to(torch.float32), IMAGE),
    "lift_fresh": each(aten.lift_fresh, IMAGE),
    "lift_fresh_copy": each(aten.lift_fresh_copy, IMAGE),
    "view_as": each(lambda x: x.view_as(x), IMAGE),
    "resolve_conj": each(aten.resolve_conj, IMAGE),
    "resolve_neg": each(aten.resolve_neg, IMAGE),
    "positive": each(torch.positive, IMAGE),
    "fill": each(lambda x: x.fill_(2.0), IMAGE) + each(lambda x: aten.fill(x, 2.0), IMAGE),
    "zero": each(lambda x: x.zero_(), IMAGE),
    "normal": each(lambda x: x.normal_(3.0, 0.0), IMAGE),
    "uniform": each(lambda x: x.uniform_(1.0, 1.0), IMAGE),
    "view": [
        *each(lambda x: x.view(len(x), -1), IMAGE),
        *each(lambda x: x.view(len(x), -1, 16), IMAGE),
        *each(lambda x: x.view(-1, 4, 4), IMAGE),
        *each(lambda x: x.view(-1, 16), IMAGE),
        *each(lambda x: x.view(2, 1, x.shape[1], 2, 8), IMAGE),
        *each(lambda x: x.view(len(x), 2, -1, 4, 4), IMAGE),
        *each(lambda x: x.view(2, 3, 2, -1), Data((2, 3, 8), (2,))),
        *each(lambda x: x.view(2, 3, -1).view(2, 3, 2, -1), Data((2, 3, 4, 2), (2,))),
        *each(lambda x: x.view(2, -1).view(2, -1, 4, 4), IMAGE),
        *each(lambda x: x.view(2, -1).view(2, -1, 2, 2, 4), IMAGE),
        *each(lambda x: x.view(-1, 1).view(2, x.shape[1], 16), IMAGE),
        *each(lambda x: x.view(torch.int64), IMAGE),
        *each(lambda x: x.view(-1, 3), Data((1, 3), ())),
        *each(
            lambda x: x.view(2, -1),
            Data((2, 3, 4), (1, 2)),
            cautious="where two dims with channels are flattened into one, the second stays",
        ),
    ],
    "_unsafe_view": [
        *each(lambda x: _shuffle(x, 2), IMAGE),
        *each(lambda x: _shuffle(x, 3), IMAGE),
        *each(lambda x: x.flatten(2).transpose(1, 2).reshape(-1, x.shape[1]), IMAGE),
    ],
    "reshape": each(lambda x: x.transpose(1, 2).reshape(2, 4, -1), IMAGE),
    "_reshape_alias": each(lambda x: aten._reshape_alias(x, [2, x.shape[1] * 16], [x.stride(0), 1]), IMAGE),
    "_reshape_copy": each(lambda x: aten._reshape_copy(x, [2, -1]), IMAGE),
    "as_strided": [
        *each(lambda x: x.as_strided(x.shape, (x.shape[1], 1, x.shape[1], 1)), STRIPES),
        *each(lambda x: x.as_strided(x.shape, (1, 6)), Data((6, 6), (1,)), refused=True),
        *each(lambda x: x.as_strided((2, 2, 4, 4), (96, 32, 4, 1)), IMAGE, refused=True),
    ],
    "view_copy": each(lambda x: aten.view_copy(x, [2, -1, 16]), IMAGE),
    "unsqueeze": [
        *each(lambda x: x.unsqueeze(0), IMAGE),
        *each(lambda x: x.unsqueeze(1), IMAGE),
        *each(lambda x: x.unsqueeze(2), IMAGE),
        *each(lambda x: x.unsqueeze(-1), FEATURES),
        *each(lambda x: x.unsqueeze(-2), FEATURES),
    ],
    "squeeze": [
        *each(lambda x: x.squeeze(), STRIPES, least=2),
        *each(lambda x: x.squeeze(-1), STRIPES),
        *each(lambda x: x.squeeze((2, 3)), STRIPES),
        *each(lambda x: x.squeeze(1), STRIPES, least=2),
        *each(lambda x: x.squeeze(1), Data((2, 1, 4), (1, 2))),
    ],
    "permute": [*each(lambda x: x.permute(0, 2, 3, 1), IMAGE), *each(lambda x: x.permute(-3, 0, -1, 2), IMAGE)],
    "t": each(torch.t, FEATURES) + each(torch.t, Data((6,), (0,))),
    "numpy_T": each(lambda x: x.T, FEATURES),
    "transpose": each(lambda x: x.transpose(1, 2), IMAGE) + each(lambda x: x.transpose(-1, -3), IMAGE),
    "swapaxes": each(lambda x: x.swapaxes(1, 3), IMAGE),
    "expand": [
        *each(lambda x: x.expand(-1, -1, 3, 2), STRIPES),
        *each(lambda x: x.expand(5, 2, -1, 3, 2), STRIPES),
        *each(lambda x: x.expand(2, 3, -1), Data((2, 1, 4), (1, 2))),
    ],
    "expand_copy": each(lambda x: aten.expand_copy(x, [2, x.shape[1], 3, 2]), STRIPES),
    "repeat": [
        *each(lambda x: x.repeat(1, 2, 1, 1), IMAGE),
        *each(lambda x: x.repeat(3, 1, 1, 1, 2), IMAGE),
        *each(lambda x: x.repeat(2), Data((6,), (0,))),
    ],
    "flip": [
        *each(lambda x: x.flip(1), IMAGE),
        *each(lambda x: x.flip(-3, 2), IMAGE),
        *each(lambda x: x.flip(-1), IMAGE),
    ],
    "pixel_shuffle": [
        *each(lambda x: F.pixel_shuffle(x, 2), image(8, 3)),
        *each(lambda x: F.pixel_shuffle(x, 2), Data((8, 3, 3), (0,))),
        *each(lambda x: F.pixel_shuffle(x, 2), image(8, 3, dims=(2,)), cautious="resampled dims stay"),
    ],
    "pixel_unshuffle": [
        *each(lambda x: F.pixel_unshuffle(x, 2), IMAGE),
        *each(lambda x: F.pixel_unshuffle(x, 2), Data((6, 4, 4), (0,))),
        *each(lambda x: F.pixel_unshuffle(x, 2), image(dims=(3,))),
    ],
    "channel_shuffle": [
        *each(lambda x: torch.channel_shuffle(x, 2), IMAGE),
        *each(lambda x: torch.channel_shuffle(x, 3), IMAGE),
    ],
    "native_channel_shuffle": each(lambda x: torch.native_channel_shuffle(x, 3), IMAGE),
}

# ------------------------------------------------------------------------------------- fresh tensors


def meets(fresh: Callable[[torch.Tensor], torch.Tensor], *data: Data) -> list[Case]:
    """The sum of an activation and a tensor made for it."""
    return each(lambda x: x + fresh(x), *(data or (IMAGE,)))


def _like(x: torch.Tensor) -> dict[str, Any]:
    return {"dtype": x.dtype, "device": x.device}


def _strides(x: torch.Tensor) -> tuple[Any, Any]:
    return x.shape, x.contiguous().stride()


CREATION = {
    "zeros_like": meets(torch.zeros_like),
    "ones_like": meets(torch.ones_like),
    "full_like": meets(lambda x: torch.full_like(x, 3.0)),
    "empty_like": meets(lambda x: torch.empty_like(x).fill_(2.0)),
    "rand_like": meets(lambda x: torch.rand_like(x) * 0.0),
    "randn_like": meets(lambda x: torch.randn_like(x) * 0.0),
    "zeros": meets(lambda x: torch.zeros(x.shape[1], 1, 1, **_like(x))),
    "ones": meets(lambda x: torch.ones(x.shape[1], **_like(x)).view(1, -1, 1, 1)),
    "full": meets(lambda x: torch.full(x.shape, 3.0, **_like(x))),
    "empty": meets(lambda x: torch.empty(x.shape[1:], **_like(x)).fill_(2.0).unsqueeze(0)),
    "rand": meets(lambda x: torch.rand(x.shape, **_like(x)).mul(0.0)),
    "randn": meets(lambda x: torch.randn(x.shape, **_like(x)).mul(0.0)),
    "new_zeros": meets(lambda x: x.new_zeros(x.shape)),
    "new_ones": meets(lambda x: x.new_ones(x.shape).clone()),
    "new_full": meets(lambda x: x.new_full(x.shape, 3.0)),
    "new_empty": meets(lambda x: x.new_empty(x.shape).zero_()),
    "scalar_tensor": meets(lambda x: torch.scalar_tensor(2.0, **_like(x))),
    "empty_strided": meets(lambda x: torch.empty_strided(*_strides(x), **_like(x)).fill_(2.0)),
    "new_empty_strided": meets(lambda x: x.new_empty_strided(*_strides(x)).fill_(2.0)),
    "arange": meets(lambda x: torch.arange(x.shape[1], device=x.device).view(-1, 1, 1)),
    "linspace": meets(lambda x: torch.linspace(0, 1, x.shape[1], device=x.device), FEATURES),
    "eye": meets(lambda x: torch.eye(*x.shape, **_like(x)), FEATURES),
    "randperm": meets(lambda x: torch.randperm(x.shape[1], device=x.device), FEATURES),
    "randint": meets(lambda x: torch.randint(99, x.shape[1:], device=x.device), FEATURES),
    "tril_indices": meets(lambda x: torch.tril_indices(3, 3, device=x.device)[:1], FEATURES),
    "triu_indices": meets(lambda x: torch.triu_indices(3, 3, device=x.device)[:1], FEATURES),
}

# ---------------------------------------------------------------------------------------------- joins


def cat(*parts: Data, dim: int = 1) -> list[Case]:
    """A concatenation of activations."""
    return each(lambda *x: torch.cat(x, dim), *parts)


JOINS = {
    "cat": [
        *cat(IMAGE, image(3), image(2)),
        *cat(IMAGE, image(3), dim=-3),
        *cat(IMAGE, image(3, dims=())),
        *cat(image(3, dims=()), IMAGE),
        *cat(IMAGE, IMAGE, dim=0),
        *cat(IMAGE, IMAGE, dim=-1),
        *cat(IMAGE, image(dims=()), dim=2),
        *cat(image(dims=()), image(dims=())),
        *each(lambda x: torch.cat([x, -x], 1), IMAGE),
        *each(lambda x: torch.cat([x.new_zeros(0), x, x.new_zeros(len(x), 2, 4, 4)], 1), IMAGE),
        case(lambda m, x: torch.cat([x, m.w], 1), IMAGE, weights={"w": (2, 3, 4, 4)}),
    ],
    "concat": each(lambda *x: torch.concat(x, -3), IMAGE, image(3)),
    "stack": [
        *each(lambda *x: torch.stack(x), IMAGE, IMAGE),
        *each(lambda *x: torch.stack(x, 1), IMAGE, IMAGE, IMAGE),
        *each(lambda *x: torch.stack(x, 2), IMAGE, IMAGE),
        *each(lambda *x: torch.stack(x, -1), FEATURES, FEATURES),
        *each(lambda *x: torch.stack(x, 1), IMAGE, image(dims=())),
    ],
}

# ---------------------------------------------------------------------------------------------- parts


def sized(run: Callable[..., Any], data: Data, **attributes: Any) -> list[Case]:
    """A call whose sizes are attributes of the module."""
    return [Case(run, [data], attributes=attributes)]


def following(run: Callable[..., Any], data: Data, dim: int, *ends: int) -> list[Case]:
    """A call whose bounds `m.a`, `m.b` ... follow the channels before them."""
    counts = {name: (0, dim, 0, end) for name, end in zip("abc", ends)}
    return [Case(run, [data], attributes=dict(zip("abc", ends)), counts=counts)]


def _unbound(x: torch.Tensor) -> torch.Tensor:
    return torch.stack(x.unbind(1), 1)


MASK = Data((4,), (), lambda shape: torch.tensor([True, False, True, True]))
MASK2 = Data((2, 6), (), lambda shape: torch.arange(12).view(shape) % 3 > 0)
PICK = Data((3,), (), below(4))
PARTS = {
    "split": [
        *each(lambda x: x.chunk(2, 1), IMAGE),
        *each(lambda x: x.chunk(3, -3), IMAGE),
        *each(lambda x: x.split(2, 1), image(dims=())),
        *each(lambda x: x.split(2, 2), IMAGE),
        *each(lambda x: x.split(2, -1), IMAGE),
        *each(lambda x: x.split(x.shape[-3] // 2, -3), IMAGE),
        *sized(lambda m, x: x.split(m.width, 1), IMAGE, width=2),
        *each(lambda x: x.split(4, 1), IMAGE),
    ],
    "split_with_sizes": [
        *each(lambda x: x.split([4, 2], 1), IMAGE),
        *each(lambda x: x.split([3, 1], -1), IMAGE),
        *sized(lambda m, x: x.split(m.sizes, 1), IMAGE, sizes=[1, 3, 2]),
        *sized(lambda m, x: x.split(m.sizes, -3), IMAGE, sizes=(3, 3)),
        *sized(lambda m, x: x.split([m.near, m.far], 1), IMAGE, near=4, far=2),
    ],
    "unsafe_split": each(lambda x: torch.unsafe_split(x, x.shape[1] // 2, -3), IMAGE),
    "unsafe_split_with_sizes": each(lambda x: torch.unsafe_split_with_sizes(x, [3, 1], -1), IMAGE),
    "split_copy": each(lambda x: aten.split_copy.Tensor(x, x.shape[1] // 3, 1), IMAGE),
    "split_with_sizes_copy": each(lambda x: aten.split_with_sizes_copy(x, [4, 2], 1), IMAGE),
    "slice": [
        *following(lambda m, x: x[:, : m.a], IMAGE, 1, 4),
        *following(lambda m, x: x[:, m.a : m.b], IMAGE, 1, 1, 5),
        *following(lambda m, x: (x[:, : m.a], x[:, m.a :]), IMAGE, 1, 2),
        *following(lambda m, x: x.narrow(-3, 0, m.a), IMAGE, 1, 4),
        *each(lambda x: x[:, :, 1:, ::2], IMAGE),
        *each(lambda x: x[..., -2:], IMAGE),
    ],
    "slice_copy": following(lambda m, x: aten.slice_copy(x, 1, 0, m.a), IMAGE, 1, 4),
    "select": [
        *each(lambda x: x[:, 2], IMAGE),
        *each(lambda x: x.select(-3, 2), IMAGE),
        *each(lambda x: x[:, :, 1], IMAGE),
        *each(lambda x: x[0], IMAGE),
        *each(lambda x: x[..., -1], IMAGE),
    ],
    "select_copy": each(lambda x: aten.select_copy(x, 0, 1), IMAGE),
    "unbind": [
        *each(_unbound, IMAGE, cautious="each index becomes a tensor of its own, whatever follows"),
        *each(lambda x: x.unbind(0), IMAGE),
        *each(lambda x: x.unbind(-1), IMAGE),
    ],
    "unbind_copy": each(lambda x: aten.unbind_copy(x, 2), IMAGE),
    "index_select": [
        *each(lambda x, i: x.index_select(2, i), IMAGE, PICK),
        *each(lambda x, i: x.index_select(-1, i), IMAGE, PICK),
        *each(lambda x, i: x.index_select(1, i), IMAGE, PICK),
    ],
    "index": [
        *each(lambda x, i: x[:, :, i], IMAGE, PICK),
        *each(lambda x, i: x[:, i], IMAGE, PICK),
        *each(lambda x, i: x[i], Data((4, 6), (1,)), Data((2, 3), (), below(4))),
        *each(lambda x, i: x[i], Data((4, 6), (1,)), Data((2, 6), (1,), below(4))),
        *each(lambda x, i: x[i], Data((4, 6), (1,)), MASK, mode="real"),
        *each(lambda x, i: x[:, i, i], IMAGE, PICK, refused=True),
        *each(lambda x, i: x[i], IMAGE, MASK2, mode="real", refused=True),
    ],
    "constant_pad_nd": [
        *each(lambda x: F.pad(x, (1, 1, 2, 0)), IMAGE),
        *each(lambda x: F.pad(x, (0, 0, 0, 0, 2, 1)), IMAGE, cautious="padded channels stay"),
        *each(lambda x: F.pad(x, (0, 0, 0, 0, -2, 0)), IMAGE, cautious="cropped channels stay"),
        *each(lambda x: F.pad(x, (0, 0, 1, 1)), ROWS),
    ],
    "roll": [
        *each(lambda x: x.roll(1, 1), IMAGE),
        *each(lambda x: x.roll((1, 2), (2, -1)), IMAGE),
        *each(lambda x: x.roll(2), IMAGE),
    ],
}

# ---------------------------------------------------------------------------------------------- norms

_AFFINE = {"g": (6,), "b": (6,)}
_RUNNING = {**_AFFINE, "mean": (6,), "var": (6,)}


def levelled(shape: tuple[int, ...]) -> torch.Tensor:
    """Every channel holds the same values in another order, so that any of them have the same mean and variance."""
    values = torch.linspace(-1, 2, shape[2], dtype=torch.float64)
    rows = [values[torch.randperm(shape[2])] for _ in range(shape[0] * shape[1])]
    return torch.stack(rows).view(shape)


LEVEL = Data((2, 6, 5), (1,), levelled)


def normed(run: Callable[..., Any], *data: Data, weights: dict[str, Any] = _RUNNING, **more: Any) -> list[Case]:
    """A norm with its parameters."""
    return [case(run, x, weights=weights, make=positive, **more) for x in data or (IMAGE, FEATURES)]


def _batch_norm(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, m.mean, m.var, m.g, m.b)


def raw_norm(function: Callable[..., Any]) -> Callable[..., Any]:
    """An ATen batch norm, which reads past the end of parameters that are too short, made to raise instead."""

    def run(m: Any, x: torch.Tensor) -> Any:
        parameters = list(m.parameters())
        if any(p.shape != x.shape[1:2] for p in parameters):
            raise ValueError("parameters of another size")
        return function(x, *parameters)

    return run


NORMS = {
    "native_batch_norm": [
        *normed(raw_norm(lambda x, g, b, *m: aten.native_batch_norm(x, g, b, *m, False, 0.1, 1e-5)[0])),
        *normed(raw_norm(lambda x, g, b, *m: aten.native_batch_norm(x, g, b, *m, True, 0.1, 1e-5))),
        *normed(lambda m, x: F.batch_norm(x, None, None, training=True)),
        *normed(lambda m, x: F.batch_norm(x, m.mean, m.var)),
        *normed(_batch_norm, VOLUME, weights=dict.fromkeys(_RUNNING, (4,))),
        *normed(_batch_norm, image(dims=())),
        *normed(_batch_norm, image(dims=(0, 1, 2))),
        *normed(lambda m, x: F.batch_norm(x, None, None, training=True), image(dims=(0, 1))),
        *normed(lambda m, x: F.instance_norm(x, weight=m.g, bias=m.b), IMAGE),
    ],
    "_native_batch_norm_legit": [
        *normed(raw_norm(lambda x, g, b, *m: aten._native_batch_norm_legit(x, g, b, *m, False, 0.1, 1e-5)[0])),
        *normed(raw_norm(lambda x, *m: aten._native_batch_norm_legit(x, *m, True, 0.1, 1e-5)), weights=_AFFINE),
    ],
    "_native_batch_norm_legit_no_training": normed(
        raw_norm(lambda x, *m: aten._native_batch_norm_legit_no_training(x, *m, 0.1, 1e-5)[0])
    ),
    "cudnn_batch_norm": normed(
        raw_norm(lambda x, *m: aten.cudnn_batch_norm(x, *m, False, 0.1, 1e-5)[0]), twin=_batch_norm
    ),
    "miopen_batch_norm": normed(
        raw_norm(lambda x, *m: aten.miopen_batch_norm(x, *m, False, 0.1, 1e-5)[0]), twin=_batch_norm
    ),
    "_batch_norm_no_update": normed(raw_norm(lambda x, *m: aten._batch_norm_no_update(x, *m, 0.1, 1e-5)[0])),
    "_batch_norm_with_update": normed(raw_norm(lambda x, *m: aten._batch_norm_with_update(x, *m, 0.1, 1e-5)[:3])),
    "native_layer_norm": [
        *normed(lambda m, x: F.layer_norm(x, x.shape[2:], m.g, m.b), TOKENS, weights=_AFFINE),
        *normed(lambda m, x: F.layer_norm(x, x.shape[2:]), Data((2, 6, 5), (1,)), weights={}),
        *normed(lambda m, x: F.layer_norm(x, x.shape[1:], m.g, m.b), SIGNAL, weights={"g": (6, 5), "b": (6, 5)}),
        *normed(
            lambda m, x: F.layer_norm(x, x.shape[1:], m.g, m.b),
            LEVEL,
            weights={"g": (6, 5), "b": (6, 5)},
            options=LOOSE,
        ),
    ],
    "rms_norm": [
        *normed(lambda m, x: F.rms_norm(x, x.shape[2:], m.g), TOKENS, weights={"g": (6,)}),
        *normed(lambda m, x: F.rms_norm(x, x.shape[1:], m.g), LEVEL, weights={"g": (6, 5)}, options=LOOSE),
    ],
    "_fused_rms_norm": [
        *normed(lambda m, x: aten._fused_rms_norm(x, x.shape[2:], m.g, 1e-5)[0], TOKENS, weights={"g": (6,)}),
        *normed(
            lambda m, x: aten._fused_rms_norm(x, x.shape[1:], m.g, 1e-5)[0],
            LEVEL,
            weights={"g": (6, 5)},
            options=LOOSE,
        ),
    ],
    "native_group_norm": [
        *normed(lambda m, x: F.group_norm(x, 2, m.g, m.b), weights=_AFFINE),
        *normed(lambda m, x: F.group_norm(x, 2, m.g, m.b), LEVEL, weights=_AFFINE, options=LOOSE),
        *normed(lambda m, x: F.group_norm(x, 3), LEVEL, weights={}, options=LOOSE),
        *normed(lambda m, x: F.group_norm(x, 2, m.g, m.b), image(dims=()), weights=_AFFINE),
        *normed(lambda m, x: F.group_norm(x, 2, m.g, m.b), image(dims=(0, 2)), weights=_AFFINE),
    ],
}

# ------------------------------------------------------------------------------------------ reductions


def reduction(function: Callable[..., Any], name: str = "dim", *, both: bool = True) -> list[Case]:
    """A reduction over pixels, over channels, over a dim that is kept with size 1, and over all."""
    pixels: Any = [2, 3] if both else -1
    return [
        *each(lambda x: function(x, **{name: pixels}), IMAGE),
        *each(lambda x: function(x, **{name: [1] if both else 1}), IMAGE),
        *each(lambda x: function(x, **{name: -1 if not both else (-1,), "keepdim": True}), IMAGE),
        *each(lambda x: function(x, **{name: 1 if not both else (1,), "keepdim": True}), IMAGE),
    ]


def total(function: Callable[..., Any]) -> list[Case]:
    """A reduction over everything."""
    return each(function, IMAGE)


_BITS = Data((2, 6, 4, 4), (1,), truth)
REDUCTIONS = {
    "mean": reduction(torch.mean) + total(torch.mean),
    "sum": reduction(torch.sum) + total(torch.sum),
    "amax": reduction(torch.amax) + total(torch.amax),
    "amin": reduction(torch.amin) + total(torch.amin),
    "max": reduction(torch.max, both=False) + total(torch.max),
    "min": reduction(torch.min, both=False) + total(torch.min),
    "var": reduction(torch.var) + total(torch.var),
    "std": reduction(torch.std) + total(torch.std),
    "var_mean": reduction(torch.var_mean) + total(torch.var_mean),
    "std_mean": reduction(torch.std_mean) + total(torch.std_mean),
    "prod": reduction(torch.prod, both=False) + total(torch.prod),
    "logsumexp": reduction(torch.logsumexp),
    "linalg_vector_norm": reduction(torch.linalg.vector_norm) + total(torch.linalg.vector_norm),
    "norm": [
        *each(lambda x: aten.norm.ScalarOpt_dim(x, 2, [2, -1]), IMAGE),
        *each(lambda x: aten.norm.ScalarOpt_dim(x, 2, [1], True), IMAGE),
        *each(lambda x: aten.norm.Scalar(x, 2), IMAGE),
    ],
    "argmax": [
        *each(lambda x: x.argmax(1), IMAGE),
        *each(lambda x: x.argmax(-1, keepdim=True), IMAGE),
        *each(torch.argmax, FEATURES),
    ],
    "argmin": each(lambda x: x.argmin(1), IMAGE) + each(lambda x: x.argmin(2), IMAGE),
    "any": [
        *each(lambda x: x.any(2), _BITS),
        *each(lambda x: x.any(1), Data((50, 6), (1,), truth)),
    ],
    "all": each(lambda x: x.all(2), _BITS) + each(lambda x: (x > -2).all(1), Data((50, 6), (1,))),
    "median": reduction(torch.median, both=False) + total(torch.median),
    "aminmax": each(lambda x: x.aminmax(dim=2), IMAGE) + each(lambda x: x.aminmax(dim=1), IMAGE),
    "nansum": reduction(torch.nansum) + total(torch.nansum),
    "count_nonzero": each(lambda x: x.count_nonzero(2), _BITS) + each(lambda x: x.count_nonzero(1), _BITS),
}


def along(function: Callable[..., Any]) -> list[Case]:
    """An operator whose results along a dim depend on all its indices: over channels, over pixels."""
    return [
        *each(lambda x: function(x, 1), IMAGE),
        *each(lambda x: function(x, -1), IMAGE),
        *each(lambda x: function(x, -3), IMAGE),
    ]


MIXING = {
    "_softmax": along(torch.softmax),
    "_log_softmax": along(torch.log_softmax),
    "_safe_softmax": along(aten._safe_softmax),
    "softmax": along(torch.softmax),
    "log_softmax": along(torch.log_softmax),
    "cumsum": along(torch.cumsum),
    "cumprod": along(torch.cumprod),
    "sort": along(torch.sort) + each(lambda x: torch.sort(x, dim=1, stable=True, descending=True), FEATURES),
    "logcumsumexp": along(torch.logcumsumexp),
}

# ------------------------------------------------------------------------------------------ pointwise

_GATE = Data((2, 6, 1, 1), (1,))
_MASK = Data((2, 6, 4, 4), (1,), truth)
_PLAIN = image(dims=())
POINTWISE = {
    "add": [
        *each(torch.add, IMAGE, IMAGE),
        *each(lambda x, y: x + 2 * y, IMAGE, _GATE),
        *each(torch.add, _GATE, IMAGE),
        *each(torch.add, IMAGE, _PLAIN),
        *each(torch.add, IMAGE, Data((2, 1, 4, 4))),
        *each(torch.add, IMAGE, Data((6, 1, 1), (0,))),
        *each(torch.add, Data((6, 1), (0,)), Data((5,), (0,))),
        *each(lambda x, y: x.add_(y), IMAGE, IMAGE),
        *each(lambda x: x + 1, IMAGE),
        *each(lambda x: x + x.flip(1), IMAGE),
        case(lambda m, x: x + m.p, IMAGE, weights={"p": (6, 1, 1)}),
        case(lambda m, x: x + m.p, TOKENS, weights={"p": (1, 3, 6)}),
        *each(lambda x, y: x + (torch.zeros_like(y) + y), IMAGE, _GATE),
        *each(lambda x: x + (x.new_zeros(x.shape).add_(1) + x.new_ones(1)), IMAGE),
    ],
    "copy": [
        *each(lambda x: x.new_empty(x.shape).copy_(x), IMAGE),
        *each(lambda x, y: x.copy_(y), IMAGE, IMAGE),
        *each(lambda x, y: x.copy_(y), IMAGE, _GATE),
    ],
    "dropout": each(lambda x: F.dropout(x, 0.5, training=False), IMAGE),
    "native_dropout": each(lambda x: aten.native_dropout(x, 0.0, True), IMAGE),
    "bernoulli": [
        *each(lambda x: torch.bernoulli(x.gt(0).to(x.dtype)), IMAGE),
        *each(lambda x: x * torch.empty_like(x).bernoulli_(1.0), IMAGE),
        *each(lambda x: x * x.new_empty(x.shape).bernoulli_(1.0), IMAGE),
    ],
    "_prelu_kernel": [
        case(lambda m, x: F.prelu(x, m.w), IMAGE, weights={"w": (6,)}),
        case(lambda m, x: F.prelu(x, m.w), IMAGE, weights={"w": (1,)}),
    ],
    "masked_fill": [
        *each(lambda x, m: x.masked_fill(m, 0.5), IMAGE, _MASK),
        *each(lambda x, m: x.masked_fill(m, 0.5), IMAGE, Data((4, 4), (), truth)),
        *each(lambda x, m: x.masked_fill_(m, 0.5), IMAGE, Data((2, 6, 4, 4), (), truth)),
    ],
    "where": [
        *each(torch.where, _MASK, IMAGE, IMAGE),
        *each(lambda m, x: torch.where(m, x, 0.0), Data((4, 4), (), truth), IMAGE),
        *each(torch.where, Data((2, 1, 4, 4), (), truth), IMAGE, _GATE),
    ],
    "relu": each(torch.relu, IMAGE) + each(lambda x: F.relu(x, inplace=True), IMAGE),
    "relu6": each(aten.relu6, IMAGE),
    "hardswish": each(F.hardswish, IMAGE) + each(lambda x: F.hardswish(x, inplace=True), IMAGE),
    "hardsigmoid": each(F.hardsigmoid, IMAGE),
    "hardtanh": each(F.relu6, IMAGE),
    "rrelu_with_noise": each(lambda x: F.rrelu(x, training=False), IMAGE),
    "lerp": each(lambda x, y: torch.lerp(x, y, 0.3), IMAGE, IMAGE) + each(torch.lerp, IMAGE, IMAGE, _GATE),
    "clamp": [
        *each(lambda x: x.clamp(-0.5, 0.5), IMAGE),
        *each(lambda x, low: x.clamp(min=low), IMAGE, _GATE),
        *each(lambda x: x.clamp_(max=0.5), IMAGE),
    ],
    "threshold": each(lambda x: F.threshold(x, 0.1, 2.0), IMAGE),
    "softplus": each(F.softplus, IMAGE),
}

# -------------------------------------------------------------------------------------------- spatial


def resampling(function: Callable[..., Any], rank: int = 2, cautious: str = "") -> list[Case]:
    """An operator on the last `rank` dims: with channels before them, without a batch, and on them."""
    pixels = (4,) * rank
    return [
        *each(function, Data((2, 6, *pixels), (1,))),
        *each(function, Data((2, 6, *pixels), (0, 1))),
        *each(function, Data((2, 6, *pixels), (2,)), cautious=cautious),
    ]


def resize(mode: str, rank: int, **more: Any) -> list[Case]:
    """Interpolation to twice the size and to a fixed size."""
    whole = "resampled dims stay, even by a whole factor" if "nearest" in mode else ""
    return [
        *resampling(lambda x: F.interpolate(x, scale_factor=2, mode=mode, **more), rank, whole),
        *resampling(lambda x: F.interpolate(x, size=(7,) * rank, mode=mode, **more), rank),
    ]


def padding(mode: str, rank: int) -> list[Case]:
    """Padding by the input's own values."""
    return resampling(lambda x: F.pad(x, (1, 2) * rank, mode=mode), rank)


def _fractional(function: Callable[..., Any], rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(x: torch.Tensor) -> torch.Tensor:
        samples = torch.full((x.shape[0], x.shape[1], rank), 0.4, dtype=x.dtype, device=x.device)
        return function(x, 2, output_size=2, _random_samples=samples)

    return run


def _boxes(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([[0, 0.0, 0.0, 2.0, 3.0], [1, 1.0, 0.0, 3.0, 3.0], [0, 1.0, 1.0, 3.0, 2.0]]).double()


def _roi(name: str) -> Callable[..., Any]:
    def run(x: torch.Tensor, boxes: torch.Tensor) -> Any:
        import torchvision.ops

        return getattr(torchvision.ops, name)(x, boxes, 2)

    return run


_ROIS = Data((3, 5), (), _boxes)
SPATIAL = {
    "max_pool2d_with_indices": resampling(lambda x: F.max_pool2d(x, 2)),
    "max_pool3d_with_indices": resampling(lambda x: F.max_pool3d(x, 2), 3),
    "adaptive_max_pool2d": resampling(lambda x: F.adaptive_max_pool2d(x, 2)),
    "adaptive_max_pool3d": resampling(lambda x: F.adaptive_max_pool3d(x, 2), 3),
    "avg_pool1d": resampling(lambda x: F.avg_pool1d(x, 2), 1),
    "avg_pool2d": resampling(lambda x: F.avg_pool2d(x, 2)),
    "avg_pool3d": resampling(lambda x: F.avg_pool3d(x, 2), 3),
    "_adaptive_avg_pool2d": resampling(lambda x: F.adaptive_avg_pool2d(x, 2)),
    "_adaptive_avg_pool3d": resampling(lambda x: F.adaptive_avg_pool3d(x, 2), 3),
    "adaptive_avg_pool1d": resampling(lambda x: F.adaptive_avg_pool1d(x, 2), 1),
    "max_pool2d": resampling(lambda x: F.max_pool2d(x, 3, 1)),
    "max_pool3d": resampling(lambda x: F.max_pool3d(x, 3, 1), 3),
    "fractional_max_pool2d": resampling(_fractional(F.fractional_max_pool2d, 2)),
    "fractional_max_pool3d": resampling(_fractional(F.fractional_max_pool3d, 3), 3),
    "upsample_nearest1d": resize("nearest", 1),
    "upsample_nearest2d": resize("nearest", 2),
    "upsample_nearest3d": resize("nearest", 3),
    "upsample_linear1d": resize("linear", 1),
    "upsample_bilinear2d": resize("bilinear", 2),
    "upsample_trilinear3d": resize("trilinear", 3),
    "upsample_bicubic2d": resize("bicubic", 2),
    "_upsample_nearest_exact1d": resize("nearest-exact", 1),
    "_upsample_nearest_exact2d": resize("nearest-exact", 2),
    "_upsample_nearest_exact3d": resize("nearest-exact", 3),
    "_upsample_bilinear2d_aa": resize("bilinear", 2, antialias=True),
    "_upsample_bicubic2d_aa": resize("bicubic", 2, antialias=True),
    "reflection_pad1d": padding("reflect", 1),
    "reflection_pad2d": padding("reflect", 2),
    "reflection_pad3d": padding("reflect", 3),
    "replication_pad1d": padding("replicate", 1),
    "replication_pad2d": padding("replicate", 2),
    "replication_pad3d": padding("replicate", 3),
    "im2col": [
        *each(lambda x: F.unfold(x, 3, padding=1), image(3)),
        *each(lambda x: F.unfold(x, (2, 1)), IMAGE),
        *each(lambda x: F.unfold(x, 2), Data((6, 4, 4), (0,))),
        *each(lambda x: F.unfold(x, 2), image(dims=(2,))),
    ],
    "grid_sampler_2d": [
        *each(lambda x, g: F.grid_sample(x, g, align_corners=False), IMAGE, Data((2, 3, 3, 2))),
        *each(lambda x, g: F.grid_sample(x, g, align_corners=False), IMAGE, Data((2, 3, 3, 2), (3,))),
        *each(
            lambda x, g: F.grid_sample(x, g, align_corners=False),
            IMAGE,
            Data((2, 3, 3, 2), (1,)),
            cautious="places stay, though each is sampled alone",
        ),
        *each(lambda x, g: F.grid_sample(x, g, align_corners=False), image(dims=(2,)), Data((2, 3, 3, 2))),
    ],
    "grid_sampler_3d": each(lambda x, g: F.grid_sample(x, g, align_corners=False), VOLUME, Data((2, 3, 3, 3, 3))),
    "torchvision::roi_align": [
        *each(_roi("roi_align"), IMAGE, _ROIS),
        *each(_roi("roi_align"), image(dims=(2,)), _ROIS),
        *each(_roi("roi_align"), IMAGE, Data((3, 5), (1,), _boxes)),
    ],
    "torchvision::roi_pool": each(_roi("roi_pool"), IMAGE, _ROIS),
}
