"""Rows of the rule table: operators that compute."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from oracle import Case, Data, below, levelled, positive, single, truth
from rule_rows import FEATURES, IMAGE, LOOSE, SIGNAL, TOKENS, VOLUME, WHOLE, WIDTH, aten, case, each, image

# -------------------------------------------------------------------------------------- contractions


def convolve(m: Any, x: torch.Tensor) -> torch.Tensor:
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
        conv(convolve, x, (4, 6, 3, 3), 4),
        conv(convolve, x, (4, 6, 1, 1)),
        conv(convolve, SIGNAL, (4, 6, 3), 4),
        conv(convolve, VOLUME, (3, 4, 3, 3, 3)),
        conv(convolve, image(dims=(0, 1)), (4, 6, 3, 3)),
        conv(convolve, image(dims=()), (4, 6, 3, 3), 4, contracts=True),
        conv(convolve, image(dims=(2,)), (4, 6, 3, 3), contracts=True),
        conv(convolve, w=(6, 3, 3, 3), options=WHOLE, **grouped),  # type: ignore[arg-type]
        conv(convolve, w=(6, 3, 3, 3), options=WIDTH, contracts=True, **grouped),  # type: ignore[arg-type]
        conv(convolve, x, (6, 1, 3, 3), 6, 6, options=WHOLE),
        conv(convolve, x, (12, 1, 3, 3), 12, 6, options=WIDTH),
        conv(convolve, image(dims=()), (6, 3, 3, 3), 6, 2),
        conv(_conv_transposed, x, (6, 4, 2, 2), 4),
        conv(_conv_transposed, w=(6, 3, 2, 2), options=WHOLE, **grouped),  # type: ignore[arg-type]
        conv(_conv_transposed, w=(6, 3, 2, 2), options=WIDTH, contracts=True, **grouped),  # type: ignore[arg-type]
        conv(_conv_transposed, x, (6, 1, 2, 2), 6, 6),
        conv(_conv_transposed, x, (6, 2, 2, 2), 12, 6, options=WIDTH),
        conv(_conv_transposed, image(dims=()), (6, 3, 2, 2), 6, 2),
    ]


def _bags(bag: Any, mode: int) -> Case:
    """Two bags of five rows in all: their sums, means or largest."""

    def run(m: Any, x: torch.Tensor) -> Any:
        return bag(m.w, x, torch.tensor([0, 2], device=x.device), False, mode)[0]

    return case(run, Data((5,), (), below(7)), weights={"w": (7, 6)})


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
    "_trilinear": [
        case(
            lambda m, x, y: F.bilinear(x, y, m.w, m.b),
            Data((3, 6), (1,)),
            Data((3, 5), (1,)),
            weights={"w": (4, 6, 5), "b": (4,)},
            contracts=True,
        ),
    ],
    "convolution_backward": [
        case(
            lambda m, g, x: aten.convolution_backward(
                g, x, m.w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
            )[0],
            Data((2, 4, 3, 3), (1,)),
            image(side=3),
            weights={"w": (4, 6, 3, 3)},
            contracts=True,
        ),
        case(
            lambda m, g, x: aten.convolution_backward(
                g, x, m.w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
            )[:2],
            Data((2, 4, 3, 3), (1,)),
            image(side=3),
            weights={"w": (4, 6, 3, 3)},
            refused=True,
        ),
    ],
    "embedding": [
        case(lambda m, x: F.embedding(x, m.w), Data((2, 5), (), below(7)), weights={"w": (7, 6)}),
        case(lambda m, x: F.embedding(x, m.w), Data((2, 5), (1,), below(7)), weights={"w": (7, 6)}),
    ],
    "_embedding_bag": [_bags(aten._embedding_bag, kind) for kind in range(3)],
    "_embedding_bag_forward_only": [_bags(aten._embedding_bag_forward_only, kind) for kind in range(3)],
}

# ---------------------------------------------------------------------------------------------- norms

_AFFINE = {"g": (6,), "b": (6,)}
_RUNNING = {**_AFFINE, "mean": (6,), "var": (6,)}


LEVEL = Data((2, 6, 5), (1,), levelled)


def normed(run: Callable[..., Any], *data: Data, weights: dict[str, Any] = _RUNNING, **more: Any) -> list[Case]:
    """A norm with its parameters."""
    return [case(run, x, weights=weights, make=positive, **more) for x in data or (IMAGE, FEATURES)]


def batch_norm(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, m.mean, m.var, m.g, m.b)


def _by_length(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A linear layer by its weight's directions and lengths."""
    if len(m.g) != len(m.w):
        raise RuntimeError("torch takes it for granted that there are as many, and ends the process")
    return F.linear(x, torch._weight_norm(m.w, m.g, 0))


