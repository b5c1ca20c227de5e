"""What is particular to Hugging Face diffusers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from allocator.adapters import Adapter, Arguments, register

_WORDS = 77
"""As many as the text encoders of latent diffusion give."""


def _inputs(model: nn.Module) -> tuple[Arguments, str] | None:
    """A noisy image, a time step and what the image is to show, as far as a model's forward takes them."""
    config: Any = getattr(model, "config", None)
    channels, side = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if not isinstance(channels, int) or side is None:
        return None
    sides = (side, side) if isinstance(side, int) else tuple(side)
    noisy = torch.zeros(1, channels, *sides)
    said = {"sample": noisy, "hidden_states": noisy, "timestep": torch.tensor([1]), "class_labels": torch.tensor([0])}
    width = getattr(config, "caption_channels", None) or getattr(config, "cross_attention_dim", None)
    if isinstance(width, int):
        said["encoder_hidden_states"] = torch.zeros(1, _WORDS, width)
    taken = inspect.signature(model.forward).parameters
    if _reads_no_classes(config):
        del said["class_labels"]
    return {name: tensor for name, tensor in said.items() if name in taken}, "the model's config"


def _reads_no_classes(config: Any) -> bool:
    kinds = (getattr(config, "num_class_embeds", None), getattr(config, "class_embed_type", None))
    return kinds == (None, None) and getattr(config, "norm_type", "") not in ("ada_norm_zero", "ada_norm")


register("diffusers.models.*", Adapter(inputs=_inputs))
