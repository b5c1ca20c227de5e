"""Rows of a regression, and what is asked of them where an activation cuts off what a layer gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from allocator.recovering.moments import Products
from allocator.scoring import ranks

Ends = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """Rows of a regression.

    Attributes:
        x: (groups, rows, n) what is read.
        y: (groups, rows, outputs) what should come out.
        ends: two like `y`, or of a single row: where y lies beyond one of them, all that lies there is as good; None
            where every number counts.
    """

    x: torch.Tensor
    y: torch.Tensor
    ends: Ends | None = None


Parts = Callable[[bool], Iterable[Part]]
"""Gives the rows to fit (False), or those held back (True), whenever it is called."""


def judge(held: Iterable[Part], solution: torch.Tensor) -> tuple[float, float, bool]:
    """How good a solution is on rows held back, over all ranks.

    Args:
        held: the rows.
        solution: (groups, outputs, n + 1) weights, and the offset last.

    Returns:
        sum of squares by which what comes out is off, after the activation; sum of squares of what should come out,
        about its mean; and whether there is such an activation.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    total = torch.zeros(solution.shape[:2], dtype=torch.float64)
    cuts_off = False
    for part in held:
        y = _clipped(part.y, part.ends)
        off = _clipped(predicted(part.x, solution), part.ends) - y
        sums += torch.stack([_squares(off), _squares(y), torch.tensor(y.shape[1], dtype=torch.float64)])
        total += y.sum(1, dtype=torch.float64).cpu()
        cuts_off = cuts_off or part.ends is not None
    ranks.add_up(sums)
    ranks.add_up(total)
    spread = float(sums[1] - total.square().sum() / sums[2])
    return float(sums[0]), max(spread, torch.finfo(torch.float64).tiny), cuts_off


def missing(part: Part, solution: torch.Tensor, *, anew: bool) -> torch.Tensor:
    """(groups, rows, outputs): what should come out less what does.

    Args:
        part: the rows.
        solution: what gives it.
        anew: nothing is missing wherever both are cut off alike; else the targets are as given.
    """
    given = predicted(part.x, solution)
    return (_retargeted(part, given) if anew else part.y) - given


def gather(seen: Iterable[Part], solution: torch.Tensor, *, anew: bool, gram: Products | None = None) -> Products:
    """What is read with what is missing, over all ranks; into `gram`, what is read with itself."""
    found = Products()
    for part in seen:
        found.add(part.x, missing(part, solution, anew=anew))
        if gram is not None:
            gram.add(part.x)
    for each in (found, gram):
        if each is not None:
            each.reduce()
    return found


def way(held: Iterable[Part], start: torch.Tensor, end: torch.Tensor, *, anew: bool) -> tuple[float, float]:
    """What the error loses on rows held back, and how far to go from one solution to another for it, from 0 to 1."""
    sums = torch.zeros(2, dtype=torch.float64)
    for part in held:
        pushed = predicted(part.x, end - start)
        sums += torch.stack(
            [(pushed * missing(part, start, anew=anew)).sum(dtype=torch.float64).cpu(), _squares(pushed)]
        )
    ranks.add_up(sums)
    falls, bends = sums.tolist()
    step = min(max(falls / bends, 0.0), 1.0) if bends > 0 else 0.0
    return 2 * step * falls - step**2 * bends, step


def _squares(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.square().sum(dtype=torch.float64).cpu()


def _retargeted(part: Part, given: torch.Tensor) -> torch.Tensor:
    """What should come out, but what does wherever both are cut off alike."""
    if part.ends is None:
        return part.y
    low, high = part.ends
    return torch.where(part.y < low, given.minimum(low), torch.where(part.y > high, given.maximum(high), part.y))


def _clipped(y: torch.Tensor, ends: Ends | None) -> torch.Tensor:
    """What is left of an output after the activation."""
    return y if ends is None else y.clamp(*ends)


def predicted(x: torch.Tensor, solution: torch.Tensor) -> torch.Tensor:
    """(groups, rows, outputs) that come of (groups, rows, n)."""
    return torch.baddbmm(solution[:, None, :, -1], x, solution[:, :, :-1].transpose(1, 2))
