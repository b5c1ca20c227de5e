"""Calls that are not left to torch give what torch gives: shape, dtype and strides, or the same error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import allocator.operators  # noqa: F401  (declares the operators)
from allocator.tracing.meta_kernels import run
from allocator.tracing.operators import AS_ONE_CALL

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


X = meta(2, 6, 9, 7)
STATISTICS = tuple(meta(6) for _ in range(4))
LAST = X.to(memory_format=torch.channels_last)


def convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: list[int] | None = None,
    padding: list[int] | None = None,
    dilation: list[int] | None = None,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[Any, tuple[Any, ...]]:
    ones = [1] * (x.dim() - 2)
    sizes = (stride or ones, padding or ones, dilation or ones, transposed, [0] * len(ones), groups)
    return aten.convolution.default, (x, weight, bias, *sizes)


CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "relu": (aten.relu.default, (X,)),
    "relu, channels last": (aten.relu.default, (LAST,)),
    "relu_": (aten.relu_.default, (X,)),
    "hardswish": (aten.hardswish.default, (X,)),
    "hardswish_": (aten.hardswish_.default, (X,)),
    "half precision": (aten.silu.default, (X.to(torch.float16),)),
    "whole numbers": (aten.sigmoid.default, (X.to(torch.int64),)),
    "add": (aten.add.Tensor, (X, X)),
    "add, other dtype": (aten.add.Tensor, (X, X.to(torch.float64))),
    "multiply, a gate first": (aten.mul.Tensor, (meta(2, 6, 1, 1), X)),
    "multiply, both broadcast": (aten.mul.Tensor, (meta(2, 6, 1, 1), meta(1, 6, 9, 1))),
    "multiply, other rank": (aten.mul.Tensor, (X, meta(7))),
    "multiply by a number": (aten.mul.Tensor, (X, 2.0)),
    "in place, a gate": (aten.mul_.Tensor, (X, meta(2, 6, 1, 1))),
    "compare": (aten.gt.Scalar, (X, 0.5)),
    "is nan": (aten.isnan.default, (X,)),
    "clamp with a missing bound": (aten.clamp.default, (X, None, 6.0)),
    "where": (aten.where.self, (X.to(torch.bool), X, X)),
    "batch norm": (aten.native_batch_norm.default, (X, *STATISTICS, False, 0.1, 1e-5)),
    "batch norm, train mode": (aten.native_batch_norm.default, (X, *STATISTICS, True, 0.1, 1e-5)),
    "batch norm as a whole": (aten.batch_norm.default, (X, *STATISTICS, False, 0.1, 1e-5, False)),
    "batch norm, channels last": (
        aten.batch_norm.default,
        (LAST, *STATISTICS, False, 0.1, 1e-5, False),
    ),
    "mean": (aten.mean.dim, (X, [-1, -2], True)),
    "mean without dims": (aten.mean.dim, (X, [2, 3], False)),
    "mean, keepdim left out": (aten.mean.dim, (X, [2, 3])),
    "mean of all": (aten.mean.dim, (X, [], True)),
    "mean, channels last": (aten.mean.dim, (LAST, [1], True)),
    "bilinear": (aten.upsample_bilinear2d.default, (X, [18, 14], False, 2.0, 2.0)),
    "bilinear, corners": (aten.upsample_bilinear2d.default, (X, [5, 4], True)),
    "bilinear, channels last": (aten.upsample_bilinear2d.default, (LAST, [18, 14], False, 2.0, 2.0)),
    "bilinear, half precision": (aten.upsample_bilinear2d.default, (X.to(torch.float16), [18, 14], False)),
    "bilinear, turned": (aten.upsample_bilinear2d.default, (X.transpose(2, 3), [18, 14], False)),
    "bilinear, one channel": (aten.upsample_bilinear2d.default, (meta(2, 1, 9, 7), [18, 14], False)),
    "bilinear, one pixel": (aten.upsample_bilinear2d.default, (meta(2, 6, 1, 1), [4, 3], True)),
    "nearest": (aten.upsample_nearest2d.default, (X, [18, 14], 2.0, 2.0)),
    "nearest, channels last": (aten.upsample_nearest2d.default, (LAST, [18, 14])),
    "nearest, one channel": (aten.upsample_nearest2d.default, (meta(2, 1, 9, 7), [4, 3])),
    "nearest, one pixel": (aten.upsample_nearest2d.default, (meta(2, 6, 1, 1), [4, 3])),
    "convolution": convolution(X, meta(4, 6, 3, 3)),
    "convolution, bias": convolution(X, meta(4, 6, 3, 5), meta(4), stride=[2, 3], padding=[0, 2], dilation=[2, 1]),
    "convolution, groups": convolution(X, meta(9, 2, 3, 3), groups=3),
    "convolution, channels last": convolution(LAST, meta(4, 6, 3, 3)),
    "convolution, transposed": convolution(X, meta(6, 4, 3, 3), transposed=True),
    "convolution, 1-D": convolution(meta(2, 6, 9), meta(4, 6, 3)),
    "convolution, 3-D": convolution(meta(2, 6, 5, 5, 5), meta(4, 6, 3, 3, 3)),
    "convolution, wrong channels": convolution(X, meta(4, 5, 3, 3)),
    "convolution, kernel too large": convolution(X, meta(4, 6, 13, 13)),
    "linear": (aten.linear.default, (X, meta(5, 7), meta(5))),
    "linear, no bias": (aten.linear.default, (meta(3, 7), meta(5, 7))),
    "linear, a vector": (aten.linear.default, (meta(7), meta(5, 7))),
    "linear, one output": (aten.linear.default, (meta(3, 7), meta(7))),
    "linear, transposed": (aten.linear.default, (X.transpose(1, 3), meta(5, 6))),
    "linear, other dtype": (aten.linear.default, (X, meta(5, 7, dtype=torch.float64))),
    "linear, wrong channels": (aten.linear.default, (X, meta(5, 6))),
    "linear, wrong bias": (aten.linear.default, (X, meta(5, 7), meta(4))),
}


def outcome(run: Any) -> Any:
    try:
        out = run()
    except RuntimeError as error:
        return type(error)
    return [(tuple(t.shape), t.dtype, t.stride(), t.device.type) for t in (out if isinstance(out, tuple) else (out,))]


@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_gives_what_torch_gives(name: str) -> None:
    func, args = CALLS[name]
    expected = outcome(lambda: func(*args))
    assert outcome(lambda: run(func, args, {})) == expected
    assert outcome(lambda: run(func, args, {})) == expected, "the second time, from what the first has taught"


def test_a_call_in_place_gives_its_argument() -> None:
    assert run(aten.relu_.default, (X,), {}) is X
    assert run(aten.add_.Tensor, (X, meta(1, 6, 1, 1)), {}) is X


def test_values_are_computed_where_there_are_some() -> None:
    x = torch.tensor([-1.0, 2.0])
    assert run(aten.relu.default, (x,), {}).tolist() == [0.0, 2.0]


def test_a_batch_norm_is_one_call_where_nothing_is_lost_by_it() -> None:
    """Torch itself tells sizes that differ, computes values, and refuses statistics of one number each."""
    weight, bias, mean, var = STATISTICS
    assert AS_ONE_CALL[functional.batch_norm](X, mean, var, weight, bias) == (
        aten.batch_norm.default,
        (X, weight, bias, mean, var, False, 0.1, 1e-5, False),
    )
    assert AS_ONE_CALL[functional.batch_norm](X, mean, var, weight, meta(5)) is None
    in_training = AS_ONE_CALL[functional.batch_norm](X, mean, var, training=True)
    assert in_training == (aten.batch_norm.default, (X, None, None, mean, var, True, 0.1, 1e-5, False))
    assert AS_ONE_CALL[functional.batch_norm](meta(1, 6), mean, var, training=True) is None
    assert AS_ONE_CALL[functional.batch_norm](X, None, None, training=True) is None
    assert AS_ONE_CALL[functional.batch_norm](torch.randn(2, 3), torch.zeros(3), torch.ones(3)) is None


class Dispatched(TorchDispatchMode):
    """The ATen calls that torch makes of a function, with tensors by their identity."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, by_identity(args)))
        return func(*args, **(kwargs or {}))


