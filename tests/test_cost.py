"""The cost model against fvcore itself: every counter, on whole networks and on rewritten ones."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cost_cases import IMAGE, REWRITTEN, WHOLE, Calls, Net, Shape, inputs_of, plain
from fvcore.nn import FlopCountAnalysis
from torch import nn

import allocator
import allocator.operators  # declares what torch's tracer is to record
from allocator.cost.fvcore import fvcore_flops
from allocator.errors import TraceError
from allocator.tracing import uncomputed
from allocator.tracing.inputs import as_inputs


def by_fvcore(model: nn.Module, *inputs: torch.Tensor) -> int:
    """What a user reads from fvcore."""
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    analysis = FlopCountAnalysis(model.eval(), inputs)
    analysis.tracer_warnings("none").uncalled_modules_warnings(False).unsupported_ops_warnings(False)
    return int(analysis.total())


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


@pytest.mark.parametrize("name", list(REWRITTEN))
def test_a_rewritten_network_costs_what_fvcore_counts(name: str) -> None:
    model, options = REWRITTEN[name]
    before = by_fvcore(model, IMAGE)
    result = allocator.allocate(
        model, before * 0.7, example_inputs=IMAGE, criterion="magnitude", **{"scope": "all", **options}
    )
    assert result.flops_before == before
    assert result.flops_after == by_fvcore(result.model, IMAGE)
    assert result.flops_after <= before * 0.7
    assert result.flops_after < before


@pytest.mark.parametrize("name", list(WHOLE)[::3])
def test_fvcore_counts_the_same_where_nothing_is_computed(name: str) -> None:
    model, shapes = WHOLE[name]
    inputs = as_inputs(tuple(inputs_of(shapes)), model.eval())
    assert fvcore_flops(model, inputs, computed=False) == fvcore_flops(model, inputs)


def test_what_is_not_computed_can_be_indices_and_in_a_constant_it_is_computed() -> None:
    def forward(module: Any, x: torch.Tensor) -> torch.Tensor:
        steps = (torch.arange(3) * 2 + 1).tolist()  # made of numbers alone, read as ever
        x = F.conv2d(x, module.weight, padding=1).view(int(x.shape[0]), sum(steps), *x.shape[2:])
        best = x.flatten(1).argmax(1)
        table = torch.zeros(4, 6)[(x.flatten(1).sum(1) * 0).long() + best * 0]
        x[:, 1:3] += 1
        return torch.cat([table, x.mean((2, 3))[:, :2].relu_()], 1) @ module.last

    model = Calls(forward, weight=torch.randn(9, 3, 3, 3), last=torch.randn(8, 5))
    inputs = as_inputs(torch.randn(2, 3, 16, 16), model.eval())
    counted = fvcore_flops(model, inputs)
    assert fvcore_flops(model, inputs, computed=False) == counted
    assert counted[0] > 2 * 9 * 27 * 16 * 16


def test_what_is_not_known_is_given_zeros_in_place_of_what_nobody_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's deformed convolution ends the process where an offset is NaN, as memory may hold."""
    filled = uncomputed._with_memory

    def spoilt(found: Any) -> Any:
        out = filled(found)
        return out.fill_(float("nan")) if isinstance(out, torch.Tensor) and out.is_floating_point() else out

    seen: list[bool] = []

    @torch.library.custom_op("neuron_cost::reads_places", mutates_args=())
    def reads_places(x: torch.Tensor) -> torch.Tensor:
        seen.append(bool(x.isnan().any()))
        return x.clone()

    monkeypatch.setattr(uncomputed, "_with_memory", spoilt)
    model = Calls(lambda m, x: reads_places(x @ m.weight) @ m.weight, weight=torch.randn(4, 4))
    fvcore_flops(model, as_inputs(torch.ones(2, 4), model), computed=False)
    assert seen == [False] * len(seen) != []


def test_a_number_that_nobody_computed_is_not_read_in_silence() -> None:
    model = Calls(lambda m, x: x.relu() if bool(m.weight.sum() > 0) else x @ m.weight, weight=torch.randn(4, 4))
    with pytest.raises(TraceError, match="cannot be counted without its numbers"):
        fvcore_flops(model, as_inputs(torch.ones(2, 4), model), computed=False)


def _as_small_as(m: Any, y: torch.Tensor) -> torch.Tensor:
    return F.interpolate(y, m.deep(m.down(y).relu()).shape[-2:])


def _as_small_as_either(m: Any, y: torch.Tensor) -> torch.Tensor:
    high, wide = m.down(y).size(2), m.deep(y).size(3)
    m.dead(y)
    return F.adaptive_avg_pool2d(y, (high, wide))


def _read_by_nobody(m: Any, y: torch.Tensor) -> torch.Tensor:
    assert m.deep(m.dead(y)).shape[1] == m.deep.out_channels
    return y


@pytest.mark.parametrize(
    ("middle", "counted"),
    [(_as_small_as, {"down", "deep"}), (_as_small_as_either, {"down", "deep"}), (_read_by_nobody, set())],
)
def test_layers_of_whose_results_the_size_alone_is_read_are_counted(middle: Any, counted: set[str]) -> None:
    strides = (("down", 2), ("deep", 3), ("dead", 1))
    parts: Any = {name: nn.Conv2d(12, 12, 3, stride, 1) for name, stride in strides}
    model = Net(middle, **parts).eval()
    graph = allocator.trace(model, IMAGE)
    assert graph.flops == by_fvcore(model, IMAGE)
    assert {term.module for term in graph.metric("flops").terms} & parts.keys() == counted
    result = allocator.allocate(model, "60%", example_inputs=IMAGE)
    assert result.flops_after == by_fvcore(result.model, IMAGE) <= 0.6 * graph.flops
    assert result.certificate.ok
