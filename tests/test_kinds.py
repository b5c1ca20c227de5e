"""Further inputs of each kind of fault that was found once, each unlike the ones that were found.

Where the others are: what a certificate has to see in `test_certificate*.py` and `test_float64.py`; what is left as it
was in `test_isolation.py` and `test_forms.py`; other modes and sizes in `test_elsewhere.py` and `test_adversarial.py`;
repairs in `test_local_repairs.py` and `test_fitting.py`; refusals in `test_refusals.py` and `test_bad_input.py`; what
is followed in `test_recurrent.py`, `test_index_buffers.py`, `test_torch_attention.py` and `test_unusual_*.py`; time in
`test_local_repairs.py` and `test_recurrent.py`; files in `test_absurd_files.py`, `test_hostile.py` and
`test_pickle_rehearsal.py`.
"""

from __future__ import annotations

import copy
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import pytest
import torch
from small_graphs import Net, net
from torch import Tensor, nn
from torch.nn import functional as F

import allocator
from allocator.errors import AllocatorError, UnsafeFileError
from allocator.io.files import load_model

IMAGE = torch.zeros(1, 3, 8, 8)
Middle = Callable[[Any, Tensor], Tensor]


def network(middle: Middle = lambda m, x: x, last: Callable[[Tensor], Any] = lambda y: y, **more: Any) -> Any:
    """Two convolutions with something between them, and a linear layer."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.head(m.two(middle(m, m.one(x).relu())).relu().mean((2, 3)))
        return (m.end if "end" in vars(m) else last)(y)

    torch.manual_seed(0)
    parts = {"one": nn.Conv2d(3, 16, 3, padding=1), "two": nn.Conv2d(16, 16, 3, padding=1), "head": nn.Linear(16, 5)}
    return net(run, **parts, **more)


def error(model: Any, result: allocator.Result, x: Tensor, training: bool = False) -> float:
    """How far the result is from the original that reads zeros, in float64, by the last layer's numbers."""
    cut, small = (copy.deepcopy(each).double().train(training) for each in (model, result.model))
    for name, parameter in cut.named_parameters():
        stay = result.allocation.kept.get(name, [None, None])
        if parameter.dim() > 1 and stay[1] is not None:
            parameter.data.index_fill_(1, torch.tensor([i for i in range(parameter.shape[1]) if i not in stay[1]]), 0)
    for each in (cut, small):
        vars(each)["end"] = lambda y: y
    with torch.no_grad():
        a, b = cut(x.double()), small(x.double())
    return float((a - b).abs().max() / a.abs().max())


def allocate(model: nn.Module, flops: Any = "60%", **options: Any) -> allocator.Result:
    given: dict[str, Any] = {"example_inputs": IMAGE, "criterion": "magnitude", **options}
    return allocator.allocate(model, flops, **given)


# A: numbers made of a channel count, and outputs that show little of them ------------------------------------

NUMBERS: dict[str, Middle] = {
    "strides": lambda m, x: x * (x.stride(0) / 1024),
    "bytes of a weight": lambda m, x: x * (m.one.weight.nbytes / (16 * 27 * 4)),
    "a shape as text": lambda m, x: x * int(str(tuple(x.shape)).split(",")[1]) / 16,
    "memory": lambda m, x: x * torch.frombuffer(bytearray(np.float32(16 / x.shape[1]).tobytes()), dtype=torch.float32),
    "ones added up": lambda m, x: x * torch.ones_like(x).cumsum(1),
    "a product of ones": lambda m, x: x * torch.einsum("c,c->", *[x.new_ones(x.shape[1])] * 2) / 16,
}
ENDS: dict[str, Callable[[Tensor], Any]] = {
    "places": lambda y: y.topk(2).indices,
    "sparse": lambda y: y.to_sparse(),
    "infinite": lambda y: torch.where(y > 0, torch.full_like(y, float("inf")), y),
    "in a queue": lambda y: deque([None, y]),
    "saturated": lambda y: (y * 1e4).softmax(1),
}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_made_of_a_channel_count_is_followed(number: str) -> None:
    model = network(NUMBERS[number])
    assert error(model, allocate(model), torch.rand(2, 3, 8, 8)) < 1e-9