def by_identity(args: Any) -> list[Any]:
    return [id(item) if isinstance(item, torch.Tensor) else item for item in args]


W, B = meta(4, 6, 3, 3), meta(4)
FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "conv2d": (torch.conv2d, (X, W, B, (2, 1), (1, 0), (1, 2), 1), {}),
    "conv2d, by name": (torch.conv2d, (), {"input": X, "weight": W, "stride": (1, 1), "padding": (0, 0),
                                           "dilation": (1, 1)}),
    "conv2d, groups": (torch.conv2d, (X, meta(6, 1, 3, 3), None, (1, 1), (1, 1), (1, 1), 6), {}),
    "conv1d": (torch.conv1d, (meta(2, 6, 9), meta(4, 6, 3), B, (1,), (1,), (1,), 1), {}),
    "conv3d": (torch.conv3d, (meta(2, 6, 5, 5, 5), meta(4, 6, 3, 3, 3), B, *[(1, 1, 1)] * 3, 1), {}),
    **{name: (getattr(functional, name), (X,), {}) for name in ("relu", "silu", "hardswish", "hardsigmoid")},
    **{f"{name} in place": (getattr(functional, name), (X.clone(),), {"inplace": True})
       for name in ("relu", "silu", "hardswish", "hardsigmoid")},
    "relu by name": (functional.relu, (), {"input": X, "inplace": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_recorded_as_one_call_is_the_call_that_torch_makes(name: str) -> None:
    function, args, kwargs = FUNCTIONS[name]
    with torch.no_grad(), Dispatched() as dispatched:
        function(*args, **kwargs)
    target, given = AS_ONE_CALL[function](*args, **kwargs)  # type: ignore[misc]
    assert [(target, by_identity(given))] == dispatched.calls


@pytest.mark.parametrize("sizes", [(1, 0, 1), ((1, 1), "same", (1, 1)), ((1,), (0, 0), (1, 1)), ([1, 1], (0, 0), 1)])
def test_a_convolution_whose_sizes_are_not_one_per_dim_is_left_to_torch(sizes: Any) -> None:
    assert AS_ONE_CALL[torch.conv2d](X, W, B, *sizes) is None


@pytest.mark.parametrize("place", range(3))
def test_a_convolution_of_other_dtypes_is_left_to_torch(place: int) -> None:
    tensors = [t.to(torch.float64) if i == place else t for i, t in enumerate((X, W, B))]
    assert AS_ONE_CALL[torch.conv2d](tensors[0], tensors[1], tensors[2], (1, 1), (0, 0), (1, 1)) is None


def test_a_convolution_or_activation_of_values_is_left_to_torch() -> None:
    x = torch.randn(1, 6, 5, 5)
    assert AS_ONE_CALL[torch.conv2d](x, torch.randn(4, 6, 3, 3), None, (1, 1), (0, 0), (1, 1)) is None
    assert AS_ONE_CALL[functional.relu](x) is None


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_that_does_not_fit_raises_as_on_values(transposed: bool, groups: int) -> None:
    """Torch itself sees neither a transposed one's channels nor a bias without values."""
    shape = (6, 4, 3, 3) if transposed else (4, 6 // groups, 3, 3)
    outputs = shape[1] * groups if transposed else shape[0]
    for channels, numbers in ((6, outputs), (4, outputs), (6, outputs + 1), (6, shape[1] + 1)):
        tensors = [torch.zeros(size) for size in ((1, channels, 5, 5), shape, (numbers,))]
        found = []
        for device in ("cpu", "meta"):
            func, args = convolution(*(t.to(device) for t in tensors), transposed=transposed, groups=groups)
            try:
                found.append(run(func, args, {}).shape)
            except RuntimeError:
                found.append(None)
        assert found[0] == found[1]
        assert (found[0] is None) == ((channels, numbers) != (6, outputs))
