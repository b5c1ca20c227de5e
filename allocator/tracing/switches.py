"""What a forward may set for the whole process or its thread: how each is read and put back, and what sets it."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.backends import opt_einsum
from torch.nn.modules import module as of_modules

from allocator.torch_private import (
    GLOBAL_HOOKS,
    SETTERS_IN_C,
    OpOverload,
    default_device,
    generator_states,
    print_options,
)

_CUDA, _CUDNN, _MKLDNN = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn


_NONE = object()
"""The state of what this torch or Python has not, or of what is no single value now."""


class Switch(NamedTuple):
    """One thing that can be set.

    Attributes:
        read: gives its state, which compares with others.
        undo: called with two states: puts back what differs between the first and the second, where it still is as in
            the second.
        set_by: functions that set it.
        named: names of which one is in any other function that sets it.
        of_the_thread: other threads have one of their own.
    """

    read: Callable[[], Any]
    undo: Callable[[Any, Any], None]
    set_by: tuple[Any, ...] = ()
    named: tuple[str, ...] = ()
    of_the_thread: bool = False


def switches() -> Callable[[], None]:
    """The state of all of them now, as a function that puts back those that are another then.

    With no other thread in the process whatever differs then was set by what ran in between. With others, only what a
    `Journal` has that was kept meanwhile, and what this thread has for itself.
    """
    before = [each.read() for each in SWITCHES]
    alone = threading.active_count() == 1

    def restore() -> None:
        for each, state in zip(SWITCHES, before, strict=True):
            now = each.read() if alone or each.of_the_thread else state
            if now != state:
                each.undo(state, now)

    return restore


def _of(read: Callable[[], Any], write: Callable[[Any], Any], *set_by: Any, **how: Any) -> Switch:
    """A switch with one value."""

    def undo(before: Any, after: Any) -> None:
        if read() == after:
            write(before)

    return Switch(read, undo, set_by, **how)


def _attribute(owner: Any, name: str, *set_by: Any, **how: Any) -> Switch:
    def read() -> Any:
        with contextlib.suppress(RuntimeError):  # it was set by operator, and is no single value
            return getattr(owner, name, _NONE)
        return _NONE

    def write(value: Any) -> None:
        if value is not _NONE:
            setattr(owner, name, value)

    return _of(read, write, *set_by, **how)


def _undo_environment(before: dict[str, str], after: dict[str, str]) -> None:
    for name in before.keys() | after.keys():
        value = before.get(name)
        if value != after.get(name) == os.environ.get(name):
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Filters(NamedTuple):
    place: int  # two lists may be equal
    filters: Any
    within: list[Any]


def _filters() -> _Filters:
    return _Filters(id(warnings.filters), warnings.filters, list(warnings.filters))


def _undo_filters(before: _Filters, after: _Filters) -> None:
    """The list of filters that there was, with what was in it."""
    if warnings.filters is after.filters:
        warnings.filters = before.filters
    if before.filters == (after.within if after.place == before.place else before.filters):
        before.filters[:] = before.within
    else:
        for each in after.within:
            if each not in before.within and each in before.filters:
                before.filters.remove(each)
    with warnings.catch_warnings():  # forgets what the filters said of earlier warnings
        pass


def _folder() -> str | None:
    with contextlib.suppress(OSError):  # it was deleted
        return os.getcwd()
    return None


def _set_folder(before: str | None) -> None:
    if before is not None:
        os.chdir(before)


def _undo_hooks(before: list[set[int]], after: list[set[int]]) -> None:
    """Without those that were added; what was taken away is not put back."""
    for hooks, known, now in zip(GLOBAL_HOOKS, before, after, strict=True):
        for key in now - known:
            hooks.pop(key, None)


def _undo_handlers(before: list[Any], after: list[Any]) -> None:
    for each in after:
        if each not in before:
            logging.root.removeHandler(each)


_OF_CUDNN = ("enabled", "benchmark", "deterministic", "allow_tf32")
_SIGNALS = tuple(each for each in signal.valid_signals() if isinstance(each, signal.Signals))


def _signals() -> list[Any]:
    """What is done at each signal; nothing in other threads than the main one, which cannot set it."""
    return list(map(signal.getsignal, _SIGNALS)) if threading.current_thread() is threading.main_thread() else []


def _undo_signals(before: list[Any], after: list[Any]) -> None:
    for number, old, new in zip(_SIGNALS, before, after, strict=True):
        if old is not new and signal.getsignal(number) is new and old is not None:
            signal.signal(number, old)


def _set_default_device(before: torch.device) -> None:
    torch.set_default_device(None if before.type == "cpu" else before)


def _set_generators(before: list[bytes]) -> None:
    on_cpu, *on_gpus = (torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in before)
    torch.set_rng_state(on_cpu)
    if on_gpus:
        torch.cuda.set_rng_state_all(on_gpus)


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


_TINY = sys.float_info.min


def _flushes() -> bool:
    """Whether numbers that are too small to be normal count as zero: torch has no function that says so."""
    return _TINY / 2 == 0


class _Bytes(NamedTuple):
    """An array: they compare number by number."""

    within: bytes
    dtype: Any


def _of_numpy() -> dict[str, Any]:
    """The state of numpy's own generator."""
    state: Any = np.random.get_state(legacy=False)
    inner = {
        name: _Bytes(n.tobytes(), n.dtype) if isinstance(n, np.ndarray) else n for name, n in state["state"].items()
    }
    return {**state, "state": inner}