@pytest.mark.parametrize("end", ENDS)
def test_outputs_that_show_little_hide_no_wrong_result_and_refuse_no_right_one(end: str) -> None:
    assert allocate(network(last=ENDS[end])).certificate.ok
    model = network(lambda m, x: x * torch.asarray([16 / x.shape[1]]).to(x), ENDS[end])
    assert error(model, allocate(model), torch.rand(2, 3, 8, 8)) < 1e-9


class InSlots:
    """Holds what it is given where no dict is."""

    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held


class Marked(Tensor):
    """A tensor of another class."""


def cyclic(h: Tensor) -> list[Any]:
    found: list[Any] = [h]
    found.append(found)
    return found


HELD: dict[str, Callable[[Tensor], Any]] = {
    "slots": InSlots,
    "a frozen set": lambda h: frozenset([h]),
    "a view of a dict": lambda h: {"h": h}.values(),
    "a read-only dict": lambda h: MappingProxyType({"h": h}),
    "an iterator": lambda h: iter([h]),
    "a map": lambda h: map(torch.tanh, [h]),
    "a function": lambda h: lambda: h,
    "a partial": lambda h: partial(torch.add, h),
    "a list that holds itself": cyclic,
    "another class": lambda h: h.as_subclass(Marked),
    "a parameter": lambda h: nn.Parameter(h, requires_grad=False),
    "a distribution": lambda h: torch.distributions.Normal(h, 1.0),
    "an array": lambda h: h.detach().numpy(),
    "a list of numbers": lambda h: h.tolist(),
    "a sum in numpy": lambda h: h.detach().numpy().sum(),
    "a shape": lambda h: h.shape,
    "a share": lambda h: 16 / h.shape[1],
    "a word": lambda h: f"{h.shape[1]} features",
    "an array of places": lambda h: np.arange(h.shape[1]),
    "a truth value for each": lambda h: [True] * h.shape[1],
}


def returning(hold: Callable[[Tensor], Any], **more: Any) -> Any:
    """A network that returns its answer, and what it holds of its features."""

    def run(m: Any, x: Tensor) -> Any:
        h = m.one(x).relu()
        return m.head(m.two(h).relu().mean((2, 3))), hold(h.mean((2, 3)))

    torch.manual_seed(0)
    parts = {"one": nn.Conv2d(3, 16, 3, padding=1), "two": nn.Conv2d(16, 16, 3, padding=1), "head": nn.Linear(16, 5)}
    return net(run, **parts, **more)


@pytest.mark.parametrize("kind", HELD)
def test_what_a_model_returns_keeps_its_channels_wherever_it_is_held(kind: str) -> None:
    result = allocate(returning(HELD[kind]))
    small: Any = result.model
    assert small.one.out_channels == 16
    assert small.two.out_channels < 16
    assert result.certificate.ok


def test_a_generator_that_is_returned_is_refused() -> None:
    with pytest.raises(AllocatorError, match=r"returns a generator, .*: return a list, as .* list\(model\(x\)\)"):
        allocate(returning(lambda h: (each for each in [h])))


def test_numbers_that_are_others_every_time_are_no_outputs() -> None:
    valued = lambda h: (time.perf_counter(), h.new_zeros(1).item())  # noqa: E731
    for hold in (lambda h: time.perf_counter(), lambda h: str(object()), valued):
        small: Any = allocate(returning(hold)).model
        assert small.one.out_channels < 16


def test_a_number_of_channels_beside_values_is_seen_in_the_outputs() -> None:
    for hold in (lambda h: (h.new_zeros(1).item(), h.shape[1]), lambda h: f"{h.new_zeros(1).item()} of {h.shape[1]}"):
        with pytest.raises(AllocatorError, match="is not the original minus the dropped neurons"):
            allocate(returning(hold))


