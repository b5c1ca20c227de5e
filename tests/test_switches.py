"""What a forward sets for the whole process, and leaves so, is as it was once its copies have run."""

from __future__ import annotations

import gc
import logging
import operator
import os
import queue
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.backends import opt_einsum
from torch.nn.modules import module as modules

import allocator
from allocator.logs import ANY, _Here, hidden, unwarned
from allocator.torch_private import GLOBAL_HOOKS, default_device
from allocator.tracing.isolation import apart, undisturbed
from allocator.tracing.journal import Journal, unnoted
from allocator.tracing.switches import SWITCHES, switches


class Said(UserWarning):
    """What nobody else filters."""


class Sets(nn.Module):
    """Calls a function in its forward."""

    def __init__(self, meddle: Callable[[], Any]) -> None:
        super().__init__()
        self.one, self.two, self.meddle = nn.Linear(6, 16), nn.Linear(16, 4), meddle

    def forward(self, x: Tensor) -> Any:
        y = self.one(x).relu()
        self.meddle()
        return self.two(y)


def _left_open() -> None:
    warnings.catch_warnings(record=True).__enter__()


def _other_filters() -> None:
    warnings.filters = [*warnings.filters]


def _nothing(*_: Any) -> None:
    return None


MEDDLES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "forward hook": (
        lambda: modules.register_module_forward_hook(_nothing, always_call=True),
        lambda: [len(hooks) for hooks in GLOBAL_HOOKS],
    ),
    "forward pre-hook": (
        lambda: modules.register_module_forward_pre_hook(_nothing),
        lambda: [len(hooks) for hooks in GLOBAL_HOOKS],
    ),
    "registration hook": (
        lambda: modules.register_module_parameter_registration_hook(_nothing),
        lambda: [len(hooks) for hooks in GLOBAL_HOOKS],
    ),
    "catch_warnings": (
        _left_open,
        lambda: (
            id(warnings.filters),
            list(warnings.filters),
            warnings.showwarning,
            vars(warnings)["_showwarnmsg_impl"],
        ),
    ),
    "showwarning": (lambda: setattr(warnings, "showwarning", _nothing), lambda: warnings.showwarning),
    "deterministic": (
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
        torch.are_deterministic_algorithms_enabled,
    ),
    "cudnn": (
        lambda: setattr(torch.backends.cudnn, "benchmark", True),
        lambda: torch.backends.cudnn.benchmark,
    ),
    "threads": (lambda: torch.set_num_threads(2), torch.get_num_threads),
    "anomaly": (lambda: torch.autograd.set_detect_anomaly(True), torch.is_anomaly_enabled),
    "precision": (lambda: torch.set_float32_matmul_precision("medium"), torch.get_float32_matmul_precision),
    "attention": (lambda: torch.backends.cuda.enable_math_sdp(False), torch.backends.cuda.math_sdp_enabled),
    "attention by cudnn": (lambda: torch.backends.cuda.enable_cudnn_sdp(False), torch.backends.cuda.cudnn_sdp_enabled),
    "fast path": (lambda: torch.backends.mha.set_fastpath_enabled(False), torch.backends.mha.get_fastpath_enabled),
    "device": (lambda: torch.set_default_device("meta"), default_device),
    "dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "autocast": (lambda: torch.set_autocast_enabled("cpu", True), lambda: torch.is_autocast_enabled("cpu")),
    "autocast to": (
        lambda: torch.set_autocast_dtype("cpu", torch.float16),
        lambda: torch.get_autocast_dtype("cpu"),
    ),
    "logging": (lambda: logging.disable(50), lambda: logging.root.manager.disable),
    "collector": (gc.disable, gc.isenabled),
    "switch interval": (lambda: sys.setswitchinterval(0.007), sys.getswitchinterval),
    "threads' excepthook": (lambda: setattr(threading, "excepthook", _nothing), lambda: threading.excepthook),
    "einsum": (
        lambda: setattr(opt_einsum, "enabled", not opt_einsum.enabled),
        lambda: opt_einsum.enabled,
    ),
    "filling": (
        lambda: setattr(torch.utils.deterministic, "fill_uninitialized_memory", False),
        lambda: operator.attrgetter("fill_uninitialized_memory")(torch.utils.deterministic),
    ),
    "gradients": (lambda: torch.set_grad_enabled(not torch.is_grad_enabled()), torch.is_grad_enabled),
    "recursion": (lambda: sys.setrecursionlimit(sys.getrecursionlimit() + 999), sys.getrecursionlimit),
    "folder": (lambda: os.chdir("/"), os.getcwd),
    "stdout": (lambda: setattr(sys, "stdout", sys.__stderr__), lambda: id(sys.stdout)),
}


