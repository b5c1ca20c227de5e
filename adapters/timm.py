"""What is particular to timm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from allocator.errors import UnknownNameError, unknown

from . import Adapter, Kept, register
from .library import library


def build(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """The model of this name, with random weights unless `pretrained` is true."""
    timm = library("timm")
    is_remote = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if not is_remote and not timm.is_model(name.partition(".")[0]):
        raise UnknownNameError(unknown("timm model", name, timm.list_models()))
    model: nn.Module = timm.create_model(name, **kwargs)
    return model


def _image(model: nn.Module) -> tuple[tuple[Any, ...], str] | None:
    """One image of the size in the model's configuration."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else getattr(config, "input_size", None)
    if not isinstance(size, (tuple, list)) or not size or not all(isinstance(n, int) for n in size):
        return None
    return (torch.zeros(1, *size),), "the model's default_cfg"


def _features(model: nn.Module, kept: Kept) -> Mapping[str, Any]:
    """`num_features` and `head_hidden_size` of a whole model follow what its classifier reads, or a layer before it."""
    classifier = getattr(model, "get_classifier", None)
    layers = [classifier() if callable(classifier) else None, getattr(model, "conv_head", None)]
    paths = [path for layer in layers for path, m in model.named_modules() if m is layer and hasattr(m, "weight")]
    read = [kept(f"{path}.weight", 1) for path in paths]
    found = {}
    for name in ("num_features", "head_hidden_size"):
        follows = next((each for each in read if len(each) == getattr(model, name, None)), None)
        if follows is not None:
            found[name] = int(follows.sum())
    return found


def _res2net(block: nn.Module, kept: Kept) -> Mapping[str, Any]:
    """`width` is given to `torch.split`, which takes a list of sizes where the parts differ."""
    width: Any = block.width
    widths = width if isinstance(width, (list, tuple)) else [width] * int(block.scale)  # type: ignore[arg-type]
    parts = [int(part.sum()) for part in np.split(kept("conv1.weight", 0), np.cumsum(widths)[:-1])]
    return {"width": parts[0] if len(set(parts)) == 1 else parts}


def _attention(module: nn.Module, kept: Kept) -> Mapping[str, Any]:
    """Heads go whole, and `head_dim` stays with `scale`."""
    count, width = _whole_heads(int(module.num_heads), kept)  # type: ignore[arg-type]
    return {"num_heads": count, "attn_dim": count * width}


def _mask_unit_attention(module: nn.Module, kept: Kept) -> Mapping[str, Any]:
    """Hiera's heads go whole; `dim_out` is the width of all of them together."""
    count, width = _whole_heads(int(module.heads), kept)  # type: ignore[arg-type]
    return {"heads": count, "dim_out": count * width}


def _whole_heads(heads: int, kept: Kept) -> tuple[int, int]:
    """How many heads the projection after them still reads, and the width of one."""
    columns = kept("proj.weight", 1).reshape(heads, -1)
    return int(columns.all(1).sum()), columns.shape[1]


def _position_bias(module: nn.Module, kept: Kept) -> Mapping[str, Any]:
    """The last of the dims that the table is shaped to counts the heads."""
    *places, _ = module.bias_shape  # type: ignore[misc]
    return {"bias_shape": (*places, int(kept("relative_position_bias_table", 1).sum()))}


def _ghost(module: nn.Module, kept: Kept) -> Mapping[str, Any]:
    """`out_chs` is where the joined halves are cut off: all of what they write, unless a channel is cut off."""
    both = np.append(kept("primary_conv.0.weight", 0), kept("cheap_operation.0.weight", 0))
    return {"out_chs": int(both.sum())} if module.out_chs == len(both) else {}


register("timm.layers.attention.Attention", Adapter(sizes=_attention))
register("timm.models.hiera.MaskUnitAttention", Adapter(sizes=_mask_unit_attention))
register("timm.layers.pos_embed_rel.RelPosBias", Adapter(sizes=_position_bias))
register("timm.models.*", Adapter(sizes=_features, inputs=_image))
register("timm.layers.norm_act.FrozenBatchNormAct2d", Adapter(norm_scale="weight"))
register("timm.models.res2net.Bottle2neck", Adapter(sizes=_res2net))
register(["timm.models.ghostnet.GhostModule", "timm.models.ghostnet.GhostModuleV2"], Adapter(sizes=_ghost))
