"""How far two lists of tensors differ, every number by the scale of its own kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# A number is measured by the largest of its tensor, unless all of some row of it are smaller by this: then the row is
# of another kind (a score beside a coordinate, a logit beside one that is masked), and is measured by its own largest.
KIND = 1e-3
# How much more than a nudge moves a number rounding may, where nothing but rounding is left of it.
ROUNDING = 100


@dataclass(frozen=True)
class Difference:
    """What two lists of tensors have in common.

    Attributes:
        worst: largest difference, each relative to the largest of its kind in the reference.
        shares: per tensor, the share of its numbers that were compared: those that are not NaN in both.
        compared: how many these are.
    """

    worst: float
    shares: tuple[float, ...]
    compared: int


def difference(
    reference: Sequence[torch.Tensor],
    result: Sequence[torch.Tensor],
    floors: Sequence[torch.Tensor] | None = None,
    *,
    patterns: bool = True,
) -> Difference:
    """Compare two lists of float64 tensors number by number.

    Args:
        reference, result: float64 tensors. Other shapes make an infinite difference.
        floors: per tensor, below what no scale may be; broadcast to it.
        patterns: a number that is NaN or infinite in one alone, or in another way, makes an infinite difference too;
            else it is passed over.
    """
    if [t.shape for t in reference] != [t.shape for t in result]:
        return Difference(float("inf"), (), 0)
    worst, shares, compared = 0.0, [], 0
    for i, (a, b) in enumerate(zip(reference, result, strict=True)):
        known = ~(a.isnan() & b.isnan())
        count = int(known.sum())
        compared += count
        shares.append(count / a.numel() if a.numel() else 1.0)
        worst = max(worst, _worst(a, b, None if floors is None else floors[i], patterns))
    return Difference(worst, tuple(shares), compared)


def _worst(a: torch.Tensor, b: torch.Tensor, floor: torch.Tensor | None, patterns: bool) -> float:
    finite = a.isfinite() & b.isfinite()
    if patterns and any(not torch.equal(kind(a), kind(b)) for kind in (torch.isnan, torch.isposinf, torch.isneginf)):
        return float("inf")
    if not finite.any():
        return 0.0
    a, b = (torch.where(finite, t, 0.0) for t in (a, b))
    scale = _scales(a)
    if floor is not None:
        scale = torch.maximum(scale, floor)
    return float(((a - b).abs() / scale.clamp_min(torch.finfo(torch.float64).tiny)).max())


def _scales(a: torch.Tensor) -> torch.Tensor:
    """Per number, the largest of its kind; broadcasts to (like a)."""
    largest = a.abs().max()
    own = _largest_of_rows(a)
    return torch.where(own < KIND * largest, own, largest)


def _largest_of_rows(a: torch.Tensor) -> torch.Tensor:
    """Per number, the largest of the row that holds the smallest ones, of the rows along every dim; (like a)."""
    sizes = a.abs()
    own = sizes.max().expand(a.shape)
    for dim, size in enumerate(a.shape):
        if size > 1:
            others = [d for d in range(a.dim()) if d != dim]
            own = torch.minimum(own, sizes.amax(others, keepdim=True) if others else sizes)
    return own


def noise_floors(
    reference: Sequence[torch.Tensor], nudged: Sequence[Sequence[torch.Tensor]], tolerance: float
) -> list[torch.Tensor]:
    """Per tensor, scales by which what rounding does to it passes.

    An output that is zero by nature holds nothing but rounding, and one in which large numbers cancel hardly more.
    What that is, is seen where the weights change in their last bits.

    Args:
        reference: outputs.
        nudged: the same with weights that were changed a little, several times.
        tolerance: relative differences that pass.
    """
    floors = []
    for i, a in enumerate(reference):
        moved = torch.zeros_like(a)
        for outputs in nudged:
            if len(outputs) == len(reference) and outputs[i].shape == a.shape:
                moved = torch.maximum(moved, (outputs[i] - a).abs().nan_to_num(0.0, 0.0, 0.0))
        floors.append(_largest_of_rows(moved) * (ROUNDING / tolerance) if a.numel() else moved)
    return floors