def group_norm(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.group_norm(x, m.groups, m.g, m.b)


def raw_norm(function: Callable[..., Any]) -> Callable[..., Any]:
    """An ATen batch norm, which reads past the end of parameters that are too short, made to raise instead."""

    def run(m: Any, x: torch.Tensor) -> Any:
        parameters = list(m.parameters())
        if any(p.shape != x.shape[1:2] for p in parameters):
            raise ValueError("parameters of another size")
        return function(x, *parameters)

    return run


NORMS = {
    "batch_norm": [
        *normed(batch_norm),
        *normed(lambda m, x: F.batch_norm(x, m.mean, m.var)),
        *normed(batch_norm, VOLUME, weights=dict.fromkeys(_RUNNING, (4,))),
        *normed(batch_norm, image(dims=())),
        *normed(batch_norm, image(dims=(0, 1, 2))),
    ],
    "native_batch_norm": [
        *normed(raw_norm(lambda x, g, b, *m: aten.native_batch_norm(x, g, b, *m, False, 0.1, 1e-5)[0])),
        *normed(raw_norm(lambda x, g, b, *m: aten.native_batch_norm(x, g, b, *m, True, 0.1, 1e-5))),
        *normed(lambda m, x: F.batch_norm(x, None, None, training=True)),
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
        raw_norm(lambda x, *m: aten.cudnn_batch_norm(x, *m, False, 0.1, 1e-5)[0]), twin=batch_norm
    ),
    "miopen_batch_norm": normed(
        raw_norm(lambda x, *m: aten.miopen_batch_norm(x, *m, False, 0.1, 1e-5)[0]), twin=batch_norm
    ),
    "_batch_norm_no_update": normed(raw_norm(lambda x, *m: aten._batch_norm_no_update(x, *m, 0.1, 1e-5)[0])),
    "_batch_norm_with_update": normed(raw_norm(lambda x, *m: aten._batch_norm_with_update(x, *m, 0.1, 1e-5)[:3])),
    "_weight_norm_interface": [
        case(
            _by_length,
            FEATURES,
            weights={"w": (4, 6), "g": (4, 1)},
            contracts=True,
            cautious="the length is of all columns, of which the original reads none as zero",
        )
    ],
    "renorm": [
        *each(lambda x: x.renorm(2, 1, 1.0), FEATURES),
        *each(lambda x: x.renorm(2, -2, 1.0), IMAGE),
        case(
            lambda m, x: F.linear(x, m.w.renorm(2, 0, 1.0)),
            FEATURES,
            weights={"w": (4, 6)},
            contracts=True,
            cautious="the length is of all columns, of which the original reads none as zero",
        ),
    ],
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
        *normed(group_norm, weights=_AFFINE, attributes={"groups": 2}),
        *normed(group_norm, weights=_AFFINE, attributes={"groups": 6}),
        *normed(group_norm, weights=_AFFINE, attributes={"groups": 1}),
        *normed(lambda m, x: F.group_norm(x, m.groups), weights={}, attributes={"groups": 3}),
        *normed(lambda m, x: F.group_norm(x, 2, m.g, m.b), LEVEL, weights=_AFFINE, options=LOOSE),
        *normed(lambda m, x: F.group_norm(x, 3), LEVEL, weights={}, options=LOOSE),
        *normed(group_norm, image(dims=()), weights=_AFFINE, attributes={"groups": 2}),
        *normed(group_norm, image(dims=(0, 2)), weights=_AFFINE, attributes={"groups": 2}),
        case(
            lambda m, x: aten.native_group_norm(x, m.g, m.b, 2, x.shape[1], 16, m.groups, 1e-5),
            IMAGE,
            weights=_AFFINE,
            make=positive,
            attributes={"groups": 3},
        ),
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
    "sum": [
        *reduction(torch.sum),
        *total(torch.sum),
        case(lambda m, x: (x * m.w).sum(-1), TOKENS, weights={"w": (6,)}, contracts=True),
        case(lambda m, x, y: (x * y).sum(1), SIGNAL, SIGNAL, contracts=True),
        case(lambda m, x, y: (x.unsqueeze(1) * y.unsqueeze(2)).sum(-1), TOKENS, TOKENS, contracts=True),
        *each(lambda x: (x * x).sum(1), SIGNAL),
    ],
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
    "cummax": along(torch.cummax),
    "cummin": along(torch.cummin),
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
    "log_sigmoid_forward": each(F.logsigmoid, IMAGE),
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


def _apart(shape: tuple[int, ...]) -> torch.Tensor:
    """Places of which no two are the same in any channel."""
    places = math.prod(shape[2:])
    return torch.stack([torch.randperm(places) for _ in range(shape[0] * shape[1])]).view(shape)


def _boxes(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([[0, 0.0, 0.0, 2.0, 3.0], [1, 1.0, 0.0, 3.0, 3.0], [0, 1.0, 1.0, 3.0, 2.0]]).double()


def _deformed(m: Any, x: torch.Tensor, offset: torch.Tensor) -> Any:
    import torchvision.ops

    return torchvision.ops.deform_conv2d(x, offset, m.w, m.b, padding=1)


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
    "col2im": [
        *each(lambda x: F.fold(x, (3, 4), 2), Data((2, 12, 6), (1,))),
        *each(lambda x: F.fold(x, 4, 2, stride=2), Data((8, 4), (0,))),
        *each(lambda x: F.fold(x, 4, 2, stride=2), Data((2, 8, 4), (2,))),
    ],
    "unfold": [
        *each(lambda x: x.unfold(2, 2, 1), IMAGE),
        *each(lambda x: x.unfold(-1, 3, 1).unfold(2, 3, 1), IMAGE),
        *each(lambda x: x.unfold(1, 2, 2), IMAGE),
    ],
    "unfold_copy": each(lambda x: aten.unfold_copy(x, -2, 2, 2), IMAGE),
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
    "affine_grid_generator": [
        *each(lambda x, t: F.affine_grid(t, x.shape, align_corners=False), IMAGE, Data((2, 2, 3))),
        *each(lambda x, t: F.affine_grid(t, x.shape, align_corners=False), IMAGE, Data((2, 2, 3), (1, 2))),
    ],
    "max_unpool2d": [
        *each(lambda x, i: aten.max_unpool2d(x, i, [8, 8]), IMAGE, Data((2, 6, 4, 4), (1,), _apart)),
        *each(lambda x, i: aten.max_unpool2d(x, i, [8, 8]), image(dims=(2,)), Data((2, 6, 4, 4), (), _apart)),
    ],
    "max_unpool3d": each(
        lambda x, i: aten.max_unpool3d(x, i, [4, 4, 4], [1, 1, 1], [0, 0, 0]),
        VOLUME,
        Data((2, 4, 4, 4, 4), (1,), _apart),
    ),
    "grid_sampler_3d": each(lambda x, g: F.grid_sample(x, g, align_corners=False), VOLUME, Data((2, 3, 3, 3, 3))),
    "torchvision::deform_conv2d": [
        case(_deformed, IMAGE, Data((2, 18, 4, 4)), weights={"w": (5, 6, 3, 3), "b": (5,)}, contracts=True),
        case(_deformed, IMAGE, Data((2, 36, 4, 4)), weights={"w": (5, 6, 3, 3), "b": (5,)}, contracts=True),
        case(_deformed, IMAGE, Data((2, 18, 4, 4)), weights={"w": (4, 3, 3, 3), "b": (4,)}, refused=True),
    ],
    "torchvision::roi_align": [
        *each(_roi("roi_align"), IMAGE, _ROIS),
        *each(_roi("roi_align"), image(dims=(2,)), _ROIS),
        *each(_roi("roi_align"), IMAGE, Data((3, 5), (1,), _boxes)),
    ],
    "torchvision::roi_pool": each(_roi("roi_pool"), IMAGE, _ROIS),
}
