"""Learn how many channels each branch of a network should have, under an exact FLOPs budget, and prove it.

>>> result = allocator.allocate(model, flops=4.2e9)  # doctest: +SKIP
>>> result.model, result.allocation, result.certificate  # doctest: +SKIP
"""

import importlib
import random
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allocator.public import *  # noqa: F403
    from allocator.public import __all__ as __all__

__version__ = "0.2.0"

# In a clone adapters/ and recipes/ lie beside this folder, in an installation inside it. Looking there too makes the
# clone's package whole, so that it works whether or not another copy is installed.
if not (Path(__file__).parent / "adapters").is_dir():
    __path__.append(str(Path(__file__).parent.parent))  # noqa: F405 - every package has one


if not TYPE_CHECKING:  # for type checkers only the names of `public` are there

    def __getattr__(name: str) -> Any:
        """Rooms and public names when they are asked for: the command line's help needs neither them nor torch."""
        room = None if name.startswith("_") else find_spec(f"allocator.{name}")
        if room is not None and room.origin is not None:  # a mere folder beside this one, such as build/, is none
            return importlib.import_module(f"allocator.{name}")
        if name == "__all__" or not name.startswith("_"):
            state = random.getstate()  # rich draws from it as it is imported
            public = importlib.import_module("allocator.public")
            random.setstate(state)
            globals().update({each: getattr(public, each) for each in ("__all__", *public.__all__)})
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module 'allocator' has no attribute {name!r}{_near(name)}", name=name)


def _near(name: str) -> str:
    from allocator.errors import did_you_mean

    near = did_you_mean(name, globals().get("__all__", ()))
    return near and f"; {near}"


def __dir__() -> list[str]:
    return sorted(importlib.import_module("allocator.public").__all__)
