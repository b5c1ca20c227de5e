"""Rows of a regression, and what is asked of them where an activation cuts off what a layer gives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from allocator.recovering.moments import Moments, all_reduce

Ends = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """Rows of a regression.

    Attributes:
        held: back, to judge by.
        x: (groups, rows, n) what is read.
        y: (groups, rows, outputs) what should come out.
        ends: two like `y`, or of a single row: where y lies beyond one of them, all that lies there is as good; None
            where every number counts.
    """

    held: bool
    x: torch.Tensor
    y: torch.Tensor
    ends: Ends | None = None


@dataclass(frozen=True)
class Found:
    """What one look at the rows found, over all ranks.

    Attributes:
        sums: moments of the rows to fit (False), and of those held back (True).
        error: sum of squares by which what comes out of those held back is off, after the activation.
        spread: sum of squares of what should, about its mean.
        cuts_off: whether there is such an activation.
    """

    sums: dict[bool, Moments]
    error: float
    spread: float
    cuts_off: bool


def look(parts: Iterable[Part], solution: torch.Tensor, like: dict[bool, Moments] | None = None) -> Found:
    """Go through the rows once.

    Args:
        parts: the rows.
        solution: (groups, outputs, n + 1) weights that are judged.
        like: moments of the same rows. With these, what `solution` gives stands in for what should come out wherever
            both are cut off alike, and what is read is not multiplied again. Without them, the targets are as given.
    """
    sums = {} if like is None else {held: each.forget() for held, each in like.items()}
    error, squares, rows = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    total = torch.zeros(solution.shape[:2], dtype=torch.float64)
    cuts_off = False
    for part in parts:
        given = predicted(part.x, solution) if part.held or like is not None else None
        if part.held and given is not None:
            y = clipped(part.y, part.ends)
            error += (clipped(given, part.ends) - y).square().sum().cpu()
            squares, rows, total = squares + y.square().sum().cpu(), rows + y.shape[1], total + y.sum(1).cpu()
        cuts_off = cuts_off or part.ends is not None
        if like is not None and given is not None:
            sums[part.held].towards(part.x, retargeted(part, given))
        elif part.held in sums:
            sums[part.held].add(Moments.of(part.x, part.y))
        else:
            sums[part.held] = Moments.of(part.x, part.y)
    for tensor in (error, squares, rows, total):
        all_reduce(tensor)
    for each in sums.values():
        each.reduce(reading=like is None)
    spread = float(squares - total.square().sum() / rows)
    return Found(sums, float(error), max(spread, torch.finfo(torch.float64).tiny), cuts_off)


def retargeted(part: Part, given: torch.Tensor) -> torch.Tensor:
    """What should come out, but what does wherever both are cut off alike."""
    if part.ends is None:
        return part.y
    low, high = part.ends
    return torch.where(part.y < low, given.minimum(low), torch.where(part.y > high, given.maximum(high), part.y))


def clipped(y: torch.Tensor, ends: Ends | None) -> torch.Tensor:
    """What is left of an output after the activation."""
    return y if ends is None else y.clamp(*ends)


def predicted(x: torch.Tensor, solution: torch.Tensor) -> torch.Tensor:
    """(groups, rows, outputs) that come of (groups, rows, n)."""
    return x @ solution[:, :, :-1].transpose(1, 2) + solution[:, None, :, -1]
