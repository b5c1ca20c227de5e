"""Which neurons to keep under a budget: the scope, then the policy's choice within it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

import allocator.planning.policies  # noqa: F401  (fills the table of policies)
from allocator.cost.budget import Budgets
from allocator.errors import AllocatorError, NothingToAllocateError, PolicyError, in_words
from allocator.graph.channel_graph import ALL, SCOPES, ChannelGraph
from allocator.graph.lent import left_alone
from allocator.planning.multiples import to_multiples
from allocator.planning.optimality import Optimality, optimality
from allocator.planning.policies.registry import find_policy
from allocator.planning.problem import Problem, Widths, forced_neurons, free_neurons
from allocator.planning.search import next_costs
from allocator.planning.unmet import unmet
from allocator.scoring.registry import CRITERIA
from allocator.scoring.scores import Scores
from allocator.settings import CHOICES, DEFAULTS, KNOWN_POLICIES, check_choice

CLOSE = 0.995
"""A plan that uses less of its budget than this is too coarse, and a wider scope is tried."""
FLOORS = ("40%", "25%", "12.5%", "6.25%")
"""What every layer keeps at least under prices, where nothing else is asked for."""
MOST_FLOOR = 0.5
"""A floor that takes more of the budget than this leaves too little to choose, and a lower one is tried."""


@dataclass(frozen=True, repr=False)
class Plan:
    """A choice of neurons.

    Attributes:
        kept: (neurons,) bool.
        budgets: that it meets.
        scope: the scope it was made in.
        policy: who competed with whom.
        criterion: what ranked the neurons.
        next_costs: by metric of the budgets, what the cheapest neuron costs that could be added; nothing if none could.
        problem: what it answers; None where the budgets leave nothing to choose.
    """

    kept: np.ndarray
    budgets: Budgets
    scope: str
    policy: str
    criterion: str
    next_costs: dict[str, int]
    problem: Problem | None = None

    def __repr__(self) -> str:
        kept = f"{int(self.kept.sum()):,} of {len(self.kept):,} neurons kept"
        return f"Plan({kept}; policy {self.policy}, criterion {self.criterion}, scope {self.scope})"

    def optimality(self) -> Optimality | None:
        """The importance that is kept, and what no plan exceeds; takes up to about a second where layers are many.

        Returns:
            None where nothing had to be chosen, or the scores have no positive sum.
        """
        return None if self.problem is None else optimality(self.problem, self.kept)


def make_plan(
    graph: ChannelGraph,
    scores: Scores,
    budgets: Budgets,
    *,
    policy: str = DEFAULTS.policy,
    scope: str = DEFAULTS.scope,
    fill: bool = DEFAULTS.fill,
    widths: Widths | None = None,
    gone: np.ndarray | None = None,
) -> Plan:
    """Choose the neurons to keep.

    Args:
        graph: the model's neurons and their cost.
        scores: their importance.
        budgets: what may be kept at most.
        policy: a registered name.
        scope: "branches", "inner", "all" (which "auto" is), or "narrowest" for the narrowest of them that can meet the
            budgets and come within 0.5 % of one (where none comes so close, the narrowest that can meet them).
        fill: spend what is left on the next best neurons that fit.
        widths: what is asked of the widths of layers.
        gone: (slots,) bool, what is not kept in any case.

    Raises:
        BudgetError: a budget cannot be met; says the smallest figure that can.
        NothingToAllocateError: no neuron can be removed.
        UnknownNameError: no such policy or scope.
        PolicyError: the policy's choice does not meet the budgets, or drops what must stay.
    """
    widths = widths or Widths()
    floors: tuple[Widths, ...] = (widths,)
    if isinstance(policy, str) and policy == "auto":  # of an array, no one answer
        policy = usual_policy(scores.criterion)
        floors = usual_floors(policy, widths)
    find_policy(policy)
    least: list[np.ndarray] = []
    coarse: Plan | None = None
    for name in _scopes(scope):
        free = free_neurons(graph, scores, name)
        if not free.any():
            continue
        forced, floor = _forced(graph, scores, free, floors, budgets)
        least.append(forced)
        if not budgets.met(forced):
            continue
        problem = Problem(graph, scores, forced, budgets, fill, floor, _units(graph, gone))
        kept = to_multiples(problem, _chosen(policy, problem), scope)
        plan = Plan(kept, budgets, name, policy, scores.criterion, next_costs(problem, kept), problem)
        if budgets.used(kept) >= CLOSE or not fill:
            return plan
        coarse = coarse or plan
    if coarse is not None:
        return coarse
    if not least:
        raise nothing(graph, scores, scope)
    nearest = min(least, key=budgets.used)
    exceeded = budgets.unmet(nearest)
    raise unmet(graph, exceeded, scope, widths, [budget.metric.value(nearest) for budget in exceeded])


def _scopes(scope: str) -> Sequence[str]:
    """The scopes to try, in this order."""
    check_choice("scope", scope, CHOICES["scope"])
    if scope == "narrowest":
        return tuple(SCOPES)
    return ("all",) if scope == "auto" else (scope,)


def _forced(
    graph: ChannelGraph, scores: Scores, free: np.ndarray, floors: Sequence[Widths], budgets: Budgets
) -> tuple[np.ndarray, Widths]:
    """What stays in any case, under the first of the floors that leaves the budgets a choice, or under the last."""
    for floor in floors:
        forced = forced_neurons(graph, scores, free, floor)
        if budgets.used(forced) <= MOST_FLOOR:
            break
    return forced, floor


def _units(graph: ChannelGraph, slots: np.ndarray | None) -> np.ndarray | None:
    """(neurons,) bool: those that hold any of these slots; None without any."""
    if slots is None:
        return None
    units = graph.unit_of_slot[slots]
    found = np.zeros(graph.size, dtype=bool)
    found[units[units >= 0]] = True
    return found


def usual_policy(criterion: str) -> str:
    """What suits a criterion: scores that add up are worth their price or not; batch norms compare within a block."""
    declared = CRITERIA.get(criterion)
    if declared is not None and declared.additive:
        return "priced"
    return "per_block" if criterion == "bn_scale" else "global"


def usual_floors(policy: str, widths: Widths) -> tuple[Widths, ...]:
    """What every layer keeps at least where the caller leaves it open, the most first.

    Prices hold for small changes. At a quarter of the FLOPs they would leave some layers next to nothing, which errs
    more, refitted or not, than a floor does (benchmarks/results/quality.md).
    """
    if policy != "priced" or widths.at_least is not None:
        return (widths,)
    return (*(replace(widths, at_least=floor) for floor in FLOORS), widths)


def _chosen(policy: str, problem: Problem) -> np.ndarray:
    """(neurons,) bool: what a policy chooses; one of the caller's own may write into what it is given.

    Raises:
        PolicyError: it raised, or does not do what a policy has to.
    """
    choose = find_policy(policy)
    if policy in KNOWN_POLICIES:
        return _checked(policy, choose(problem), problem)
    try:
        with left_alone(problem.graph, f"policy {policy!r}", PolicyError):
            kept = choose(problem.lent())
    except AllocatorError:
        raise
    except Exception as error:
        raise PolicyError(
            f"policy {policy!r} raised {in_words(error)}; it is called with a Problem, and gives (neurons,) bool: "
            "which neurons to keep"
        ) from error
    return _checked(policy, kept, problem)


def _checked(policy: str, kept: np.ndarray, problem: Problem) -> np.ndarray:
    """What a policy chose, once it is known to do what a policy has to; it may be the caller's own."""
    expected = problem.forced
    if not isinstance(kept, np.ndarray) or (kept.shape, kept.dtype) != (expected.shape, expected.dtype):
        given = f"{kept.dtype} {kept.shape}" if isinstance(kept, np.ndarray) else type(kept).__name__
        raise PolicyError(f"policy {policy!r} gave {given}, expected bool {expected.shape}: which neurons to keep")
    dropped = int((expected & ~kept).sum())
    if dropped:
        raise PolicyError(f"policy {policy!r} drops {dropped} neurons that must stay: keep those in problem.forced")
    closed = int((kept & ~problem.open).sum())
    if closed:
        raise PolicyError(f"policy {policy!r} keeps {closed} neurons that are gone: keep only what problem.open has")
    exceeded = problem.budgets.unmet(kept)
    if exceeded:
        metric, limit = exceeded[0].metric, exceeded[0].limit
        raise PolicyError(
            f"policy {policy!r} keeps {metric.show(metric.value(kept))}, {metric.show(limit)} are allowed: add "
            "neurons while problem.budgets.met(kept)"
        )
    return kept


def nothing(graph: ChannelGraph, scores: Scores, scope: str) -> NothingToAllocateError:
    """The error for a model of which nothing can go, with the reasons."""
    reasons = graph.why()
    unscored = int(np.isnan(scores.values).sum())
    if unscored:
        reasons.insert(0, f"{unscored} neurons have no score under criterion {scores.criterion!r}")
    wider = int((graph.scope_of > SCOPES.get(scope, ALL)).sum())
    if wider:
        reasons.insert(0, f"{wider} neurons can only be removed in a wider scope than {scope!r}")
    listed = "; ".join(reasons[:5]) or "the model has no convolution or linear layer whose outputs stay inside it"
    return NothingToAllocateError(f"no neuron of the model can be removed: {listed}", reasons=reasons)
