"""The refit of one layer: ridge regression toward the weights as they are, judged on rows that it did not see.

W' = argmin ||Y - W' X||^2 + strength ||W' - W||^2, with X what the smaller network's layer reads, Y what the original's
gave, and an offset that is not penalised where the layer has a place for one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from allocator.recovering.moments import Products
from allocator.recovering.targets import Part, Parts, gather, judge, predicted, way
from allocator.scoring import ranks

STRENGTHS = (1e-8, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the mean of the diagonal of X's covariance, per row."""
FIRST = STRENGTHS.index(1e-2)
ROUNDS = 4
"""Of fits with other targets where an activation cuts off, at most."""
ENOUGH = 0.002
"""Share of its error that a round has to gain for another one to follow."""
SAME = 64
"""An error below the square of so many roundings is none."""
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
    """Solutions to rows that are known by their products.

    One matrix as large as theirs is made beside it, in the dtype of the weights: the factor of the last strength.

    Args:
        gram: what is read with itself, which is used up; None where the offset alone is to move.
        start: (groups, outputs, n + 1) the weights as they are, toward which the ridge pulls.
        offset: whether there is a place for one; else the last column stays.
    """

    def __init__(self, gram: Products | None, start: torch.Tensor, *, offset: bool) -> None:
        self.start, self.offset = start, offset
        if gram is None:
            return
        self.mean, self.square = gram.first, (gram.product if offset else gram.about_zero()).div_(gram.rows)
        diagonal = self.square.diagonal(dim1=1, dim2=2).mean(1)
        self.scale = torch.where(diagonal > 0, diagonal, 1.0)  # inputs that never vary are no trouble
        self._strength, self._factor = math.nan, torch.zeros(())

    def solve(self, from_: torch.Tensor, lacks: Products, strength: float) -> torch.Tensor:
        """(groups, outputs, n + 1): the solution.

        Args:
            from_: a solution to set out from; where it is does not matter but for rounding.
            lacks: what is read, with what is missing to what should come out of that solution.
            strength: of the mean diagonal; infinite to move the offset alone.
        """
        end = from_.clone()
        if math.isfinite(strength):
            right = ((lacks.product if self.offset else lacks.about_zero()) / lacks.rows).to(end.dtype)
            if from_ is not self.start:
                pull = strength * self.scale[:, None, None]
                right -= (pull * (from_ - self.start)[:, :, :-1].transpose(1, 2)).to(end.dtype)
            moved = torch.cholesky_solve(right, self.factor(strength)).transpose(1, 2)
            end[:, :, :-1] += moved
            if self.offset:
                end[:, :, -1] -= (moved.double() @ self.mean[:, :, None])[:, :, 0].to(end.dtype)
        if self.offset:
            end[:, :, -1] += lacks.second.to(end.dtype)
        return end

    def factor(self, strength: float) -> torch.Tensor:
        """Of the covariance with its ridge, which is made a little stronger where its rank is too low for the dtype."""
        if strength != self._strength:
            least, more = torch.finfo(self.start.dtype).eps, 0.0
            self._factor = torch.zeros(())  # gone before the next one is made
            while True:
                made = torch.empty_like(self.square, dtype=self.start.dtype).transpose(1, 2).copy_(self.square)
                made.diagonal(dim1=1, dim2=2).add_(((strength + more) * self.scale)[:, None])
                made, failed = torch.linalg.cholesky_ex(made, out=(made, made.new_empty(0, dtype=torch.int32)))
                if not bool(failed.any()):
                    break
                more = max(10 * more, least)
            self._strength, self._factor = strength, made
        return self._factor


