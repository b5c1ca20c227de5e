"""What is particular to this project's own recipes."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from . import Adapter, register


def build(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """The recipe of this name."""
    return importlib.import_module("allocator.recipes").build(name, **kwargs)


def _present_scales(module: nn.Module) -> dict[str, tuple[str, ...]]:
    names = [name for name, conv in module.get_submodule("conv2")._modules.items() if conv is not None]
    return {f"conv2.{i}": (f"conv2.{i}", f"bn2.{i}") for i in names}


register("allocator.recipes.scalenet.ScaleBlock", Adapter(optional_branches=_present_scales))
