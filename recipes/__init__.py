"""Networks by name: data plus one small function each, imported only when asked for."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from allocator.errors import UnknownNameError, did_you_mean
from allocator.io.models import register_builder

if TYPE_CHECKING:
    from torch import nn

    from allocator.recipes.outcome import RunResult

__all__ = ["build", "call", "names", "train"]

# module of this package, function in it, arguments it is called with
_Recipe = tuple[str, str, dict[str, Any]]


def _family(module: str, function: str, name: str) -> dict[str, _Recipe]:
    """Standard networks and seeds of 50 and 101 layers, and the small ones."""
    recipes: dict[str, _Recipe] = {}
    for depth in (50, 101):
        recipes[f"{name}{depth}"] = (module, function, {"depth": depth})
        recipes[f"{name}{depth}-seed"] = (module, f"{function}_seed", {"depth": depth})
    recipes[f"{name}-small"] = (module, f"{function}_small", {})
    recipes[f"{name}-small-seed"] = (module, f"{function}_small_seed", {})
    return recipes


_RECIPES: dict[str, _Recipe] = {
    "scalenet50-light": ("scalenet", "scalenet50_light", {}),
    "scalenet50": ("scalenet", "scalenet50", {}),
    "scalenet101": ("scalenet", "scalenet101", {}),
    "scalenet152": ("scalenet", "scalenet152", {}),
    "scalenet50-seed": ("scalenet", "scalenet_seed", {"depth": 50}),
    "scalenet101-seed": ("scalenet", "scalenet_seed", {"depth": 101}),
    "scalenet152-seed": ("scalenet", "scalenet_seed", {"depth": 152}),
    "scalenet-small": ("scalenet", "scalenet_small", {}),
    "scalenet-small-seed": ("scalenet", "scalenet_small_seed", {}),
    **_family("resnet", "resnet", "resnet"),
    **_family("resnet", "se_resnet", "se-resnet"),
    **_family("resnext", "resnext", "resnext"),
    "resnext50-width-seed": ("resnext", "resnext_seed", {"depth": 50, "groups": 32, "width": 8}),
    "resnext101-width-seed": ("resnext", "resnext_seed", {"depth": 101, "groups": 32, "width": 8}),
    **_family("res2net", "res2net", "res2net"),
}

# networks on top of others, built by name and not listed
_COMPOSED: dict[str, _Recipe] = {"faster-rcnn": ("detection", "named_faster_rcnn", {})}


def names() -> list[str]:
    """The names `build` knows, in the order of the list."""
    return list(_RECIPES)


def build(name: str, **kwargs: Any) -> nn.Module:
    """Build the network called `name` with fresh weights from torch's random state.

    Args:
        name: one of `names()`, or `faster-rcnn`; case and underscores do not matter.
        kwargs: passed to the recipe, such as `num_classes=10`.

    Raises:
        UnknownNameError: there is no such recipe; the message names the nearest ones.
    """
    module, function, fixed = _find(name)
    factory = getattr(import_module(f"{__name__}.{module}"), function)
    model: nn.Module = partial(factory, **fixed)(**kwargs)
    return model


def call(name: str) -> str:
    """The call that builds a recipe, such as `resnet.resnet_seed(depth=50)`; a module of this package comes first.

    Raises:
        UnknownNameError: as for `build`.
    """
    module, function, fixed = _find(name)
    return f"{module}.{function}({', '.join(f'{key}={value!r}' for key, value in fixed.items())})"


def _find(name: str) -> _Recipe:
    key = name.lower().replace("_", "-")
    if key in _COMPOSED:
        return _COMPOSED[key]
    if key not in _RECIPES:
        hint = did_you_mean(key, _RECIPES, most=3, cutoff=0.4) or f"known: {', '.join(_RECIPES)}"
        raise UnknownNameError(f"no recipe is called {name!r}; {hint}")
    return _RECIPES[key]


def train(config: Any, **options: Any) -> RunResult:
    """Train a seed, allocate, train what is left and evaluate; see `allocator.recipes.run.train`."""
    # Only here: building a network by name is not to wait for what training needs.
    from allocator.recipes.run import train as run

    return run(config, **options)


register_builder("recipe", build)
