"""What this package uses of torch that is private or undocumented, all in one place.

Such names may change with any release. Each is tried once when this module is imported, by what it does and not only
by being there: a renamed hook would otherwise put every call into the wrong module, and nothing would say so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from allocator.errors import UnexpectedTorchError

OLDEST, NEWEST = "2.6", "2.14"
"""The releases of torch that this package was tried on."""


def _unexpected(what: str) -> UnexpectedTorchError:
    return UnexpectedTorchError(
        f"this torch ({torch.__version__}) {what}: neuron-allocator was tried on torch {OLDEST} to {NEWEST}; "
        "install one of these, or a newer neuron-allocator"
    )


try:
    from torch._ops import OpOverload
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch._tensor_str import PRINT_OPTS as _PRINT_OPTIONS
    from torch.multiprocessing.reductions import StorageWeakRef as StorageReference
    from torch.nn.modules.batchnorm import _NormBase as BatchNormBase
    from torch.nn.modules.conv import _ConvNd as ConvolutionBase
    from torch.overrides import TorchFunctionMode as _Modes
    from torch.overrides import _get_current_function_mode_stack as _function_modes
    from torch.utils._python_dispatch import TorchDispatchMode as _TorchDispatchMode
    from torch.utils._python_dispatch import _disable_current_modes as without_dispatch_modes
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as _dispatch_modes
    from torch.utils._pytree import tree_flatten, tree_map
except ImportError as error:
    raise _unexpected(f"lacks a name ({error})") from error

FAKE_LOGGER = FakeTensorMode.__module__
"""The logger to which fake tensors say what raised."""

__all__ = [
    "LITERALS",
    "FAKE_LOGGER",
    "GLOBAL_HOOKS",
    "SETTERS_IN_C",
    "BatchNormBase",
    "ConvolutionBase",
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "StorageReference",
    "TorchDispatchMode",
    "call_as_usual",
    "call_by",
    "call_by_itself",
    "called_straight",
    "default_device",
    "generator_states",
    "fake_tensors",
    "is_being_recorded",
    "is_transformed",
    "map_arguments",
    "modes_left",
    "of_the_processor",
    "parts_recorded",
    "past_dispatch",
    "print_options",
    "schema_of",
    "state_without_compiled_call",
    "storage_of",
    "tree_flatten",
    "tree_map",
    "without_dispatch_modes",
]


class TorchDispatchMode(_TorchDispatchMode):
    """Torch's own, without the two calls around each of its calls that keep torch.compile out: it meets none here."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


past_dispatch: Callable[[], contextlib.AbstractContextManager[None]] = torch._C._DisableTorchDispatch
"""Within, calls on plain tensors go past the dispatch modes that are on: these take time even where they do nothing."""

_SET_IN_C = (
    *("num_threads", "anomaly", "warnAlways", "default_", "deterministic", "float32", "fp32", "cudnn", "cublas"),
    *("mkldnn", "sdp_use"),
)
SETTERS_IN_C: tuple[Any, ...] = tuple(
    each
    for name, each in vars(torch._C).items()
    if name.lstrip("_").removeprefix("cuda_").startswith(tuple(f"set_{what}" for what in _SET_IN_C))
)
"""Functions by which others of torch set what holds for the whole process."""


def print_options() -> tuple[tuple[str, Any], ...]:
    """How tensors are printed, as `torch.set_printoptions` takes it."""
    return tuple(vars(_PRINT_OPTIONS).items())


_COMPILED = "_compiled_call_impl"  # where Module.compile leaves what is called in place of the module
MODULE_FIELDS = frozenset(vars(nn.Module()))
"""What every module keeps for torch itself."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

GLOBAL_HOOKS: tuple[dict[int, Any], ...] = tuple(
    each for name, each in vars(nn.modules.module).items() if name.startswith("_global_") and isinstance(each, dict)
)
"""Hooks of all modules, by their numbers, one dict per kind."""

PT2_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
"""Dtypes by their numbers in an exported program's file (`torch._export.serde.schema.ScalarType`)."""


@contextlib.contextmanager
def modes_left() -> Iterator[None]:
    """Modes that were entered within, and not left, are left at the end; but for the default device's."""
    functions, dispatch = _function_modes(), _dispatch_modes()
    try:
        yield
    finally:
        # Not by what a class of the model's makes of leaving; torch's own dispatch modes keep more to put back.
        for mode in _newer(_function_modes(), functions):
            _Modes.__exit__(mode, None, None, None)
        for mode in _newer(_dispatch_modes(), dispatch):
            of_torch = type(mode).__module__.startswith("torch.")
            (type(mode) if of_torch else _TorchDispatchMode).__exit__(mode, None, None, None)


def _newer(modes: list[Any], known: list[Any]) -> list[Any]:
    """Those that are not known, the last first; that of the default device lies below all others, and is no part."""
    default = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return [mode for mode in reversed(modes) if mode is not default and not any(mode is each for each in known)]


