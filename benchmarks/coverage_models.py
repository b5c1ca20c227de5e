"""Names of the networks that coverage is measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from .common import read, write


def classifiers() -> list[str]:
    """All of torchvision's classifiers."""
    from torchvision import models

    return [f"torchvision:{name}" for name in models.list_models(module=models)]


def families() -> list[str]:
    """The network with the fewest parameters of each of timm's modules; found once, then read from results/."""
    known = read("coverage_families")
    if not known:
        known = {"families": _smallest_of_each()}
        lines = [f"| {module} | {name} | {size:,} |" for module, (name, size) in known["families"].items()]
        text = [
            "# timm's smallest network of each module",
            "",
            "| module | network | parameters |",
            "| --- | --- | ---: |",
        ]
        write("coverage_families", known, "\n".join(text + lines))
    return [f"timm:{name}" for name, _ in known["families"].values()]


def _smallest_of_each() -> dict[str, tuple[str, int]]:
    import timm

    found: dict[str, tuple[str, int]] = {}
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if names:
            name, size = found[module] = smallest(names, timm.create_model)
            print(module, name, f"{size:,}", flush=True)
    return found


def smallest(names: Iterable[str], build: Callable[[str], nn.Module]) -> tuple[str, int]:
    """Of these networks, the one with the fewest parameters, and how many it has."""
    sizes = []
    for name in names:
        try:
            with torch.device("meta"):
                model = build(name)
        except Exception:  # some read values while they are built; then they are built for real
            model = build(name)
        sizes.append((sum(p.numel() for p in model.parameters()), name))
    size, name = min(sizes)
    return name, size


def dense() -> list[str]:
    """torchvision's networks for segmentation, detection, video and optical flow."""
    from torchvision import models

    kinds = (models.segmentation, models.detection, models.video, models.optical_flow)
    return [f"torchvision:{name}" for kind in kinds for name in models.list_models(module=kind)]


SETS: dict[str, tuple[Callable[[], list[str]], ...]] = {"1": (classifiers, families), "2": (dense,)}


def names_of(which: str) -> list[str]:
    """All names of a set."""
    return [name for part in SETS[which] for name in part()]