OBJECTS: dict[str, Callable[[Tensor], Tensor]] = {
    "another class and back": lambda x: (x.as_subclass(Marked) * 2).as_subclass(Tensor),
    "a parameter": lambda x: nn.Parameter(x, requires_grad=False) * 2,
    "an object of the same memory": lambda x: torch.Tensor._make_subclass(Marked, x) * 2,
    "memory of another library": lambda x: torch.from_dlpack(x) * 2,
    "number by number in Python": lambda x: x.detach().cpu().clone().apply_(lambda value: value * 2),
    "a mean in numpy": lambda x: x - torch.from_numpy(x.detach().numpy().mean(1, keepdims=True)),
    "a gradient": lambda x: torch.func.grad(lambda t: (t**2).sum())(x),
    "a place to write into": lambda x: _written_in_part(x),
}


def _written_in_part(x: Tensor) -> Tensor:
    z = x.clone()
    torch.tanh(x[:, :4], out=z[:, :4])
    return z


@pytest.mark.parametrize("kind", OBJECTS)
def test_a_tensor_is_followed_through_other_objects_of_its_memory(kind: str) -> None:
    model = network(lambda m, x: OBJECTS[kind](x))
    result = allocate(model)
    small: Any = result.model
    assert small.two.out_channels < 16
    assert error(model, result, torch.rand(2, 3, 8, 8)) < 1e-9


def test_quantised_outputs_are_compared() -> None:
    quantise = lambda y: torch.quantize_per_tensor(y, 0.001, 0, torch.qint32)  # noqa: E731
    assert str(allocate(network(last=quantise)).certificate).startswith("passed")


def test_nested_outputs_are_compared() -> None:
    nested = lambda y: torch.nested.nested_tensor(list(y))  # noqa: E731
    assert str(allocate(network(last=nested)).certificate).startswith("passed")


# B: what a forward changes outside of its modules ---------------------------------------------------------------

GENERATORS: dict[str, tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "torch": (torch.Generator, lambda g: torch.rand(3, generator=g), lambda g: g.get_state().tolist()),
    "numpy": (np.random.default_rng, lambda g: g.random(), lambda g: g.bit_generator.state),
    "numpy, old": (np.random.RandomState, lambda g: g.rand(), lambda g: g.get_state()[1].tolist()),
    "Python": (random.Random, lambda g: g.random(), lambda g: g.getstate()),
}


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_of_the_model_s_own_is_where_it_was(kind: str, held: bool) -> None:
    make, draw, state = GENERATORS[kind]
    generator = make()

    def middle(m: Any, x: Tensor) -> Tensor:
        draw(m.generator if held else generator)
        return x

    model = network(middle, **({"generator": generator} if held else {}))
    before = state(generator)
    allocate(model)
    assert state(generator) == before


def test_what_a_thread_keeps_is_as_it_was() -> None:
    kept = threading.local()

    def middle(m: Any, x: Tensor) -> Tensor:
        if not hasattr(kept, "shift"):
            kept.shift = torch.zeros(x.shape[1], 1, 1, device=x.device)
        return x + kept.shift

    model = network(middle)
    allocate(model)
    assert not hasattr(kept, "shift")
    assert model(IMAGE).shape == (1, 5)


