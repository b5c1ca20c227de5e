"""What is particular to PEFT: low-rank adapters stay as they are while the model around them gets narrower."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from allocator.adapters import Adapter, Arguments, Kept, example_inputs, register


def _inputs(model: nn.Module) -> tuple[Arguments, str] | None:
    """Those of the model inside."""
    base = getattr(model, "get_base_model", None)
    return example_inputs(base()) if callable(base) else None


def _down(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(adapter's name, path) of the layers whose width is a rank."""
    layers: Any = getattr(module, "lora_A", {})
    for name in layers:
        yield name, f"lora_A.{name}"


def _ranks(module: nn.Module) -> list[str]:
    return [path for _, path in _down(module)]


def _sizes(module: Any, kept: Kept) -> Mapping[str, Any]:
    """Ranks, where the caller asked for them to go, and the sizes that the layer says of the one inside it."""
    sizes: dict[str, Any] = {}
    if isinstance(getattr(module, "base_layer", None), nn.Linear):
        sizes["out_features"] = int(kept("base_layer.weight", 0).sum())
        sizes["in_features"] = int(kept("base_layer.weight", 1).sum())
    ranks = {name: int(kept(f"{path}.weight", 0).sum()) for name, path in _down(module)}
    if ranks:
        sizes["r"] = {**module.r, **ranks}
    return sizes


register("peft.peft_model.*", Adapter(inputs=_inputs))
register("peft.tuners.lora.layer.*", Adapter(sizes=_sizes, spared=_ranks))