def call_by(module: nn.Module, call: Callable[..., Any]) -> None:
    """Have `module(...)` run `call` instead, as if it had been compiled in place; cheaper than hooks."""
    vars(module)[_COMPILED] = call


def call_by_itself(module: nn.Module) -> None:
    """Undo `call_by`."""
    vars(module).pop(_COMPILED, None)


def generator_states() -> list[bytes]:
    """The states of torch's generators, the CPU's first, read past the modes that are on."""
    with torch._C.DisableTorchFunction(), past_dispatch():
        states = [torch.get_rng_state()]
        states += torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return [state.numpy().tobytes() for state in states]


def default_device() -> torch.device:
    """Where new tensors lie; of torch 2.6, which raises once a default was taken back, too."""
    try:
        return torch.get_default_device()
    except AttributeError:
        return torch.device("cpu")


def call_as_usual(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a module's hooks and forward, whatever `call_by` put in their place."""
    return module._call_impl(*args, **kwargs)


@contextlib.contextmanager
def called_straight(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, `module(...)` is a module's forward and nothing around it, where nothing would run there.

    Torch's tracer notes the whole stack for every call and every number in it, so that each frame takes its time.

    Args:
        modules: one's own; those with hooks or with another way to be called stay as they are.
    """
    straight = [] if any(GLOBAL_HOOKS) else [each for each in modules if _is_called_plainly(each)]
    for module in straight:
        call_by(module, module.forward)
    try:
        yield
    finally:
        for module in straight:
            call_by_itself(module)  # else each would hold itself


def _is_called_plainly(module: nn.Module) -> bool:
    cls: Any = type(module)
    as_usual = cls.__call__ is nn.Module.__call__ and cls._call_impl is nn.Module._call_impl
    return as_usual and not any(getattr(module, hooks) for hooks in _HOOKS)


def state_without_compiled_call(module: nn.Module) -> Mapping[str, Any]:
    """A module's fields without a forward that was compiled in place: it would run this module's weights."""
    return module.__getstate__() if _COMPILED in vars(module) else vars(module)


def storage_of(reference: StorageReference) -> torch.UntypedStorage | None:
    """The storage that a reference is of, which it does not keep; None where it is gone."""
    found: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
    return found


LITERALS = frozenset({int, float, bool, str, type(None), torch.Size})
"""What stands in the arguments of a call beside tensors, mostly."""


def map_arguments(function: Callable[[Any], Any], tree: Any) -> Any:
    """`tree_map` for what a call is given or gives, but for plain literals, which stay; several times faster."""
    kind = type(tree)
    if kind in LITERALS:
        return tree
    if kind is tuple or kind is list:
        return kind([item if type(item) in LITERALS else map_arguments(function, item) for item in tree])
    if kind is dict:
        return {key: map_arguments(function, item) for key, item in tree.items()}
    return function(tree) if isinstance(tree, torch.Tensor) else tree_map(function, tree)


def fake_tensors() -> FakeTensorMode:
    """A mode of tensors without values, which raise where their memory is asked for: torch would read at no address."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode._allow_unsafe_data_ptr_access = False
    return mode


def schema_of(target: OpOverload) -> Any:
    """The schema of an overload such as `torch.ops.aten.add.Tensor`: names and kinds of what it takes and gives."""
    return target._schema


def is_transformed() -> bool:
    """Whether functions are called on parts of tensors, as within `torch.vmap`; whole ones meet the dispatcher."""
    return torch._C._functorch.maybe_current_level() is not None


def is_being_recorded() -> bool:
    """Whether torch.jit's tracer records what is called now; not so within a call that it has recorded."""
    return torch._C._get_tracing_state() is not None


def parts_recorded() -> Any:
    """A context of a dispatch mode's, in which torch.jit's tracer records what is called."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    tracer: Any = torch._C._parse_dispatch_key("Tracer")
    return torch._C._ForceDispatchKeyGuard(included, excluded.remove(tracer))


def of_the_processor(target: OpOverload, args: Any, kwargs: Any) -> Any:
    """What an overload does on the CPU: it may be a call of others, which are dispatched anew."""
    return target._handle.redispatch_boxed(_ON_CPU, *args, **kwargs)


_ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def overload_for(name: str, args: list[Any], kwargs: dict[str, Any]) -> str:
    """The overload of an ATen operator that torch would choose for arguments of these kinds, "default" for none.

    Raises:
        RuntimeError: none fits.
    """
    return str(torch._C._jit_resolve_packet(f"aten::{name}", *args, **kwargs) or "default")


def _check_calls() -> None:
    module, seen = nn.Identity(), []

    def noting(value: int) -> Any:
        seen.append(value)
        return call_as_usual(module, value)

    call_by(module, noting)
    answer = module(3)
    call_by_itself(module)
    if (answer, module(4), seen) != (3, 4, [3]):
        raise _unexpected("calls modules in another way")
    hooked = nn.Identity()
    hooked.register_forward_hook(lambda *_: 5)
    with called_straight([module, hooked]):
        straight = vars(module)[_COMPILED], vars(hooked).get(_COMPILED), module(3), hooked(3)
    if straight != (module.forward, None, 3, 5) or vars(module).get(_COMPILED) is not None:
        raise _unexpected("keeps hooks in another way")
    if not {"_parameters", "_buffers", "_modules", "training"} <= MODULE_FIELDS:
        raise _unexpected("keeps a module's parts in another way")


def _check_global_hooks() -> None:
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    found = any(hook.id in hooks for hooks in GLOBAL_HOOKS)
    hook.remove()
    if not found:
        raise _unexpected("keeps hooks of all modules in another way")


def _check_setters() -> None:
    set_dtype = torch._C._set_default_dtype
    if set_dtype not in SETTERS_IN_C or torch.set_num_threads not in SETTERS_IN_C:
        raise _unexpected("sets what holds for the process in another way")
    before = print_options()
    torch.set_printoptions(precision=7)
    changed = dict(print_options())
    torch.set_printoptions(**dict(before))
    if changed != {**dict(before), "precision": 7} or print_options() != before:
        raise _unexpected("keeps how tensors are printed in another way")


def _check_operators() -> None:
    target = torch.ops.aten.add_.Tensor
    if not isinstance(target, OpOverload) or schema_of(target).name != "aten::add_" or not schema_of(target).is_mutable:
        raise _unexpected("describes operators in another way")
    if torch.Tag.pointwise not in torch.ops.aten.relu.default.tags:
        raise _unexpected("tags operators in another way")
    if overload_for("add", [torch.empty(1, device="meta"), 1], {}) not in ("Tensor", "Scalar"):
        raise _unexpected("chooses overloads in another way")


def _check_dispatch() -> None:
    seen = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(schema_of(func).name)
            return func(*args, **(kwargs or {}))

    x = torch.empty(2, device="meta")
    with Noting():
        torch.neg(x)
    with Noting(), without_dispatch_modes():
        torch.neg(x)
    with Noting(), past_dispatch():
        torch.neg(x)
    with Noting(), modes_left():
        torch.device("meta").__enter__()
        Noting().__enter__()
    if seen != ["aten::neg"] or _dispatch_modes() or torch.empty(1).is_meta:
        raise _unexpected(f"dispatches one call as {seen}, or keeps modes in another way")
    leaves, _ = tree_flatten(({"a": [1]}, 2))
    if leaves != [1, 2] or tree_map(str, [1, {"a": 2}]) != ["1", {"a": "2"}]:
        raise _unexpected("walks containers in another way")


def _check_classes() -> None:
    # Not by an object of each: the first fake tensor loads 900 modules of a compiler, and takes a second.
    of_norms = issubclass(nn.BatchNorm2d, BatchNormBase) and not issubclass(nn.GroupNorm, BatchNormBase)
    of_convolutions = issubclass(nn.Conv1d, ConvolutionBase) and issubclass(nn.ConvTranspose2d, ConvolutionBase)
    if not of_norms or not of_convolutions or not issubclass(FakeTensor, torch.Tensor):
        raise _unexpected("derives its classes in another way")
    if not issubclass(FakeTensorMode, _TorchDispatchMode):
        raise _unexpected("makes fake tensors in another way")


def _check_storages() -> None:
    x = torch.arange(4.0)
    known, other = StorageReference(x[1:].untyped_storage()), StorageReference(torch.ones(1).untyped_storage())
    found, version = storage_of(known), x._version
    if known not in {StorageReference(x.untyped_storage())} or known == other or storage_of(other) is not None:
        raise _unexpected("refers to storages in another way")
    assert found is not None
    found.resize_(0)
    found.resize_(16)
    torch.empty(0, dtype=torch.uint8).set_(found).copy_(torch.arange(4.0).view(torch.uint8))
    if x.tolist() != [0, 1, 2, 3] or x._version != version:
        raise _unexpected("empties and fills storages in another way")
    del x, found
    if storage_of(known) is not None or not known.expired():
        raise _unexpected("keeps storages that nobody holds")


@contextlib.contextmanager
def _as_usual() -> Iterator[None]:
    """Within, no mode, default or hook of the caller's: what imports this first may be a call that is made in one."""
    hooks, dtype = [dict(each) for each in GLOBAL_HOOKS], torch.get_default_dtype()
    with without_dispatch_modes(), torch.inference_mode(False), torch.device("cpu"):
        for each in GLOBAL_HOOKS:
            each.clear()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            for each, before in zip(GLOBAL_HOOKS, hooks, strict=True):
                each.update(before)


for _check in (
    _check_calls,
    _check_global_hooks,
    _check_setters,
    _check_operators,
    _check_dispatch,
    _check_classes,
    _check_storages,
):
    try:
        with _as_usual():
            _check()
    except UnexpectedTorchError:
        raise
    except Exception as error:
        raise _unexpected(f"does not do what is expected of it ({type(error).__name__}: {error})") from error
