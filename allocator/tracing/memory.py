"""What a model's code remembers outside of its modules: in classes, globals, closures, caches and context variables."""

from __future__ import annotations

import contextvars
import functools
import random
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from types import CellType, CodeType, FunctionType, MappingProxyType, ModuleType
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import nn

from allocator.modules import slots_of
from allocator.torch_private import without_dispatch_modes

_FOREIGN = ("torch", "numpy", "builtins", "typing", "abc", "collections", "functools", "allocator")
_ELSEWHERE = frozenset({*_FOREIGN, *sys.stdlib_module_names})
_ATOMS = (int, float, bool, str, bytes, type(None), type, ModuleType, torch.Tensor, nn.Module, torch.dtype)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_ON_MODULES = {FunctionType, functools.partial, *_GENERATORS}
"""What a module may hold that its forward changes, though no copy of the module has one of its own."""
_CONTAINERS: tuple[Any, ...] = (dict, list, set, deque)
_DEPTH = 4
_MOST_NUMBERS = 1 << 16  # of a tensor, that are copied
_REGISTRY = 50  # entries of a global from which on it is taken to be a table, and not looked into further


class Memory:
    """What a model's code may remember outside of its modules, as it was.

    Of a class of the model's everything is put back; of the files that its code comes from, which other code writes
    into too, only what holds tensors.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._containers: list[tuple[Any, Any, bool]] = []  # (container, copy of it, whether all of it is put back)
        self._classes: list[tuple[type, dict[str, Any]]] = []
        self._caches: dict[Any, int] = {}  # how often each had missed
        self._generators: list[Callable[[], None]] = []
        self._objects: list[tuple[Any, dict[str, Any], bool]] = []  # (object with slots, their contents, as above)
        self._tensors: list[tuple[torch.Tensor, torch.Tensor]] = []  # (tensor, copy of it)
        self._cells: list[tuple[CellType, Any, bool]] = []  # of closures, with what they held
        self._seen: set[int] = set()
        classes: set[type] = set()
        functions: list[FunctionType] = []
        self._kinds: set[type] = set()
        for module in modules:
            self._kinds.add(type(module))
            for value in vars(module).values():
                if type(value) in _ON_MODULES:
                    functions += [value] if isinstance(value, FunctionType) else []
                    self._look(value, False, _DEPTH)
        for kind in self._kinds:
            of_classes: Any = type(kind)  # a class of classes keeps things too
            bases = [*kind.__mro__, *of_classes.__mro__]
            classes.update(base for base in bases if _is_own(base))
        for cls in classes:
            self._classes.append((cls, dict(vars(cls))))
            for value in vars(cls).values():
                self._look(value, True, _DEPTH)
        namespaces = [each for cls in classes for each in _namespaces(cls)]
        namespaces += [f.__globals__ for f in functions if not _is_foreign(f.__module__)]
        for namespace in {id(each): each for each in namespaces}.values():
            self._look(namespace, False, _DEPTH)  # a namespace is looked into, however large
        for value in contextvars.copy_context().values():
            self._look(value, False, _DEPTH)

    def _look(self, value: Any, everything: bool, depth: int) -> None:
        if type(value) is torch.Tensor and id(value) not in self._seen and _is_small(value):
            self._seen.add(id(value))
            with without_dispatch_modes():
                self._tensors.append((value, value.clone()))
        if _is(value, _ATOMS) or not depth or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if _is(value, _CONTAINERS):
            before = _plain(value)
            self._containers.append((value, before, everything))
            if len(before) > _REGISTRY and depth < _DEPTH:
                return
        elif _is(value, functools._lru_cache_wrapper):
            self._caches[value] = value.cache_info().misses
        elif _is(value, _GENERATORS):
            self._generators.append(_state_of(value))
        elif _is(value, FunctionType):
            cells = [cell for cell in value.__closure__ or () if not _is_empty(cell)]
            self._cells += [(cell, cell.cell_contents, everything) for cell in cells]
        elif _slots(value):
            self._objects.append((value, in_slots(value), everything))
        for each in _held_by(value):
            self._look(each, everything, depth - 1)

    def covers(self, modules: Iterable[nn.Module]) -> bool:
        """Whether this is of all classes of these modules."""
        return self._kinds.issuperset(map(type, modules))

    def restore(self) -> None:
        """Put everything back."""
        for put_back in self._generators:
            put_back()
        for cache, misses in self._caches.items():
            if cache.cache_info().misses != misses:
                cache.cache_clear()
                self._caches[cache] = 0
        for cls, before in self._classes:
            _restore_class(cls, before)
        for container, before, everything in self._containers:
            if isinstance(before, dict):
                _restore_mapping(container, before, everything)
            elif not _same(now := _plain(container), before) and (everything or _holds_tensors(list(now))):
                kind: Any = type(before)
                kind.clear(container)
                (kind.update if kind is set else kind.extend)(container, before)
        for value, fields, everything in self._objects:
            _restore_slots(value, fields, everything)
        for cell, held, everything in self._cells:
            now = None if _is_empty(cell) else cell.cell_contents
            if now is not held and (everything or _holds_tensors([now, held])):
                cell.cell_contents = held
        if self._tensors and threading.active_count() == 1:  # another thread may have written into them
            with without_dispatch_modes():
                for tensor, numbers in self._tensors:
                    _restore_tensor(tensor, numbers)


def _is_small(tensor: torch.Tensor) -> bool:
    """Whether a tensor's numbers are few enough to copy them on suspicion."""
    there = tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_inference()
    return there and tensor.numel() <= _MOST_NUMBERS and not tensor.requires_grad


