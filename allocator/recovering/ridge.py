"""The refit of one layer: ridge regression toward the weights as they are, judged on rows that it did not see.

W' = argmin ||Y - W' X||^2 + strength ||W' - W||^2, with X what the smaller network's layer reads, Y what the original's
gave, and an offset that is not penalised where the layer has a place for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from allocator.recovering.moments import Moments

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the mean of the diagonal of X's covariance, per row."""
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
    strength: float = 0.0
    step: float = 0.0


def ridge(seen: Moments, start: torch.Tensor, strength: float, *, offset: bool) -> torch.Tensor:
    """(groups, outputs, n + 1): the solution; where a layer has no place for an offset, its last column stays.

    Args:
        seen: rows to fit.
        start: (groups, outputs, n + 1) the weights as they are.
        strength: of the mean diagonal.
        offset: whether there is a place for one.
    """
    reads, both = seen.reads / seen.rows, seen.both / seen.rows
    square, target = reads[:, :-1, :-1], both[:, :-1]
    if offset:
        means, given = reads[:, :-1, -1:], both[:, -1:]
        square, target = square - means @ means.transpose(1, 2), target - means @ given
    else:
        target = target - reads[:, :-1, -1:] @ start[:, :, -1:].transpose(1, 2)
    weights = start[:, :, :-1].transpose(1, 2)
    ridged = square + strength * _mean_diagonal(square) * torch.eye(square.shape[1], dtype=square.dtype).to(square)
    change = _solve(ridged, target - square @ weights)
    solution = start.clone()
    solution[:, :, :-1] += change.transpose(1, 2)
    return centred(seen, solution) if offset else solution


def centred(seen: Moments, weights: torch.Tensor) -> torch.Tensor:
    """The same weights with the offset that gives the right mean."""
    reads, both = seen.reads / seen.rows, seen.both / seen.rows
    solution = weights.clone()
    solution[:, :, -1] = both[:, -1] - (weights[:, :, :-1] @ reads[:, :-1, -1:])[:, :, 0]
    return solution


def _mean_diagonal(square: torch.Tensor) -> torch.Tensor:
    """(groups, 1, 1); above zero, so that inputs that never vary are no trouble."""
    mean = square.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    return mean.clamp_min(max(float(mean.max()), 1.0) * 1e-12)


def _solve(square: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    factor, failed = torch.linalg.cholesky_ex(square)
    if bool(failed.any()):  # of too low a rank for so small a ridge
        return torch.linalg.lstsq(square, right, driver="gelsd").solution if square.device.type == "cpu" else right * 0
    return torch.cholesky_solve(right, factor)


def refit(
    seen: Moments,
    held: Moments,
    start: torch.Tensor,
    *,
    offset: bool,
    weights: bool = True,
    strengths: Sequence[float] = STRENGTHS,
) -> Refit:
    """The best of several refits on held-back rows, with the best step to it; nothing where none gains.

    Args:
        seen: rows to fit.
        held: rows to judge by.
        start: (groups, outputs, n + 1) the weights as they are.
        offset: whether there is a place for an offset.
        weights: fit these too, not the offset alone.
        strengths: of ridges to try.
    """
    spread = max(held.spread, torch.finfo(torch.float64).tiny)
    before = held.error(start)
    best = Refit(None, before / spread, before / spread)
    candidates = [(float("inf"), centred(seen, start))] if offset else []
    if weights:
        candidates += [(strength, ridge(seen, start, strength, offset=offset)) for strength in strengths]
    for strength, end in candidates:
        step = held.best_step(start, end)
        solution = start + step * (end - start)
        after = held.error(solution) / spread
        if after < best.after:
            best = Refit(solution, before / spread, after, strength, step)
    return best if best.after < (1 - GAIN) * best.before else Refit(None, best.before, best.before)