def refit(parts: Parts, start: torch.Tensor, *, offset: bool, weights: bool = True, few: bool = False) -> Refit:
    """The best of several refits on held-back rows, with the best step to it; nothing where none gains.

    Args:
        parts: gives the rows, whenever it is called.
        start: (groups, outputs, n + 1) the weights as they are.
        offset: whether there is a place for an offset.
        weights: fit these too, not the offset alone.
        few: there are fewer rows than unknowns.
    """
    error, spread, cuts_off = judge(parts(True), start)
    before = error / spread
    same = (SAME * torch.finfo(start.dtype).eps) ** 2
    if before <= same or not math.isfinite(before) or not (weights or offset):
        return Refit(None, before, before)
    if weights and few and ranks.count() == 1:
        found = _fit_few(parts, start, error, offset=offset, cuts_off=cuts_off)
    else:
        found = _fit(parts, start, error, offset=offset, weights=weights, cuts_off=cuts_off)
    if found.solution is None or error - found.after < GAIN * error:
        return Refit(None, before, before)
    return replace(found, before=before, after=found.after / spread)


def _fit_few(parts: Parts, start: torch.Tensor, error: float, *, offset: bool, cuts_off: bool) -> Refit:
    """As `_fit`, where no change but one along the rows themselves can count: there are no more unknowns than rows."""
    basis = torch.linalg.qr(torch.cat([part.x for part in parts(False)], 1).transpose(1, 2)).Q

    def along(held: bool) -> Iterator[Part]:
        for part in parts(held):
            given = predicted(part.x, start)
            ends = None if part.ends is None else (part.ends[0] - given, part.ends[1] - given)
            yield Part(part.x @ basis, part.y - given, ends)

    nothing = start.new_zeros(*start.shape[:2], basis.shape[2] + 1)
    found = _fit(along, nothing, error, offset=offset, weights=True, cuts_off=cuts_off)
    if found.solution is None:
        return found
    change = torch.cat([found.solution[:, :, :-1] @ basis.transpose(1, 2), found.solution[:, :, -1:]], 2)
    return replace(found, solution=start + change)


def _fit(parts: Parts, start: torch.Tensor, error: float, *, offset: bool, weights: bool, cuts_off: bool) -> Refit:
    """The best refit, with its error on held-back rows as `after`.

    Where an activation cuts off, an output that is rightly cut off may be any: its target is then what it is, and the
    fit is made again (majorisation, as for nonlinear responses by Zhang et al., CVPR 2015).
    """
    gram = Products() if weights else None
    lacks = gather(parts(False), start, anew=False, gram=gram)
    if not bool(lacks.product.isfinite().all()):
        return Refit(None, error, error)
    ridge = Ridge(gram, start, offset=offset)
    best = search(ridge, lacks, parts, weights=weights)
    if not cuts_off:
        return replace(best, after=error + best.after)
    result = Refit(None, error, error)
    solution, step = start if best.solution is None else best.solution, best.step
    for round_ in range(ROUNDS + 1):
        after, _, _ = judge(parts(True), solution)
        gained = result.solution is None or after < (1 - ENOUGH) * result.after
        if after < result.after:
            result = Refit(solution, error, after, best.strength, step)
        if not gained:
            break
        if round_ < ROUNDS:
            end = ridge.solve(solution, gather(parts(False), solution, anew=True), best.strength)
            _, step = way(parts(True), solution, end, anew=True)
            solution = solution + step * (end - solution)
    return result


def search(ridge: Ridge, lacks: Products, parts: Parts, *, weights: bool) -> Refit:
    """The best strength on held-back rows, from a usual one on in the direction in which it gets better.

    Args:
        ridge: of the rows to fit.
        lacks: what is read, with what is missing to what should come out.
        parts: gives the rows.
        weights: fit these too, not the offset alone.

    Returns:
        what was found, with the change of the error in place of `after`.
    """
    best = Refit(None, 0.0, 0.0)

    def better(strength: float) -> bool:
        nonlocal best
        end = ridge.solve(ridge.start, lacks, strength)
        gained, step = way(parts(True), ridge.start, end, anew=False)
        if -gained >= best.after:
            return False
        best = Refit(ridge.start + step * (end - ridge.start), 0.0, -gained, strength, step)
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
