"""Rows of the rule table: operators that only move values, or make new ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from oracle import Case, Data, below, truth
from rule_rows import FEATURES, IMAGE, SIGNAL, TOKENS, aten, case, each, image

# ------------------------------------------------------------------------------------------------- views

STRIPES = Data((2, 6, 1, 1), (1,))
ROWS = Data((2, 6, 4), (2,))


def _given_away(x: torch.Tensor) -> torch.Tensor:
    copied = x.clone()
    doubled = 2 * copied
    copied.set_()  # type: ignore[call-overload]
    return doubled


def _shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x.reshape(len(x), groups, -1, 4, 4).transpose(1, 2).reshape(x.shape)


ROWS_OF = Data((2, 6, 4), (1,))
PICK_FIVE = Data((4,), (), below(5))
_LAST = "the last row or column of a triangle may go alone, as it holds a single number or none"


def _scattered(name: str) -> Callable[..., Any]:
    return lambda x, i: getattr(x.new_zeros(2, x.shape[1], 5), name)(2, i.expand_as(x), x)


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
        *each(lambda x: x.view(1, -1, 1, 1), Data((6,), (0,))),
        *each(lambda x: x.view(1, -1), Data((6,), (0,))),
        *each(lambda x: x.view(-1, 1, 1), Data((6,), (0,))),
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
    "resize": [
        *each(lambda x: x.clone().resize_(x.shape), IMAGE),
        *each(lambda x: x + x.new_zeros(0).resize_(x.shape).fill_(2.0), IMAGE),
        *each(lambda x: x.clone().resize_(2, 6, 2, 4), IMAGE, refused=True),
    ],
    "set": [
        *each(_given_away, IMAGE),
        *each(lambda x: x.clone().set_(x), IMAGE, refused=True),
    ],
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
        *each(lambda x, y: x * y.expand_as(x), IMAGE, Data((2, 1, 4, 4), ())),
        *each(lambda x, y: y.expand_as(x).transpose(1, 2).sigmoid() + x.transpose(1, 2), IMAGE, Data((2, 1, 4, 4), ())),
        *each(lambda x, y: x + (y[None].expand_as(x).clone() * 2 + y), IMAGE, Data((1, 4, 4), ())),
    ],
    "expand_copy": each(lambda x: aten.expand_copy(x, [2, x.shape[1], 3, 2]), STRIPES),
    "repeat": [
        *each(lambda x: x.repeat(1, 2, 1, 1), IMAGE),
        *each(lambda x: x.repeat(3, 1, 1, 1, 2), IMAGE),
        *each(lambda x: x.repeat(2), Data((6,), (0,))),
        *each(lambda x, y: x * y.repeat(1, x.shape[1], 1, 1), IMAGE, Data((2, 1, 4, 4), ())),
    ],
    "tril": [
        case(lambda m, x, k=k: x @ m.w.tril(k), TOKENS, weights={"w": (6, 6)}, contracts=True, cautious=why)
        for k, why in ((0, _LAST), (-1, _LAST), (1, ""), (2, ""))
    ],
    "triu": [
        *(
            case(lambda m, x, k=k: m.w.triu(k) @ x, SIGNAL, weights={"w": (6, 6)}, contracts=True, cautious=why)
            for k, why in ((0, _LAST), (1, _LAST), (-1, ""))
        ),
        *each(torch.triu, IMAGE),
        *each(torch.triu, Data((2, 6, 6), (1,))),
        case(lambda m, x: x @ m.w.triu(), TOKENS, weights={"w": (6, 4)}, contracts=True),
    ],
    "flip": [
        *each(lambda x: x.flip(1), IMAGE),
        *each(lambda x: x.flip(-3, 2), IMAGE),
        *each(lambda x: x.flip(-1), IMAGE),
    ],
    "rot90": [each(lambda x, k=k: x.rot90(k, (2, 1)), IMAGE)[0] for k in (1, 2, 3, -3)],
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
    "randint": meets(lambda x: torch.randint(7, 8, x.shape[1:], device=x.device), FEATURES),
    "randint_like": meets(lambda x: torch.randint_like(x, 7, 8)),
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
    "block_diag": [
        *each(lambda *x: torch.block_diag(*x), Data((3, 4), (0, 1)), Data((2, 5), (0, 1))),
        *each(lambda *x: torch.block_diag(*x), Data((3, 4), (0,)), Data((2, 5), (1,))),
        *each(lambda *x: torch.block_diag(*x), Data((3, 4), (0, 1)), Data((5,), (0,)), refused=True),
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


def _written(places: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    fresh = values.new_zeros((4, *values.shape[1:]))
    fresh[places] = values
    return fresh


def _unbound(x: torch.Tensor) -> torch.Tensor:
    return torch.stack(x.unbind(1), 1)


PLACES = Data((3,), (), below(4))
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
    "glu": [
        *each(lambda x: F.glu(x, 1), IMAGE),
        *each(lambda x: F.glu(x), TOKENS),
        *each(lambda x: F.glu(x), IMAGE),
    ],
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
        *each(lambda x, i: x[:, :, i, i], IMAGE, PICK),
        *each(lambda x, i: x[:, i, i], IMAGE, PICK),
        *each(lambda x, i, j: x[i, :, j], IMAGE, Data((5, 1), (), below(2)), PICK),
        *each(lambda x, i, j: x[:, :, i, j], IMAGE, Data((5, 1), (), below(4)), PICK),
        *each(lambda x, i: x[i], IMAGE, MASK2, mode="real"),
        *each(lambda x, i: x[i], Data((2, 6, 5), (2,)), MASK2, mode="real"),
        *each(lambda x, i: x[:, :, i], IMAGE, Data((4, 4), (), truth), mode="real"),
        *each(lambda x, i, j: x[i, j], Data((4, 4, 6), (2,)), Data((2, 6), (1,), below(4)), Data((6,), (0,), below(4))),
    ],
    "index_put": [
        *each(lambda x, i, v: x.index_put((i,), v), Data((4, 6), (1,)), PLACES, Data((3, 6), (1,))),
        *each(lambda x, i, v: x.index_put((i,), v), Data((4, 6), (1,)), PLACES, Data((6,), (0,))),
        *each(lambda x, i, v: x.index_put((i,), v), Data((4, 6), (1,)), PLACES, Data((), ())),
        *each(lambda x, i: x.index_put((i,), x.new_ones(x.shape[1])), Data((4, 6), (1,)), PLACES),
        *each(lambda x, m: x.index_put((m,), x.new_ones(1)), Data((4, 6), (1,)), MASK),
        *each(lambda x, i, v: aten.index_put(x, [None, i], v), Data((2, 6), (1,)), PLACES, Data((2, 3), (1,))),
        *each(_written, PLACES, Data((3, 6, 2), (1,))),
        *each(lambda i, v: _written(i, v).relu(), PLACES, Data((3, 6, 2), (1,))),
        *each(lambda x, i: x.index_put((i, i), x.new_ones(1)), Data((4, 6), (1,)), PLACES, refused=True),
    ],
    "_index_put_impl": each(
        lambda x, i, v: aten._index_put_impl(x, [i], v), Data((4, 6), (1,)), PLACES, Data((3, 6), (1,))
    ),
    "gather": [
        *each(lambda x, i: x.gather(2, i.expand_as(x)), ROWS_OF, Data((1, 1, 4), (), below(4))),
        *each(lambda x, i: x.gather(2, i), ROWS_OF, Data((2, 6, 4), (1,), below(4))),
        *each(lambda x, i: x.gather(1, i), FEATURES, Data((3, 6), (), below(6))),
        *each(lambda x, i: x.gather(1, i), FEATURES, Data((2, 6), (), below(6)), refused=True),
    ],
    "index_add": [
        *each(lambda x, i: x.new_zeros(2, x.shape[1], 5).index_add(2, i, x), ROWS_OF, PICK_FIVE),
        *each(lambda x, y, i: x.index_add(0, i, y), Data((5, 6), (1,)), Data((3, 6), (1,)), Data((3,), (), below(5))),
        *each(lambda x, i: x.index_add(1, i, x), FEATURES, Data((6,), (), below(6))),
    ],
    "scatter_add": [
        *each(_scattered("scatter_add"), ROWS_OF, Data((1, 1, 4), (), below(5))),
        *each(lambda x, i: x.scatter_add(1, i, x), FEATURES, Data((3, 6), (), below(6))),
        *each(lambda x, i: x.scatter_add(2, i, x), ROWS_OF, Data((2, 6, 4), (1,), below(4))),
        *each(lambda x, i: x[:1].scatter_add(1, i[:1], x), FEATURES, Data((3, 6), (), below(6)), refused=True),
    ],
    "scatter": [
        *each(_scattered("scatter"), ROWS_OF, Data((1, 1, 4), (), lambda shape: torch.randperm(4).view(shape))),
        *each(lambda x, i: x.scatter(2, i, 3.0), ROWS_OF, Data((2, 6, 4), (1,), below(4))),
        *each(lambda x: torch.zeros_like(x).scatter_(2, x.argmax(2, keepdim=True), 1.0), ROWS_OF),
        *each(lambda x, i: x.scatter(1, i, 3.0), FEATURES, Data((3, 6), (), below(6))),
    ],
    "scatter_reduce": each(
        lambda x, i: x.scatter_reduce(2, i.expand_as(x), x, "amax"), ROWS_OF, Data((1, 1, 4), (), below(4))
    ),
    "index_reduce": each(lambda x, i: x.index_reduce(2, i, x, "amax"), ROWS_OF, Data((4,), (), below(4))),
    "nonzero": each(torch.nonzero, Data((3, 6), (1,), truth)),
    "masked_select": each(torch.masked_select, FEATURES, Data((3, 6), (1,), truth)),
    "topk": [
        *each(lambda x: x.topk(2, 2), IMAGE),
        *each(lambda x: x.topk(2), IMAGE),
        *each(lambda x: x.topk(3, 1), IMAGE),
    ],
    "constant_pad_nd": [
        *each(lambda x: F.pad(x, (1, 1, 2, 0)), IMAGE),
        *each(lambda x: F.pad(x, (0, 0, 0, 0, 2, 1)), IMAGE),
        *each(lambda x: F.pad(x, (0, 0, 0, 0, -2, 0)), IMAGE, cautious="cropped channels stay"),
        *each(lambda x: F.pad(x, (0, 0, 1, 1)), ROWS),
    ],
    "roll": [
        *each(lambda x: x.roll(1, 1), IMAGE),
        *each(lambda x: x.roll((1, 2), (2, -1)), IMAGE),
        *each(lambda x: x.roll(2), IMAGE),
    ],
}
