"""Copies of a model's structure with other tensors in it, so that weights are never copied unasked."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import MemberDescriptorType
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import nn

from allocator.closures import CALLABLES, Memo, copy_callable, reaches
from allocator.errors import UnsupportedModelError, in_words
from allocator.torch_private import without_dispatch_modes

Replace = Callable[[str, torch.Tensor], torch.Tensor]
T = TypeVar("T")


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """`dict(model.named_modules())`, without its generator per level for every module."""
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()
    waiting: list[tuple[str, nn.Module | None]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module is not None and module not in seen:
            seen.add(module)
            found[path] = module
            waiting += [(f"{path}.{key}" if path else key, child) for key, child in reversed(module._modules.items())]
    return found


def tensor_names(model: nn.Module, modules: Mapping[str, nn.Module] | None = None) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by its first name; a tied tensor appears once.

    Args:
        model: any module.
        modules: what `modules_of(model)` gives, where it is known.
    """
    return {name: tensor for _, name, tensor in _tensors(modules_of(model) if modules is None else modules)}


def set_training(model: nn.Module, training: bool) -> nn.Module:
    """Put every module into train or eval mode, without the `train` that a wrapper may have overridden."""
    for module in modules_of(model).values():
        module.training = training
    return model


def attribute_of(module: nn.Module, name: str) -> Any:
    """An attribute, or one of what the module holds (`config.heads`, `stages.2.channels`); None where there is none."""
    value: Any = module
    for part in name.split("."):
        value = _part_of(value, part)
    return value


def _part_of(holder: Any, name: str) -> Any:
    """An entry of a list by its number, or of a mapping by its key; an attribute of anything else."""
    if isinstance(holder, list):
        return holder[int(name)] if name.isdigit() and int(name) < len(holder) else None
    return holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)


def _set_part(holder: Any, name: str, value: Any) -> None:
    if isinstance(holder, list):
        holder[int(name)] = value
    elif isinstance(holder, dict):
        holder[name] = value
    else:
        setattr(holder, name, value)


def set_attribute(module: nn.Module, name: str, value: Any, *, shared: bool = False) -> None:
    """Set what `attribute_of` reads; a tuple stays one.

    Args:
        module, name, value: what is set.
        shared: others may hold the same object, which so is copied first.
    """
    current = attribute_of(module, name)
    value = tuple(value) if isinstance(current, tuple) and value is not None else value
    if current == value:
        return
    *held, last = name.split(".")
    holder: Any = module
    for part in held:
        inner = _part_of(holder, part)
        if shared:
            inner = copy.copy(inner)
            _set_part(holder, part, inner)
        holder = inner
    _set_part(holder, last, value)


def lies_within(path: str, modules: Iterable[str]) -> bool:
    """Whether this is the path of one of these modules, or of what is inside one."""
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Sizes of every parameter and buffer by its first name."""
    return {name: tuple(tensor.shape) for name, tensor in tensor_names(model).items()}


def numbers_of(model: nn.Module) -> dict[str, np.ndarray]:
    """Vectors of whole numbers among the buffers, by their first names; none of those without values."""
    found = {}
    for name, tensor in tensor_names(model).items():
        whole = (
            tensor.dim() == 1 and tensor.dtype in (torch.int64, torch.int32) and not isinstance(tensor, nn.Parameter)
        )
        if whole and type(tensor) is torch.Tensor and not tensor.is_meta:
            found[name] = tensor.detach().cpu().numpy()
    return found


def count_parameters(model: nn.Module) -> int:
    """Numbers in all parameters; a tied one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _tensors(modules: Mapping[str, nn.Module]) -> list[tuple[str, str, torch.Tensor]]:
    """(field of the module that holds it, name, tensor): parameters, then buffers, as torch names them."""
    found, seen = [], set[int]()
    for kind in ("_parameters", "_buffers"):
        for path, module in modules.items():
            for key, tensor in getattr(module, kind).items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found.append((kind, f"{path}.{key}" if path else key, tensor))
    return found


def skeleton(model: nn.Module, replace: Replace) -> nn.Module:
    """Copy the module structure of `model`, putting `replace(name, tensor)` in place of every tensor.

    Args:
        model: any module; it is not changed.
        replace: called once per parameter, buffer and tensor attribute with its name; what it returns
            stands in the copy (for a parameter it is wrapped in `nn.Parameter`). In place of the tensor itself
            another stands with its memory, so that what is set on it (`requires_grad`, `data`) is not set on the
            model's.

    Returns:
        A module of the same classes and names whose tensors are those that `replace` returned.

    Raises:
        UnsupportedModelError: the module structure cannot be deep-copied.
    """
    return _skeleton(model, replace, None)


