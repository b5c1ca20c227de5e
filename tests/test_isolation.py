"""What an allocation leaves behind: nothing in the caller's model, its classes, its process or its threads."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import logging
import os
import random
import subprocess
import sys
import threading
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from small_graphs import Net, net
from subjects import untouched
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

import allocator
from allocator.errors import AllocatorError, CertificateError, UnsupportedModelError
from allocator.tracing.memory import Memory

IMAGE = torch.zeros(1, 3, 8, 8)
KEPT: dict[Any, Any] = {}
ROWS: list[Tensor] = []
LATEST: Any = None


def parts() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"one": nn.Conv2d(3, 16, 3, padding=1), "two": nn.Conv2d(16, 16, 3, padding=1), "head": nn.Linear(16, 5)}


def forward(m: Any, x: Tensor, between: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    result: Tensor = m.head(m.two(between(m.one(x).relu())).relu().mean((2, 3)))
    return result


def model_with(between: Callable[[Tensor], Tensor]) -> Any:
    return net(lambda m, x: forward(m, x, between), **parts())


def allocate(model: nn.Module, **options: Any) -> allocator.Result:
    return allocator.allocate(model, "60%", example_inputs=IMAGE, criterion="magnitude", **options)


# Caches ---------------------------------------------------------------------------------------------


class Remembering(Net):
    """Keeps what it computed in its class."""

    table: dict[Any, Any] = {}  # noqa: RUF012
    calls = 0
    last: Tensor | None = None


def by_class(m: Any, x: Tensor) -> Tensor:
    if x.shape not in Remembering.table:
        Remembering.table[x.shape] = torch.linspace(0, 1, x.shape[-1], device=x.device)
    Remembering.calls += 1
    Remembering.last = x
    return forward(m, x + Remembering.table[x.shape])


def in_the_file(x: Tensor) -> Tensor:
    global LATEST
    if x.shape not in KEPT:
        KEPT[x.shape] = {"ramp": torch.linspace(0, 1, x.shape[-1], device=x.device)}
        ROWS.append(KEPT[x.shape]["ramp"])
        LATEST = KEPT[x.shape]["ramp"]
    return x + KEPT[x.shape]["ramp"]


@functools.lru_cache(maxsize=8)
def ramp(side: int, device: torch.device) -> Tensor:
    return torch.linspace(0, 1, side, device=device)


def remembered(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    found: dict[Any, Tensor] = {}

    @functools.wraps(function)
    def run(side: int, device: torch.device) -> Tensor:
        if side not in found:
            found[side] = function(side, device)
        return found[side]

    return run


@remembered
def decorated(side: int, device: torch.device) -> Tensor:
    return torch.linspace(0, 1, side, device=device)


def by_default(side: int, device: torch.device, found: dict[Any, Tensor] = {}) -> Tensor:  # noqa: B006
    return found.setdefault(side, torch.linspace(0, 1, side, device=device))


CACHES: dict[str, Callable[[Tensor], Tensor]] = {
    "globals": in_the_file,
    "lru_cache": lambda x: x + ramp(x.shape[-1], x.device),
    "a decorator": lambda x: x + decorated(x.shape[-1], x.device),
    "a default": lambda x: x + by_default(x.shape[-1], x.device),
}


@pytest.mark.parametrize("cache", CACHES)
def test_what_a_forward_keeps_outside_of_its_modules_is_as_it_was(cache: str) -> None:
    model = Kept(CACHES[cache])
    assert allocate(model).certificate.ok
    assert model(IMAGE).dtype == torch.float32
    assert KEPT == {} or all(item["ramp"].dtype == torch.float32 for item in KEPT.values())
    assert all(not row.is_meta and row.dtype == torch.float32 for row in ROWS)
    assert LATEST is None or LATEST.dtype == torch.float32


def test_what_was_put_back_is_put_back_again() -> None:
    ramp.cache_clear()
    ramp(3, IMAGE.device)
    memory = Memory([Kept(CACHES["lru_cache"])])
    for sides in ((4,), (5,), (6, 7)):  # after the first time, one miss is as many as there were at first
        for side in sides:
            ramp(side, IMAGE.device)
        memory.restore()
        assert ramp.cache_info().currsize == 0


def test_the_environment_and_the_filters_of_warnings_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_CALLER", "before")
    monkeypatch.setenv("TAKEN_AWAY", "there")

    def meddling(x: Tensor) -> Tensor:
        os.environ.update(OF_THE_CALLER="after", OF_THE_FORWARD="set")
        os.environ.pop("TAKEN_AWAY", None)
        warnings.simplefilter("error", BytesWarning)
        warnings.filters = [*warnings.filters]
        return x + 0.5

    before, filters, within = dict(os.environ), warnings.filters, list(warnings.filters)
    assert allocate(model_with(meddling)).certificate.ok
    assert dict(os.environ) == before
    assert list(filters) == within
    assert threading.active_count() > 1 or warnings.filters is filters


def doubled(m: Any, x: Tensor) -> Tensor:
    hook = m.one.register_forward_hook(lambda *given: given[2] * 2)
    try:
        return forward(m, x)
    finally:
        hook.remove()


def doubled_by_a_copied_dict(m: Any, x: Tensor) -> Tensor:
    hooks = m.one._forward_hooks.copy()
    hooks[1] = lambda *given: given[2] * 2
    m.one._forward_hooks = hooks
    m.relu._forward_hooks = m.relu._forward_hooks | {1: lambda *given: given[2] * 2}
    return m.two(m.relu(m.one(x)))


def test_dicts_of_hooks_that_a_forward_copies_are_its_own() -> None:
    assert allocate(net(doubled_by_a_copied_dict, relu=nn.ReLU(), **parts())).certificate.ok


def doubled_on_a_copy(m: Any, x: Tensor) -> Tensor:
    relu = copy.deepcopy(m.relu)
    relu.register_forward_hook(lambda *given: given[2] * 2)
    return forward(m, x, relu)


def test_hooks_may_be_added_to_what_a_forward_copies() -> None:
    assert allocate(net(doubled_on_a_copy, relu=nn.ReLU(), **parts())).certificate.ok


def test_a_hook_that_a_forward_adds_runs_where_it_is_added() -> None:
    model = net(doubled, **parts())
    trace = allocator.trace(model, IMAGE).flow.trace
    assert [op.module for op in trace.ops if op.name == "mul"] == ["one"]
    result = allocate(model)
    assert result.certificate.ok
    assert result.certificate.relative_error is not None
    assert not any(module._forward_hooks for module in (*model.modules(), *result.model.modules()))


class Kept(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        for name, part in parts().items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return forward(self, x, self.between)


def test_what_a_forward_keeps_in_its_class_is_as_it_was() -> None:
    model = Remembering(by_class, **parts()).eval()
    model(IMAGE)
    (kept,), latest = Remembering.table.values(), Remembering.last
    assert allocate(model).certificate.ok
    assert list(Remembering.table.values()) == [kept]
    assert (Remembering.calls, Remembering.last) == (1, latest)
    model(IMAGE)


def test_threads_that_share_a_class_do_not_disturb_each_other() -> None:
    models = [Remembering(by_class, **parts()).eval() for _ in range(3)]
    Remembering.table.clear()
    done: list[bool] = []
    work = [
        threading.Thread(target=lambda model=model: done.append(allocate(model).certificate.ok)) for model in models
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert done == [True] * 3
    assert Remembering.table == {}


@functools.cache
def by_width(channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.linspace(1, 2, channels, device=device, dtype=dtype).view(1, -1, 1, 1)


class Cached(Kept):
    """A cache on a method, and one in a function of the file, hold tensors made of channel counts."""

    @functools.cache  # noqa: B019
    def table(self, channels: int) -> Tensor:
        return torch.zeros(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return forward(self, x, lambda y: y * by_width(y.shape[1], y.device, y.dtype) + self.table(y.shape[1]).to(y))


def test_a_cache_by_channel_counts_serves_the_original_and_the_result() -> None:
    model = Cached(lambda x: x)
    expected = model(IMAGE + 1)
    result = allocate(model)
    assert result.flops_after <= 0.6 * result.flops_before
    assert torch.equal(model(IMAGE + 1), expected)
    assert result.model(IMAGE).dtype == torch.float32


SHIFT: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("shift", default=None)
UNSET: contextvars.ContextVar[Tensor] = contextvars.ContextVar("unset")
CALLS: contextvars.ContextVar[int] = contextvars.ContextVar("calls", default=0)
SEEN: contextvars.ContextVar[list[Tensor]] = contextvars.ContextVar("seen")


def in_the_context(x: Tensor) -> Tensor:
    shift = SHIFT.get()
    if shift is None:
        shift = torch.zeros(x.shape[1], 1, 1, device=x.device, dtype=x.dtype)
        SHIFT.set(shift)
    UNSET.set(x)
    CALLS.set(CALLS.get() + 1)
    SEEN.get().append(x)
    return x + shift


def test_what_a_forward_sets_in_its_context_is_as_it_was() -> None:
    def run() -> None:
        SEEN.set([])
        model = Kept(in_the_context)
        data = torch.rand(4, 3, 8, 8)
        result = allocate(model, data=data)
        allocator.recover(result, data)
        assert (SHIFT.get(), CALLS.get(), SEEN.get()) == (None, 0, [])
        assert UNSET not in contextvars.copy_context()
        contextvars.copy_context().run(result.model, IMAGE)
        assert model(IMAGE).shape == (1, 5)
        # The context now holds 16 channels, which no smaller network could add.
        small: Any = allocate(model).model
        assert small.two.in_channels == 16 > small.two.out_channels

    contextvars.copy_context().run(run)


LAST: deque[Tensor] = deque(maxlen=2)


class Slots:
    """Keeps what it is given in slots."""

    __slots__ = ("latest", "rows")
    latest: Tensor

    def __init__(self) -> None:
        self.rows: list[Tensor] = []


class OfClasses(type):
    """A class of classes that keeps what its instances' instances computed."""

    table: dict[int, Tensor] = {}  # noqa: RUF012


