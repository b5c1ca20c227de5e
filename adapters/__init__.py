"""What is particular to a library's blocks, by class name, so that no library is imported until it is used.

An adapter is looked up by the qualified name of a module's class or of one of its bases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

OptionalBranches = Callable[[nn.Module], dict[str, tuple[str, ...]]]


@dataclass(frozen=True)
class Adapter:
    """Knowledge about one class of modules.

    Attributes:
        optional_branches: gives, for a module, the paths (relative to it) of layers that the forward can
            do without, each with all the paths that must be set to None together with it.
        norm_scale: for a norm that torch does not know as one, the name of the vector that scales its channels.
    """

    optional_branches: OptionalBranches | None = None
    norm_scale: str | None = None


_ADAPTERS: dict[str, Adapter] = {}


def register(class_name: str, adapter: Adapter) -> None:
    """Register an adapter for a class such as `allocator.recipes.scalenet.ScaleBlock`.

    Raises:
        ValueError: the class has an adapter already.
    """
    if class_name in _ADAPTERS:
        raise ValueError(f"{class_name} has an adapter already")
    _ADAPTERS[class_name] = adapter


def find(module: nn.Module) -> Adapter | None:
    """The adapter of a module's class or of its nearest base that has one."""
    for cls in type(module).__mro__:
        known = _ADAPTERS.get(f"{cls.__module__}.{cls.__qualname__}")
        if known is not None:
            return known
    return None


def optional_branches(modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """Full paths of all layers of a model that may be absent, each with what goes with it."""
    return dict(_optional_branches(modules))


def _optional_branches(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for path, module, adapter in _adapted(modules):
        if adapter.optional_branches is None:
            continue
        prefix = f"{path}." if path else ""
        for layer, together in adapter.optional_branches(module).items():
            yield prefix + layer, tuple(prefix + name for name in together)


def norm_scales(modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of the vectors by which norms that torch does not know as such scale their channels."""
    return [f"{path}.{a.norm_scale}".lstrip(".") for path, _, a in _adapted(modules) if a.norm_scale]


def _adapted(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module, Adapter]]:
    """(path, module, adapter) of the modules that have one; each class is looked up once."""
    known = {cls: find(module) for cls, module in {type(m): m for m in modules.values()}.items()}
    for path, module in modules.items():
        adapter = known[type(module)]
        if adapter is not None:
            yield path, module, adapter


def _present_scales(module: nn.Module) -> dict[str, tuple[str, ...]]:
    names = [name for name, conv in module.get_submodule("conv2")._modules.items() if conv is not None]
    return {f"conv2.{i}": (f"conv2.{i}", f"bn2.{i}") for i in names}


register("allocator.recipes.scalenet.ScaleBlock", Adapter(optional_branches=_present_scales))
for _frozen in ("torchvision.ops.misc.FrozenBatchNorm2d", "timm.layers.norm_act.FrozenBatchNormAct2d"):
    register(_frozen, Adapter(norm_scale="weight"))
