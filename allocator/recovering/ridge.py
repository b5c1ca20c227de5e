"""The refit of one layer: ridge regression toward the weights as they are, judged on rows that it did not see.

W' = argmin ||Y - W' X||^2 + strength ||W' - W||^2, with X what the smaller network's layer reads, Y what the original's
gave, and an offset that is not penalised where the layer has a place for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from allocator.recovering.moments import Moments
from allocator.recovering.targets import Part, look

STRENGTHS = (1e-8, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the mean of the diagonal of X's covariance, per row."""
FIRST = STRENGTHS.index(1e-2)
ROUNDS = 4
"""Of fits with other targets where an activation cuts off."""
SAME = 1e-12
"""Share of the spread below which an error is none."""
GAIN = 1e-3
"""Share of its error on held-back rows that a layer has to lose for a refit to count."""


@dataclass(frozen=True)
class Refit:
    """What came of a layer.

    Attributes:
        solution: (groups, outputs, n + 1) weights, and the offset last; None where nothing was gained.
        before, after: error on held-back rows, as a share of the spread of what should come out.
        strength: of the ridge; infinite where only the offset moved.
        step: how far it went from the old weights to the new.
    """

    solution: torch.Tensor | None
    before: float
    after: float
    strength: float = math.inf
    step: float = 0.0


class Ridge:
    """Solutions to the rows seen so far.

    Args:
        seen: their moments.
        start: (groups, outputs, n + 1) the weights as they are, toward which the ridge pulls.
        offset: whether there is a place for one; else the last column stays.
    """

    def __init__(self, seen: Moments, start: torch.Tensor, *, offset: bool) -> None:
        self.start, self.offset = start, offset
        reads = seen.reads / seen.rows
        self.means = reads[:, :-1, -1:]
        square = reads[:, :-1, :-1]
        self.square = square - self.means @ self.means.transpose(1, 2) if offset else square
        self.pull = self.square @ start[:, :, :-1].transpose(1, 2)
        self.factors: dict[float, torch.Tensor] = {}

    def solve(self, seen: Moments, strength: float) -> torch.Tensor:
        """(groups, outputs, n + 1): the solution for rows whose reading is that of the first ones.

        Args:
            seen: moments with what should come out.
            strength: of the mean diagonal; infinite to move the offset alone.
        """
        both = seen.both / seen.rows
        solution = self.start.clone()
        if math.isfinite(strength):
            other = both[:, -1:] if self.offset else self.start[:, :, -1:].transpose(1, 2)
            right = both[:, :-1] - self.means @ other - self.pull
            solution[:, :, :-1] += torch.cholesky_solve(right, self._factor(strength)).transpose(1, 2)
        if self.offset:
            solution[:, :, -1] = both[:, -1] - (solution[:, :, :-1] @ self.means)[:, :, 0]
        return solution

    def _factor(self, strength: float) -> torch.Tensor:
        """Of the covariance with its ridge; the last one is kept."""
        if strength not in self.factors:
            mean = self.square.diagonal(dim1=1, dim2=2).mean(1)
            mean = torch.where(mean > 0, mean, 1.0)  # inputs that never vary are no trouble
            ridged = self.square + torch.diag_embed((strength * mean)[:, None].expand(-1, self.square.shape[1]))
            factor, failed = torch.linalg.cholesky_ex(ridged)
            more = 1e-12 * mean[:, None]
            while bool(failed.any()):  # of too low a rank for so small a ridge, in these many bits
                ridged.diagonal(dim1=1, dim2=2).add_(more)
                more = 10 * more
                factor, failed = torch.linalg.cholesky_ex(ridged)
            self.factors = {strength: factor}
        return self.factors[strength]


def refit(parts: Callable[[], Iterable[Part]], start: torch.Tensor, *, offset: bool, weights: bool = True) -> Refit:
    """The best of several refits on held-back rows, with the best step to it; nothing where none gains.

    Where an activation cuts off, an output that is rightly cut off may be any: its target is then what it is, and the
    fit is made again (majorisation, as for nonlinear responses by Zhang et al., CVPR 2015).

    Args:
        parts: gives the rows, whenever it is called.
        start: (groups, outputs, n + 1) the weights as they are.
        offset: whether there is a place for an offset.
        weights: fit these too, not the offset alone.
    """
    found = look(parts(), start)
    before = found.error / found.spread
    finite = math.isfinite(before) and bool(found.sums[False].reads.isfinite().all())
    if before <= SAME or not finite or not (weights or offset):
        return Refit(None, before, before)
    ridge = Ridge(found.sums[False], start, offset=offset)
    best = search(ridge, found.sums, weights=weights)
    if not found.cuts_off:
        return _if_gained(best, before, before - best.after / found.spread)
    result = Refit(None, before, before)
    solution, step = _from(start, best), best.step
    for last in [False] * ROUNDS + [True]:
        again = look(parts(), solution, found.sums)
        after = again.error / found.spread
        if after < result.after:
            result = Refit(solution, before, after, best.strength, step)
        elif result.solution is not None:
            break
        if not last:
            end = ridge.solve(again.sums[False], best.strength)
            _, step = again.sums[True].step(solution, end)
            solution = solution + step * (end - solution)
    return _if_gained(result, before, before - result.after)


def _from(start: torch.Tensor, best: Refit) -> torch.Tensor:
    return start if best.solution is None else best.solution


def _if_gained(found: Refit, before: float, gain: float) -> Refit:
    """What was found, with its errors as shares; nothing where it gained too little."""
    if found.solution is None or gain < GAIN * before:
        return Refit(None, before, before)
    return replace(found, before=before, after=before - gain)


def search(ridge: Ridge, sums: dict[bool, Moments], *, weights: bool) -> Refit:
    """The best strength on held-back rows, from a usual one on in the direction in which it gets better.

    Args:
        ridge: of the rows to fit.
        sums: moments of the rows to fit (False), and of those held back (True).
        weights: fit these too, not the offset alone.
    """
    seen, held = sums[False], sums[True]
    first = held.error(ridge.start)
    best = Refit(None, 0.0, first)

    def better(strength: float) -> bool:
        nonlocal best
        end = ridge.solve(seen, strength)
        gained, step = held.step(ridge.start, end)
        after = first - gained
        if after >= best.after:
            return False
        best = Refit(ridge.start + step * (end - ridge.start), 0.0, after, strength, step)
        return True

    if ridge.offset:
        better(math.inf)
    if not weights:
        return best
    better(STRENGTHS[FIRST])
    place = FIRST + 1
    while place < len(STRENGTHS) and better(STRENGTHS[place]):
        place += 1
    if place == FIRST + 1:
        place = FIRST - 1
        while place >= 0 and better(STRENGTHS[place]):
            place -= 1
    return best
