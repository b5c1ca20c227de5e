"""What is particular to einops: its layers keep the lengths of axes twice, as they were given and as they are read."""

from __future__ import annotations

from typing import Any

from allocator.adapters import Adapter, register


def _read_anew(layer: Any) -> None:
    layer._axes_lengths = tuple(layer.axes_lengths.items())


_LAYERS = ("einops.layers.torch.Rearrange", "einops.layers.torch.Reduce")
register(_LAYERS, Adapter(rewritten=_read_anew))
