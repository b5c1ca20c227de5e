"""Photographs that packages ship, cut into crops, in two parts that share no picture.

`pip install --no-deps scikit-image foolbox` brings theirs beside scikit-learn's two. Debian's mate-backgrounds and
lomiri-wallpapers-16.04 and -20.04 hold 31 more; where these are installed, `--pictures /usr/share/backgrounds` finds
them. More, for calibration alone, lie in gcompris-qt-data (photographs, once `python -m benchmarks.quality.pictures
FOLDER` has taken them out of their resource files) and in tuxpaint-stamps-default (things and animals, cut out); where
both are unpacked into a folder, `--more FOLDER` finds them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

PACKAGED = {
    "foolbox": ("foolbox/data/imagenet_*.jpg",),
    "scikit-learn": ("sklearn/datasets/images/*.jpg",),
    "scikit-image": tuple(
        f"skimage/data/{name}"
        for name in ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "retina.jpg")
    ),
}
DRAWN = ("abstract", "desktop")
"""Folders of pictures that are no photographs."""
RESOURCES = (
    "categorization",
    "erase",
    "explore_farm_animals",
    "explore_monuments",
    "explore_world_animals",
    "explore_world_music",
)
"""Resource files of gcompris-qt-data that hold photographs."""
STAMPS = ("animals", "food", "plants", "vehicles", "household", "hobbies", "sports", "town")
NO_PHOTOGRAPHS = {"cartoon", "toys", "flags", "roadsigns", "plastic"}
VALIDATION = 80
"""Photographs that choices between ideas were made on: neither for calibration nor for the test."""
NEAR, SAME = 0.9, 0.95
"""Correlations of two pictures in 16 by 16 grey pixels: from the first on they may be of one thing, from the second on
they are one picture."""
SCALE = (0.15, 1.0)
"""Share of the picture that a crop shows."""


def find(folder: Path | None) -> list[Path]:
    """The photographs of the packages that are installed, and of a folder, each once, by name."""
    found = {path.name: path for path in _packaged()}
    if folder is not None:
        for path in folder.rglob("*"):
            if path.suffix.lower() in (".jpg", ".jpeg", ".png") and path.parent.name not in DRAWN:
                found[path.name] = path
    return [found[name] for name in sorted(found)]


def _packaged() -> Iterator[Path]:
    for package, patterns in PACKAGED.items():
        try:
            root = Path(str(importlib.metadata.distribution(package).locate_file("")))
        except importlib.metadata.PackageNotFoundError:
            continue
        for pattern in patterns:
            yield from root.glob(pattern)


def split(pictures: list[Path]) -> dict[str, list[Path]]:
    """Half of the pictures for calibration, half for the test, shuffled once and for all."""
    order = list(pictures)
    random.Random(2019).shuffle(order)
    return {"calibration": order[::2], "test": order[1::2]}


def more(folder: Path, parts: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """Photographs of two packages, for calibration and for validation; none that is near to one of the test.

    Args:
        folder: what the packages were unpacked to.
        parts: as `split` gives them.
    """
    test = np.stack([_grey(path) for path in parts["test"]])
    seen = [_grey(path) for path in parts["calibration"]]
    photographs = []
    for path in _in_resources(folder):
        grey = _grey(path)
        if float(np.abs(test @ grey).max()) <= NEAR and max(float(other @ grey) for other in seen) <= SAME:
            seen.append(grey)
            photographs.append(path)
    stamps = [path for path in _stamps(folder) if float(np.abs(test @ _grey(path)).max()) <= NEAR]
    random.Random(1).shuffle(photographs)
    pool = [*photographs[VALIDATION:], *stamps]
    random.Random(2).shuffle(pool)
    return {"calibration": [*parts["calibration"], *pool], "validation": photographs[:VALIDATION]}


def _in_resources(folder: Path) -> list[Path]:
    """What `unpack` wrote."""
    found = {path.name: path for path in folder.rglob("*") if path.stem.rsplit("_", 1)[0] in RESOURCES}
    return [found[name] for name in sorted(found) if name.endswith((".webp", ".jpg"))]


def _stamps(folder: Path) -> list[Path]:
    (root,) = folder.rglob("tuxpaint/stamps")
    return [
        path
        for kind in STAMPS
        for path in sorted((root / kind).rglob("*.png"))
        if not NO_PHOTOGRAPHS & set(path.parts) and "mirror" not in path.stem
    ]


def unpack(folder: Path, least: int = 180) -> None:
    """Write the pictures of Qt resource files beside them, those of at least so many pixels in either direction."""
    for resource in sorted(path for name in RESOURCES for path in folder.rglob(f"{name}.rcc")):
        held, number = resource.read_bytes(), 0
        for mark in re.finditer(rb"RIFF....WEBP|\xff\xd8\xff[\xe0\xe1\xdb]", held, re.DOTALL):
            try:
                image = Image.open(io.BytesIO(held[mark.start() :]))
                if min(image.size) < least:
                    continue
                image.load()
            except OSError:  # bytes that only look like the beginning of one
                continue
            number += 1
            image.convert("RGBA").save(resource.with_name(f"{resource.stem}_{number:03}.webp"), lossless=True)


def _grey(path: Path) -> np.ndarray:
    """(256,) 16 by 16 pixels about their mean, of unit length."""
    found = np.asarray(_on_white(path).convert("L").resize((16, 16), Image.Resampling.BOX), float).ravel()
    found -= found.mean()
    return found / max(float(np.linalg.norm(found)), 1e-9)


def crops(pictures: list[Path], side: int, count: int, seed: int) -> Tensor:
    """(count, 3, side, side) between 0 and 1, as many of each picture, mirrored half of the time."""
    cut = v2.Compose([v2.RandomResizedCrop(side, SCALE, antialias=True), v2.RandomHorizontalFlip()])
    opened = [_opened(path, side) for path in pictures]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.stack([cut(opened[i % len(opened)]) for i in range(count)])


def by_picture(images: Tensor, pictures: int) -> Tensor:
    """The same crops, those of one picture side by side: then what recovery holds back shows pictures of its own."""
    return images[torch.argsort(torch.arange(len(images)) % pictures, stable=True)]


def _opened(path: Path, side: int) -> Tensor:
    image = _on_white(path)
    image.thumbnail((6 * side, 6 * side))
    return v2.functional.to_dtype(v2.functional.pil_to_tensor(image), torch.float32, scale=True)


def _on_white(path: Path) -> Image.Image:
    image = Image.open(path)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=unpack.__doc__)
    parser.add_argument("folder", type=Path)
    unpack(parser.parse_args().folder)