def on_a_copy(model: nn.Module, replace: Replace, run: Callable[[nn.Module], T]) -> T:
    """What `run` gives of a `skeleton` for one forward, whose modules share one dict for all the hooks that are none.

    Such dicts are most of what a copy is made of. Where a forward adds a hook, it runs once more, on a plain skeleton.

    Args:
        model: any module; it is not changed.
        replace: as for `skeleton`.
        run: called with the copy.
    """
    shared = _NoHooks()
    try:
        result = run(_skeleton(model, replace, shared))
    except Exception:
        if not shared.written:
            raise
    else:
        if not shared.written:
            return result
    return run(skeleton(model, replace))


class _NoHooks(OrderedDict[Any, Any]):
    """Takes no hook, and notes that there was one, or that it was copied: nobody else is to run it."""

    written = False

    def __setitem__(self, key: Any, value: Any) -> None:
        self.written = True
        raise RuntimeError("hooks are added to a copy whose modules share them")

    def copy(self) -> OrderedDict[Any, Any]:  # type: ignore[override]
        self.written = True  # what the forward makes of it, also with `deepcopy` of a module, would be shared too
        return OrderedDict()

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self.copy()), ()


def _skeleton(model: nn.Module, replace: Replace, no_hooks: _NoHooks | None) -> nn.Module:
    modules = modules_of(model)
    memo = Memo(map(id, modules.values()), no_hooks)
    for kind, name, tensor in _tensors(modules):
        new = replace(name, tensor)
        new = tensor.detach() if new is tensor else new
        memo[id(tensor)] = _as_parameter(new, tensor) if kind == "_parameters" else new
    for name, tensor in _tensor_attributes(modules):
        if id(tensor) not in memo:
            memo[id(tensor)] = replace(name, tensor)
    memo.own.update(memo)
    try:
        return cast(nn.Module, _copy(model, memo))
    except (TypeError, RuntimeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied ({in_words(error)}); "
            "detach tensors kept as attributes, and drop locks, streams or open files from the module"
        ) from error


def for_inference(model: nn.Module, written: Collection[str] = ()) -> nn.Module:
    """A copy in eval mode that shares the parameters; buffers, which a forward may write into, are its own.

    Args:
        model: any module; it is not changed.
        written: names of parameters that a forward writes into, which are the copy's own too.
    """

    def share(name: str, tensor: torch.Tensor) -> torch.Tensor:
        own = name in written or not isinstance(tensor, nn.Parameter)
        return tensor.detach().clone() if own else tensor

    return set_training(skeleton(model, share), False)


def _copy(value: Any, memo: Memo) -> Any:
    """`copy.deepcopy`, with a short way for modules and plain containers: most of a network is these.

    It also goes where `deepcopy` does not: into functions, such as hooks, that hold a part of the model.
    """
    kind: Any = type(value)
    if kind in _ATOMS:
        return value
    known = memo.get(id(value))
    if known is not None:
        return known
    if kind in _PLAIN and not value:
        memo[id(value)] = empty = kind()
        return empty
    if isinstance(value, nn.Module) and _copies_plainly(kind):
        return _copied_by_fields(value, memo)
    if kind is torch.Size:
        return torch.Size(map(int, value))  # while torch.jit traces, sizes are tensors, which nobody could copy
    if kind is tuple:
        return value if _is_plain(value) else tuple(_copy(item, memo) for item in value)
    if kind in _MAPPINGS:
        mapping = memo[id(value)] = kind()
        _copy_items(value, mapping, memo)
        return mapping
    if kind is list:
        items = memo[id(value)] = []
        items += [_copy(item, memo) for item in value]
        return items
    if kind is torch.Generator:
        new = memo[id(value)] = _copied_generator(value)
        return new
    if kind in CALLABLES:
        return copy_callable(value, memo, _copy) if reaches(value, memo.own) else value
    return _copied_its_own_way(value, memo) if isinstance(value, nn.Module) else copy.deepcopy(value, memo)


