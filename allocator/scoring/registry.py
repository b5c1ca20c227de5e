"""The table of criteria: what ranks neurons, by name, by function or by numbers of the caller's own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from allocator.arguments import checked, misfit
from allocator.clock import Progress
from allocator.errors import (
    AllocatorError,
    CriterionError,
    DataError,
    UninformativeScoresWarning,
    UnknownNameError,
    as_given,
    did_you_mean,
    in_words,
    none_of,
    unknown,
    warn,
)
from allocator.graph.channel_graph import ChannelGraph
from allocator.graph.lent import LentGraph, left_alone, own
from allocator.scoring.answers import Loss
from allocator.scoring.calibration import Statistics, collect, with_gradients
from allocator.scoring.scores import Scores, SlotScores, as_array
from allocator.scoring.torch_pruning import importance_scores, is_importance
from allocator.tracing.isolation import undisturbed

Weights = Callable[[str], torch.Tensor]
"""Gives a parameter or buffer of the model by its name; functions of the caller's get a copy."""
Function = Callable[..., "np.ndarray | SlotScores"]
"""Of the graph, of `Weights`, and of `Statistics` where it needs data: one number per neuron, or scores by slot."""
Stored = Mapping[str, torch.Tensor] | None
AUTO = "auto"


@dataclass(frozen=True)
class Criterion:
    """What ranks neurons.

    Attributes:
        name: by which it is known.
        function: gives the scores.
        needs: what it needs of the data ("gradients", "moments", "covariances", "curvature"); nothing where weights are
            enough.
        additive: whether its scores add up, in the unit of a loss, so that they may be divided by a price.
        labels: whether it needs the caller's loss, so that the model's own answers would not do.
    """

    name: str
    function: Function
    needs: tuple[str, ...] = ()
    additive: bool = False
    labels: bool = False

    @property
    def of_this_package(self) -> bool:
        """Whether it is known to write into nothing."""
        return str(getattr(self.function, "__module__", "")).partition(".")[0] == "allocator"


CRITERIA: dict[str, Criterion] = {}


def is_auto(criterion: Any) -> bool:
    """Whether it is left open what ranks neurons; arrays are compared number by number, and are no answer."""
    return isinstance(criterion, str) and criterion == AUTO


@dataclass(frozen=True)
class Data:
    """What criteria may look at beside the weights.

    Attributes:
        loader: as for `allocator.allocate`.
        loss: called with the output and the target; None for the model's own answers.
        seed: of the noise that stands in for answers that are no classes.
        progress: called with how far it is.
    """

    loader: Any
    loss: Loss | None = None
    seed: int = 0
    progress: Progress | None = None

    @classmethod
    def given(cls, loader: Any, loss: Loss | None, seed: int, progress: Progress | None) -> Data | None:
        """What the caller gave, None for nothing.

        Raises:
            DataError: a loss without data to call it on, or a class in place of one.
        """
        if isinstance(loss, type):
            raise DataError(f"loss is the class {loss.__name__}: pass an object of it, such as {loss.__name__}()")
        if loader is not None:
            return cls(loader, loss, seed, progress)
        if loss is not None:
            raise DataError(
                "loss needs data, whose targets it is called with: pass data=loader of (inputs, target) pairs beside "
                "it, or leave loss out"
            )
        return None


@checked
def criterion(
    name: str, *, needs: Collection[str] = (), additive: bool = False, labels: bool = False
) -> Callable[[Function], Function]:
    """Register a criterion: a function of the graph, of a look-up of tensors by name, and of what it needs of the data.

    Args:
        name: what to call it.
        needs: any of "gradients", "moments", "covariances" and "curvature"; then the function's third argument is
            `allocator.scoring.calibration.Statistics`.
        additive: the scores add up, in the unit of a loss.
        labels: it needs the caller's loss.

    Raises:
        CriterionError: the name is taken.
    """

    def register(function: Function) -> Function:
        if name in CRITERIA:
            raise CriterionError(f"criterion {name} is registered already")
        CRITERIA[name] = Criterion(name, function, tuple(needs), additive, labels)
        return function

    return register


def find_criterion(name: str) -> Criterion:
    """The criterion of this name.

    Raises:
        UnknownNameError: no such criterion.
    """
    if name not in CRITERIA:
        raise UnknownNameError(none_of("criterion", name, sorted((AUTO, *CRITERIA))))
    return CRITERIA[name]


def check_criterion(graph: ChannelGraph, criterion: Any) -> None:
    """Raise as `score` does, for all that can be seen without looking at data or running a function."""
    names = (criterion,) if isinstance(criterion, str) else criterion
    if isinstance(names, Sequence) and all(isinstance(name, str) for name in names):
        for name in names:
            if name != AUTO:
                find_criterion(name)
    elif not callable(criterion):
        score(graph, criterion)
    elif not is_importance(criterion):
        _check_signature(_own(criterion), graph, graph.tensors.get)


