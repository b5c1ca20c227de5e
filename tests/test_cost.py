"""The cost model against fvcore itself: every counter, on whole networks and on rewritten ones."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from torch import nn

import allocator
from allocator.cost.fvcore import fvcore_flops
from allocator.cost.metric import Metric
from allocator.cost.terms import Term
from allocator.tracing.inputs import as_inputs

Shape = tuple[int, ...]


class Calls(nn.Module):
    """A module that calls a function of itself and its inputs."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)

    def forward(self, *x: torch.Tensor) -> Any:
        return self.function(self, *x)


def by_fvcore(model: nn.Module, *inputs: torch.Tensor) -> int:
    """What a user reads from fvcore."""
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    analysis = FlopCountAnalysis(model.eval(), inputs)
    analysis.tracer_warnings("none").uncalled_modules_warnings(False).unsupported_ops_warnings(False)
    return int(analysis.total())


def plain(function: Callable[..., Any], *shapes: Shape) -> tuple[nn.Module, list[Shape]]:
    """A function of activations alone."""
    return Calls(lambda m, *x: function(*x)), list(shapes)


def layer(module: nn.Module, *shapes: Shape) -> tuple[nn.Module, list[Shape]]:
    """A layer as it is."""
    return module, list(shapes)


def _convolutions() -> dict[str, Any]:
    rows: dict[str, Any] = {
        "strided and padded": layer(nn.Conv2d(3, 4, 3, 2, 1), (1, 3, 9, 8)),
        "grouped": layer(nn.Conv2d(6, 4, 3, groups=2), (2, 6, 9, 8)),
        "depthwise, dilated": layer(nn.Conv2d(6, 12, 3, groups=6, bias=False, dilation=2), (2, 6, 9, 8)),
    }
    pairs = [(nn.Conv1d, nn.ConvTranspose1d), (nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d)]
    for d, (conv, transposed) in enumerate(pairs, 1):
        sides = (7, 6, 5)[:d]
        rows[f"{d}-D"] = layer(conv(4, 5, 3), (2, 4, *sides))
        rows[f"{d}-D without a batch"] = layer(conv(4, 5, 3), (4, *sides))
        rows[f"{d}-D transposed"] = layer(transposed(4, 6, 3, stride=2, output_padding=1), (2, 4, *sides))
        rows[f"{d}-D transposed, grouped"] = layer(transposed(4, 6, 3, groups=2), (2, 4, *sides))
    return rows


_PAIRS: list[tuple[Shape, Shape]] = [
    ((3, 6), (6, 4)),
    ((2, 3, 6), (6, 4)),
    ((2, 3, 6), (2, 6, 4)),
    ((3, 6), (2, 6, 4)),
    ((5, 2, 3, 6), (5, 2, 6, 4)),
    ((5, 1, 3, 6), (2, 6, 4)),
    ((1, 3, 6), (1, 6, 4)),
]


def _products() -> dict[str, Any]:
    rows: dict[str, Any] = {
        "torch.mm": plain(torch.mm, (3, 6), (6, 4)),
        "torch.bmm": plain(torch.bmm, (2, 3, 6), (2, 6, 4)),
        "torch.mv, not counted": plain(torch.mv, (3, 6), (6,)),
        "torch.dot, not counted": plain(torch.dot, (6,), (6,)),
        "torch.addmm": plain(torch.addmm, (3, 4), (3, 6), (6, 4)),
        "torch.baddbmm, not counted": plain(torch.baddbmm, (2, 3, 4), (2, 3, 6), (2, 6, 4)),
        "matmul by keywords": plain(lambda a, b: torch.matmul(other=b, input=a), (3, 6), (6, 4)),
    }
    for a, b in _PAIRS:
        rows[f"{a} @ {b}"] = plain(lambda x, y: x @ y, a, b)
        rows[f"{a} @ weight {b}"] = (Calls(lambda m, x: torch.matmul(x, m.w), w=torch.randn(b)), [a])
        rows[f"weight {a} @ {b}"] = (Calls(lambda m, x: m.w @ x, w=torch.randn(a)), [b])
    for rank in (1, 2, 3, 4):
        shape = (2, 3, 4, 6)[-rank:]
        rows[f"linear, {rank}-D"] = layer(nn.Linear(6, 5), shape)
        rows[f"linear without bias, {rank}-D"] = layer(nn.Linear(6, 5, bias=False), shape)
    return rows