def _set_numpy(before: dict[str, Any]) -> None:
    inner = {name: np.frombuffer(*n) if isinstance(n, _Bytes) else n for name, n in before["state"].items()}
    np.random.set_state({**before, "state": inner})


def _of_torch(read: Callable[[], Any], write: Callable[[Any], Any]) -> Switch:
    return _of(read, write, *SETTERS_IN_C)


def _attention(kind: str) -> Switch:
    return _of_torch(getattr(_CUDA, f"{kind}_sdp_enabled"), getattr(_CUDA, f"enable_{kind}_sdp"))


def _autocast(device: str) -> tuple[Switch, Switch]:
    return (
        _of(
            lambda: torch.is_autocast_enabled(device),
            lambda value: torch.set_autocast_enabled(device, value),
            of_the_thread=True,
        ),
        _of(
            lambda: torch.get_autocast_dtype(device),
            lambda dtype: torch.set_autocast_dtype(device, dtype),
            of_the_thread=True,
        ),
    )


def _parts_of(backend: Any) -> list[Any]:
    """Kinds of operators that have a precision of their own, in torch since 2.9."""
    return [part for part in vars(type(backend)).values() if hasattr(part, "fp32_precision")]


_HOOKED = [each for name, each in vars(of_modules).items() if name.startswith("register_module_")]


def _methods(module: ModuleType) -> dict[str, Any]:
    """Methods of an object that a module offers as functions."""
    found = {name: each for name, each in vars(module).items() if callable(each)}
    return {name: each for name, each in found.items() if not isinstance(getattr(each, "__self__", module), ModuleType)}


def _named(functions: Iterable[str]) -> tuple[str, ...]:
    """Without names that stand for anything in most code."""
    return tuple(name for name in functions if len(name) > 1)


_DRAWS, _NUMPY_DRAWS = _methods(random), _methods(np.random)