MEDDLES |= {
    "environment": (lambda: os.environ.update(OF_THE_FORWARD="set"), lambda: dict(os.environ)),
    "environment, where it is not set": (lambda: os.environ.setdefault("OF_A_FORWARD", "1"), lambda: dict(os.environ)),
    "stderr by redirection": (lambda: redirect_stderr(sys.__stdout__).__enter__(), lambda: id(sys.stderr)),
    "excepthook": (lambda: setattr(sys, "excepthook", _nothing), lambda: sys.excepthook),
    "filter": (lambda: warnings.simplefilter("error", BytesWarning), lambda: list(warnings.filters)),
    "other filters": (_other_filters, lambda: (id(warnings.filters), list(warnings.filters))),
    "root logger's level": (lambda: logging.getLogger().setLevel(5), lambda: logging.root.level),
    "root logger's handlers": (
        lambda: logging.getLogger().addHandler(logging.NullHandler()),
        lambda: list(logging.root.handlers),
    ),
    "warn always": (lambda: torch.set_warn_always(True), torch.is_warn_always_enabled),
    "printing": (lambda: torch.set_printoptions(precision=9, sci_mode=True), lambda: repr(torch.tensor([12345.678]))),
    "cudnn's trials": (
        lambda: setattr(torch.backends.cudnn, "benchmark_limit", 3),
        lambda: torch.backends.cudnn.benchmark_limit,
    ),
    "cudnn's tf32": (
        lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
        lambda: torch.backends.cudnn.allow_tf32,
    ),
    "matmul's tf32": (
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        lambda: torch.backends.cuda.matmul.allow_tf32,
    ),
    "matmul's sums in half": (
        lambda: setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
        lambda: torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    ),
    "autocast's cache": (lambda: torch.set_autocast_cache_enabled(False), torch.is_autocast_cache_enabled),
    "denormal numbers": (lambda: torch.set_flush_denormal(True), lambda: float(torch.tensor(1e-40) * 0.5)),
    "random numbers": (random.random, random.getstate),
    "random integers": (lambda: random.randint(0, 9), random.getstate),
    "numpy's, set": (lambda: np.random.seed(7), lambda: repr(np.random.get_state())),
    "numpy's": (lambda: np.random.rand(3), lambda: repr(np.random.get_state())),
    "signal": (lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN), lambda: signal.getsignal(signal.SIGTERM)),
    "tracing": (lambda: sys.settrace(_nothing), sys.gettrace),
}
if np.__version__ < "2":  # later it is of a context
    MEDDLES["numpy's printing"] = (
        lambda: np.set_printoptions(precision=3),
        lambda: np.get_printoptions()["precision"],
    )
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # since torch 2.9
    MEDDLES["matmul's precision"] = (
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        lambda: torch.backends.cuda.matmul.fp32_precision,
    )
OF_A_THREAD = (
    "signal",
    "threads",
    "device",
    "autocast",
    "autocast to",
    "autocast's cache",
    "gradients",
    "denormal numbers",
    "tracing",
)
"""What another thread has for itself, or cannot set."""


@contextmanager
def _put_back() -> Iterator[None]:
    """Whatever comes of it, the other tests are to run as before, also where there are other threads."""
    before = [each.read() for each in SWITCHES]
    try:
        yield
    finally:
        for each, state in zip(SWITCHES, before, strict=True):
            now = each.read()
            if now != state:
                each.undo(state, now)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Another:
    """Another thread, which waits, or does what it is asked to."""

    def __enter__(self) -> Another:
        self.asked: queue.Queue[Callable[[], Any] | None] = queue.Queue()
        self.thread = threading.Thread(target=self._work)
        self.thread.start()
        return self

    def _work(self) -> None:
        for call in iter(self.asked.get, None):
            call()
            self.asked.task_done()

    def does(self, call: Callable[[], Any]) -> None:
        """Return once it did so."""
        self.asked.put(call)
        self.asked.join()

    def __exit__(self, *_: object) -> None:
        self.asked.put(None)
        self.thread.join(20)