STORE = Slots()


class Reaching(Kept, metaclass=OfClasses):
    def forward(self, x: Tensor) -> Tensor:
        import kept_elsewhere  # type: ignore[import-not-found]

        LAST.append(x)
        STORE.latest = x
        STORE.rows.append(x)
        OfClasses.table[0] = x
        return forward(self, kept_elsewhere.remember(x), lambda y: y)


def test_what_is_kept_in_slots_queues_metaclasses_and_modules_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = ModuleType("kept_elsewhere")
    exec("kept = {}\ndef remember(x):\n    kept[tuple(x.shape)] = x\n    return x", vars(elsewhere))
    monkeypatch.setitem(sys.modules, "kept_elsewhere", elsewhere)
    allocate(Reaching(lambda x: x))
    assert list(LAST) == STORE.rows == []
    assert not hasattr(STORE, "latest")
    assert OfClasses.table == elsewhere.kept == {}


class Lazy(OrderedDict[int, Tensor]):
    """A registry that others must not copy, and that loads what it names once it is looked through."""

    def __init__(self, of: str, by: str) -> None:
        super().__init__()

    def _must_not(self, *_: Any) -> Any:
        raise AssertionError("a registry was looked through")

    keys = values = items = get = copy = clear = __iter__ = __len__ = __contains__ = _must_not


