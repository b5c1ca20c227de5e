"""What is particular to Ultralytics: a wrapper that trains where a module would change its mode, and its blocks."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from allocator.adapters import Adapter, Kept, Places, explain_pickles, register
from allocator.adapters.library import library
from allocator.adapters.stand_ins import stand_ins
from allocator.adapters.yolo import note_allocated, wrap
from allocator.errors import UnknownNameError, unknown


def build(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """The network of one of the library's YAML files, such as ``yolo11n-seg``, or of a file of one's own."""
    models = library("ultralytics")
    own = os.path.isfile(name)
    name = name if own else name.removesuffix(".yaml")
    # One file stands for all sizes; the letter of the size is in the name alone.
    known = {path.stem for path in Path(str(models.__file__)).parent.rglob("cfg/models/*/*.yaml")}
    without_size = re.sub(r"^(yolo(?:e-)?v?\d+)[nslmx]", r"\1", name)
    if not own and name not in known and without_size not in known:
        raise UnknownNameError(unknown("Ultralytics model", name, known))
    network: nn.Module = models.YOLO(name if own else f"{name}.yaml", **kwargs).model
    return network


# Wrapper and files ------------------------------------------------------------------------------------


def _network(wrapper: nn.Module) -> Any:
    return wrapper.model


def _opened(network: nn.Module) -> nn.Module:
    """A checkpoint holds half precision to be small; the library's own reader makes it single too."""
    return network.float()


def _checkpoint(network: nn.Module) -> dict[str, Any]:
    """What ``YOLO(path)`` reads."""
    return {"model": network, "train_args": _arguments(network)}


def _arguments(network: nn.Module) -> dict[str, Any]:
    """What the network was trained or built with: a dict, or after training a namespace."""
    arguments: Any = getattr(network, "args", {})
    return dict(arguments if isinstance(arguments, dict) else vars(arguments))


def _image(network: nn.Module) -> tuple[tuple[Any, ...], str] | None:
    """One image of the size that the network was trained at, which is 640 unless it was said."""
    size = _arguments(network).get("imgsz")
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, (list, tuple)) or len(sides) != 2:
        return None
    yaml: Any = getattr(network, "yaml", {})
    return (torch.zeros(1, int(yaml.get("channels", 3)), *sides),), "the model's imgsz"


# Blocks -----------------------------------------------------------------------------------------------


def _halves(_: nn.Module, kept: Kept) -> Mapping[str, Any]:
    """`c` is what each of the two halves of the first convolution's output has; what is exported splits by it."""
    return {"c": int(kept("cv1.conv.weight", 0).sum()) // 2}


def _first(_: nn.Module, kept: Kept) -> Mapping[str, Any]:
    return {"c": int(kept("cv1.conv.weight", 0).sum())}


def _attention(module: Any, kept: Kept) -> Mapping[str, Any]:
    """All heads alike have as many values as the projection reads of each; their scale is a number of its own."""
    return {"head_dim": int(kept("proj.conv.weight", 1).sum()) // module.num_heads, "key_dim": module.key_dim}


def _of_one_width(module: Any) -> list[tuple[Places, Places | None]]:
    """What the heads gave is viewed as if it had the channels of the input. Queries and keys stay: of the formats that
    are exported to, one scales by their number.
    """
    width = 2 * module.key_dim + module.head_dim
    rows = np.arange(module.num_heads * width).reshape(module.num_heads, width)[:, : 2 * module.key_dim]
    everything = slice(None)
    return [
        (("qkv.conv.weight", 1, everything), ("proj.conv.weight", 1, everything)),
        (("qkv.conv.weight", 0, rows.reshape(-1)), None),
    ]


def _repeated(module: nn.Module, kept: Kept) -> Mapping[str, Any]:
    """Read where three branches are fused into one convolution."""
    if module.g != 1:
        return {}
    return {"c1": int(kept("conv1.conv.weight", 1).sum()), "c2": int(kept("conv1.conv.weight", 0).sum())}


def _anchors(feats: Any, strides: torch.Tensor, grid_cell_offset: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Middles of the cells of all levels (n, 2), and their strides (n, 1); the library's own reads the strides."""
    places, all_strides = [], []
    for level, feat in enumerate(feats):
        height, width = feat.shape[2:]
        y = torch.arange(height, device=feat.device, dtype=feat.dtype) + grid_cell_offset
        x = torch.arange(width, device=feat.device, dtype=feat.dtype) + grid_cell_offset
        grid = torch.meshgrid(y, x, indexing="ij")
        places.append(torch.stack(grid[::-1], -1).view(-1, 2))
        all_strides.append(strides[level].to(feat).expand(height * width, 1))
    return torch.cat(places), torch.cat(all_strides)


_BLOCKS = "ultralytics.nn.modules.block"
explain_pickles("ultralytics.", "checkpoints of Ultralytics hold the whole model as a pickle, and need --trust")
stand_ins.add("ultralytics.nn.modules.head", "make_anchors", _anchors)
register("ultralytics.engine.model.Model", Adapter(network=_network, wrap=wrap))
register(
    "ultralytics.nn.tasks.BaseModel",
    Adapter(inputs=_image, opened=_opened, checkpoint=_checkpoint, rewritten=note_allocated),
)
register(
    [f"{_BLOCKS}.{name}" for name in ("C2", "C2f", "C2fAttn", "PSA", "C2PSA", "RepNCSPELAN4")], Adapter(sizes=_halves)
)
register([f"{_BLOCKS}.{name}" for name in ("ADown", "SPPELAN")], Adapter(sizes=_first))
register(f"{_BLOCKS}.Attention", Adapter(sizes=_attention, together=_of_one_width, narrow_heads=True))
register("ultralytics.nn.modules.conv.RepConv", Adapter(sizes=_repeated))
