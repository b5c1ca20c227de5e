"""Build any model by name: ``torchvision:``, ``timm:``, ``recipe:``, ``hf:``, ``package.module:factory``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from torch import nn

from .errors import FileError, UnknownNameError, UnsupportedModelError

BUILD_ATTRIBUTE = "_allocator_build"
"""Attribute of a built model: ``{"name": str, "kwargs": dict}``, how to build its like."""

_INSTALL_HINTS = {
    "torchvision": "pip install 'neuron-allocator[zoo]'",
    "timm": "pip install 'neuron-allocator[zoo]'",
    "transformers": "pip install transformers",
}
_FETCHING_KWARGS = ("pretrained", "weights", "weights_backbone", "checkpoint_path")


def build(name: str, **kwargs: Any) -> nn.Module:
    """Build a model from its name.

    Args:
        name: ``torchvision:resnet50``, ``timm:res2net50_26w_4s``, ``recipe:scalenet50``,
            ``hf:ResNetConfig`` or ``hf:./folder-with-a-config``, or ``package.module:factory``.
        **kwargs: passed to the library's own constructor. Weights are random unless one of these asks for
            pretrained ones (``weights="DEFAULT"`` for torchvision, ``pretrained=True`` for timm and hf).

    Returns:
        The model, in training mode as its library makes it.

    Raises:
        UnknownNameError: no such prefix, model or factory; near names are given.
        UnsupportedModelError: the library is not installed, or what was built is not an ``nn.Module``.
        FileError: ``hf:`` with a folder that holds no config.
    """
    prefix, colon, rest = name.partition(":")
    if not colon or not rest or not prefix:
        raise UnknownNameError(_no_prefix(name))
    builder = _BUILDERS.get(prefix)
    model = builder(rest, kwargs) if builder else _build_from_factory(prefix, rest, kwargs)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"{name!r} gave a {type(model).__name__}, not a torch.nn.Module")
    plain = _plain_kwargs(kwargs)
    if plain is not None:
        setattr(model, BUILD_ATTRIBUTE, {"name": name, "kwargs": plain})
    return model


def _plain_kwargs(kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The kwargs that shape the model, as JSON would give them back; None where one is not plain data."""
    shaping = {key: value for key, value in kwargs.items() if key not in _FETCHING_KWARGS}
    try:
        return json.loads(json.dumps(shaping))
    except (TypeError, ValueError):
        return None


def _build_torchvision(name: str, kwargs: dict[str, Any]) -> nn.Module:
    models = _library("torchvision.models")
    if name not in models.list_models():
        raise UnknownNameError(_unknown("torchvision model", name, models.list_models()))
    kwargs = {"weights": None, **kwargs}
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    if "weights_backbone" in parameters:
        kwargs.setdefault("weights_backbone", None)
    if name.endswith(("googlenet", "inception_v3")) and kwargs["weights"] is None:
        kwargs.setdefault("init_weights", True)  # says what is done anyway; left out, it warns
    return models.get_model(name, **kwargs)


def _build_timm(name: str, kwargs: dict[str, Any]) -> nn.Module:
    timm = _library("timm")
    is_remote = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if not is_remote and not timm.is_model(name.partition(".")[0]):
        raise UnknownNameError(_unknown("timm model", name, timm.list_models()))
    return timm.create_model(name, **kwargs)


def _build_recipe(name: str, kwargs: dict[str, Any]) -> nn.Module:
    recipes = importlib.import_module("allocator.recipes")
    return recipes.build(name, **kwargs)


def _build_transformers(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """From a config class (``ResNetConfig``) or a folder with a ``config.json``; nothing is downloaded."""
    transformers = _library("transformers")
    kwargs = dict(kwargs)
    pretrained = bool(kwargs.pop("pretrained", False))
    if name.endswith("Config"):
        config_class = getattr(transformers, name, None)
        if config_class is None:
            known = [each for each in dir(transformers) if each.endswith("Config")]
            raise UnknownNameError(_unknown("transformers config", name, known))
        return _transformers_class(transformers, config_class)(config_class(**kwargs))
    if not os.path.isfile(os.path.join(name, "config.json")):
        raise FileError(
            f"hf:{name} is neither a config class such as hf:ResNetConfig nor a folder with a config.json; "
            "nothing is downloaded by this prefix"
        )
    config = transformers.AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False, **kwargs)
    model_class = _transformers_class(transformers, type(config))
    if pretrained:
        return model_class.from_pretrained(name, config=config, local_files_only=True, use_safetensors=True)
    return model_class(config)


def _transformers_class(transformers: ModuleType, config_class: type) -> Any:
    """The image classifier of a config class, or its bare model where it has none."""
    tables = (
        transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        transformers.MODEL_MAPPING,
    )
    for table in tables:
        if config_class in table:
            found = table[config_class]
            return found[0] if isinstance(found, tuple) else found
    raise UnsupportedModelError(f"transformers has no model for {config_class.__name__}")


def _build_from_factory(module_name: str, attribute: str, kwargs: dict[str, Any]) -> nn.Module:
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name != missing and not module_name.startswith(missing + "."):
            raise UnsupportedModelError(f"importing {module_name!r} needs the package {missing!r}") from error
        raise UnknownNameError(_unknown("prefix or module", module_name, _BUILDERS)) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [each for each in dir(found) if not each.startswith("_")]
            raise UnknownNameError(_unknown(f"factory in {module_name}", attribute, public))
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise UnsupportedModelError(f"{module_name}:{attribute} is a {type(found).__name__}, not a factory")
    return found(**kwargs)


def _library(name: str) -> ModuleType:
    """Import an optional library, or say how to get it."""
    top = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != top:
            raise
        raise UnsupportedModelError(f"{top} is not installed: {_INSTALL_HINTS[top]}") from error


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}?" if near else f"{len(known)} are known"
    if not near and len(known) <= 12:
        hint = f"known: {', '.join(sorted(known))}"
    return f"unknown {kind} {name!r}: {hint}"


def _no_prefix(name: str) -> str:
    prefixes = ", ".join(f"{prefix}:" for prefix in _BUILDERS)
    return f"{name!r} is not a model name: it needs a prefix ({prefixes} or package.module:factory)"


_BUILDERS: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "torchvision": _build_torchvision,
    "timm": _build_timm,
    "recipe": _build_recipe,
    "hf": _build_transformers,
}