def _restore_tensor(tensor: torch.Tensor, before: torch.Tensor) -> None:
    """Put back what was written into a tensor; of another size it is no longer the same."""
    same = tensor.shape == before.shape and torch.equal(tensor.nan_to_num(), before.nan_to_num())
    if not same and tensor.shape == before.shape:
        tensor.copy_(before)


def _is(value: Any, kinds: Any) -> TypeGuard[Any]:
    """`isinstance`, without asking the value for its class: what a library loads late would be loaded."""
    return issubclass(type(value), kinds)


def _attribute(value: Any, name: str, default: Any) -> Any:
    """An attribute that is there, without what the value's class makes of those that are not."""
    kind: Any = type(value)
    try:
        return kind.__getattribute__(value, name)
    except Exception:
        return default


def _plain(container: Any) -> Any:
    """A plain container of the same kind with what is in this one, whatever its class makes of the methods."""
    kind = next(kind for kind in (*_CONTAINERS, tuple) if issubclass(type(container), kind))
    return dict(dict.items(container)) if kind is dict else kind(kind.__iter__(container))


def _state_of(generator: Any) -> Callable[[], None]:
    """The state of a generator, as a function that puts it back."""
    if isinstance(generator, np.random.Generator):
        bits, state = generator.bit_generator, generator.bit_generator.state
        return lambda: setattr(bits, "state", state)
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    return functools.partial(generator.set_state, generator.get_state())


def _held_by(value: Any) -> list[Any]:
    """What a model's code may write into, one step further in."""
    if _is(value, (*_CONTAINERS, tuple)):
        held = _plain(value)
        return list(held.values() if isinstance(held, dict) else held)
    if _is(value, (staticmethod, classmethod)):
        return [value.__func__]
    if _is(value, FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell)]
        return [*held, *(value.__defaults__ or ()), vars(value)]
    # Objects of torch's or of the language's own classes keep nothing of a forward, and are many.
    if not _is_own(type(value)):
        return []
    return [_attribute(value, "__dict__", {}), *in_slots(value).values()]


@functools.lru_cache(maxsize=1024)
def _slots_of(cls: type) -> tuple[str, ...]:
    """Names of the slots of a class that is none of torch's or of the language's, as attributes."""
    return slots_of(tuple(base for base in cls.__mro__ if _is_own(base)))


