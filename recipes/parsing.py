"""Dataclasses from plain data, as YAML holds it; all that does not fit is noted, and not only what comes first."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from allocator.errors import as_given, did_you_mean

T = TypeVar("T")


def parse(cls: type[T], data: Any, place: str, problems: list[str]) -> T | None:
    """An instance of a dataclass from plain data.

    Args:
        cls: the dataclass; its fields may be dataclasses, too.
        data: its fields by name.
        place: the dotted key of the data in the whole, for messages; "" for the whole.
        problems: what does not fit is added here.

    Returns:
        The instance, or None where something does not fit.
    """
    before = len(problems)
    if not isinstance(data, Mapping):
        problems.append(f"{place or 'configuration'}: expected a section, got {as_given(data)}")
        return None
    dot = f"{place}." if place else ""
    hints = get_type_hints(cls)
    required = _required(cls)
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key in required:
            values[key] = _value(hints[key], value, f"{dot}{key}", problems)
        else:
            nearest = did_you_mean(str(key), required, cutoff=0.5) or f"known: {', '.join(required)}"
            problems.append(f"unknown key {dot}{key}; {nearest}")
    for key, is_required in required.items():
        if is_required and key not in data:
            problems.append(f"{dot}{key} is missing")
    # Not made of what did fit: other checks would then find fault with defaults that nobody has chosen.
    if len(problems) > before:
        return None
    return cls(**values)


def _required(cls: type) -> dict[str, bool]:
    """The fields of a dataclass, and whether each has to be given."""
    required = {}
    for field in fields(cls):
        required[field.name] = field.default is MISSING and field.default_factory is MISSING
    return required


def _value(hint: Any, value: Any, place: str, problems: list[str]) -> Any:
    """The value of a field from plain data; what does not fit is noted, and None returned."""
    choices = _alternatives(hint)
    if value is None and (type(None) in choices or Any in choices):
        return None
    for choice in choices:
        if is_dataclass(choice):
            return parse(typing.cast(type, choice), value, place, problems)
        plain = _plain(choice, value)
        if plain is not None:
            return plain
    expected = " or ".join(_name(choice) for choice in choices)
    problems.append(f"{place}: expected {expected}, got {as_given(value)}")
    return None


def _alternatives(hint: Any) -> list[Any]:
    """The types that a field may have; of one that takes one of a few words, text: which is checked with the whole."""
    if get_origin(hint) in (Union, types.UnionType):
        choices: list[Any] = []
        for member in get_args(hint):
            # Several words and text are all text, which messages name once.
            choices += [choice for choice in _alternatives(member) if choice not in choices]
        return choices
    if get_origin(hint) is Literal:
        return [str]
    if get_origin(hint) is Sequence:
        return [types.GenericAlias(tuple, (*get_args(hint), ...))]
    return [hint]


def _plain(hint: Any, value: Any) -> Any:
    """The value as the type asks for it, None where it is of another."""
    if hint is Any:
        return value  # what it has to be is known where it is used, and checked there
    container = get_origin(hint)
    if hint is float and not isinstance(value, bool) and isinstance(value, int | float | str):
        # Text too: YAML 1.1 takes 1e-4 for one, as its numbers need a dot.
        try:
            return float(value)
        except ValueError:
            return None
    if container in (list, tuple) and isinstance(value, list | tuple):
        items = [_plain(get_args(hint)[0], item) for item in value]
        return None if None in items else container(items)
    if container is dict and isinstance(value, Mapping):
        return dict(value)
    # Not isinstance, as true and false would pass for whole numbers.
    return value if type(value) is hint else None


_NAMES = {float: "a number", int: "a whole number", str: "text", bool: "true or false", type(None): "null"}


def _name(hint: Any) -> str:
    """What messages call a type."""
    if get_origin(hint) in (list, tuple):
        each = get_args(hint)[0]
        return "a list" if each is Any else f"a list, each {_name(each)}"
    if get_origin(hint) is dict:
        return "a section"
    return _NAMES.get(hint, str(hint))