@pytest.fixture(autouse=True)
def _deaf_to_signals() -> Iterator[None]:
    yield
    sys.settrace(None)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("what", MEDDLES)
def test_switches_that_a_forward_sets_are_as_they_were(what: str, alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 1 if alone else 2)  # another test may have left one
    meddle, read = MEDDLES[what]
    model = Sets(meddle)
    with _put_back():
        before = read()
        with undisturbed(model, itself=True):
            apart(model, torch.zeros(1, 6))
            assert read() != before, "this forward sets nothing"
        assert read() == before
        assert allocator.allocate(model, "60%", example_inputs=torch.zeros(1, 6)).certificate.ok
        assert read() == before


@pytest.mark.parametrize("what", [what for what in MEDDLES if what not in OF_A_THREAD])
def test_what_another_thread_sets_during_a_forward_stays(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    meddle, read = MEDDLES[what]
    with _put_back(), Another() as other:
        called: list[str] = []

        def waits() -> None:
            if not called:
                called.append(what)
                other.does(meddle)

        model, before = Sets(waits), read()
        with undisturbed(model, itself=True):
            apart(model, torch.zeros(1, 6))
            set_to = read()
        assert read() == set_to != before


def test_what_another_thread_sets_beside_the_forward_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with _put_back(), Another() as other:

        def both() -> None:
            os.environ["OF_THE_FORWARD"] = "1"
            other.does(lambda: os.environ.update(OF_ANOTHER="1"))
            modules.register_module_forward_hook(_nothing)
            other.does(lambda: modules.register_module_forward_pre_hook(_nothing))
            warnings.simplefilter("ignore", BytesWarning)
            other.does(lambda: warnings.simplefilter("ignore", Said))

        model, hooks, filters = Sets(both), [len(each) for each in GLOBAL_HOOKS], list(warnings.filters)
        with undisturbed(model, itself=True):
            apart(model, torch.zeros(1, 6))
        assert "OF_THE_FORWARD" not in os.environ
        assert os.environ["OF_ANOTHER"] == "1"
        assert sum(len(each) for each in GLOBAL_HOOKS) == sum(hooks) + 1
        assert [each[2] for each in warnings.filters if each not in filters] == [Said]
        assert len(warnings.filters) == len(filters) + 1


def test_our_own_code_within_a_model_s_is_not_noted() -> None:
    seen = []

    @unnoted
    def ours() -> None:
        seen.append(sys.getprofile())

    with Journal().kept():
        kept = sys.getprofile()
        ours()
        assert sys.getprofile() is kept is not None
    assert seen == [None]


def test_a_profiler_of_the_callers_stays() -> None:
    seen: list[str] = []

    def profiling(frame: Any, event: str, arg: Any) -> None:
        seen.append(event)

    with Another():
        sys.setprofile(profiling)
        try:
            assert allocator.allocate(Sets(_nothing), "60%", example_inputs=torch.zeros(1, 6)).certificate.ok
            assert sys.getprofile() is profiling
        finally:
            sys.setprofile(None)


def test_what_threads_of_a_recovery_set_is_as_it_was() -> None:
    """The forwards of both networks run in threads of their own."""
    model = Sets(lambda: os.environ.setdefault("OF_THE_FORWARD", "1"))
    data = torch.rand(8, 6)
    with _put_back(), Another():
        before = dict(os.environ)
        allocator.recover(allocator.allocate(model, "60%", example_inputs=data[:1]), data)
        assert dict(os.environ) == before


def _seen() -> list[Any]:
    """What other threads see of all switches, without filters of warnings that match here alone."""
    states = [each.read() for each in SWITCHES]
    return [
        [item for item in state.within if not isinstance(item[1], _Here)] if hasattr(state, "filters") else state
        for state in states
    ]


@pytest.mark.parametrize("what", ["allocate", "data and recover", "verify", "widen", "sweep"])
def test_nothing_that_we_do_is_seen_by_another_thread(what: str) -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        torch.rand(8, 3, 9, 9),
    )
    small = allocator.allocate(model, "60%", example_inputs=x[:1])
    calls: dict[str, Callable[[], Any]] = {
        "allocate": lambda: allocator.allocate(model, "60%", example_inputs=x[:1]),
        "data and recover": lambda: allocator.allocate(model, "60%", data=x, recover=True),
        "verify": lambda: allocator.verify(model, small.model, small.allocation, example_inputs=x[:1]),
        "widen": lambda: allocator.widen(model, flops="130%", example_inputs=x[:1]),
        "sweep": lambda: allocator.sweep(model, ["80%", "60%"], example_inputs=x[:1]),
    }
    before: list[list[Any]] = []
    seen: list[Any] = []

    def poll() -> None:
        while not over.is_set():
            states = _seen()
            seen.extend(
                (each, state) for each, state, first in zip(SWITCHES, states, before[0], strict=True) if state != first
            )
            polls.append(1)

    polls: list[int] = []
    over, interval = threading.Event(), sys.getswitchinterval()
    with Another() as other:
        sys.setswitchinterval(1e-4)
        try:
            other.does(lambda: before.append(_seen()))
            other.asked.put(poll)
            calls[what]()
        finally:
            over.set()
            other.asked.join()
            sys.setswitchinterval(interval)
    assert seen == []
    assert len(polls) > 20


