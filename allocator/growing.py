"""The public functions that make networks wider: the same neurons, the other way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from allocator import adapters
from allocator.arguments import checked
from allocator.clock import Progress
from allocator.errors import InputError
from allocator.io.files import load_allocation
from allocator.pipeline.restore import restore_model
from allocator.pipeline.widen import Widths, by_allocation, by_branches, by_budgets, by_factor, widen_model
from allocator.result import Result
from allocator.rewriting.allocation import Allocation
from allocator.settings import (
    DEFAULTS,
    WIDENING,
    Certify,
    Groups,
    Init,
    Limit,
    Limits,
    Scope,
    Settings,
    Weights,
    check_choice,
)
from allocator.tracing.isolation import as_usual


@checked
@as_usual
def widen(
    model: nn.Module,
    flops: Limit = None,
    *,
    params: Limit = None,
    activations: Limit = None,
    peak_activations: Limit = None,
    factor: float | None = WIDENING.factor,
    like: Allocation | Result | str | Path | None = None,
    init: Init = WIDENING.init,
    example_inputs: Any = None,
    scope: Scope = DEFAULTS.scope,
    groups: Groups = DEFAULTS.groups,
    exclude: Any = DEFAULTS.exclude,
    include: Any = DEFAULTS.include,
    multiple: int = DEFAULTS.multiple,
    weights: Weights = "keep",
    certify: Certify = "small",
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Make a wider network that computes the same, and prove it.

    What is added are neurons like those that are there, with all that goes with them: whole groups of a grouped
    convolution or a group norm, whole heads; and of channels that a layer norm or another average is taken over, as
    many copies of each. `allocate` takes them away again.

    Args:
        model: the network; not changed.
        flops, params, activations, peak_activations: budgets above the model's own, as for `allocate`, one or several;
            all layers become wider by the same factor, and what is left goes to single neurons.
        factor: instead, every layer so many times as wide, rounded to whole neurons.
        like: instead, an allocation, a result or the path of its file: every layer becomes as wide as it leaves the
            layer of this name; those that it does not name stay.
        init: "zero" adds neurons whose weights are drawn with the mean and deviation of others in their layer, and
            which nothing reads yet: what would read them is zero. "copy" adds copies (Net2Wider), and those that read
            the first share it: in unequal parts, so that training tells them apart.
        scope, groups, exclude: as for `allocate`, of what may grow.
        include: what alone may grow, in the words of `exclude`.
        multiple: widths of layers are multiples of this where they change at all, as for `allocate`.
        weights: "keep", or "reset" to train the result from scratch.
        example_inputs, certify, progress: as for `allocate`.
        seed: of what is drawn, and of the certificate's input.

    Returns:
        A result whose `certificate` holds both ways: the wider network computes what the original does, and without
        what was added it is the original bit for bit. Its `notes` name what could not be widened exactly.

    Raises:
        InputError: none of budgets, `factor` and `like`, or several of these; a factor below 1; a width below the
            layer's own.
        BudgetError: a budget is no number, below the model's own, or leaves no room for a neuron; says what does.
        NothingToAllocateError: no neuron can be added exactly; says what would be inexact.
        FileError: the file cannot be read.
        UnsupportedModelError, InputError, TraceError: as for `allocate`.
        CertificateError, CostMismatchError: the result failed its own checks, and is not returned.
    """
    settings = Settings(scope=scope, groups=groups, exclude=exclude, include=include, multiple=multiple)
    widths = _widths(Limits(flops, params, activations, peak_activations), factor, like)
    return _widened(model, widths, example_inputs, settings, init, weights, certify, seed, progress)


@checked
@as_usual
def seed(
    model: nn.Module,
    neurons: int | str = "100%",
    *,
    init: Init = WIDENING.init,
    example_inputs: Any = None,
    exclude: Any = DEFAULTS.exclude,
    include: Any = DEFAULTS.include,
    weights: Weights = "keep",
    certify: Certify = "small",
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Make a seed of any network with branches: each branch of a block gets the same number of neurons.

    Which of them are worth having is then learned: train the seed, `allocate` with policy "per_block", and train again.

    Args:
        model: the network; not changed.
        neurons: of each branch: a number for all blocks, or a share of each block's widest branch.
        init: as for `widen`: the seed computes what the model does.
        weights: "keep", or "reset" to train the seed from scratch.
        example_inputs, exclude, include, certify, seed, progress: as for `widen`.

    Returns:
        A result like that of `widen`.

    Raises:
        InputError: `neurons` is neither a number nor a share, or fewer than a branch has.
        NothingToAllocateError: there is no branch that it adds to.
        UnsupportedModelError, InputError, TraceError, CertificateError, CostMismatchError: as for `widen`.
    """
    settings = Settings(exclude=exclude, include=include)
    return _widened(model, by_branches(neurons), example_inputs, settings, init, weights, certify, seed, progress)


@checked
@as_usual
def restore(
    result: Result, dropped: Literal["zero", "original"] = "zero", *, certify: Certify = "small", seed: int = 0
) -> nn.Module:
    """A network of the original's shape that computes what the smaller one does.

    Args:
        result: from `allocate`, trained or recovered since or not; it and its models stay as they are.
        dropped: what stands where neurons were dropped: "zero" throughout, or the "original" weights that wrote
            them, which nothing reads until training finds a use for them.
        certify, seed: as for `allocate`.

    Returns:
        A module that takes the original's `state_dict` and gives one, in the mode (train or eval) of the original.

    Raises:
        InputError: the result is a wider network, or was made with norms="loose".
        UnknownNameError: `dropped` is neither.
        CertificateError: it does not compute what the smaller network does, and is not returned.
    """
    check_choice("dropped", dropped, ("zero", "original"))
    model = restore_model(result, dropped, numeric=certify, seed=seed)
    return adapters.wrapped_like(result.model, model)


def _widened(
    model: nn.Module,
    widths: Widths,
    example_inputs: Any,
    settings: Settings,
    init: Init,
    weights: Weights,
    certify: Certify,
    seed: int,
    progress: Progress | None,
) -> Result:
    """The wider network, in the wrapper that the model came in."""
    check_choice("weights", weights, get_args(Weights))
    check_choice("init", init, get_args(Init))
    result = widen_model(
        model,
        widths,
        example_inputs,
        settings,
        init=init,
        weights=weights,
        numeric=certify,
        seed=seed,
        progress=progress,
    )
    return replace(result, model=adapters.wrapped_like(model, result.model))


def _widths(limits: Limits, factor: float | None, like: Allocation | Result | str | Path | None) -> Widths:
    given = [*limits.given(), *(name for name, value in (("factor", factor), ("like", like)) if value is not None)]
    if not given or (len(given) > 1 and (factor, like) != (None, None)):
        said = " and ".join(given) or "none of flops, factor and like"
        raise InputError(f"{said} given: pass one of them, such as flops='150%' or factor=1.5")
    if limits.given():
        return by_budgets(limits)
    if factor is not None:
        return by_factor(factor)
    if isinstance(like, Result):
        return by_allocation(like.allocation)
    assert like is not None
    return by_allocation(like if isinstance(like, Allocation) else load_allocation(like))
