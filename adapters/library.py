"""What building a model by name needs for every library."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

from allocator.errors import UnsupportedModelError

_INSTALL_HINTS = {"transformers": "pip install transformers"}
_ZOO = "pip install 'neuron-allocator[zoo]'"


def library(name: str) -> ModuleType:
    """Import an optional library, or say how to get it.

    Raises:
        UnsupportedModelError: it is not installed.
    """
    top = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != top:
            raise
        raise UnsupportedModelError(f"{top} is not installed: {_INSTALL_HINTS.get(top, _ZOO)}") from error


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not there, with near ones."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}?" if near else f"{len(known)} are known"
    if not near and len(known) <= 12:
        hint = f"known: {', '.join(sorted(known))}"
    return f"unknown {kind} {name!r}: {hint}"
