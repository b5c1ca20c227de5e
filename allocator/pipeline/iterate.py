"""Smaller step by step, or smaller and wider again, with training in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

from torch import nn

from allocator import adapters
from allocator.arguments import is_real
from allocator.clock import Progress
from allocator.cost.budget import Budgets
from allocator.errors import AllocatorError, InputError, IterationError, as_given, in_words
from allocator.model_checks import check_model
from allocator.modules import shapes_of
from allocator.pipeline.choice import budgets_of, choose, settled
from allocator.pipeline.model import trace_model
from allocator.pipeline.recovered import run_recovered
from allocator.pipeline.run import run
from allocator.pipeline.widen import by_budgets, widen_model
from allocator.planning.problem import Widths
from allocator.result import Result
from allocator.rewriting.allocation import Allocation
from allocator.scoring.registry import Data, score
from allocator.settings import Certify, Limits, Settings
from allocator.verifying.certificate import Certificate

Train = Callable[[nn.Module], Any]
MOST_STEPS = 10_000


@dataclass(frozen=True)
class Step:
    """One step: the choice among the neurons of the network before it, and proof that nothing else was changed."""

    allocation: Allocation
    certificate: Certificate


@dataclass(frozen=True, repr=False)
class Iterated:
    """A network that became smaller in steps, or smaller and wider again.

    Attributes:
        model: of the last step, trained.
        allocation: which of the original's neurons it keeps.
        steps: first to last.
    """

    model: nn.Module
    allocation: Allocation
    steps: tuple[Step, ...]

    def __repr__(self) -> str:
        before, after = self.allocation.flops_before, self.allocation.flops_after
        name = type(self.model).__name__
        return f"<Iterated: {name}, {before:,} FLOPs before, {after:,} after {len(self.steps)} steps>"


def even_schedule(steps: int) -> list[float]:
    """So many steps of the same factor.

    Raises:
        InputError: no whole number above zero, or beyond `MOST_STEPS`.
    """
    if not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
        raise InputError(f"steps={as_given(steps)} is no whole number above zero and up to {MOST_STEPS:,}, such as 5")
    return [(step + 1) / steps for step in range(steps)]


def iterate_model(
    model: nn.Module,
    limits: Limits,
    example_inputs: Any,
    settings: Settings,
    *,
    schedule: Sequence[float],
    train: Train,
    grow: float | None = None,
    data: Data | None = None,
    recover: str | None = None,
    numeric: Certify = "small",
    seed: int = 0,
    progress: Progress | None = None,
) -> Iterated:
    """See `allocator.iterate`.

    Args:
        model: the trained network; not changed.
        limits: the last step's budgets.
        example_inputs: as the caller gave them.
        settings: how neurons are chosen.
        schedule: how far each step goes, from 0 for the model's own cost to 1 for the budgets.
        train: called with the network of every step.
        grow: instead, of every step alike, the share of the FLOPs that it first goes down to by importance, before all
            layers become evenly wider up to the budget (MorphNet: Gordon et al., CVPR 2018).
        data: what criteria may look at.
        recover: how the network of every step is refitted on the data before it is trained; None for not at all.
        numeric, seed, progress: as for `run`.
    """
    schedule = _checked(schedule)
    _check_grow(grow, limits)
    seen = None if data is None else data.loader
    graph = trace_model(check_model(model, values=True), example_inputs, settings, seen)
    last = budgets_of(graph, limits)
    if len(schedule) > 1 and not last.met(graph.everything):  # what can't be met is said before anything is trained
        followed, least = settled(graph, last, settings)
        choose(followed, least, settings, score(followed, "random"))
    settings = replace(settings, at_least=Widths(settings.at_least).of(graph))
    done: Iterated | None = None
    for number, far in enumerate(schedule, start=1):
        source = model if done is None else done.model
        step = f"step {number} of {len(schedule)}"
        try:
            limited = _limits_on_the_way(last, far) if grow is None else Limits(last.first.limit * grow)
            how: dict[str, Any] = {
                "numeric": numeric,
                "seed": seed,
                "progress": None if progress is None else partial(_say, progress, step),
            }
            if recover is None or data is None:
                result = run(source, limited, graph.inputs, _on(source, settings), data=data, **how)
            else:
                result = run_recovered(source, limited, graph.inputs, _on(source, settings), data, recover, **how)
            results = [result]
            if grow is not None:
                wider = by_budgets(Limits(flops=last.first.limit))
                result = widen_model(result.model, wider, graph.inputs, settings, numeric=numeric, seed=seed + number)
                results.append(result)
        except AllocatorError as error:
            if done is None:
                raise
            raise IterationError(f"{step}: {error}", done) from error
        results[-1] = replace(result, model=adapters.wrapped_like(model, result.model))
        _train(train, results[-1].model, step, done)
        for result in results:
            done = _after(done, result)
    assert done is not None
    return done


def _on(network: nn.Module, settings: Settings) -> Settings:
    """The settings without what they ask of layers that this network has no more."""
    if settings.at_least is None:
        return settings
    there = shapes_of(network)
    return replace(settings, at_least={name: least for name, least in settings.at_least.items() if name in there})


def _limits_on_the_way(last: Budgets, far: float) -> Limits:
    """The budgets of a step that goes so far, from 0 for the whole cost to 1 for the last budgets."""
    limits = {}
    for budget in last.each:
        whole = budget.metric.whole
        # A budget above the model's own cost binds nothing, and is to grow nothing on the way either.
        limits[budget.metric.name] = whole * min(budget.limit / whole, 1.0) ** far
    return Limits(**limits)


def _train(train: Train, network: nn.Module, step: str, done: Iterated | None) -> None:
    """Have the caller train a step's network; it must come back with tensors of the same names and sizes."""
    before = shapes_of(check_model(network))
    try:
        train(network)
    except Exception as error:
        raise IterationError(f"{step}: training raised {in_words(error)}", done) from error
    other = sorted({name for name, _ in before.items() ^ shapes_of(check_model(network)).items()})
    if other:
        raise IterationError(f"{step}: training gave the network other tensors ({', '.join(other[:3])})", done)


def _check_grow(grow: Any, limits: Limits) -> None:
    if grow is None:
        return
    if not is_real(grow) or not 0 < grow < 1:
        raise InputError(
            f"grow={as_given(grow)} is no share between 0 and 1, such as 0.7, that a step keeps before it widens"
        )
    if list(limits.given()) != ["flops"]:
        raise InputError(f"with grow the budget is one of flops, not {' and '.join(limits.given()) or 'none'}")


def _say(progress: Progress, step: str, said: str) -> None:
    progress(f"{step}: {said}")


def _checked(schedule: Sequence[float]) -> list[float]:
    try:
        shares = [float(share) for share in schedule]
    except (TypeError, ValueError):
        shares = []
    if not shares or not all(a < b for a, b in pairwise([0.0, *shares])) or shares[-1] != 1:
        raise InputError(f"schedule={as_given(schedule)} does not rise to 1 from above 0, as [0.25, 0.5, 0.75, 1] does")
    return shares


def _after(done: Iterated | None, result: Result) -> Iterated:
    step = Step(result.allocation, result.certificate)
    if done is None:
        return Iterated(result.model, result.allocation, (step,))
    return Iterated(result.model, done.allocation.compose(result.allocation), (*done.steps, step))