def usual_criterion(data: Data | None) -> str:
    """What "auto" stands for: the best that is known with data, and without."""
    return "group_norm" if data is None else "fisher"


def score(graph: ChannelGraph, criterion: Any = AUTO, data: Data | None = None, stored: Stored = None) -> Scores:
    """Rank all neurons.

    Args:
        graph: the model's neurons.
        criterion: a registered name, or "auto"; several, whose rankings are averaged; a function like a registered
            one; one of Torch-Pruning's importances; an array of one number per neuron; or, by the names of
            parameters, arrays of their shapes, whose entries are added up over everything that goes with a neuron.
        data: what criteria may look at.
        stored: the values of a model on the meta device, by name, read one by one.

    Raises:
        UnknownNameError: no such criterion, or no such parameter.
        CriterionError: it has nothing to rank this model by, as where its weights lie on the meta device or it needs
            data and there are none; or gave something else than one number per neuron.
        DataError: the data do not fit the model.
    """
    if isinstance(criterion, Scores):
        criterion.by_slot(graph)
        return criterion
    if isinstance(criterion, Mapping):
        return _checked(graph, "own", _by_parameter(graph, criterion))
    if isinstance(criterion, str):
        return _by_names(graph, (usual_criterion(data) if is_auto(criterion) else criterion,), data, stored)
    if isinstance(criterion, Sequence) and criterion and all(isinstance(name, str) for name in criterion):
        return _by_names(graph, tuple(criterion), data, stored)
    if callable(criterion):
        return _by_function(graph, criterion, data, stored)
    if not _are_numbers(criterion):
        raise CriterionError(
            f"criterion is {as_given(criterion)}, and takes a name such as 'group_norm', several names, a function, "
            "one number per neuron, or arrays by the names of parameters"
        )
    return _checked(graph, "own", criterion)


def _are_numbers(given: Any) -> bool:
    """Whether this may be one number per neuron; which they are is found when they are read."""
    several = hasattr(given, "__array__") or (isinstance(given, Sequence) and not isinstance(given, bytes))
    return several and getattr(given, "ndim", 1) > 0


def _by_names(graph: ChannelGraph, names: tuple[str, ...], data: Data | None, stored: Stored) -> Scores:
    """By one criterion, or by the mean rank of several."""
    found = score_each(graph, names, data, stored)
    if len(found) == 1:
        return found[0]
    ranks = np.mean([_rank(scores.values) for scores in found], axis=0)
    return Scores("+".join(names), ranks)


def score_each(graph: ChannelGraph, names: Sequence[str], data: Data | None, stored: Stored) -> list[Scores]:
    """The scores by each of several criteria; the data are looked at once for all of them.

    Args:
        graph: the model's neurons.
        names: of registered criteria.
        data, stored: as for `score`.

    Raises:
        UnknownNameError, CriterionError, DataError: as for `score`.
    """
    criteria = [find_criterion(name) for name in names]
    statistics = _statistics(graph, [each for each in criteria if each.needs], data)
    found = []
    for each in criteria:
        extra = (statistics,) if each.needs else ()
        found.append(_checked(graph, each.name, _called(graph, each, stored, *extra)))
    return found


def _called(graph: ChannelGraph, criterion: Criterion, stored: Stored, *statistics: Statistics | None) -> Any:
    """What a criterion's function gives.

    Raises:
        CriterionError: it takes other arguments, or raised.
    """
    weights = _weights_of(graph, criterion, stored)
    if criterion.of_this_package:
        return criterion.function(graph, weights, *statistics)
    given = (LentGraph(graph), weights, *statistics)
    _check_signature(criterion, *given)
    try:
        with left_alone(graph, f"criterion {criterion.name!r}", CriterionError):
            return criterion.function(*given)
    except AllocatorError:
        raise
    except Exception as error:
        said = f"criterion {criterion.name!r} raised {in_words(error)}"
        raise CriterionError(f"{said}; {_takes(criterion)}") from error


def _check_signature(criterion: Criterion, *given: Any) -> None:
    wrong = misfit(criterion.function, *given)
    if wrong:
        raise CriterionError(f"criterion {criterion.name!r} takes other arguments ({wrong}): {_takes(criterion)}")


def _takes(criterion: Criterion) -> str:
    """What a criterion's function is called with, and gives."""
    *most, last = (
        "the graph",
        "a function that gives a tensor by its name",
        *(["Statistics"] if criterion.needs else []),
    )
    words = f"{', '.join(most)} and {last}"
    return f"it is called with {words}, and gives one number per neuron (a loss is passed as loss=)"


