"""Sums over rows, of which a regression is made: no row is kept."""

from __future__ import annotations

import torch

from allocator.scoring import ranks

STRIP = 1024
"""Columns that are multiplied at a time, so that what is made on the way is small beside the sum."""


class Products:
    """What two kinds of rows have in common: the sum of their outer products about their means, in float64.

    Every part is multiplied about its own means, in the dtype that it comes in: so float32 does, and is summed in
    float64 (Chan et al., "Updating formulae and a pairwise algorithm for computing sample variances", 1979).

    Attributes:
        rows: how many rows were added.
        first, second: (groups, n) and (groups, m) means.
        product: (groups, n, m); of rows with themselves, the lower triangle alone.
    """

    def __init__(self) -> None:
        self.rows = 0.0
        self.first, self.second, self.product = (torch.zeros(()) for _ in range(3))

    def add(self, a: torch.Tensor, b: torch.Tensor | None = None) -> None:
        """Those of (groups, rows, n) and (groups, rows, m), or with themselves."""
        rows = a.shape[1]
        first = a.mean(1, dtype=torch.float64)
        second = first if b is None else b.mean(1, dtype=torch.float64)
        if not self.rows:
            self.product = first.new_zeros(*first.shape, second.shape[1])
            self.first, self.second = torch.zeros_like(first), torch.zeros_like(second)
        self._multiply(_about(a, first), None if b is None else _about(b, second))
        self._shift(first - self.first, second - self.second, self.rows * rows / (self.rows + rows))
        self.rows += rows
        self.first = self.first + (first - self.first) * (rows / self.rows)
        self.second = self.second + (second - self.second) * (rows / self.rows)

    def _multiply(self, a: torch.Tensor, b: torch.Tensor | None) -> None:
        turned = a.transpose(1, 2)
        for start in range(0, turned.shape[1], STRIP):
            strip = slice(start, start + STRIP)
            there = slice(0, min(start + STRIP, turned.shape[1])) if b is None else slice(None)
            self.product[:, strip, there] += turned[:, strip] @ (a if b is None else b)[:, :, there]

    def _shift(self, a: torch.Tensor, b: torch.Tensor, times: float) -> None:
        """Add a multiple of an outer product."""
        self.product.baddbmm_(a[:, :, None], b[:, None, :], alpha=times)

    def reduce(self) -> None:
        """Add those of all ranks, where `torch.distributed` runs."""
        if ranks.count() == 1:
            return
        means = []
        rows = torch.tensor(self.rows, dtype=torch.float64)
        ranks.add_up(rows)
        for own in (self.first, self.second):
            mean = own * (self.rows / float(rows))
            ranks.add_up(mean)
            means.append(mean)
        self._shift(self.first - means[0], self.second - means[1], self.rows)
        ranks.add_up(self.product)
        self.rows, self.first, self.second = float(rows), *means

    def about_zero(self) -> torch.Tensor:
        """(groups, n, m): the sum of the outer products themselves."""
        return torch.baddbmm(self.product, self.first[:, :, None], self.second[:, None, :], alpha=self.rows)


def _about(rows: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return rows - mean[:, None].to(rows.dtype)


def average(tensor: torch.Tensor) -> None:
    """Take the mean, in place, over all ranks where `torch.distributed` runs."""
    ranks.add_up(tensor)
    tensor /= ranks.count()