_EQUATIONS: dict[str, list[Shape]] = {
    "ij,jk->ik": [(3, 6), (6, 4)],
    "ij,jk": [(3, 6), (6, 4)],
    "b i j, b j k -> b i k": [(2, 3, 6), (2, 6, 4)],
    "...ij,...jk->...ik": [(5, 2, 3, 6), (2, 6, 4)],
    "...ij,jk": [(2, 3, 6), (6, 4)],
    "bhid,bhjd->bhij": [(1, 3, 37, 11), (1, 3, 41, 11)],
    "bchw,oc->bohw": [(2, 13, 17, 19), (7, 13)],
    "nct,ncp->ntp": [(5, 31, 37), (5, 31, 41)],
    "nct,npt->npc": [(5, 31, 37), (5, 41, 37)],
    "ncth,nph->npct": [(2, 5, 31, 37), (2, 11, 37)],
    "i,j->ij": [(3,), (5,)],
    "bi,bi->b": [(3, 6), (3, 6)],
    "bij,bij->bij": [(3, 3, 7), (3, 3, 7)],
    "bchw,bc->bchw": [(1, 3, 37, 37), (1, 3)],
    "ij->ji": [(3, 5)],
    "ij->i": [(3, 6)],
    "ii->i": [(5, 5)],
    "ij,jk,kl->il": [(31, 62), (62, 43), (43, 21)],
    "ij,ij->": [(3, 6), (3, 6)],
}


def _norms() -> dict[str, Any]:
    rows: dict[str, Any] = {
        "batch norm, 2-D input": layer(nn.BatchNorm1d(6), (3, 6)),
        "instance norm by function": plain(lambda x: F.instance_norm(x), (2, 6, 4, 4)),
        "layer norm over two dims": layer(nn.LayerNorm((3, 6)), (2, 3, 6)),
        "layer norm without bias": layer(nn.LayerNorm(6, bias=False), (2, 3, 6)),
        "rms norm, not counted": layer(nn.RMSNorm(6), (2, 3, 6)),
    }
    kinds = [
        (nn.BatchNorm1d, nn.InstanceNorm1d),
        (nn.BatchNorm2d, nn.InstanceNorm2d),
        (nn.BatchNorm3d, nn.InstanceNorm3d),
    ]
    for affine in (True, False):
        said = "affine" if affine else "plain"
        rows[f"layer norm, {said}"] = layer(nn.LayerNorm(6, elementwise_affine=affine), (2, 3, 6))
        rows[f"group norm, {said}"] = layer(nn.GroupNorm(2, 6, affine=affine), (2, 6, 4, 4))
        for d, (batch, instance) in enumerate(kinds, 1):
            for tracked in (True, False):
                name = f"{d}-D, {said}, {'running' if tracked else 'own'} statistics"
                shape = (2, 6, *(4,) * d)
                more: dict[str, Any] = {"affine": affine, "track_running_stats": tracked}
                rows[f"batch norm {name}"] = layer(batch(6, **more), shape)
                rows[f"instance norm {name}"] = layer(instance(6, **more), shape)
    return rows


_MODES = {
    1: ("nearest", "linear", "nearest-exact"),
    2: ("nearest", "bilinear", "bicubic", "nearest-exact", "area"),
    3: ("nearest", "trilinear", "nearest-exact", "area"),
}


