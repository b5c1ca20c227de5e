"""Operators and tensors of unusual kinds: what touches them is right by certificate, or stays and is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from subjects import IMAGE, trained, untouched
from torch import Tensor, nn
from torch.nn import functional as F

import allocator
from allocator.cost.fvcore import fvcore_flops

pytestmark = [
    pytest.mark.filterwarnings("ignore::allocator.AllocatorWarning"),
    pytest.mark.filterwarnings("ignore:.*Sparse CSR.*"),
    pytest.mark.filterwarnings("ignore:.*nested.*"),
]


class Around(nn.Module):
    """An ordinary stem, what is asked about on its 16 channels, and an ordinary body that can always be narrowed."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm, self.middle = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), middle
        self.body, self.norm2, self.head = nn.Conv2d(16, 48, 3, padding=1), nn.BatchNorm2d(48), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(F.relu(self.norm(self.stem(x))))
        return self.head(F.relu(self.norm2(self.body(x))).mean((2, 3)))


class _Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grads[0] * s * (1 + x * (1 - s))


class CustomFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Swish.apply(x)


_LIBRARY = torch.library.Library("unusual_operators", "DEF")
_LIBRARY.define("reversed(Tensor x) -> Tensor")
_LIBRARY.impl("reversed", lambda x: x.flip(1).contiguous(), "CPU")


class OperatorWithoutMeta(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.unusual_operators.reversed(x)


class WritesIntoViews(nn.Module):
    """Half of the channels are doubled in place through a view of a view."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y.view(y.shape[0], 2, -1, *y.shape[2:])[:, 1].mul_(2)
        return y


class Spectrum(nn.Module):
    """Channels are filtered one by one in the frequency domain (Rao et al., NeurIPS 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(16, 16, 9, dtype=torch.complex64) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x, norm="ortho") * self.filter, s=x.shape[-2:], norm="ortho")


