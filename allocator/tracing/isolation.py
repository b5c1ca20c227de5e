"""Running the code of a model without leaving anything of it behind in the process.

A forward may keep what it computed outside its modules: in an attribute of its class, a global of the file that it
comes from, an `lru_cache`, the closure of a decorator, a context variable. What a copy on tensors without values, or in
float64, leaves there would meet the caller's next forward. It may also draw from the process's generators.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from allocator import adapters
from allocator.errors import UnsupportedModelError
from allocator.modules import modules_of, tensor_names
from allocator.torch_private import default_device, modes_left, without_dispatch_modes
from allocator.tracing.journal import noted, put_back
from allocator.tracing.memory import Memory
from allocator.tracing.operators import FUNCTIONS

_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
# Two threads' forwards may share a cache, which neither is to see change under it.
_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def undisturbed(
    model: nn.Module, modules: Mapping[str, nn.Module] | None = None, *, itself: bool = False
) -> Iterator[None]:
    """Run copies of this model within: afterwards random states, and what lies outside of modules, are as before.

    Args:
        model: what was copied.
        modules: what `modules_of(model)` gives, where it is known.
        itself: it is one's own, and runs itself.

    Raises:
        UnsupportedModelError: the forward reached the model itself instead of the copy, and wrote into it.
    """
    modules = modules_of(model) if modules is None else modules
    tensors = {} if itself else tensor_names(model, modules)
    versions = {name: _version(tensor) for name, tensor in tensors.items()}
    with _ONE_AT_A_TIME:
        memory, restore_states = _memory_of(modules), _states()
        watch, watched = _Watch(), _has_to_be_watched(modules.values())
        try:
            with put_back(), watch if watched else contextlib.nullcontext(), adapters.in_calls_that_are_followed():
                yield
        finally:
            restore_states(watch.drew or not watched)
            memory.restore()
    written = [name for name, tensor in tensors.items() if _version(tensor) != versions[name]]
    if written:
        raise UnsupportedModelError(
            f"the forward of a copy wrote into {', '.join(written[:3])} of the model itself, which it reaches other "
            "than through its modules: take the hook or global variable away that holds the model"
        )


@contextlib.contextmanager
def looked_at_once(model: nn.Module) -> Iterator[None]:
    """Within, nothing but forwards of copies of this model runs: what they may remember is looked for once, here."""
    with _ONE_AT_A_TIME:
        memory = Memory(modules_of(model).values())
    token = _LOOKED_AT.set(memory)
    try:
        yield
    finally:
        _LOOKED_AT.reset(token)


_LOOKED_AT: contextvars.ContextVar[Memory | None] = contextvars.ContextVar("looked_at", default=None)


def _memory_of(modules: Mapping[str, nn.Module]) -> Memory:
    known = _LOOKED_AT.get()
    return known if known is not None and known.covers(modules.values()) else Memory(modules.values())


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


P = ParamSpec("P")
R = TypeVar("R")


def apart(run: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a model's code in a context of its own: the context variables that it sets are set there alone.

    Modes that it enters and does not leave are left.

    Raises:
        RuntimeError: it does not leave inference mode, which nobody else can.
    """
    inference = torch.is_inference_mode_enabled()
    with modes_left(), noted():
        found = contextvars.copy_context().run(run, *args, **kwargs)
    if torch.is_inference_mode_enabled() and not inference:
        raise RuntimeError("the forward enters inference mode and does not leave it")
    return found


def as_usual(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function as if no mode of the caller's were on: inference mode, autocast, fake tensors, `torch.device`.

    What is made would else be of that mode; all of them are of this thread alone. Context variables that it sets are
    set for it alone.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with contextlib.ExitStack() as stack:
            stack.enter_context(without_dispatch_modes())
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            if default_device().type == "meta":
                stack.enter_context(torch.device("cpu"))
            return contextvars.copy_context().run(function, *args, **kwargs)

    return run


def _has_to_be_watched(modules: Iterable[nn.Module]) -> bool:
    """Alone in the process, and without attention of torch's own, nothing is to be told apart; a mode takes time."""
    return threading.active_count() > 1 or any(isinstance(module, _FUSED) for module in modules)


class _Watch(TorchFunctionMode):
    """Notes whether anything was drawn. That a mode is active also keeps attention in the parts that fvcore counts."""

    drew = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if type(func) is _GETTER:  # most are
            return func(*args)
        declared = FUNCTIONS.get(getattr(func, "__name__", "").strip("_"))
        self.drew = self.drew or (declared is not None and declared.draws)
        return func(*args, **(kwargs or {}))


_GETTER = type(torch.Tensor.shape.__get__)  # type: ignore[attr-defined]


def _states() -> Callable[[bool], None]:
    """The states of torch's generators, as a function that puts them back.

    Other threads draw from these too: they are put back where a function that draws was called, or where there is
    no other thread.
    """
    on_cpu = torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(drew: bool) -> None:
        if drew or threading.active_count() == 1:
            torch.set_rng_state(on_cpu)
            if on_gpus:
                torch.cuda.set_rng_state_all(on_gpus)

    return restore
