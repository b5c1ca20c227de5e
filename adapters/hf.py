"""What is particular to Hugging Face transformers."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import torch
from torch import nn

from allocator.errors import FileError, UnknownNameError, UnsupportedModelError, unknown

from . import Adapter, register
from .library import library


def build(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """From a config class (``ResNetConfig``) or a folder with a ``config.json``; nothing is downloaded."""
    transformers = library("transformers")
    kwargs = dict(kwargs)
    pretrained = bool(kwargs.pop("pretrained", False))
    if name.endswith("Config"):
        config_class = getattr(transformers, name, None)
        if config_class is None:
            known = [each for each in dir(transformers) if each.endswith("Config")]
            raise UnknownNameError(unknown("transformers config", name, known))
        return _model_class(transformers, config_class)(config_class(**kwargs))
    if not os.path.isfile(os.path.join(name, "config.json")):
        raise FileError(
            f"hf:{name} is neither a config class such as hf:ResNetConfig nor a folder with a config.json; "
            "nothing is downloaded by this prefix"
        )
    config = transformers.AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False, **kwargs)
    model_class = _model_class(transformers, type(config))
    if pretrained:
        return model_class.from_pretrained(name, config=config, local_files_only=True, use_safetensors=True)
    return model_class(config)


def _model_class(transformers: ModuleType, config_class: type) -> Any:
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


def _image(model: nn.Module) -> tuple[tuple[Any, ...], str] | None:
    """One image of the size and channels in the model's configuration."""
    config = getattr(model, "config", None)
    channels = getattr(config, "num_channels", None)
    if not isinstance(channels, int):
        return None
    side = getattr(config, "image_size", None)
    sides = side if isinstance(side, (tuple, list)) else (side, side) if isinstance(side, int) else (224, 224)
    return (torch.zeros(1, channels, *sides),), "the model's config"


register("transformers.*", Adapter(inputs=_image))
