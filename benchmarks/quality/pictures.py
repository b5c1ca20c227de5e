"""Photographs that packages ship, cut into crops, in two parts that share no picture.

`pip install --no-deps scikit-image foolbox` brings theirs beside scikit-learn's two. Debian's mate-backgrounds and
lomiri-wallpapers-16.04 and -20.04 hold 31 more; where these are installed, `--pictures /usr/share/backgrounds` finds
them.
"""

from __future__ import annotations

import importlib.metadata
import random
from collections.abc import Iterator
from pathlib import Path

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
    image = Image.open(path).convert("RGB")
    image.thumbnail((6 * side, 6 * side))
    return v2.functional.to_dtype(v2.functional.pil_to_tensor(image), torch.float32, scale=True)