def test_a_default_dtype_that_a_forward_sets_is_as_it_was() -> None:
    def middle(m: Any, x: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        return x

    try:
        allocate(network(middle))
        assert torch.get_default_dtype() is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


# C: other modes and sizes -----------------------------------------------------------------------------------------


def _by_side(m: Any, x: Tensor) -> Tensor:
    return x + F.interpolate(m.places, x.shape[2:]) if x.shape[2:] != m.places.shape[2:] else x + m.places


ELSEWHERE: dict[str, tuple[Middle, Callable[[], dict[str, Any]]]] = {
    "places by side": (_by_side, lambda: {"places": nn.Parameter(torch.randn(1, 16, 8, 8))}),
    "a gate in train mode": (
        lambda m, x: x * m.gate.view(1, -1, 1, 1) if m.training else x,
        lambda: {"gate": nn.Parameter(torch.rand(16))},
    ),
    "a width in train mode": (lambda m, x: x.view(len(x), 16, -1).view_as(x) if m.training else x, dict),
    "a mean of large images": (lambda m, x: x * (x.sum(1, keepdim=True) / 16) if x.shape[-1] > 12 else x, dict),
    "parts of small images": (lambda m, x: torch.cat(x.chunk(4, 1)[::-1], 1) if x.shape[-1] < 8 else x, dict),
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_result_holds_in_other_modes_and_sizes(kind: str) -> None:
    middle, parts = ELSEWHERE[kind]
    model = network(middle, **parts())
    result = allocate(model)
    for training in (False, True):
        for shape in ((3, 3, 8, 8), (2, 3, 12, 16), (2, 3, 6, 6)):
            assert error(model, result, torch.rand(shape), training) < 1e-9


# D: what a check in a module freezes ------------------------------------------------------------------------------


class Checked(nn.Module):
    """Looks at what it is given before it does anything, if it does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 32:
            raise ValueError("expected 32 channels")
        result: Tensor = self.layer(x)
        return result


class Unit(nn.Sequential):
    """A convolution and its norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


@pytest.mark.parametrize("layer", [nn.Identity, lambda: nn.AvgPool2d(3, 1, 1), lambda: Unit(32, 32)])
def test_a_module_that_refuses_what_it_is_given_freezes_that_alone(layer: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    units = [Unit(3, 32), Unit(32, 48), Unit(48, 32), Checked(layer()), Unit(32, 64), Unit(64, 32)]
    model = Net(lambda m, x: m.head(m.units(x)), units=nn.Sequential(*units), head=nn.Conv2d(32, 8, 1)).eval()
    result = allocate(model, "25%", scope="all")
    small: Any = result.model
    assert small.units[2][0].out_channels == 32
    assert small.units[4][0].out_channels < 64
    note = next(note for note in result.notes if "stay" in note)
    assert "expected 32 channels" in note
    assert "in units.2" in note or layer is not nn.Identity


# E: refusals that say what would help -----------------------------------------------------------------------------


def _sparse() -> nn.Module:
    model: Any = network()
    model.head.weight = nn.Parameter(model.head.weight.detach().to_sparse())
    return cast(nn.Module, model)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), r"0\.weight is lazily initialised: run model\("),
    "sparse": (_sparse, r"head\.weight is sparse_coo, which has no channels .* such as its \.to_dense\(\)"),
    "a function": (lambda: torch.relu, "pass a torch.nn.Module"),
    "traced": (lambda: torch.jit.trace(nn.Conv2d(3, 4, 1), IMAGE), "pass the Python module it was made from"),
    "nothing returned": (lambda: network(last=lambda y: None), "; what its forward returns holds no tensor: "),
    "a forward that raises": (lambda: network(lambda m, x: x / 0 if 1 // 0 else x), "ZeroDivisionError in the model's"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refusal_says_why_and_leaves_nothing_on_stderr(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, message = REFUSED[kind]
    model = make()
    capfd.readouterr()
    with pytest.raises(AllocatorError, match=message):
        allocate(model)
    assert capfd.readouterr().err == ""


# H: files that ask for more than they hold -----------------------------------------------------------------------


class Asks:
    """Pickled as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "asks",
    [
        Asks(nn.Bilinear, 10_000, 10_000, 1_000),
        Asks(nn.Transformer, 512, 8, 1_000),
        Asks(bytes, 10**10),
        [Asks(nn.Linear, 2_000, 2_000) for _ in range(500)],
    ],
    ids=["bilinear", "transformer", "bytes", "many"],
)
def test_a_small_file_that_asks_for_much_is_refused(asks: Any, tmp_path: Path) -> None:
    torch.save(asks, tmp_path / "m.pt")
    with pytest.raises(UnsafeFileError, match="was not opened"):
        load_model(tmp_path / "m.pt")