class Nested(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.nested.nested_tensor(list(x))
        return torch.nested.to_padded_tensor(F.relu(pieces), 0.0)


class SparseWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        dense = torch.eye(16) + 0.1 * torch.randn(16, 16) * (torch.rand(16, 16) < 0.2)
        self.register_buffer("weight", dense.to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        flat = x.permute(1, 0, 2, 3).flatten(1)
        mixed = torch.sparse.mm(self.get_buffer("weight"), flat)
        return mixed.view(16, x.shape[0], *x.shape[2:]).permute(1, 0, 2, 3)


class Einsum(nn.Module):
    """A bottleneck of parameters that only einsum reads."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(16, 12) / 4), nn.Parameter(torch.randn(16, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("oh,nhyx->noyx", self.up, F.relu(torch.einsum("nchw,cd->ndhw", x, self.down)))


class Standardised(nn.Conv2d):
    """Weight standardisation (Qiao et al., 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return self._conv_forward(x, w, self.bias)


class Dynamic(nn.Module):
    """A mixture of kernels that the image chooses (Chen et al., CVPR 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.gate = nn.Parameter(torch.randn(4, 16, 16, 3, 3) / 8), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        mix = self.gate(x.mean((2, 3))).softmax(-1)
        weight = (mix @ self.kernels.flatten(1)).view(-1, 16, 3, 3)
        n = x.shape[0]
        return F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight, padding=1, groups=n).view(n, -1, *x.shape[2:])


class Hyper(nn.Module):
    """A small network makes the weights of a layer out of a code (Ha et al., ICLR 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.make = nn.Parameter(torch.randn(8)), nn.Linear(8, 16 * 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.make(self.code).view(16, 16, 1, 1))


# Each with the operator that is named where the 16 channels of the stem must stay; None where they may be narrowed.
MIDDLES: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "custom autograd function": (CustomFunction, None),
    "custom operator without a meta kernel": (OperatorWithoutMeta, "unusual_operators::reversed"),
    "in-place writes into views": (WritesIntoViews, None),
    "complex tensors": (Spectrum, None),
    "nested tensors": (Nested, "_nested_tensor_from_tensor_list"),
    "sparse weight": (SparseWeight, "_sparse_addmm"),
    "parameters in einsum": (Einsum, None),
    "weight standardisation": (lambda: Standardised(16, 16, 3, padding=1), "std"),
    "dynamic convolution": (Dynamic, "convolution"),
    "hypernetwork": (Hyper, "view"),
}


@pytest.mark.parametrize("kind", MIDDLES)
def test_it_is_right_or_stays_and_is_named(kind: str) -> None:
    make, named = MIDDLES[kind]
    torch.manual_seed(0)
    model = trained(Around(make()))
    with untouched(model):
        options: dict[str, Any] = {"scope": "all", "criterion": "magnitude", "policy": "per_block"}
    result = allocator.allocate(model, "60%", example_inputs=IMAGE, **options)
    small: Any = result.model
    assert result.certificate.ok
    assert result.certificate.relative_error is not None
    assert result.certificate.relative_error <= 1e-9
    assert result.flops_after <= result.flops_asked
    assert small.body.out_channels < 48
    if named is None:
        assert small.stem.out_channels < 16
    else:
        assert small.stem.out_channels == 16
        said = [reason for reason, _ in result.graph.reasons() if reason.endswith("in middle")]
        assert any(f"({named})" in reason for reason in said), said
    _same_as_zeroed(model, result)
    if kind not in _NO_GRADIENT:
        small.train()(torch.randn(2, 3, 16, 16)).sum().backward()


class Waves(nn.Module):
    """Convolutions of complex numbers, of which fvcore sees the real ones that they are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, dtype=torch.complex64)
        self.each = nn.Conv2d(16, 16, 3, padding=1, groups=16, dtype=torch.complex64)
        self.head = nn.Conv2d(16, 4, 1, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.each(self.first(x.to(torch.complex64))))
        return y.abs()


@pytest.mark.filterwarnings("error:Casting complex")
@pytest.mark.parametrize("criterion", ["group_norm", "magnitude", "fpgm"])
def test_convolutions_of_complex_numbers_count_as_fvcore_counts_them(criterion: str) -> None:
    torch.manual_seed(0)
    model = Waves().eval()
    result = allocator.allocate(model, "60%", example_inputs=IMAGE, scope="all", criterion=criterion)
    assert result.certificate.ok
    assert result.certificate.relative_error is not None
    assert result.flops_after == fvcore_flops(result.model, result.graph.inputs)[0]
    assert result.flops_before == fvcore_flops(model, result.graph.inputs)[0]
    assert result.model.first.out_channels < 16  # type: ignore[union-attr, operator]


_NO_GRADIENT = {"custom operator without a meta kernel"}


# Weights that read neurons, with the dim that does.
_READERS = {"middle.weight": 1, "middle.down": 0, "middle.up": 1, "body.weight": 1, "head.weight": 1}


def _same_as_zeroed(model: Any, result: allocator.Result) -> None:
    """By hand: what is dropped is zeroed wherever a weight reads it; the outputs are the same."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in _READERS.keys() & result.allocation.kept.keys() & parameters.keys():
            dim, whole = _READERS[name], parameters[name]
            stay = result.allocation.kept[name][dim]
            if stay is not None:
                whole.index_fill_(dim, torch.tensor(sorted({*range(whole.shape[dim])} - {*stay})), 0)
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(result.model.eval()(x), model(x))


def test_two_widths_of_a_bottleneck_in_einsum_are_one() -> None:
    torch.manual_seed(0)
    model = trained(Around(Einsum()))
    options: dict[str, Any] = {"scope": "all", "criterion": "magnitude", "policy": "per_block"}
    result = allocator.allocate(model, "60%", example_inputs=IMAGE, **options)
    down, up = (result.model.get_parameter(f"middle.{name}") for name in ("down", "up"))
    assert down.shape[1] == up.shape[1] < 12
    assert result.allocation.kept["middle.down"][1] == result.allocation.kept["middle.up"][1]
    assert down.shape[0] == result.model.get_parameter("stem.weight").shape[0]


WRITTEN_DOWN: dict[str, Callable[[Tensor, int], Tensor]] = {
    "torch.tensor": lambda x, n: torch.tensor(n),
    "on a device": lambda x, n: torch.tensor([n], device=x.device),
    "as_tensor": lambda x, n: torch.as_tensor(float(n)),
    "new_tensor": lambda x, n: x.new_tensor([n]),
    "full": lambda x, n: torch.full((1,), n),
    "new_full": lambda x, n: x.new_full((1,), n),
    "scalar_tensor": lambda x, n: torch.scalar_tensor(n),
    "ones": lambda x, n: torch.ones(n).sum(),
}


class DividesByWidth(nn.Module):
    """Divides by the root of the number of channels, which it writes into a tensor first."""

    def __init__(self, write: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        return x / self.write(x, x.shape[1]).sqrt()


@pytest.mark.parametrize("kind", WRITTEN_DOWN)
def test_a_size_that_is_written_into_a_tensor_keeps_the_channels_it_counts(kind: str) -> None:
    """RAFT does so; the structural check alone let it pass."""
    torch.manual_seed(0)
    model = trained(Around(DividesByWidth(WRITTEN_DOWN[kind])))
    result = allocator.allocate(
        model, "60%", example_inputs=IMAGE, scope="all", criterion="magnitude", policy="uniform", certify=False
    )
    small: Any = result.model
    assert (small.stem.out_channels, small.body.out_channels < 48) == (16, True)
    assert any("in middle counts" in note or "in middle stay" in note for note in result.notes)
    _same_as_zeroed(model, result)


class WithoutPrefix(nn.Module):
    """Sets a prefix of no tokens aside, as attentions with rotary embeddings do where there is no class token."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, 6, 8))
        self.wide, self.narrow = nn.Linear(8, 20), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.place
        prefix, rest = x[:, :0], x[:, 0:]
        return torch.cat([prefix, self.narrow(F.relu(self.wide(rest)))], 1)


def test_a_part_that_is_empty_from_the_start_is_not_lost() -> None:
    torch.manual_seed(0)
    result = allocator.allocate(WithoutPrefix().eval(), "60%", example_inputs=torch.randn(2, 6, 8))
    small: Any = result.model
    assert (small.wide.out_features, small.wide.in_features) == (12, 8)
    assert not any("stay" in note for note in result.notes)


class Forgets(nn.Module):
    """Writes the number of channels into tensors that it has no use for, before it computes."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            torch.as_tensor(x.shape[1])
            torch.tensor(x.shape[1])
            x.new_tensor(x.shape[1])
            x = F.relu(x) + 1
        return x


def test_a_size_that_is_written_down_and_forgotten_keeps_nothing() -> None:
    """A later tensor may lie where the forgotten one lay."""
    torch.manual_seed(0)
    model = trained(Around(Forgets()))
    result = allocator.allocate(
        model, "60%", example_inputs=IMAGE, scope="all", criterion="magnitude", policy="uniform"
    )
    small: Any = result.model
    assert small.stem.out_channels < 16
    assert not any("stay" in note for note in result.notes), result.notes


class Reshapes(nn.Module):
    """Gives tensors other shapes in place."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(x)
        y.unsqueeze_(2)
        y.transpose_(3, 4)
        y.squeeze_(2)
        return y.transpose_(2, 3)


def test_shapes_that_change_in_place_are_followed() -> None:
    torch.manual_seed(0)
    model = trained(Around(Reshapes()))
    result = allocator.allocate(
        model, "60%", example_inputs=IMAGE, scope="all", criterion="magnitude", policy="uniform"
    )
    small: Any = result.model
    assert small.stem.out_channels < 16
    assert not any("stay" in note for note in result.notes), result.notes


class ByName(nn.Module):
    """Its functions are given their arguments by name, as their documentation has them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        x = F.conv2d(input=x, weight=self.conv.weight, bias=self.conv.bias, stride=(1, 1))
        x = F.batch_norm(
            input=x, running_mean=norm.running_mean, running_var=norm.running_var, weight=norm.weight, bias=norm.bias
        )
        x = F.relu(input=x).movedim(1, -1)
        return F.linear(input=x, weight=self.linear.weight, bias=self.linear.bias).movedim(-1, 1)


def test_functions_that_are_given_arguments_by_name() -> None:
    model = trained(Around(ByName()))
    graph = allocator.trace(model, IMAGE)
    assert {"convolution", "batch_norm", "relu", "linear"} <= {op.name for op in graph.flow.trace.ops}
    assert allocator.allocate(model, "60%", example_inputs=IMAGE).certificate.ok


class Refusing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("not today")


class Falling(nn.Module):
    """Falls back where a part of it raises."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.ReLU(), Refusing())

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.first(x)
        except ValueError:
            return x


def test_a_part_that_raised_and_was_caught_has_not_run_on() -> None:
    graph = allocator.trace(trained(Around(Falling())), IMAGE)
    modules = [op.module for op in graph.flow.trace.ops]
    assert modules[modules.index("middle.first.0") + 1 :] == ["body", "norm2", "", "", "head"]