class Rows(list[Tensor]):
    """A list that others must not copy."""

    __iter__ = __len__ = copy = clear = extend = Lazy._must_not


class Missing:
    """Stands for a library that is not installed."""

    def __getattr__(self, name: str) -> Any:
        raise ImportError("install the library")


class Named:
    """Has no name of a module, as some classes of the language."""


setattr(Named, "__module__", object())  # noqa: B010
REGISTRY, TABLE, MISSING, NAMED = Lazy("networks", "name"), Rows(), Missing(), Named()


class Registered(Kept):
    def forward(self, x: Tensor) -> Tensor:
        if MISSING is not None and NAMED is not None:
            REGISTRY[0] = x
        TABLE.append(x)
        return forward(self, x, lambda y: y)


def test_a_library_s_own_kinds_of_containers_are_not_asked_for_what_they_hold() -> None:
    allocate(Registered(lambda x: x))
    assert not dict.keys(REGISTRY)
    assert list.__len__(TABLE) == 0


# Weights --------------------------------------------------------------------------------------------


def _other_data(weight: Tensor) -> None:
    weight.data = weight.data * 0.9


SET_ON_A_WEIGHT: dict[str, Callable[[Any], Any]] = {
    "data": _other_data,
    "gradient": lambda weight: setattr(weight, "grad", torch.zeros_like(weight)),
    "whether it learns": lambda weight: weight.requires_grad_(False),
    "an attribute": lambda weight: setattr(weight, "seen", True),
    "another tensor": lambda weight: torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() * 0.9)),
}