def _spatial() -> dict[str, Any]:
    def sample(x: torch.Tensor, grid: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
        return F.grid_sample(x, grid, mode=mode, align_corners=False)

    rows: dict[str, Any] = {
        "adaptive pool without a batch": plain(lambda x: F.adaptive_avg_pool2d(x, 2), (6, 8, 8)),
        "adaptive pool by keywords": plain(lambda x: F.adaptive_avg_pool2d(input=x, output_size=2), (2, 6, 8, 8)),
        "adaptive pool in one dim": plain(lambda x: F.adaptive_avg_pool2d(x, (None, 1)), (2, 6, 8, 8)),
        "mean, not counted": plain(lambda x: x.mean((2, 3)), (2, 6, 8, 8)),
        "antialiased": plain(lambda x: F.interpolate(x, (3, 3), mode="bilinear", antialias=True), (2, 6, 8, 8)),
        "upsampling layer": layer(nn.UpsamplingBilinear2d(scale_factor=2), (1, 3, 4, 4)),
        "grid sample": plain(sample, (2, 6, 8, 8), (2, 5, 4, 2)),
        "grid sample, nearest": plain(lambda x, g: sample(x, g, "nearest"), (2, 6, 8, 8), (2, 5, 4, 2)),
        "grid sample, 3-D": plain(sample, (2, 6, 4, 4, 4), (2, 3, 3, 3, 3)),
    }
    for d, modes in _MODES.items():
        shape = (2, 6, *(8,) * d)
        for kind in ("AdaptiveAvgPool", "AdaptiveMaxPool", "AvgPool", "MaxPool"):
            for size in (1, 3):
                rows[f"{kind}{d}d to {size}"] = layer(getattr(nn, f"{kind}{d}d")(size), shape)
        for mode in modes:
            rows[f"{d}-D {mode} by a factor"] = plain(
                lambda x, mode=mode: F.interpolate(x, scale_factor=2, mode=mode), shape
            )
            rows[f"{d}-D {mode} to a size"] = plain(
                lambda x, mode=mode, d=d: F.interpolate(x, size=(5,) * d, mode=mode), shape
            )
    return rows


def _others() -> dict[str, Any]:
    conv = nn.Conv2d(3, 3, 3)
    heads = (2, 3, 4, 5)
    encoder: dict[str, Any] = {"d_model": 8, "nhead": 2, "dim_feedforward": 16}
    return {
        "attention, not counted": plain(F.scaled_dot_product_attention, heads, heads, heads),
        "multi-head attention": (
            Calls(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(8, 2)),
            [(5, 2, 8)],
        ),
        "multi-head attention without its weights": (
            Calls(lambda m, x: m.a(x, x, x, need_weights=False)[0], a=nn.MultiheadAttention(8, 2)),
            [(5, 2, 8)],
        ),
        "cross attention": (
            Calls(lambda m, x, y: m.a(x, y, y)[0], a=nn.MultiheadAttention(8, 2, kdim=6, vdim=6)),
            [(5, 2, 8), (5, 2, 6)],
        ),
        "encoder": layer(nn.TransformerEncoderLayer(**encoder), (5, 2, 8)),
        "encoder, batch and norm first": layer(
            nn.TransformerEncoderLayer(**encoder, batch_first=True, norm_first=True), (2, 5, 8)
        ),
        "LSTM, not counted": layer(nn.LSTM(6, 5), (3, 2, 6)),
        "GRU, not counted": layer(nn.GRU(6, 5, bidirectional=True), (3, 2, 6)),
        "RNN, not counted": layer(nn.RNN(6, 5, num_layers=2), (3, 2, 6)),
        "LSTM cell": layer(nn.LSTMCell(6, 5), (2, 6)),
        "GRU cell": layer(nn.GRUCell(6, 5), (2, 6)),
        "pointwise, not counted": plain(lambda x: F.gelu(x).softmax(1) * 2 + x, (2, 6)),
        "dropped before the output": (
            Calls(lambda m, x: (m.a(x), m.b(x))[0], a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 5, 3)),
            [(1, 3, 8, 8)],
        ),
        "called twice": (Calls(lambda m, x: m.a(m.a(x)), a=conv), [(1, 3, 8, 8)]),
    }


WHOLE: dict[str, tuple[nn.Module, list[Shape]]] = {
    **{f"convolution, {name}": row for name, row in _convolutions().items()},
    **_products(),
    **{f"einsum {e}": plain(lambda *x, e=e: torch.einsum(e, *x), *shapes) for e, shapes in _EQUATIONS.items()},
    "einsum of a list": plain(lambda *x: torch.einsum("ij,jk->ik", [*x]), (3, 6), (6, 4)),
    "einsum by numbers": plain(lambda a, b: torch.einsum(a, [0, 1], b, [1, 2], [0, 2]), (3, 6), (6, 4)),
    **_norms(),
    **_spatial(),
    **_others(),
}


def inputs_of(shapes: list[Shape]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(shape) for shape in shapes)


@pytest.mark.parametrize("name", list(WHOLE))
def test_a_call_costs_what_fvcore_counts(name: str) -> None:
    model, shapes = WHOLE[name]
    inputs = inputs_of(shapes)
    expected = by_fvcore(model, *inputs)
    assert allocator.trace(model, inputs).flops == expected
    assert (expected == 0) == uncounted(name)


