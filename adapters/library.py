"""What building a model by name needs for every library."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from allocator.errors import UnsupportedModelError

_INSTALL_HINTS = {
    "lightning": "pip install 'neuron-allocator[lightning]'",
    "transformers": "pip install 'neuron-allocator[language]'",
    "ultralytics": "pip install 'neuron-allocator[ultralytics]'",
}
_ZOO = "pip install 'neuron-allocator[zoo]'"


def library(name: str) -> ModuleType:
    """Import an optional library, or say how to get it.

    Raises:
        UnsupportedModelError: it is not installed.
    """
    top = name.partition(".")[0]
    try:
        # A library is imported once for the whole process, not for the `torch.device` that the caller builds under:
        # importing torchvision 0.21 within that of meta raises, as torch's compiler then adds up tensors.
        with torch.device("cpu"):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A library that is installed but lacks something of its own is not mended by installing it.
        if error.name != top:
            raise
        raise UnsupportedModelError(f"{top} is not installed: {_INSTALL_HINTS.get(top, _ZOO)}") from error
