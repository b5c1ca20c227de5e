"""What a forward may set for the whole process or its thread: how each is read, and put back."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

from allocator.torch_private import GLOBAL_HOOKS


def switches() -> Callable[[], None]:
    """The state of all of them now, as a function that puts back those that are another then."""
    before = [read() for read, _ in _SWITCHES]

    def restore() -> None:
        for (read, write), state in zip(_SWITCHES, before, strict=True):
            if read() != state:
                write(state)

    return restore


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: getattr(owner, name, None), lambda value: setattr(owner, name, value)


def _of_this_thread_alone(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """An attribute that another thread may have set for a while, as with `contextlib.redirect_stdout`."""
    read, write = _attribute(owner, name)
    return read, lambda value: write(value) if threading.active_count() == 1 else None


def _set_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _filters() -> tuple[int, Any, list[Any]]:
    return id(warnings.filters), warnings.filters, list(warnings.filters)


def _set_filters(before: tuple[int, Any, list[Any]]) -> None:
    """The list of filters that there was, with what was in it.

    In another thread's `catch_warnings` another list stands in its place, which is that thread's.
    """
    _, filters, within = before
    if warnings.filters is not filters and threading.active_count() == 1:
        warnings.filters = filters
    if filters != within:
        filters[:] = within
    with warnings.catch_warnings():  # forgets what the filters said of earlier warnings
        pass


def _folder() -> str | None:
    with contextlib.suppress(OSError):  # it was deleted
        return os.getcwd()
    return None


def _set_folder(before: str | None) -> None:
    if before is not None:
        os.chdir(before)


def _set_hooks(before: list[set[int]]) -> None:
    """Without those that were added; what another thread took away is not put back."""
    for hooks, known in zip(GLOBAL_HOOKS, before, strict=True):
        for key in hooks.keys() - known:
            del hooks[key]


def _set_default_device(before: torch.device) -> None:
    torch.set_default_device(None if before.type == "cpu" else before)


def _precision() -> str | None:
    with contextlib.suppress(RuntimeError):  # it was set by backend, and is no single word
        return torch.get_float32_matmul_precision()
    return None


def _set_precision(before: str | None) -> None:
    if before is not None:
        torch.set_float32_matmul_precision(before)


def _set_anomaly(before: bool) -> None:
    torch.autograd.set_detect_anomaly(before)


def _set_collecting(before: bool) -> None:
    (gc.enable if before else gc.disable)()


def _attention(kind: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    backends = torch.backends.cuda
    return getattr(backends, f"{kind}_sdp_enabled"), getattr(backends, f"enable_{kind}_sdp")


def _autocast(device: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: torch.is_autocast_enabled(device), lambda value: torch.set_autocast_enabled(device, value)


def _autocast_dtype(device: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: torch.get_autocast_dtype(device), lambda dtype: torch.set_autocast_dtype(device, dtype)


_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], None]], ...] = (
    (lambda: dict(os.environ), _set_environment),
    _of_this_thread_alone(warnings, "showwarning"),
    _of_this_thread_alone(warnings, "_showwarnmsg_impl"),
    (_filters, _set_filters),
    *(_of_this_thread_alone(sys, name) for name in ("stdout", "stderr", "excepthook")),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (_folder, _set_folder),
    (gc.isenabled, _set_collecting),
    (lambda: logging.root.manager.disable, logging.disable),
    (lambda: [set(hooks) for hooks in GLOBAL_HOOKS], _set_hooks),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, _set_default_device),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.is_anomaly_enabled, _set_anomaly),
    (_precision, _set_precision),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    *(_attribute(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")),
    _attribute(torch.backends.mkldnn, "enabled"),
    *(_attention(kind) for kind in ("flash", "mem_efficient", "math", "cudnn")),
    *(_autocast(device) for device in ("cpu", "cuda")),
    *(_autocast_dtype(device) for device in ("cpu", "cuda")),
)