def uncounted(name: str) -> bool:
    """What fvcore leaves out: pooling but adaptive mean pooling to an image, most resampling, and so on."""
    counted_pool = name.startswith("AdaptiveAvgPool2d") or "Pool" not in name
    resampled = "-D " in name and ("by a factor" in name or "to a size" in name)
    counted_mode = any(f"2-D {mode} " in name for mode in ("nearest", "bilinear", "area"))
    return "not counted" in name or name == "antialiased" or not counted_pool or (resampled and not counted_mode)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("convolution, strided and padded", 4 * 3 * 3 * 3 * 5 * 4),
        ("convolution, grouped", 2 * 4 * 3 * 3 * 3 * 7 * 6),
        ("convolution, 2-D transposed, grouped", 2 * 4 * 3 * 3 * 3 * 7 * 6),
        ("linear, 3-D", 3 * 4 * 6 * 5),
        ("(5, 1, 3, 6) @ (2, 6, 4)", 5 * 1 * 3 * 6 * 4),
        ("batch norm 2-D, affine, running statistics", 2 * 2 * 6 * 4 * 4),
        ("batch norm 2-D, plain, own statistics", 4 * 2 * 6 * 4 * 4),
        ("layer norm, affine", 5 * 2 * 3 * 6),
        ("AdaptiveAvgPool2d to 1", 2 * 6 * 8 * 8),
        ("2-D nearest by a factor", 2 * 6 * 16 * 16),
        ("2-D bilinear to a size", 4 * 2 * 6 * 5 * 5),
        ("grid sample", 4 * 2 * 6 * 5 * 4),
        ("einsum bij,bij->bij", (3 * 3 * 7 + 1) // 2),  # nothing is summed over; numpy adds one
        ("einsum bhid,bhjd->bhij", 100_100 // 2),  # 2 * 1 * 3 * 37 * 41 * 11 = 100 122, printed as 1.001e+05
        ("einsum nct,ncp->ntp", 5 * 31 * 37 * 41),  # one of the two that fvcore multiplies out by hand
        ("einsum ij,jk,kl->il", 192_700 // 2),  # 2 * (62 * 43 * 21 + 31 * 62 * 21) + 1 = 192 697
    ],
)
def test_a_call_costs(name: str, count: int) -> None:
    model, shapes = WHOLE[name]
    assert allocator.trace(model, inputs_of(shapes)).flops == count


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda a, b: torch.tensordot(a, b, 1), [(2, 3, 6), (6, 4)]),
        (torch.inner, [(3, 6), (4, 6)]),
        (lambda a, b, c: torch.linalg.multi_dot([a, b, c]), [(3, 6), (6, 4), (4, 2)]),
        (lambda a, b, c: torch.chain_matmul(a, b, c), [(3, 6), (6, 4), (4, 2)]),
        (lambda a: torch.linalg.matrix_power(a, 3), [(2, 4, 4)]),
        (lambda a: torch.matrix_power(a, 3), [(2, 4, 4)]),
    ],
    ids=["tensordot", "inner", "multi_dot", "chain_matmul", "linalg.matrix_power", "matrix_power"],
)
def test_composites_that_fvcore_does_not_count(function: Callable[..., Any], shapes: list[Shape]) -> None:
    model, shapes = plain(function, *shapes)
    inputs = inputs_of(shapes)
    assert allocator.trace(model, inputs).flops == by_fvcore(model, *inputs)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("sides", [(8,), (8, 6), (8, 6, 4)], ids=["signal", "image", "volume"])
def test_resizing_by_area_is_adaptive_pooling(sides: Shape, size: int) -> None:
    """It calls `mean` where one pixel is left, and pools a signal as an image of height 1; fvcore counts images."""
    model, shapes = plain(lambda x: F.interpolate(x, size=size, mode="area"), (2, 3, *sides))
    inputs = inputs_of(shapes)
    assert allocator.trace(model, inputs).flops == by_fvcore(model, *inputs) == (288 if len(sides) == 2 else 0)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)], ids=str)