def _statistics(graph: ChannelGraph, criteria: Sequence[Criterion], data: Data | None) -> Statistics | None:
    """What these criteria need to know of the data; None where there are none that look at data."""
    if not criteria:
        return None
    if data is None:
        raise CriterionError(f"criterion {criteria[0].name!r} looks at data: pass data=loader")
    needs: set[str] = set()
    for each in criteria:
        needs.update(each.needs)
        if each.labels and data.loss is None:
            raise CriterionError(f"criterion {each.name!r} needs labels: pass loss=function beside the data")
    return collect(graph, data.loader, needs, loss=data.loss, seed=data.seed, progress=data.progress)


def _rank(values: np.ndarray) -> np.ndarray:
    """Between 0 and 1, the best highest, equals alike; NaN where there is no score."""
    scored = ~np.isnan(values)
    _, rank = np.unique(values[scored], return_inverse=True)
    result = np.full(len(values), np.nan)
    result[scored] = (rank + 1) / max(int(rank.max(initial=0)) + 1, 1)
    return result


def _by_function(graph: ChannelGraph, function: Any, data: Data | None, stored: Stored) -> Scores:
    name = getattr(function, "__name__", type(function).__name__)
    if is_importance(function):
        if stored is not None:
            raise CriterionError(f"{name} of Torch-Pruning reads the whole model, whose weights stay in their folder")
        if data is None:
            model = LentGraph(graph).model
        else:  # on a copy, so that the caller's gradients stay as they are
            model = with_gradients(graph, data.loader, loss=data.loss, seed=data.seed, progress=data.progress)
        with undisturbed(model, itself=True):  # one of them draws
            values = importance_scores(graph, function, model)
        return _checked(graph, name, values)
    return _checked(graph, name, _called(graph, _own(function), stored))


def _own(function: Any) -> Criterion:
    """A function that is not registered."""
    return Criterion(getattr(function, "__name__", type(function).__name__), function)


def _weights_of(graph: ChannelGraph, criterion: Criterion, stored: Stored) -> Weights:
    tensors = graph.tensors

    def weights(name: str) -> torch.Tensor:
        if stored is not None and name in stored:
            return stored[name]
        if name not in tensors:
            raise UnknownNameError(f"criterion {criterion.name!r} reads {unknown('tensor', name, tensors)}")
        if tensors[name].is_meta:
            raise CriterionError(
                f"criterion {criterion.name!r} reads {name}, which lies on the meta device and has no values: build "
                "the model on a real device and load its weights, or pass criterion='random'"
            )
        return tensors[name] if criterion.of_this_package else own(tensors[name])

    return weights


def _by_parameter(graph: ChannelGraph, arrays: Mapping[str, Any]) -> SlotScores:
    """An importance per entry of each parameter, added up over all entries that go with a neuron."""
    rows = []
    for name, given in arrays.items():
        if name not in graph.slots.shapes:
            near = did_you_mean(str(name), graph.slots.shapes, mark="'")
            raise UnknownNameError(
                f"the criterion has scores for {as_given(name)}, which is no parameter of the model"
                f"{near and '; ' + near}"
            )
        array = as_array(given, f"the scores of {name}")
        expected = graph.slots.shapes[name]
        if array.shape != expected:
            raise CriterionError(f"the scores of {name} have shape {array.shape}, expected {expected}")
        for dim, label in enumerate(graph.slots.labels(name)):
            others = tuple(d for d in range(array.ndim) if d != dim)
            rows.append((label, _new_along(graph, name, array, dim).sum(axis=others)))
    return SlotScores.of(rows, "sum")


def _new_along(graph: ChannelGraph, name: str, array: np.ndarray, dim: int) -> np.ndarray:
    """The array without the entries that go with the same neuron along an earlier dim, as within a residual stream."""
    units = [graph.unit_of_slot[label] for label in graph.slots.labels(name)]
    places = [each.reshape([-1 if d == at else 1 for d in range(array.ndim)]) for at, each in enumerate(units)]
    for earlier in range(dim):
        if np.intersect1d(units[earlier], units[dim]).max(initial=-1) >= 0:
            array = np.where((places[earlier] == places[dim]) & (places[dim] >= 0), 0.0, array)
    return array


def _checked(graph: ChannelGraph, name: str, given: np.ndarray | SlotScores) -> Scores:
    if isinstance(given, SlotScores):
        scores = Scores(name, given.on(graph), given)
    else:
        scores = Scores(name, given)
        scores.by_slot(graph)
    ranked = scores.values[~np.isnan(scores.values)]
    if len(ranked) > 1 and np.ptp(ranked) == 0:
        warn(
            f"all {len(ranked)} scores of criterion {name!r} are {ranked[0]:g}, so the ranking carries no "
            "information (an untrained model?); neurons are dropped evenly over the branches",
            UninformativeScoresWarning,
        )
    return scores
