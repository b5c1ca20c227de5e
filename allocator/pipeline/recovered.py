"""Allocating and refitting in one: the criterion is the one whose network comes back nearest to the original."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

from torch import nn

from allocator.clock import Progress
from allocator.errors import AllocatorError
from allocator.model_checks import check_model
from allocator.pipeline.model import inputs_to_trace
from allocator.pipeline.recover import recover_result
from allocator.pipeline.run import run
from allocator.pipeline.trial import trial_note
from allocator.recovering.samples import gather
from allocator.result import Result
from allocator.scoring.batches import again_and_again
from allocator.scoring.registry import Data, is_auto
from allocator.scoring.surgeon import affordable
from allocator.settings import RECOVERING, Certify, Limits, Settings

CANDIDATES = ("fisher", "surgeon")
"""The second knows what a refit makes up for, and misleads where data are few."""


def run_recovered(
    model: nn.Module,
    limits: Limits,
    example_inputs: Any,
    settings: Settings,
    data: Data,
    method: str,
    *,
    numeric: Certify = "small",
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """As `run`, and what is left is refitted on the data.

    Criteria look at what the refit looks at, and neither at what is held back to judge by: on inputs that had a say in
    what goes, little seems to be lost. Where the criterion is "auto", networks by `CANDIDATES` are made and refitted,
    and the one that is nearer to the original on the inputs held back is given; the second only where its matrices are
    affordable.

    Args:
        model, limits, example_inputs, settings, numeric, seed, progress: as for `run`.
        data: what criteria look at, and what is refitted on.
        method: of refitting.
    """
    model = check_model(model, values=True)
    loader = again_and_again(data.loader)
    inputs, _ = inputs_to_trace(model, example_inputs, loader)
    samples = gather(loader, model, inputs, RECOVERING.samples, progress, targets=data.loss is not None)
    seen = replace(data, loader=samples.batches)

    def made(criterion: Any) -> Result:
        result = run(
            model,
            limits,
            example_inputs,
            replace(settings, criterion=criterion),
            data=seen,
            numeric=numeric,
            seed=seed,
            progress=progress,
        )
        return recover_result(result, samples, method, samples=RECOVERING.samples, seed=seed, progress=progress)

    if not is_auto(settings.criterion):
        return made(settings.criterion)
    first, second = CANDIDATES
    found = {first: made(first)}
    if affordable(found[first].graph):
        with contextlib.suppress(AllocatorError):
            found[second] = made(second)
    far = {name: _far(result) for name, result in found.items()}
    best = found[min(far, key=lambda name: far[name])]
    if len(found) > 1:
        note = trial_note("recovered, how far outputs are from the original's on inputs held back", far)
        best = replace(best, notes=[*best.notes, note])
    return best


def _far(result: Result) -> float:
    return math.inf if result.recovery is None else result.recovery.after