def test_a_product_with_a_vector_counts_though_fvcore_raises(shape: Shape) -> None:
    model, shapes = plain(lambda a, b: a @ b, shape, (6,))
    inputs = inputs_of(shapes)
    with pytest.raises(IndexError):
        by_fvcore(model, *inputs)
    expected = {1: 6, 2: 3 * 6, 3: 2 * 3 * 6}[len(shape)]
    assert allocator.trace(model, inputs).flops == expected
    assert fvcore_flops(model, as_inputs(inputs, model))[0] == expected


def test_a_forward_that_fvcore_cannot_follow_is_a_typed_error() -> None:
    def run(model: Any, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_tracing():
            raise ValueError("not in here")
        return model.w @ x

    model = Calls(run, w=torch.randn(4, 6))
    with pytest.raises(allocator.TraceError, match="fvcore cannot count Calls: ValueError: not in here"):
        fvcore_flops(model, as_inputs((torch.randn(6, 2),), model))


# -------------------------------------------------------------------------------------- after a rewrite


class Net(nn.Module):
    """A convolution and batch norm, something in the middle, and a convolution that reads it."""

    def __init__(self, middle: Callable[..., torch.Tensor], width: int = 12, **parts: nn.Module) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.middle = middle
        for name, part in parts.items():
            setattr(self, name, part)
        self.head = nn.Conv2d(width, 5, 1)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                nn.init.uniform_(module.weight, 0.2, 1.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self, torch.relu(self.bn(self.stem(x)))))