def _slots(value: Any) -> tuple[str, ...]:
    kind: Any = type(value)
    return _slots_of(kind)


def in_slots(value: Any) -> dict[str, Any]:
    """What is in those slots of an object that are not empty."""
    return {name: getattr(value, name) for name in _slots(value) if hasattr(value, name)}


def _restore_slots(value: Any, before: dict[str, Any], everything: bool) -> None:
    now = in_slots(value)
    for name in (*now, *(name for name in before if name not in now)):
        same = name in now and name in before and now[name] is before[name]
        if not same and (everything or _holds_tensors([now.get(name), before.get(name)])):
            if name in before:
                object.__setattr__(value, name, before[name])
            else:
                object.__delattr__(value, name)


def _restore_class(cls: type, before: dict[str, Any]) -> None:
    now = dict(vars(cls))
    for key in now:
        if key not in before and not _is_pythons(key):
            delattr(cls, key)
    for key, value in before.items():
        if now.get(key) is not value and not _is_pythons(key):
            setattr(cls, key, value)


def _is_pythons(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _restore_mapping(mapping: dict[Any, Any], before: dict[Any, Any], everything: bool) -> None:
    kind: Any = OrderedDict if isinstance(mapping, OrderedDict) else dict
    now = _plain(mapping)
    for key in now.keys() - before.keys():
        if everything or _holds_tensors([key, now[key]]):
            kind.__delitem__(mapping, key)
    for key, value in before.items():
        if now.get(key) is not value and (everything or _holds_tensors([now.get(key), value])):
            kind.__setitem__(mapping, key, value)


def _same(items: Any, before: Any) -> bool:
    return len(items) == len(before) and all(a is b for a, b in zip(items, before))


def _holds_tensors(values: list[Any], depth: int = _DEPTH) -> bool:
    for value in values:
        if _is(value, torch.Tensor):
            return True
        if depth and not _is(value, _ATOMS):
            held = _is(value, (*_CONTAINERS, tuple))
            inside = _plain(value) if held else {**_attribute(value, "__dict__", {}), **in_slots(value)}
            if isinstance(inside, (dict, MappingProxyType)):
                inside = [*inside, *inside.values()]
            if _holds_tensors(list(inside), depth - 1):
                return True
    return False


def _is_empty(cell: Any) -> bool:
    try:
        return cell.cell_contents is cell
    except ValueError:
        return True


def _is_own(cls: type) -> bool:
    """Whether a class is none of torch's or of the language's."""
    return not _is_foreign(cls.__module__)


def _is_foreign(module: Any) -> bool:
    """Whether this names a module of torch's or of the language's; some classes of the latter have a slot there."""
    return module is not None and (not isinstance(module, str) or module.partition(".")[0] in _FOREIGN)


@functools.lru_cache(maxsize=512)
def _namespaces(cls: type) -> tuple[dict[str, Any], ...]:
    """Globals of the file that a class is from, of those whose functions it has imported, and of those it names."""
    module = sys.modules.get(cls.__module__)
    if module is None:
        return ()
    own = vars(module)
    called = list(own.values())
    namespaces = [own]
    names = {name for value in vars(cls).values() for name in _names_in(_attribute(value, "__code__", None))}
    for name in names:
        other = own.get(name, sys.modules.get(name))
        if _is(other, ModuleType) and other.__name__.partition(".")[0] not in _ELSEWHERE:
            namespaces.append(vars(other))
            called += [vars(other)[each] for each in names & vars(other).keys()]
    for value in called:
        function = _attribute(value, "__wrapped__", value)
        if _is(function, FunctionType) and not _is_foreign(function.__module__):
            namespaces.append(function.__globals__)
    return tuple({id(each): each for each in namespaces}.values())


def _names_in(code: CodeType | None) -> set[str]:
    """Names of globals, attributes and modules in a function and in those that it defines."""
    if code is None:
        return set()
    inner = (_names_in(each) for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*inner)
