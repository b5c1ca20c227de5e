"""How much importance any plan could keep under a budget: the bound that a plan's gap is measured against."""

from __future__ import annotations

from allocator.cost.budget import Budget
from allocator.planning.classes import classes_of
from allocator.planning.hubs import by_hubs
from allocator.planning.planes import by_planes
from allocator.planning.problem import Problem


def upper_bound(problem: Problem) -> float | None:
    """The importance that no choice of neurons exceeds under the problem's budgets; None where none is known.

    Of several budgets, each bounds by itself, and the least holds.
    """
    found = [_of_budget(problem, budget) for budget in problem.budgets.each]
    known = [bound for bound in found if bound is not None]
    return min(known) if known else None


def _of_budget(problem: Problem, budget: Budget) -> float | None:
    classes = classes_of(problem, budget)
    if classes is None or not classes.best:
        return None if classes is None else classes.kept
    bound = by_hubs(classes)
    bound = by_planes(classes) if bound is None else bound
    return None if bound is None else classes.kept + bound
