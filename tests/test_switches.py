"""What a forward sets for the whole process, and leaves so, is as it was once its copies have run."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

import allocator
from allocator.torch_private import GLOBAL_HOOKS
from allocator.tracing.isolation import undisturbed
from allocator.tracing.switches import switches


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
    "device": (lambda: torch.set_default_device("meta"), torch.get_default_device),
    "dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "autocast": (lambda: torch.set_autocast_enabled("cpu", True), lambda: torch.is_autocast_enabled("cpu")),
    "autocast to": (
        lambda: torch.set_autocast_dtype("cpu", torch.float16),
        lambda: torch.get_autocast_dtype("cpu"),
    ),
    "logging": (lambda: logging.disable(50), lambda: logging.root.manager.disable),
    "collector": (gc.disable, gc.isenabled),
    "recursion": (lambda: sys.setrecursionlimit(sys.getrecursionlimit() + 999), sys.getrecursionlimit),
    "folder": (lambda: os.chdir("/"), os.getcwd),
    "stdout": (lambda: setattr(sys, "stdout", sys.__stderr__), lambda: id(sys.stdout)),
}


@contextmanager
def _put_back() -> Iterator[None]:
    """Whatever comes of it, the other tests are to run as before."""
    restore = switches()
    try:
        yield
    finally:
        restore()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("what", MEDDLES)
def test_switches_that_a_forward_sets_are_as_they_were(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 1)  # another test may have left one that does nothing
    meddle, read = MEDDLES[what]
    model = Sets(meddle)
    with _put_back():
        before = read()
        with undisturbed(model, itself=True):
            model(torch.zeros(1, 6))
            assert read() != before, "this forward sets nothing"
        assert read() == before
        assert allocator.allocate(model, "60%", example_inputs=torch.zeros(1, 6)).certificate.ok
        assert read() == before


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

    restore, other = switches(), threading.Thread(target=catching)
    with _put_back():
        other.start()
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