def _tokens(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Apply a function to (batch, pixels, channels), and give (batch, channels, pixels, 1)."""
    return lambda m, x: function(m, x.flatten(2).transpose(1, 2)).transpose(1, 2).unsqueeze(3)


def _attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (part(x) for part in (m.q, m.k, m.v))
    return (q @ k.transpose(1, 2)).softmax(-1) @ v


def _fused(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (part(x).unsqueeze(1) for part in (m.q, m.k, m.v))
    return F.scaled_dot_product_attention(q, k, v, scale=0.5).squeeze(1)


def _einsum_attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (part(x) for part in (m.q, m.k, m.v))
    return torch.einsum("bij,bjd->bid", torch.einsum("bid,bjd->bij", q, k), v)


def _qkv() -> dict[str, nn.Module]:
    return {name: nn.Linear(12, 10) for name in "qkv"}


def _pooled(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x * m.gate(F.adaptive_avg_pool2d(x, 1)).sigmoid()


_SIDE = (8, 7)
REWRITTEN: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "plain": (Net(lambda m, x: x), {}),
    "transposed": (Net(lambda m, x: m.up(x), 9, up=nn.ConvTranspose2d(12, 9, 2, 2)), {}),
    "depthwise": (Net(lambda m, x: m.dw(x), dw=nn.Conv2d(12, 12, 3, groups=12)), {}),
    "whole groups": (Net(lambda m, x: m.g(x), g=nn.Conv2d(12, 12, 3, groups=6)), {"scope": "all"}),
    "narrower groups": (Net(lambda m, x: m.g(x), g=nn.Conv2d(12, 12, 3, groups=3)), {"groups": "width"}),
    "1-D": (Net(lambda m, x: m.c(x.flatten(2)).unsqueeze(3), 9, c=nn.Conv1d(12, 9, 3)), {}),
    "3-D": (Net(lambda m, x: m.c(x.unsqueeze(4)).squeeze(4), 9, c=nn.Conv3d(12, 9, (3, 3, 1))), {}),
    "linear, 3-D input": (Net(_tokens(lambda m, x: m.l(x)), 10, l=nn.Linear(12, 10)), {}),
    "linear, 2-D input": (Net(lambda m, x: m.l(x.mean((2, 3)))[:, :, None, None], 10, l=nn.Linear(12, 10)), {}),
    "linear over flat pixels": (Net(lambda m, x: m.l(x.flatten(1))[:, :, None, None], 10, l=nn.Linear(672, 10)), {}),
    "attention": (Net(_tokens(_attention), 10, **_qkv()), {}),
    "fused attention": (Net(_tokens(_fused), 10, **_qkv()), {}),
    "einsum attention": (Net(_tokens(_einsum_attention), 10, **_qkv()), {}),
    "einsum gate": (Net(lambda m, x: torch.einsum("bchw,bc->bchw", x, x.mean((2, 3)))), {}),
    "batch norm": (Net(lambda m, x: m.n(x), n=nn.BatchNorm2d(12)), {}),
    "batch norm, plain": (Net(lambda m, x: m.n(x), n=nn.BatchNorm2d(12, affine=False)), {}),
    "instance norm": (Net(lambda m, x: m.n(x), n=nn.InstanceNorm2d(12, affine=True)), {}),
    "instance norm, plain": (Net(lambda m, x: m.n(x), n=nn.InstanceNorm2d(12)), {}),
    "group norm": (Net(lambda m, x: m.n(x), n=nn.GroupNorm(3, 12)), {"norms": "loose", "certify": False}),
    "layer norm": (Net(_tokens(lambda m, x: m.n(x)), n=nn.LayerNorm(12)), {"norms": "loose", "certify": False}),
    "pool and gate": (Net(_pooled, gate=nn.Conv2d(12, 12, 1)), {}),
    "mean": (Net(lambda m, x: x.mean((2, 3), keepdim=True)), {}),
    "nearest": (Net(lambda m, x: F.interpolate(x, scale_factor=2)), {}),
    "bilinear": (Net(lambda m, x: F.interpolate(x, size=(9, 5), mode="bilinear")), {}),
    "area": (Net(lambda m, x: F.interpolate(x, size=(3, 3), mode="area")), {}),
    "concat": (Net(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), 14, a=nn.Conv2d(12, 6, 1), b=nn.Conv2d(12, 8, 1)), {}),
    "grid sample": (
        Net(lambda m, x: F.grid_sample(x, torch.ones(len(x), 3, 3, 2, device=x.device), align_corners=False)),
        {},
    ),
}


@pytest.mark.parametrize("name", list(REWRITTEN))
def test_a_rewritten_network_costs_what_fvcore_counts(name: str) -> None:
    model, options = REWRITTEN[name]
    image = torch.zeros(1, 3, *_SIDE)
    before = by_fvcore(model, image)
    result = allocator.allocate(
        model, before * 0.7, example_inputs=image, criterion="magnitude", **{"scope": "all", **options}
    )
    assert result.flops_before == before
    assert result.flops_after == by_fvcore(result.model, image)
    assert result.flops_after <= before * 0.7
    assert result.flops_after < before


# ---------------------------------------------------------------------------------------- the cost model


def _random_terms(random: np.random.Generator, degree: int) -> list[Term]:
    slots = [random.integers(0, 20, random.integers(1, 9)) for _ in range(5)]
    return [Term(int(random.integers(1, 50)), tuple(slots[k] for k in random.integers(0, 5, degree))) for _ in range(6)]


def _counted_by_hand(terms: list[Term], unit_of_slot: np.ndarray, kept: np.ndarray) -> int:
    stays = [unit < 0 or kept[unit] for unit in unit_of_slot.tolist()]
    total = 0
    for term in terms:
        count = term.factor
        for axis in term.axes:
            count *= sum(stays[slot] for slot in axis.tolist())
        total += count
    return total


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_the_model_multiplies_kept_labels(degree: int) -> None:
    random = np.random.default_rng(degree)
    for _ in range(20):
        terms = _random_terms(random, degree)
        unit_of_slot = random.integers(-1, 7, 20)
        model = Metric("flops", "FLOPs", terms, unit_of_slot, 7)
        kept = random.random(7) > 0.4
        assert model.value(kept) == _counted_by_hand(terms, unit_of_slot, kept)
        assert model.value(kept) == model.per_term(kept).sum()
        if degree < 3:
            gone = np.flatnonzero(~kept)
            assert [model.added(kept, int(unit)) for unit in gone] == model.added_each(kept)[gone].tolist()


def test_a_printed_count_is_rounded_as_a_whole() -> None:
    axis = np.arange(1, 11)
    model = Metric("flops", "FLOPs", [Term(2 * 1234, (axis,), printed=True)], np.arange(-1, 10), 10)
    everything = np.ones(10, dtype=bool)
    assert model.value(everything) == 24_680 // 2
    assert model.value(np.arange(10) < 7) == 17_280 // 2  # 2 * 1234 * 7 + 1 = 17 277
    assert model.added_each(np.arange(10) < 7)[9] == 1234


def test_no_calls_cost_nothing() -> None:
    assert Metric("flops", "FLOPs", [], np.zeros(0, dtype=int), 0).value(np.zeros(0, dtype=bool)) == 0
