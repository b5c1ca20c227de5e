"""How near a plan comes to the best that there is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from allocator.planning.bound import upper_bound
from allocator.planning.problem import Problem


@dataclass(frozen=True)
class Optimality:
    """The importance that a plan keeps, beside what no plan in its scope and budgets exceeds.

    Attributes:
        importance: share of the sum of all scores.
        bound: the same of the bound; None where none is known.
    """

    importance: float
    bound: float | None

    @property
    def gap(self) -> float | None:
        """By how much a better plan could exceed this one, as a share of the bound; None where no bound is known."""
        if self.bound is None:
            return None
        return 0.0 if self.bound <= 0 else max(0.0, 1 - self.importance / self.bound)

    def __str__(self) -> str:
        kept = f"importance kept {self.importance:.3%}"
        if self.bound is None:
            return f"{kept}; no bound is known"
        return f"{kept}; no plan keeps more than {self.bound:.3%}: gap {self.gap:.2%}"


def optimality(problem: Problem, kept: np.ndarray) -> Optimality | None:
    """Of a choice of neurons; takes up to about a second where layers are many.

    Args:
        problem: that the choice answers.
        kept: (neurons,) bool.

    Returns:
        None where the scores have no sum to share: all zero, or negative on the whole.
    """
    values = np.nan_to_num(problem.scores.values)
    whole = float(values.sum())
    if whole <= 0:
        return None
    bound = upper_bound(problem)
    return Optimality(float(values[kept].sum()) / whole, None if bound is None else min(bound / whole, 1.0))
