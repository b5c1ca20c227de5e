"""The task that the small networks are trained on: digits of many sizes among pieces of others.

It is hard enough that the full networks err between a tenth and a quarter of the time, so that there is something to
lose. Training, calibration and test draw from digits of their own, in a split that is fixed: random seeds change the
networks, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from allocator.recipes.digits import place
from benchmarks.clutter import pieces, source_digits

from .networks import SIDE

SIZES = (14.0, 30.0)
PIECES = 2
NOISE = 0.1
COPIES = {"train": 3, "calibration": 2, "test": 3}
SPLIT_SEED = 2019
SHARES = {"train": 3200, "calibration": 500, "test": 1300}


@dataclass(frozen=True)
class Part:
    """Images (N, 1, 32, 32) and their classes (N)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load() -> dict[str, Part]:
    """The three parts, always the same."""
    digits, classes = source_digits()
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    parts = {}
    for name, pool in pools(len(digits), generator).items():
        chosen = pool.repeat(COPIES[name])
        images = place(digits[chosen], SIDE, SIZES, generator)
        for _ in range(PIECES):
            images = torch.maximum(images, pieces(digits[pool], len(chosen), SIDE, generator))
        images += NOISE * torch.randn(images.shape, generator=generator)
        parts[name] = Part(images, classes[chosen])
    return parts


def pools(digits: int, generator: torch.Generator) -> dict[str, Tensor]:
    """By part, which of the digits it draws from."""
    order = torch.randperm(digits, generator=generator)
    return dict(zip(SHARES, order[: sum(SHARES.values())].split(list(SHARES.values())), strict=True))


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image moved by up to three pixels."""
    padded = F.pad(images, (3, 3, 3, 3))
    moved = torch.empty_like(images)
    offsets = torch.randint(7, (len(images), 2), generator=generator).tolist()
    for i, (row, column) in enumerate(offsets):
        moved[i] = padded[i, :, row : row + SIDE, column : column + SIDE]
    return moved
