"""Scores by the criterion that suits a network: where there are data, the likely ones are tried and the best is taken.

No criterion is the best for every network and every budget. Which is, is cheap to see: the plans that they lead to are
made, and the one whose network answers most like the original is it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from allocator.clock import Progress, bar
from allocator.cost.budget import Budgets
from allocator.errors import AllocatorError, DataError
from allocator.graph.channel_graph import ChannelGraph
from allocator.modules import for_inference, set_training
from allocator.pipeline.choice import choose
from allocator.recovering.batch_norm import take_statistics
from allocator.recovering.compare import distances
from allocator.recovering.samples import Samples, gather
from allocator.rewriting.materialise import materialise
from allocator.scoring import ranks
from allocator.scoring.batches import again_and_again
from allocator.scoring.registry import Data, Stored, is_auto, score, score_each
from allocator.scoring.scores import Scores
from allocator.settings import Settings
from allocator.tracing.isolation import undisturbed

CANDIDATES = ("fisher", "group_norm", "activation")
"""The first is taken where nothing can be tried."""
SAMPLES = 128
"""Inputs that the networks are compared on, at most."""
USELESS = 1.0
"""A distance, in nats or of the outputs' own size, at which answers say next to nothing of the original's."""


def suitable_scores(
    graph: ChannelGraph, budgets: Budgets, settings: Settings, data: Data | None, stored: Stored = None
) -> tuple[Scores, list[str]]:
    """Scores by the settings' criterion; where that is "auto" and there are data, by the best of `CANDIDATES`.

    Args:
        graph: the model's neurons.
        budgets: what the plans that are compared have to meet.
        settings: how neurons are chosen.
        data: what criteria may look at, and what the networks are compared on.
        stored: as for `score`; without data.

    Returns:
        The scores, and a note on what was tried, if anything.

    Raises:
        UnknownNameError, CriterionError, DataError: as for `score`.
    """
    if data is None or not is_auto(settings.criterion) or "latency" in budgets.names:
        return score(graph, settings.criterion, data, stored), []
    data = replace(data, loader=again_and_again(data.loader))
    scored = score_each(graph, CANDIDATES, data, stored)
    samples = _samples(graph, data)
    if samples is None:
        return scored[0], []
    tried = _tried(graph, budgets, settings, scored, samples, data.progress)
    if not tried:
        return scored[0], []
    best = min(tried, key=lambda name: tried[name])
    count = samples.count + samples.held_count
    note = trial_note(f"how far answers are from the original's on {count} inputs", tried)
    return next(scores for scores in scored if scores.criterion == best), [note]


def trial_note(what: str, tried: dict[str, float]) -> str:
    """Which criterion was the nearest, of those tried, and how near each was."""
    order = sorted(tried, key=lambda name: tried[name])
    listed = ", ".join(f"{name} {tried[name]:.3g}" for name in order)
    return f"criterion {order[0]} was chosen by trial: {what} ({listed})"


def _samples(graph: ChannelGraph, data: Data) -> Samples | None:
    """Inputs to compare on; None where this process, or another rank, has too few."""
    samples = None
    with contextlib.suppress(DataError):
        samples = gather(data.loader, graph.model, graph.inputs, SAMPLES, data.progress)
    return samples if all(ranks.gathered(lambda: samples is not None)) else None


def _tried(
    graph: ChannelGraph,
    budgets: Budgets,
    settings: Settings,
    scored: Sequence[Scores],
    samples: Samples,
    progress: Progress | None,
) -> dict[str, float]:
    """How far the network that each criterion leads to is from the original; without those that lead to none."""
    tried: dict[str, float] = {}
    with undisturbed(graph.model), bar("trying criteria", progress, total=len(scored)) as advance:
        model = for_inference(graph.model, graph.written())
        for scores in scored:
            with contextlib.suppress(AllocatorError):
                fitted = choose(graph, budgets, settings, scores)
                small = set_training(materialise(graph.model, fitted.allocation), False)
                tried[scores.criterion] = _distance(model, small, samples)
            advance(scores.criterion)
    return tried


def _distance(model: nn.Module, small: nn.Module, samples: Samples) -> float:
    """As it was cut, and once its batch norms hold the statistics of the data: the geometric mean of the two.

    The first is what is handed back, the second what a few steps of training or a recovery begin with. As cut, answers
    that are further off than `USELESS` all count alike.
    """
    smalls = [small, for_inference(small)]
    with contextlib.suppress(DataError):  # where a norm meets a single number
        take_statistics(smalls[1], samples)
    as_cut, after = distances(model, smalls, (*samples.seen, *samples.held))
    return math.sqrt(min(as_cut, USELESS) * after) if math.isfinite(after) else math.inf
