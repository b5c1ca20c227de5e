"""Build any model by name: with a library's prefix, such as ``torchvision:``, or ``package.module:factory``."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import PurePath
from types import ModuleType
from typing import Any

from torch import nn

from allocator.arguments import checked
from allocator.disk import shorten
from allocator.errors import (
    AllocatorError,
    UnknownNameError,
    UnsupportedModelError,
    a_kind,
    as_given,
    in_words,
    unknown,
)
from allocator.settings import PREFIXES

BUILD_ATTRIBUTE = "_allocator_build"
"""Attribute of a built model: ``{"name": str, "kwargs": dict}``, how to build its like."""

# They say which weights to load, not how the network looks: its like is built without them.
_FETCHING_KWARGS = ("pretrained", "weights", "weights_backbone", "checkpoint_path")
# What rooms above this one build; what has another prefix is built by the adapter of that name.
_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register_builder(prefix: str, builder: Callable[..., nn.Module]) -> None:
    """Let `build` hand on the names with one of its prefixes.

    Args:
        prefix: what comes before the colon.
        builder: takes what comes after it, and the keyword arguments.

    Raises:
        ValueError: the prefix has a builder already, or is none that messages list.
    """
    if prefix in _BUILDERS or prefix not in PREFIXES:
        raise ValueError(f"{prefix}: has a builder already, or is not one of {', '.join(PREFIXES)}")
    _BUILDERS[prefix] = builder


@checked
def build(name: str, **kwargs: Any) -> nn.Module:
    """Build a model from its name.

    Args:
        name: ``torchvision:resnet50``, ``timm:res2net50_26w_4s``, ``recipe:scalenet50``,
            ``hf:ResNetConfig`` or ``hf:./folder``, ``ultralytics:yolo11n``, or ``package.module:factory``. Of a folder
            that transformers wrote the class and the weights are read that lie there, and the widths where the model
            was allocated.
        **kwargs: passed to the library's own constructor. Weights are random, but for those of a folder, unless one
            of these asks for pretrained ones (``weights="DEFAULT"`` for torchvision, ``pretrained=True`` for timm).

    Returns:
        The model, in training mode as its library makes it.

    Raises:
        UnknownNameError: no such prefix, model or factory; near names are given.
        UnsupportedModelError: the library is not installed, or what was built is not an ``nn.Module``.
        FileError: ``hf:`` with a folder that holds no config.
    """
    prefix, colon, what = name.partition(":")
    if not colon or not what or not prefix:
        raise UnknownNameError(_no_prefix(name))
    model: Any
    if prefix == "recipe":  # a file may say such a name before anything has asked for the recipes
        importlib.import_module("allocator.recipes")
    if prefix in _BUILDERS:
        model = _BUILDERS[prefix](what, **kwargs)
    elif prefix in PREFIXES:
        model = importlib.import_module(f"allocator.adapters.{prefix}").build(what, kwargs)
    else:
        model = _build_from_factory(prefix, what, kwargs)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"{name!r} gave {a_kind(model)}, not a torch.nn.Module")
    plain = _plain_kwargs(kwargs)
    if plain is not None:
        setattr(model, BUILD_ATTRIBUTE, {"name": name, "kwargs": plain})
    return model


def build_as_asked(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """`build`, where what the constructor raises is said as an error of what was asked for.

    Raises:
        UnsupportedModelError: also where the constructor takes no such arguments, or fails with them.
    """
    try:
        return build(name, **kwargs)
    except AllocatorError:
        raise
    except Exception as error:  # whatever code of the caller's or of a library raises
        raise UnsupportedModelError(f"building {said_of(name, kwargs)} raised {shorten(in_words(error))}") from error


def said_of(name: str, kwargs: dict[str, Any]) -> str:
    """A name and the arguments it is built with, in words."""
    said = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
    return f"{name} with {said}" if said else name


def _plain_kwargs(kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The kwargs that shape the model, as JSON would give them back; None where one is not plain data."""
    shaping = {key: value for key, value in kwargs.items() if key not in _FETCHING_KWARGS}
    try:
        return json.loads(json.dumps(shaping))
    except (TypeError, ValueError):
        return None


def _build_from_factory(module_name: str, attribute: str, kwargs: dict[str, Any]) -> Any:
    """What a function (or class) of the caller's gives; a module that lies there ready is taken as it is."""
    factory: Any = _imported(module_name)
    for part in attribute.split("."):
        if not hasattr(factory, part):
            public = [name for name in dir(factory) if not name.startswith("_")]
            raise UnknownNameError(unknown(f"factory in {module_name}", attribute, public))
        factory = getattr(factory, part)
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise UnsupportedModelError(f"{module_name}:{attribute} is {a_kind(factory)}, not a factory")
    return factory(**kwargs)


def _imported(module_name: str) -> ModuleType:
    hint = f" ({in_python_file(module_name)})" if module_name.endswith(".py") else ""
    unknown_name = UnknownNameError(unknown("prefix or module", module_name, PREFIXES) + hint)
    if module_name.startswith("."):  # relative to nothing
        raise unknown_name
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        # What is missing may be the module itself or a package around it; anything else is something that it needs.
        if module_name != missing and not module_name.startswith(f"{missing}."):
            raise UnsupportedModelError(f"importing {module_name!r} needs the package {missing!r}") from error
        raise unknown_name from error


def in_python_file(path: str) -> str:
    """What to write for a function in a file of Python."""
    return f"a network of your own is MODULE:FUNCTION, as in {PurePath(path).stem}:FUNCTION"


def _no_prefix(name: str) -> str:
    prefixes = ", ".join(f"{prefix}:" for prefix in PREFIXES)
    return f"{as_given(name)} is not a model name: it needs a prefix ({prefixes} or package.module:factory)"