def test_warnings_and_messages_of_other_threads_are_said_while_ours_are_hidden(
    caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    def says(who: str) -> None:
        warnings.warn(f"of {who}", Said, stacklevel=2)
        logging.getLogger("somebody").error("of %s", who)

    with Another() as other, hidden(ANY), unwarned():
        says("ours")
        other.does(lambda: says("theirs"))
        with unwarned(BytesWarning):
            says("ours")
    says("mine")
    assert [str(each.message) for each in recwarn if each.category is Said] == ["of theirs", "of mine"]
    assert caplog.messages == ["of theirs", "of mine"]
    assert not any(isinstance(item[1], _Here) for item in warnings.filters)


def test_what_is_read_before_a_forward_compares_with_itself() -> None:
    states = [each.read() for each in SWITCHES]
    assert [each.read() for each in SWITCHES] == states


def test_what_a_forward_sets_in_its_context_is_set_there_alone() -> None:
    before = np.geterr()
    assert allocator.allocate(Sets(lambda: np.seterr(all="ignore")), "60%", example_inputs=torch.zeros(1, 6))
    assert np.geterr() == before


def test_hooks_of_the_callers_stay() -> None:
    called = []
    hook = modules.register_module_forward_hook(lambda *_: called.append(1))
    try:
        before = [list(hooks) for hooks in GLOBAL_HOOKS]
        model = Sets(MEDDLES["forward hook"][0])
        assert allocator.allocate(model, "60%", example_inputs=torch.zeros(1, 6)).certificate.ok
        assert [list(hooks) for hooks in GLOBAL_HOOKS] == before
        called.clear()
        nn.Identity()(torch.zeros(1))
        assert called == [1]
    finally:
        hook.remove()


def test_a_hook_that_another_thread_took_away_stays_away() -> None:
    hook = modules.register_module_forward_hook(_nothing)
    restore = switches()
    hook.remove()
    restore()
    assert not any(hook.id in hooks for hooks in GLOBAL_HOOKS)


def test_what_another_thread_catches_is_left_to_it() -> None:
    caught, go_on = threading.Event(), threading.Event()

    def catching() -> None:
        with warnings.catch_warnings(record=True):
            caught.set()
            go_on.wait(20)

    other = threading.Thread(target=catching)
    with _put_back():
        other.start()
        restore = switches()
        caught.wait(20)
        during = warnings.filters
        restore()
        assert warnings.filters is during
        go_on.set()
        other.join()


def test_a_folder_that_is_gone_and_a_precision_by_backend_are_no_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mixed() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    model = Sets(_nothing)
    assert allocator.allocate(model, "60%", example_inputs=torch.zeros(1, 6)).certificate.ok
