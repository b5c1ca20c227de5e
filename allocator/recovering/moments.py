"""Sums over rows, of which a regression and its error are made: no row is kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Moments:
    """Second moments of what a layer reads, with a one as last entry, and of what it should give; float64.

    Attributes:
        rows: how many rows were added.
        reads: (groups, n + 1, n + 1) the sum of the outer products of what is read.
        both: (groups, n + 1, outputs) of what is read with what should come out.
        gives: (groups, outputs) the sum of squares of what should come out.
    """

    rows: torch.Tensor
    reads: torch.Tensor
    both: torch.Tensor
    gives: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor) -> Moments:
        """Of (groups, rows, n) inputs and (groups, rows, outputs)."""
        x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2)
        turned = x.transpose(1, 2)
        rows = torch.tensor(float(x.shape[1]), dtype=x.dtype, device=x.device)
        return cls(rows, turned @ x, turned @ y, y.square().sum(1))

    def add(self, other: Moments) -> None:
        """Those of more rows."""
        for name in ("rows", "reads", "both", "gives"):
            getattr(self, name).add_(getattr(other, name))

    def towards(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add (groups, rows, outputs) of what should come out for rows whose reading is in already."""
        self.both[:, :-1] += x.transpose(1, 2) @ y
        self.both[:, -1] += y.sum(1)
        self.gives += y.square().sum(1)

    def forget(self) -> Moments:
        """The same reading, with nothing yet that should come out."""
        return Moments(self.rows, self.reads, torch.zeros_like(self.both), torch.zeros_like(self.gives))

    def reduce(self, *, reading: bool = True) -> None:
        """Add those of all ranks, where `torch.distributed` runs; of what is read only where that is not done yet."""
        for tensor in ((self.rows, self.reads) if reading else ()) + (self.both, self.gives):
            all_reduce(tensor)

    def error(self, solution: torch.Tensor) -> float:
        """Sum of squared differences that (groups, outputs, n + 1) weights with the offset last leave."""
        turned = solution.transpose(1, 2)
        left = self.gives.sum() - 2 * (turned * self.both).sum() + (turned * (self.reads @ turned)).sum()
        return max(float(left), 0.0)

    def step(self, start: torch.Tensor, end: torch.Tensor) -> tuple[float, float]:
        """What the error loses, and how far to go from one solution to another for it, from 0 to 1."""
        way = (end - start).transpose(1, 2)
        pushed = self.reads @ way
        bends = float((way * pushed).sum())
        falls = float((way * self.both).sum() - (start.transpose(1, 2) * pushed).sum())
        step = min(max(falls / bends, 0.0), 1.0) if bends > 0 else 0.0
        return 2 * step * falls - step**2 * bends, step


def all_reduce(tensor: torch.Tensor) -> None:
    """Add up, in place, over all ranks where `torch.distributed` runs."""
    if ranks() > 1:
        torch.distributed.all_reduce(tensor)


def average(tensor: torch.Tensor) -> None:
    """Take the mean, in place, over all ranks where `torch.distributed` runs."""
    all_reduce(tensor)
    tensor /= ranks()


def ranks() -> int:
    """How many there are."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
