"""Handwritten digits at varying size and place: small, real data on which the scale of things matters.

The digits are the 1,797 8x8 images that scikit-learn ships (`load_digits`, from the UCI repository's optical
recognition of handwritten digits, Alpaydin and Kaynak, 1998). Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from allocator.errors import InputError, MissingPackageError


@dataclass(frozen=True)
class Split:
    """Images with their classes.

    Attributes:
        images: (N, 1, S, S) float32; ink is 1 and paper 0 before noise.
        labels: (N,) int64, the digit.
        sources: (N,) int64, which of scikit-learn's images each was drawn from.
    """

    images: Tensor
    labels: Tensor
    sources: Tensor

    def __len__(self) -> int:
        return len(self.images)


def load(
    side: int = 32,
    sizes: tuple[float, float] = (8.0, 28.0),
    copies: tuple[int, int] = (2, 2),
    test_share: float = 0.2,
    noise: float = 0.1,
    seed: int = 0,
) -> tuple[Split, Split]:
    """Draw the digits onto canvases; return the training and the test split.

    No source image is in both splits. The same arguments give the same tensors.

    Args:
        side: side S of the canvas in pixels.
        sizes: smallest and largest side of a digit in pixels, drawn log-uniformly; at most `side`.
        copies: how often every source digit is drawn, in training and in test.
        test_share: share of the source digits held out for the test.
        noise: standard deviation of the Gaussian noise over the canvas.
        seed: decides the split, the sizes, the places and the noise.

    Raises:
        InputError: the sizes do not fit the canvas, or a split would be empty.
        MissingPackageError: scikit-learn is not installed.
    """
    if not 0 < sizes[0] <= sizes[1] <= side:
        raise InputError(f"expected sizes with 0 < smallest <= largest <= {side} pixels, got {sizes}")
    digits, classes = _source_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits), generator=generator)
    held_out = round(test_share * len(digits))
    if not 0 < held_out < len(digits) or min(copies) < 1:
        raise InputError(f"expected both splits to hold images, got test_share={test_share} and copies={copies}")
    splits = []
    for sources, repeats in ((order[held_out:], copies[0]), (order[:held_out], copies[1])):
        chosen = sources.repeat(repeats)
        images = place(digits[chosen], side, sizes, generator)
        images += noise * torch.randn(images.shape, generator=generator)
        splits.append(Split(images, classes[chosen], chosen))
    return splits[0], splits[1]


def place(images: Tensor, side: int, sizes: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Draw every image, (N, C, h, w), at a random size and place on an empty canvas: (N, C, side, side).

    Sizes, in pixels, are log-uniform between the two of `sizes`; places are uniform over those where the
    whole image is on the canvas.
    """
    count = len(images)
    low, high = torch.tensor(sizes, dtype=torch.float32).log()
    size = (low + (high - low) * torch.rand(count, generator=generator)).exp()
    # Normalised coordinates: the canvas is [-1, 1], so an image of `size` pixels spans 2 * size / side.
    room = 1 - size / side
    centre = room[:, None] * (2 * torch.rand(count, 2, generator=generator) - 1)
    zoom = side / size
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = zoom
    matrix[:, :, 2] = -zoom[:, None] * centre
    grid = F.affine_grid(matrix, [count, images.shape[1], side, side], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _source_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits as (1797, 1, 8, 8) in 0..1, and their classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingPackageError("the digits come with scikit-learn: pip install 'neuron-allocator[demo]'") from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    return images, torch.from_numpy(bunch.target).long()
