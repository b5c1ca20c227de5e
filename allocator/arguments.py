"""Arguments of another kind than a signature says: refused before any work, in words about what was passed."""

from __future__ import annotations

import contextlib
import functools
import inspect
import numbers
import os
import types
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import nn

from allocator.errors import ArgumentsError, InputError, UnsupportedModelError, as_given, did_you_mean

_WORDS: dict[Any, str] = {
    nn.Module: "a torch.nn.Module",
    Mapping: "a dict",
    Callable: "a function",
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    os.PathLike: "a path",
    str: "text",
}
_HOLDERS = ("model", "allocation", "graph")
"""Attributes of results by which one kind of value holds another."""
_MAKERS = {"ChannelGraph": "trace", "Scores": "score", "Allocation": "plan", "Result": "allocate"}
_NOTHING = object()
LARGEST_SEED = 2**63
"""Seeds lie below it: numpy takes none below zero, and torch none of more bits with what is added to them here."""

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse what does not fit a public function's annotations, before it does anything.

    Looked at are arguments of this package's classes, modules, functions, paths, text, whole numbers and truth values;
    budgets, choices and data have checks of their own, which know more.

    Raises:
        UnsupportedModelError: another thing in place of a model.
        InputError: an argument is of another kind; says which, what it takes, and what is at hand that would fit.
        ArgumentsError: one is missing, or there is none of that name.
    """
    signature = inspect.signature(function)

    @functools.cache
    def kinds() -> dict[str, tuple[Any, ...]]:
        hints = get_type_hints(function)
        known = {name: _kinds_of(hints[name]) for name in signature.parameters if name in hints}
        return {name: found for name, found in known.items() if found}

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            said = f"{function.__name__}: {error}{_meant(signature, kwargs)}"
            given: dict[str, Any] = {}
            with contextlib.suppress(TypeError):
                given = signature.bind_partial(*args, **kwargs).arguments
            _check(given, kinds(), f"; {said}")
            raise ArgumentsError(said) from None
        _check(bound.arguments, kinds())
        _check_seed(bound.arguments.get("seed", 0))
        for name, found in kinds().items():
            if int in found and isinstance(bound.arguments.get(name), numbers.Integral):
                bound.arguments[name] = int(bound.arguments[name])  # numpy's, which torch does not take
        return function(*bound.args, **bound.kwargs)

    return run


def misfit(function: Callable[..., Any], *given: Any) -> str:
    """What keeps a function from being called with these arguments, "" where nothing does or none can tell."""
    try:
        inspect.signature(function).bind(*given)
    except TypeError as error:
        return str(error)
    except ValueError:  # a builtin, of which nothing is known
        return ""
    return ""


def is_real(value: Any) -> bool:
    """Whether this is a number, one of numpy's too; a truth value is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check(given: dict[str, Any], kinds: dict[str, tuple[Any, ...]], also: str = "") -> None:
    """Raise for the first argument that does not fit; `also` is said beside it."""
    for name, found in kinds.items():
        if name in given and not _fits(given[name], found):
            _refuse(name, given, kinds, also)


def _check_seed(seed: int) -> None:
    """Raise for a number from which torch or numpy would not draw."""
    if not 0 <= seed < LARGEST_SEED:
        raise InputError(f"seed={as_given(seed)} is no whole number from 0 to 2**63 - 1")


def _meant(signature: inspect.Signature, kwargs: dict[str, Any]) -> str:
    """What an argument of another name may have been meant as."""
    other = next((name for name in kwargs if name not in signature.parameters), None)
    near = "" if other is None else did_you_mean(other, signature.parameters)
    return near and f"; {near}"


def _kinds_of(hint: Any) -> tuple[Any, ...]:
    """The kinds that an annotation allows; () for one that is not looked at."""
    if get_origin(hint) in (Union, types.UnionType):
        found = [_kinds_of(each) for each in get_args(hint)]
        kinds = tuple(kind for each in found for kind in each) if all(found) else ()
        return () if {float, str} <= set(kinds) else kinds  # a budget
    origin = get_origin(hint) or hint
    if origin in (*_WORDS, type(None)):
        return (origin,)
    if not inspect.isclass(origin) or getattr(origin, "_is_protocol", False):
        return ()
    if issubclass(origin, os.PathLike):
        return (os.PathLike,)
    return (origin,) if origin.__module__.startswith("allocator.") else ()


def _fits(value: Any, kinds: tuple[Any, ...]) -> bool:
    return any(_is(value, kind) for kind in kinds)


def _is(value: Any, kind: Any) -> bool:
    if kind is Callable:
        return callable(value)
    if kind is float:
        return is_real(value)
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if kind is bool:
        return isinstance(value, bool) or type(value).__name__ == "bool"  # numpy's own
    return isinstance(value, kind)


def _refuse(name: str, given: dict[str, Any], kinds: dict[str, tuple[Any, ...]], also: str) -> None:
    """Raise; a model of any other kind is left to the check of models where nothing at hand would fit."""
    value, wanted = given[name], kinds[name]
    hint = _swapped(name, given, kinds) or _held(value, wanted) or _maker(wanted)
    if _named(wanted) == [nn.Module] and not hint:
        return
    words = " or ".join(dict.fromkeys(_WORDS.get(kind) or kind.__name__ for kind in _named(wanted)))
    said = f"{name} is {as_given(value)}, and takes {words}{hint and '; ' + hint}{also}"
    raise UnsupportedModelError(said) if nn.Module in wanted else InputError(said)


def _swapped(name: str, given: dict[str, Any], kinds: dict[str, tuple[Any, ...]]) -> str:
    value, wanted = given[name], kinds[name]
    for other, allowed in kinds.items():
        if other != name and other in given and _fits(value, allowed) and _fits(given[other], wanted):
            return f"{name} and {other} are the wrong way round"
    return ""


def _held(value: Any, wanted: tuple[Any, ...]) -> str:
    for attribute in _HOLDERS:
        if _fits(getattr(value, attribute, _NOTHING), wanted):
            return f"pass its .{attribute}"
    return ""


def _maker(wanted: tuple[Any, ...]) -> str:
    for kind in wanted:
        if kind.__name__ in _MAKERS:
            return f"pass what allocator.{_MAKERS[kind.__name__]} gave"
    return ""


def _named(wanted: tuple[Any, ...]) -> list[Any]:
    """The kinds worth naming: a path may be text, and what may be left out need not be said."""
    left_out = {type(None), str} if os.PathLike in wanted else {type(None)}
    return [kind for kind in wanted if kind not in left_out]
