"""A result whose model is refitted; the proof of the cut stays with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from allocator import adapters
from allocator.clock import Clock, Progress
from allocator.recovering.recover import recover
from allocator.result import Result


def recover_result(
    result: Result, data: Any, method: str, *, samples: int, seed: int = 0, progress: Progress | None = None
) -> Result:
    """A new result; see `allocator.recover`."""
    clock = Clock(progress)
    with clock("recover"):
        model, recovery = recover(
            result.graph,
            result.plan.kept,
            adapters.network_of(result.model),
            data,
            method,
            samples=samples,
            seed=seed,
            progress=progress,
        )
    refitted = recovery.inputs if recovery.tensors else None
    return replace(
        result,
        model=adapters.wrapped_like(result.model, model),
        certificate=replace(result.certificate, refitted=refitted),
        notes=[*result.notes, f"recovery: {recovery}"],
        timings={**result.timings, **clock.seconds},
        recovery=recovery,
    )
