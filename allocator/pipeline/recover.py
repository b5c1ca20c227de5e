"""Refitting: what was asked for, and a result whose model is refitted; the proof of the cut stays with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from allocator import adapters
from allocator.clock import Clock, Progress
from allocator.errors import DataError, InputError
from allocator.recovering.recover import recover
from allocator.result import Result
from allocator.settings import METHODS, RECOVERING, Limit, Method, Weights, check_choice, method_of


def asked_method(recover: bool | Method, data: Any, weights: Weights) -> Method | None:
    """The method that was asked for, None for none.

    Raises:
        UnknownNameError: no such method.
        DataError, InputError: it could do nothing, without data or with weights that are reset.
    """
    method = method_of(recover)
    if method is None:
        return None
    check_choice("recover", method, METHODS)
    if data is None:
        raise DataError("recover needs data: a few hundred inputs without labels are enough")
    if weights == "reset":
        raise InputError('recover refits the weights that are kept: leave out weights="reset", or recover')
    return method


def recover_result(
    result: Result,
    data: Any,
    method: str,
    *,
    samples: int,
    memory: Limit = RECOVERING.memory,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """A new result; see `allocator.recover`.

    Raises:
        InputError: nothing was dropped, as the result is a wider network.
    """
    if result.allocation.widens:
        raise InputError(
            "this result is wider than its original and computes the same, so that there is nothing to recover: "
            "recover is for what allocate gave"
        )
    clock = Clock(progress)
    with clock("recover"):
        model, recovery = recover(
            result.graph,
            result.plan.kept,
            adapters.network_of(result.model),
            data,
            method,
            samples=samples,
            memory=memory,
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
