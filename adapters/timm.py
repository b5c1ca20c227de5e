"""What is particular to timm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from allocator.adapters import Adapter, Kept, register
from allocator.adapters.library import library
from allocator.errors import UnknownNameError, unknown


def build(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """The model of this name, with random weights unless `pretrained` is true."""
    timm = library("timm")
    # Names on a hub and folders are timm's own affair; of its list, a name may have a tag of weights after a dot.
    is_remote = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if not is_remote and not timm.is_model(name.partition(".")[0]):
        raise UnknownNameError(unknown("timm model", name, timm.list_models()))
    model: nn.Module = timm.create_model(name, **kwargs)
    return model


def _image(model: nn.Module) -> tuple[tuple[Any, ...], str] | None:
    """One image of the size in the model's configuration."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    # timm leaves a dict; a caller may have set its PretrainedCfg.
    if isinstance(config, dict):
        size = config.get("input_size")
    else:
        size = getattr(config, "input_size", None)
    if not isinstance(size, (tuple, list)) or not size or not all(isinstance(n, int) for n in size):
        return None
    return (torch.zeros(1, *size),), "the model's default_cfg"


def _features(model: nn.Module, kept: Kept) -> Mapping[str, Any]:
    """`num_features` and `head_hidden_size` of a whole model follow what its classifier reads, or a layer before it."""
    columns = _columns_of_last_layers(model, kept)
    sizes = {}
    for name in ("num_features", "head_hidden_size"):
        width = getattr(model, name, None)
        # The attribute does not say whose width it is; it is the first layer's that reads as many.
        for columns_of_layer in columns:
            if len(columns_of_layer) == width:
                sizes[name] = int(columns_of_layer.sum())
                break
    return sizes


def _widths(model: nn.Module) -> Mapping[str, str]:
    """What `feature_info` says of the channels at every stage."""
    info = getattr(model, "feature_info", None)
    if not isinstance(info, list):
        return {}
    told = {f"feature_info.{i}.num_chs": stage["module"] for i, stage in enumerate(info) if "num_chs" in stage}
    embedded = {"embed_dim": "patch_embed"} if isinstance(getattr(model, "embed_dim", None), int) else {}
    return {**told, **embedded}


def _columns_of_last_layers(model: nn.Module, kept: Kept) -> list[np.ndarray]:
    """Which of their input channels the classifier keeps, then the convolution that some networks have ahead of it."""
    layers = []
    get_classifier = getattr(model, "get_classifier", None)
    if callable(get_classifier):
        layers.append(get_classifier())
    layers.append(getattr(model, "conv_head", None))
    columns = []
    for layer in layers:
        for path, module in model.named_modules():
            # A network without classes has an Identity for its classifier, which reads all and weighs nothing.
            if module is layer and hasattr(module, "weight"):
                columns.append(kept(f"{path}.weight", 1))
    return columns


def _res2net(block: nn.Module, kept: Kept) -> Mapping[str, Any]:
    """`width` is given to `torch.split`, which takes a list of sizes where the parts differ."""
    widths: Any = block.width
    if not isinstance(widths, (list, tuple)):
        widths = [widths] * int(block.scale)  # type: ignore[arg-type]
    parts = [int(part.sum()) for part in np.split(kept("conv1.weight", 0), np.cumsum(widths)[:-1])]
    # Equal parts stay a number, so that with everything kept the block is told what it has.
    if len(set(parts)) == 1:
        return {"width": parts[0]}
    return {"width": parts}


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
    if module.out_chs != len(both):
        return {}
    return {"out_chs": int(both.sum())}


register("timm.layers.attention.Attention", Adapter(sizes=_attention))
register("timm.models.hiera.MaskUnitAttention", Adapter(sizes=_mask_unit_attention))
register("timm.layers.pos_embed_rel.RelPosBias", Adapter(sizes=_position_bias))
register("timm.models.*", Adapter(sizes=_features, inputs=_image, widths=_widths))
register("timm.layers.norm_act.FrozenBatchNormAct2d", Adapter(norm_scale="weight"))
register("timm.models.res2net.Bottle2neck", Adapter(sizes=_res2net))
register(["timm.models.ghostnet.GhostModule", "timm.models.ghostnet.GhostModuleV2"], Adapter(sizes=_ghost))
