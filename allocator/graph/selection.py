"""Which parts of a model the caller means: by name pattern, by class, or by the module itself."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from allocator.errors import InputError, as_given, did_you_mean

Modules = Mapping[str, nn.Module]
UNMATCHED = "matches no module"
"""What every note of `unmatched` says of modules."""


def as_items(given: Any, what: str) -> tuple[Any, ...]:
    """One pattern, class or module, or several of them, as a tuple.

    Args:
        given: what the caller gave; None for none.
        what: the option that it was given for.

    Raises:
        InputError: it is, or holds, something else.
    """
    items = _several(given)
    for item in items:
        if not isinstance(item, _MEANT):
            raise InputError(f"{what} is {as_given(item)}: pass name patterns, module classes or modules")
    return items


def as_groups(given: Any, what: str) -> tuple[tuple[Any, ...], ...]:
    """What is meant to be alike: one group of patterns, classes and modules, or several; as `as_items`."""
    items = _several(given)
    if any(isinstance(item, (list, tuple, set)) for item in items):
        return tuple(as_items(item, what) for item in items)
    return (as_items(items, what),) if items else ()


_MEANT = (str, type, nn.Module)
"""What means layers: a name pattern, a class, or a module itself, which may be iterable too."""


def _several(given: Any) -> tuple[Any, ...]:
    if given is None:
        return ()
    if isinstance(given, (*_MEANT, bytes)) or not isinstance(given, Iterable):
        return (given,)
    try:
        return tuple(given)
    except TypeError:  # a tensor of one number says that it can be gone through, and cannot
        return (given,)


def selected(modules: Modules, tensors: Collection[str], items: Sequence[Any], what: str) -> set[str]:
    """Names of the parameters and buffers that lie in what is meant.

    Args:
        modules: all of the model's, by path.
        tensors: names of all of its parameters and buffers.
        items: name patterns of modules or tensors (`"layer1.*"`, which holds for all below too), module classes, or
            modules.
        what: the option that the items were given for.

    Raises:
        InputError: an item is a module that the model does not have.
    """
    return {name for item in items for name in _tensors_of(modules, tensors, item, what)}


def unmatched(
    modules: Modules, tensors: Collection[str], what: str, items: Sequence[Any], kind: str = "module or parameter"
) -> list[str]:
    """A note for every item that matches nothing, since it may be misspelled.

    Args:
        modules, tensors, items: as for `selected`.
        what: the option that the items were given for.
        kind: what the tensors are, or lie in.
    """
    notes = []
    for item in items:
        if isinstance(item, (list, tuple)):
            notes += unmatched(modules, tensors, what, item, kind)
        elif isinstance(item, str) and not _tensors_of(modules, tensors, item, what):
            near = did_you_mean(item, _holding(tensors), mark="'")
            notes.append(f"{what}={as_given(item)} matches no {kind}{near and '; ' + near}")
        elif isinstance(item, type) and not _tensors_of(modules, tensors, item, what):
            notes.append(f"{what}={item.__name__} {UNMATCHED} of the model")
    return notes


def _holding(tensors: Collection[str]) -> dict[str, None]:
    """The modules that these lie in, and those around these."""
    found: dict[str, None] = {}
    for name in tensors:
        path = name.rpartition(".")[0]
        while path and path not in found:
            found[path] = None
            path = path.rpartition(".")[0]
    return found


def _tensors_of(modules: Modules, tensors: Collection[str], item: Any, what: str) -> list[str]:
    if isinstance(item, str):
        return [name for name in tensors if matches(name, item)]
    if isinstance(item, nn.Module):
        paths = [path for path, module in modules.items() if module is item]
        if not paths:
            raise InputError(
                f"{what}: this {type(item).__name__} is no module of the model: pass one of model.modules()"
            )
        return [name for name in tensors if name.startswith(f"{paths[0]}." if paths[0] else "")]
    owners = {path for path, module in modules.items() if isinstance(module, item)}
    return [name for name in tensors if name.rpartition(".")[0] in owners]


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern means a tensor: by its own name, by its module's, or by that of a module around it."""
    texts = (name, name.rpartition(".")[0])
    return any(fnmatch.fnmatchcase(text, p) for text in texts for p in (pattern, f"{pattern}.*"))