def _copied_by_fields(module: nn.Module, memo: Memo) -> nn.Module:
    kind: Any = type(module)
    new: nn.Module = object.__new__(kind)  # a `__new__` of its own may want arguments, or give another class
    memo[id(module)] = new
    _copy_fields(module, vars(new), memo)
    for name in slots_of(kind.__mro__):
        if hasattr(module, name):
            object.__setattr__(new, name, _copy(getattr(module, name), memo))
    return new


def _copied_its_own_way(module: nn.Module, memo: Memo) -> nn.Module:
    """As its class says; by its fields where that gives no copy that takes what stands in for its tensors.

    A `__deepcopy__` that builds the module anew gives other tensors, and draws random numbers for them; it does not
    take those of another size.
    """
    with without_dispatch_modes():
        drawn = torch.get_rng_state()
    new: object = None
    try:
        with contextlib.suppress(TypeError, RuntimeError, AttributeError, ValueError):
            new = copy.deepcopy(module, memo)
    finally:
        with without_dispatch_modes():
            torch.set_rng_state(drawn)
    if isinstance(new, nn.Module):
        found = tensor_names(new)
        if all(memo.get(id(own), own) is found.get(name) for name, own in tensor_names(module).items()):
            return new
    return _copied_by_fields(module, memo)


@functools.lru_cache(maxsize=1024)
def slots_of(bases: tuple[type, ...]) -> tuple[str, ...]:
    """Names of the slots of these classes, as attributes."""
    members = ((name, member) for base in bases for name, member in vars(base).items())
    return tuple(name for name, member in members if type(member) is MemberDescriptorType)


def _copied_generator(generator: torch.Generator) -> torch.Generator:
    with without_dispatch_modes():  # its state has values, in whatever mode the copy is made
        return torch.Generator(generator.device).set_state(generator.get_state())


def _copy_fields(module: nn.Module, into: dict[str, Any], memo: Memo) -> None:
    """Copies of all fields of a module; most are numbers, and torch's own that hold nothing."""
    # A forward compiled in place (Module.compile) stays behind: it would run the original's weights.
    state = module.__getstate__() if "_compiled_call_impl" in vars(module) else vars(module)
    into.update(state)
    for key, item in state.items():
        kind = type(item)
        if kind in _ATOMS:
            continue
        if key in MODULE_FIELDS:
            if item:
                into[key] = _copy(item, memo)
            else:
                into[key] = kind() if kind is not OrderedDict or memo.empty is None else memo.empty
        elif kind is not tuple or not _ATOMS.issuperset(map(type, item)):
            into[key] = _copy(item, memo)


def _is_plain(value: Any) -> bool:
    """Whether this is a number, text or none, or a tuple of such: most of what a module holds beside its parts."""
    kind = type(value)
    return kind in _ATOMS or (kind is tuple and _ATOMS.issuperset(map(type, value)))


def _copy_items(items: Mapping[Any, Any], into: dict[Any, Any], memo: Memo) -> None:
    for key, item in items.items():
        into[key if type(key) in _ATOMS else _copy(key, memo)] = item if type(item) in _ATOMS else _copy(item, memo)


@functools.lru_cache
def _copies_plainly(cls: type) -> bool:
    return all(getattr(cls, name, None) is getattr(nn.Module, name, None) for name in _COPY_HOOKS)


_MAPPINGS = frozenset({dict, OrderedDict})
_PLAIN = _MAPPINGS | {set, list}
_ATOMS = frozenset({int, float, bool, str, type(None)})
_COPY_HOOKS = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__")


def _as_parameter(tensor: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    if type(tensor) is not torch.Tensor and isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=like.requires_grad and not tensor.is_inference())


def _tensor_attributes(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that modules keep as plain attributes, alone or within lists, tuples and dicts."""
    for path, module in modules.items():
        for key, value in vars(module).items():
            if type(value) in _ATOMS or key in MODULE_FIELDS or _is_plain(value):
                continue
            for tensor in tensors_within(value):
                yield f"{path}.{key}".lstrip("."), tensor


def tensors_within(value: Any) -> list[torch.Tensor]:
    """Tensors in containers within one another."""
    found, waiting, seen = [], [value], set[int]()
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple, dict)) and id(item) not in seen:
            seen.add(id(item))
            inside = item.values() if isinstance(item, dict) else item
            waiting += [each for each in inside if type(each) not in _ATOMS]
    return found


MODULE_FIELDS = frozenset(vars(nn.Module()))
"""What torch keeps in every module."""