SWITCHES: tuple[Switch, ...] = (
    Switch(
        lambda: dict(os.environ),
        _undo_environment,
        (type(os.environ).__setitem__, type(os.environ).__delitem__),
    ),
    *(_attribute(warnings, name, named=(name,)) for name in ("showwarning", "_showwarnmsg_impl")),
    Switch(
        _filters, _undo_filters, (warnings.simplefilter, warnings.filterwarnings, warnings.resetwarnings), ("filters",)
    ),
    *(
        _attribute(sys, name, redirect.__enter__, redirect.__exit__, named=(name,))
        for name, redirect in (("stdout", contextlib.redirect_stdout), ("stderr", contextlib.redirect_stderr))
    ),
    *(_attribute(sys, name, named=(name,)) for name in ("excepthook", "unraisablehook", "displayhook")),
    _attribute(threading, "excepthook", named=("excepthook",)),
    _of(sys.getswitchinterval, sys.setswitchinterval, sys.setswitchinterval),
    _of(sys.getrecursionlimit, sys.setrecursionlimit, sys.setrecursionlimit),
    _of(_folder, _set_folder, os.chdir, os.fchdir),
    _of(gc.isenabled, _set_collecting, gc.enable, gc.disable),
    Switch(_signals, _undo_signals, (signal.signal,)),
    _of(lambda: logging.root.manager.disable, logging.disable, logging.disable),
    _of(lambda: logging.root.level, logging.root.setLevel, logging.Logger.setLevel),
    Switch(lambda: list(logging.root.handlers), _undo_handlers, (logging.Logger.addHandler,)),
    _of(random.getstate, random.setstate, *_DRAWS.values(), named=_named(_DRAWS)),
    # Functions that draw are watched for; operators called by their overload are none.
    _of(generator_states, _set_generators, OpOverload.__call__, type(torch.ops.aten.rand).__call__),
    _of(_of_numpy, _set_numpy, named=_named(_NUMPY_DRAWS)),
    _of(np.geterr, lambda before: np.seterr(**before), of_the_thread=True),
    _of(np.get_printoptions, lambda before: np.set_printoptions(**before), np.set_printoptions),
    Switch(lambda: [set(hooks) for hooks in GLOBAL_HOOKS], _undo_hooks, tuple(_HOOKED)),
    _of_torch(torch.get_default_dtype, torch.set_default_dtype),
    _of(torch.is_grad_enabled, torch.set_grad_enabled, of_the_thread=True),
    _of(default_device, _set_default_device, of_the_thread=True),
    _of(torch.get_num_threads, torch.set_num_threads, of_the_thread=True),
    _of_torch(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    _of_torch(torch.is_anomaly_enabled, _set_anomaly),
    _of_torch(torch.is_warn_always_enabled, torch.set_warn_always),
    _of_torch(_precision, _set_precision),
    _of(
        torch.backends.mha.get_fastpath_enabled,
        torch.backends.mha.set_fastpath_enabled,
        torch.backends.mha.set_fastpath_enabled,
    ),
    _of(print_options, lambda before: torch.set_printoptions(**dict(before)), torch.set_printoptions),
    *(_attribute(_CUDNN, name, *SETTERS_IN_C) for name in _OF_CUDNN),
    _attribute(_CUDNN, "benchmark_limit", *SETTERS_IN_C, named=("benchmark_limit",)),
    *(
        _attribute(_CUDA.matmul, f"allow_{name}", *SETTERS_IN_C)
        for name in ("tf32", "fp16_reduced_precision_reduction", "bf16_reduced_precision_reduction")
    ),
    *(
        _attribute(owner, "fp32_precision", *SETTERS_IN_C)
        for owner in (torch.backends, _CUDA.matmul, *_parts_of(_CUDNN), _MKLDNN, *_parts_of(_MKLDNN))
    ),
    _attribute(_MKLDNN, "enabled", *SETTERS_IN_C),
    _attribute(opt_einsum, "enabled", named=("opt_einsum",)),
    _attribute(torch.utils.deterministic, "fill_uninitialized_memory", *SETTERS_IN_C),
    *(_attention(kind) for kind in ("flash", "mem_efficient", "math", "cudnn")),
    *(each for device in ("cpu", "cuda") for each in _autocast(device)),
    _of(torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, of_the_thread=True),
    *(
        _of(read, write, of_the_thread=True)
        for read, write in ((sys.gettrace, sys.settrace), (sys.getprofile, sys.setprofile))
    ),
    _of(_flushes, torch.set_flush_denormal, of_the_thread=True),
)
