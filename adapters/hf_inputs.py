"""What a model of transformers takes, by its configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from allocator.adapters import Arguments

_TOKENS = 128
"""As many as a short text has; FLOPs of attention grow with the square of it."""
_SAMPLES = 16_000
"""One second of speech."""


def inputs(model: nn.Module) -> tuple[Arguments, str] | None:
    """Arguments for one forward of a whole model; None where its configuration does not tell.

    The first is the one that the model's class calls its main input: token ids, an image, a spectrogram or a waveform.
    """
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if main in (None, "pixel_values"):
        image = _image(config)
        return None if image is None else ((image,), "the model's config")
    arguments: dict[str, torch.Tensor] = {}
    if main == "input_ids":
        arguments["input_ids"] = _tokens(_text_part(config))
        image = _image(getattr(config, "vision_config", None))
        if image is not None and hasattr(config, "projection_dim"):  # a pair of encoders (CLIP) reads both
            arguments["pixel_values"] = image
    elif main == "input_features" and hasattr(config, "num_mel_bins"):
        # A convolution of stride 2 comes before the positions.
        arguments["input_features"] = torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions)
    elif main == "input_values":
        arguments["input_values"] = torch.zeros(1, _SAMPLES)
    else:
        return None
    if getattr(config, "is_encoder_decoder", False):
        arguments["decoder_input_ids"] = _tokens(config)
    return arguments, "the model's config"


def _text_part(config: Any) -> Any:
    return getattr(config, "text_config", None) or config


def _tokens(config: Any) -> torch.Tensor:
    """(1, tokens) ids that all differ, as far as there are so many."""
    longest = _TOKENS
    for name in ("max_position_embeddings", "n_positions", "max_target_positions"):
        positions = getattr(config, name, None)
        if isinstance(positions, int) and positions > 2:
            longest = min(longest, positions - 2)  # some count from the one after the padding's
    return (torch.arange(longest) % config.vocab_size)[None]


def _image(config: Any) -> torch.Tensor | None:
    """One image of the size and channels in a configuration."""
    channels = getattr(config, "num_channels", None)
    if not isinstance(channels, int):
        return None
    side = getattr(config, "image_size", None)
    if isinstance(side, int):
        side = (side, side)
    elif not isinstance(side, (tuple, list)):
        side = (224, 224)  # convolutional networks name no size; this is what theirs are trained at
    return torch.zeros(1, channels, *side)
