"""The refit of one layer: ridge regression toward the weights as they are, judged on rows that it did not see.

W' = argmin ||Y - W' X||^2 + strength ||W' - W||^2, with X what the smaller network's layer reads, Y what the original's
gave, and an offset that is not penalised where the layer has a place for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from allocator.recovering.moments import Moments, all_reduce

STRENGTHS = (1e-8, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the mean of the diagonal of X's covariance, per row."""
ROUNDS = 5
"""Of fits with other targets where an activation cuts off."""
SAME = 1e-12
"""Share of the spread below which an error is none."""
GAIN = 1e-3
"""Share of its error on held-back rows that a layer has to lose for a refit to count."""


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
    ends: tuple[torch.Tensor, torch.Tensor] | None = None


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
    parts: Callable[[], Iterable[Part]],
    start: torch.Tensor,
    *,
    offset: bool,
    weights: bool = True,
    strengths: Sequence[float] = STRENGTHS,
) -> Refit:
    """The best of several refits on held-back rows, with the best step to it; nothing where none gains.

    Where an activation cuts off, an output that is rightly cut off may be any: its target is then what it is, and the
    fit is made again (majorisation, as for nonlinear responses by Zhang et al., CVPR 2015).

    Args:
        parts: gives the rows, whenever it is called.
        start: (groups, outputs, n + 1) the weights as they are.
        offset: whether there is a place for an offset.
        weights: fit these too, not the offset alone.
        strengths: of ridges to try.
    """
    sums = moments_of(parts())
    spread = max(sums[True].spread, torch.finfo(torch.float64).tiny)
    before = sums[True].error(start)
    best = Refit(None, before / spread, before / spread)
    if before <= SAME * spread:
        return best
    best = _best(sums, best, start, start, offset, weights, strengths, spread)
    if next(iter(parts())).ends is None:
        return best if best.after < (1 - GAIN) * best.before else Refit(None, best.before, best.before)
    solution = start if best.solution is None else best.solution
    first, spread = cut_off_error(parts(), start)
    now, _ = cut_off_error(parts(), solution)
    best = Refit(best.solution, first / spread, now / spread, best.strength, best.step)
    for _ in range(ROUNDS):
        sums = moments_again(sums, retargeted(parts(), solution))
        again = _best(sums, Refit(None, 1.0, float("inf")), solution, start, offset, weights, strengths, 1.0)
        if again.solution is None:
            break
        solution = again.solution
        now, _ = cut_off_error(parts(), solution)
        if now / spread >= best.after:
            break
        best = Refit(solution, best.before, now / spread, again.strength, again.step)
    return best if best.after < (1 - GAIN) * best.before else Refit(None, best.before, best.before)


def _best(
    sums: dict[bool, Moments],
    best: Refit,
    now: torch.Tensor,
    start: torch.Tensor,
    offset: bool,
    weights: bool,
    strengths: Sequence[float],
    spread: float,
) -> Refit:
    seen, held = sums[False], sums[True]
    candidates = [(float("inf"), centred(seen, now))] if offset else []
    if weights:
        candidates += [(strength, ridge(seen, start, strength, offset=offset)) for strength in strengths]
    for strength, end in candidates:
        step = held.best_step(now, end)
        solution = now + step * (end - now)
        after = held.error(solution) / spread
        if after < best.after:
            best = Refit(solution, best.before, after, strength, step)
    return best


def moments_of(parts: Iterable[Part]) -> dict[bool, Moments]:
    """Of the rows to fit (False), and of those held back (True), over all ranks."""
    sums: dict[bool, Moments] = {}
    for part in parts:
        found = Moments.of(part.x, part.y)
        if part.held in sums:
            sums[part.held].add(found)
        else:
            sums[part.held] = found
    for each in sums.values():
        each.reduce()
    return sums


def moments_again(sums: dict[bool, Moments], parts: Iterable[Part]) -> dict[bool, Moments]:
    """Of the same rows with other targets: what is read need not be multiplied again."""
    again = {held: each.forget() for held, each in sums.items()}
    for part in parts:
        again[part.held].towards(part.x, part.y)
    for each in again.values():
        all_reduce(each.both)
        all_reduce(each.gives)
    return again


def retargeted(parts: Iterable[Part], solution: torch.Tensor) -> Iterator[Part]:
    """The rows with what comes out now in place of what should, wherever both are cut off alike."""
    for part in parts:
        assert part.ends is not None
        (low, high), y = part.ends, part.y
        given = predicted(part.x, solution)
        y = torch.where(y < low, given.minimum(low), torch.where(y > high, given.maximum(high), y))
        yield Part(part.held, part.x, y, part.ends)


def cut_off_error(parts: Iterable[Part], solution: torch.Tensor) -> tuple[float, float]:
    """Of the rows held back, the squared error of what is left after the activation, and the spread of that."""
    sums = torch.zeros(2, dtype=torch.float64)
    rows = torch.zeros((), dtype=torch.float64)
    total = torch.zeros(())
    for part in parts:
        if part.held:
            assert part.ends is not None
            y = part.y.clamp(*part.ends)
            error = (predicted(part.x, solution).clamp(*part.ends) - y).square().sum()
            sums += torch.stack([error, y.square().sum()]).cpu()
            rows, total = rows + y.shape[1], total + y.sum(1).cpu()
    for each in (sums, rows, total):
        all_reduce(each)
    spread = float(sums[1] - (total.square() / rows).sum())
    return float(sums[0]), max(spread, torch.finfo(torch.float64).tiny)


def predicted(x: torch.Tensor, solution: torch.Tensor) -> torch.Tensor:
    """(groups, rows, outputs)."""
    return x @ solution[:, :, :-1].transpose(1, 2) + solution[:, None, :, -1]