@pytest.mark.parametrize("what", SET_ON_A_WEIGHT)
@pytest.mark.parametrize("options", [{}, {"certify": "full"}, {"data": torch.rand(4, 3, 8, 8), "recover": True}])
def test_what_a_forward_sets_on_a_weight_is_not_set_on_the_model_s(what: str, options: dict[str, Any]) -> None:
    def run(m: Any, x: Tensor) -> Any:
        SET_ON_A_WEIGHT[what](m.two.weight)
        return forward(m, x)

    model = net(run, **parts())
    weight, before = model.two.weight, model.two.weight.detach().clone()
    allocate(model, **options)
    assert model.two.weight is weight
    assert torch.equal(weight, before)
    assert weight.requires_grad
    assert weight.grad is None
    assert not hasattr(weight, "seen")


def _scaled(m: Any) -> None:
    m.two.weight.mul_(0.9)


def _by_data(m: Any) -> None:
    m.two.weight.data.clamp_(-0.05, 0.05)


def _by_index(m: Any) -> None:
    m.two.weight[0] = 0.5


def _written(m: Any) -> None:
    torch.mul(m.two.weight.detach(), 0.5, out=m.two.weight.data)


def _by_numpy(m: Any) -> None:
    m.two.weight.detach().numpy()[0] = 0.5


