"""What is particular to Hugging Face transformers."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import torch
from torch import nn

from allocator.adapters import Adapter, register, register_state
from allocator.adapters.library import library
from allocator.errors import FileError, UnknownNameError, UnsupportedModelError, unknown


def build(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """From a config class (``ResNetConfig``) or a folder with a ``config.json``; nothing is downloaded."""
    transformers = library("transformers")
    kwargs = dict(kwargs)
    pretrained = bool(kwargs.pop("pretrained", False))
    if name.endswith("Config"):
        config_class = _config_class(transformers, name)
        return _model_class(transformers, config_class)(config_class(**kwargs))
    # transformers would take any other name for one on its hub, and fetch it.
    if not os.path.isfile(os.path.join(name, "config.json")):
        raise FileError(
            f"hf:{name} is neither a config class such as hf:ResNetConfig nor a folder with a config.json; "
            "nothing is downloaded by this prefix"
        )
    config = transformers.AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False, **kwargs)
    model_class = _model_class(transformers, type(config))
    if pretrained:
        # A pickle would run code as it is read.
        return model_class.from_pretrained(name, config=config, local_files_only=True, use_safetensors=True)
    return model_class(config)


def _config_class(transformers: ModuleType, name: str) -> Any:
    config_class = getattr(transformers, name, None)
    if config_class is None:
        config_names = [other for other in dir(transformers) if other.endswith("Config")]
        raise UnknownNameError(unknown("transformers config", name, config_names))
    return config_class


def _model_class(transformers: ModuleType, config_class: type) -> Any:
    """The image classifier of a config class, or its bare model where it has none."""
    for table in (transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, transformers.MODEL_MAPPING):
        if config_class in table:
            model_class = table[config_class]
            # A config that several models share lists them all, the usual one first.
            if isinstance(model_class, tuple):
                model_class = model_class[0]
            return model_class
    raise UnsupportedModelError(f"transformers has no model for {config_class.__name__}")


def _image(model: nn.Module) -> tuple[tuple[Any, ...], str] | None:
    """One image of the size and channels in the model's configuration."""
    config = getattr(model, "config", None)
    channels = getattr(config, "num_channels", None)
    if not isinstance(channels, int):
        return None
    side = getattr(config, "image_size", None)
    if isinstance(side, int):
        side = (side, side)
    elif not isinstance(side, (tuple, list)):
        side = (224, 224)  # convolutional networks name no size; this is what theirs are trained at
    return (torch.zeros(1, channels, *side),), "the model's config"


register("transformers.*", Adapter(inputs=_image))
# Keys and values of the tokens so far.
register_state(("transformers.cache_utils.Cache", "transformers.cache_utils.EncoderDecoderCache"))