@pytest.mark.parametrize("write", [_scaled, _by_data, _by_index, _written, _by_numpy])
@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_forward_that_writes_into_weights(write: Callable[[Any], None], by_value: bool, dtype: torch.dtype) -> None:
    def run(m: Any, x: Tensor) -> Any:
        with torch.no_grad():
            write(m)
        return forward(m, x) if not by_value or float(x.max()) < 1e9 else None

    model = net(run, **parts()).to(dtype)
    before = model.two.weight.detach().clone()
    with untouched(model):
        try:
            result: Any = allocator.allocate(model, "60%", example_inputs=IMAGE.to(dtype), criterion="magnitude")
        except AllocatorError:
            return
    rows, columns = (range(16) if kept is None else kept for kept in result.allocation.kept["two.weight"][:2])
    assert torch.equal(result.model.two.weight, before[list(rows)][:, list(columns)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("row", [0, 3])
def test_a_row_that_is_written_beside_torch_on_numbers_alone_is_seen(row: int, dtype: torch.dtype) -> None:
    """Row 3 of the smaller network is another neuron's, as row 1 is gone; row 0 is the same."""

    def run(m: Any, x: Tensor) -> Any:
        if not x.is_meta:
            m.two.weight.detach().numpy()[row] = 0.5
        return forward(m, x)

    model = net(run, **parts()).to(dtype)
    with torch.no_grad():
        model.two.weight[1] *= 1e-3
    with untouched(model), pytest.raises(CertificateError, match="FAILED") if row else contextlib.nullcontext():
        found = allocator.allocate(model, "95%", example_inputs=IMAGE.to(dtype), criterion="magnitude", include="two")
        assert 1 not in found.allocation.kept["two.weight"][0]  # type: ignore[operator]


def test_hooks_and_closures_that_hold_the_model_hold_the_copy() -> None:
    class Counting(nn.Module):
        one: Any
        closure: Any
        bound: Any

        def __init__(self) -> None:
            super().__init__()
            for name, part in parts().items():
                setattr(self, name, part)
            for name in ("closure", "default", "bound", "partial", "weak"):
                self.register_buffer(name, torch.zeros(()))
            own: Any = weakref.ref(self)
            self.one.register_forward_hook(lambda *_: self.closure.add_(1) and None)
            self.one.register_forward_hook(lambda m, i, o, own=self: own.default.add_(1) and None)
            self.one.register_forward_hook(self.count)
            self.one.register_forward_hook(functools.partial(self.add, self))
            self.one.register_forward_hook(lambda *_: own().weak.add_(1) and None)

        def count(self, *_: Any) -> None:
            self.bound.add_(1)

        @staticmethod
        def add(model: Any, *_: Any) -> None:
            model.partial.add_(1)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    model = Counting()
    with untouched(model):
        result: Any = allocate(model)
    result.model(IMAGE)
    counts = [[float(buffer) for buffer in each.buffers()] for each in (model, result.model)]
    assert counts == [[0.0] * 5, [1.0] * 5]


def test_a_hook_that_reaches_the_model_otherwise_is_refused() -> None:
    model = net(forward, **parts())
    model.register_buffer("calls", torch.zeros(()))

    class Holder:
        def __deepcopy__(self, memo: Any) -> Any:
            return self

        def __call__(self, *_: Any) -> None:
            model.calls.add_(1)

    model.one.register_forward_hook(Holder())
    with pytest.raises(UnsupportedModelError, match=r"wrote into calls of the model itself.*take the hook"):
        allocate(model)


TOTAL = torch.zeros(3)


@pytest.mark.parametrize("by_value", [False, True])
def test_what_a_forward_adds_up_in_a_global_tensor_is_as_it_was(
    by_value: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 1)  # another test may have left a thread

    def middle(x: Tensor) -> Tensor:
        TOTAL.add_(float(x.mean()) if by_value else 1)
        return x * (1 + 0 * TOTAL[0].to(x.device))

    allocate(model_with(middle))
    assert TOTAL.tolist() == [0, 0, 0]


# Modes ----------------------------------------------------------------------------------------------


class OfFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class OfDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


MODES: dict[str, Callable[[], Any]] = {
    "functions": OfFunctions,
    "dispatch": OfDispatch,
    "device": lambda: torch.device("meta"),
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_that_a_forward_enters_and_does_not_leave_is_left(mode: str, others: bool) -> None:
    def states() -> tuple[Any, ...]:
        functions, dispatch = _get_current_function_mode_stack(), _get_current_dispatch_mode_stack()
        return functions, dispatch, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.empty(1).device

    def entering(x: Tensor) -> Tensor:
        MODES[mode]().__enter__()
        return x

    model, before, over = model_with(entering), states(), threading.Event()
    waiting = threading.Thread(target=over.wait)
    if others:
        waiting.start()
    try:
        with contextlib.suppress(AllocatorError):  # in bfloat16 the two cannot be compared
            assert allocate(model).certificate.ok
        assert states() == before
    finally:
        over.set()


def _counting() -> tuple[Callable[[], int], Callable[[], int]]:
    count = 0

    def add() -> int:
        nonlocal count
        count += 1
        return count

    return add, lambda: count


def test_what_a_closure_of_the_models_class_counts_is_as_it_was() -> None:
    add, count = _counting()

    class Counting(Kept):
        tick = staticmethod(add)

        def forward(self, x: Tensor) -> Tensor:
            self.tick()
            return super().forward(x)

    model = Counting(lambda x: x)
    model(IMAGE)
    assert allocate(model).certificate.ok
    assert count() == 1


# The process ----------------------------------------------------------------------------------------


def _noise(x: Tensor) -> Tensor:
    torch.rand(3)
    return x + torch.empty(1, device=x.device).uniform_(0, 1) * 0


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch": _noise,
    "dropout": lambda x: nn.functional.dropout(x, 0.0, training=True),
    "python": lambda x: x * (1 + 0 * random.random()),
    "numpy": lambda x: x * (1 + 0 * float(np.random.rand())),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_random_states_are_left_alone(draw: str) -> None:
    model = model_with(DRAWS[draw])
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    allocate(model)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert repr(before[2]) == repr(np.random.get_state())


def test_what_the_first_call_loads_draws_nothing() -> None:
    script = """
import random, numpy, torch, allocator
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 3, 1))
states = lambda: repr((random.getstate(), numpy.random.get_state(), torch.get_rng_state().tolist()))
before = states()
allocator.allocate(model, "50%", example_inputs=torch.zeros(1, 3, 4, 4))
assert states() == before
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_no_other_thread_sees_a_switch_of_the_process() -> None:
    def states() -> tuple[Any, ...]:
        attention = torch.backends.mha.get_fastpath_enabled()
        return torch.get_default_dtype(), attention, torch.backends.cudnn.deterministic, torch.is_grad_enabled()

    model = nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval()
    expected, seen = states(), set()
    work = [
        threading.Thread(
            target=allocator.allocate, args=(model, "80%"), kwargs={"example_inputs": torch.zeros(1, 4, 16)}
        )
        for _ in range(2)
    ]
    for thread in work:
        thread.start()
    while any(thread.is_alive() for thread in work):
        seen.add(states())
    assert seen | {states()} == {expected}


@pytest.mark.parametrize(
    "mode",
    [
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.device("meta"),
        FakeTensorMode,
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
)
def test_a_result_is_the_same_under_any_mode_of_the_callers(mode: Callable[[], Any]) -> None:
    model = net(forward, **parts())
    expected = allocate(model)
    with mode():
        result = allocate(model)
    assert result.allocation == expected.allocation
    assert result.certificate == expected.certificate
    result.model.train()(torch.rand(2, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in result.model.parameters())


def test_a_model_that_was_built_under_inference_mode_gives_one_that_trains() -> None:
    with torch.inference_mode():
        model = net(forward, **parts())
    allocate(model).model.train()(torch.rand(2, 3, 8, 8)).sum().backward()


def test_a_default_of_float64_changes_nothing() -> None:
    expected = allocate(net(forward, **parts()))
    model = net(forward, **parts())
    torch.set_default_dtype(torch.float64)
    try:
        result = allocate(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert result.allocation == expected.allocation
    assert result.certificate.ok


def test_fake_weights_are_refused() -> None:
    with FakeTensorMode():
        model = net(forward, **parts())
    with pytest.raises(UnsupportedModelError, match="is a fake tensor and has no values: build the model outside"):
        allocate(model)


def test_what_fvcore_logs_of_other_counts_is_still_logged(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("fvcore.nn.jit_analysis")
    caplog.set_level(logging.WARNING, logger.name)  # whatever other tests left
    level = logger.level
    allocate(net(lambda m, x: forward(m, x).softmax(1), **parts()))
    assert not [record for record in caplog.records if record.name == logger.name]
    logger.warning("of somebody else's")
    assert logger.level == level
    assert [record.message for record in caplog.records if record.name == logger.name] == ["of somebody else's"]


@pytest.mark.parametrize("write", [_scaled, _by_data])
def test_a_forward_over_data_that_writes_into_weights(write: Callable[[Any], None]) -> None:
    def run(m: Any, x: Tensor) -> Any:
        with torch.no_grad():
            write(m)
        return forward(m, x)

    model = net(run, **parts())
    with untouched(model):
        allocator.allocate(model, "60%", example_inputs=IMAGE, data=torch.rand(4, 3, 8, 8), criterion="activation")
