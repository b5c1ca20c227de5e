"""The public functions: the whole flow in one call, and its stages one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from torch import nn

from allocator import adapters
from allocator.arguments import checked
from allocator.clock import Progress
from allocator.errors import InputError, as_given
from allocator.graph.channel_graph import ChannelGraph
from allocator.io.files import load_allocation
from allocator.model_checks import check_model
from allocator.pipeline.choice import budgets_of, choose, settled
from allocator.pipeline.iterate import Iterated, even_schedule, iterate_model
from allocator.pipeline.model import trace_model, warn_of_unmatched
from allocator.pipeline.recover import asked_method, recover_result
from allocator.pipeline.recovered import run_recovered
from allocator.pipeline.run import run
from allocator.pipeline.sweep import Evaluate, Sweep, sweep_model
from allocator.pipeline.verify import verify_model
from allocator.pipeline.widen import by_budgets, has_room_to_grow, widen_model
from allocator.planning.problem import Widths
from allocator.result import Result
from allocator.rewriting.allocation import Allocation
from allocator.rewriting.rewrite import rewrite as rewrite_model
from allocator.scoring.answers import Loss
from allocator.scoring.batches import again_and_again
from allocator.scoring.registry import Data
from allocator.scoring.registry import score as score_graph
from allocator.scoring.scores import Scores
from allocator.settings import (
    DEFAULTS,
    RECOVERING,
    Certify,
    Groups,
    Limit,
    Limits,
    Method,
    Norms,
    Policy,
    Scope,
    Settings,
    Weights,
    check_certify,
    check_choice,
)
from allocator.tracing.isolation import as_usual
from allocator.verifying.certificate import Certificate


@checked
@as_usual
def allocate(
    model: nn.Module,
    flops: Limit = None,
    *,
    params: Limit = None,
    activations: Limit = None,
    peak_activations: Limit = None,
    latency: Limit = None,
    data: Any = None,
    loss: Loss | None = None,
    example_inputs: Any = None,
    policy: Policy | str = DEFAULTS.policy,
    criterion: Any = DEFAULTS.criterion,
    scope: Scope = DEFAULTS.scope,
    fill: bool = DEFAULTS.fill,
    groups: Groups = DEFAULTS.groups,
    norms: Norms = DEFAULTS.norms,
    exclude: Any = DEFAULTS.exclude,
    include: Any = DEFAULTS.include,
    same: Any = DEFAULTS.same,
    at_least: Any = DEFAULTS.at_least,
    multiple: int = DEFAULTS.multiple,
    grow: bool = False,
    weights: Weights = "keep",
    recover: bool | Method = RECOVERING.recover,
    certify: Certify = "small",
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Make a smaller network under a budget, and prove it.

    Args:
        model: the trained network; not changed. It is measured and proven in eval mode. One in a wrapper that an
            adapter knows (Ultralytics' `YOLO`) comes back in a wrapper of its kind.
        flops: the budget as fvcore counts it (one multiply-add is one FLOP): a number, text such as "4.2G", or a
            share such as "60%".
        params, activations, peak_activations: budgets of numbers in parameters, of numbers that convolutions and
            matrix products write in one forward, and of numbers in activations that are alive at once; alone, or
            together with others.
        latency: a budget of time for one forward: seconds, text such as "8ms", or a share. It is measured where the
            model's parameters lie, with as many threads as torch uses: modules at several widths to plan by, then
            the smaller network beside the original, until one lands. What was measured stands in `Result.notes`.
        data: what the network is for, for criteria that look at it: a loader of tensors, of (inputs, target) pairs
            or of dicts, or a tensor of inputs. A few hundred samples are enough. Under `torch.distributed` every
            process calls this with its share of them, and all choose the same.
        loss: called with the model's output and the batch's target, gives a scalar; without one, the model's own
            answers stand in for labels. The target is the second of a pair, a tuple of all that come after the inputs,
            None where a batch is inputs alone, and of a batch that is a dict the whole dict.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; None for one input of the size
            that the model says, else of the first of the data, else of the usual one. The notes say which.
        policy: who competes with whom; "auto" for what suits the criterion; see `plan`.
        criterion: what ranks neurons; see `score`. "auto" is "group_norm" without data. With data, networks by
            "fisher", "group_norm" and "activation" are made and compared with the original on up to 128 inputs, as cut
            and after batch-norm statistics, and the nearest is taken; the notes say how near each was. With `recover`
            networks by "fisher" and "surgeon" (where its matrices are not too large) are made and refitted, and the
            nearest on the inputs held back is taken.
        scope: "branches" (neurons that enter a concatenation or a grouped convolution), "inner" (all but residual
            streams), "all" (which "auto" is), or "narrowest" for the narrowest of them that can meet the budgets.
        fill: spend the rest of the budgets on the next best neurons.
        groups: "whole" drops whole groups of grouped convolutions, "width" narrows all groups alike; "auto" is "whole",
            and "width" where whole groups cannot meet the budgets, which the notes say.
        norms: "exact" keeps channels under a norm over channels (of a group norm, whole groups may go), "loose" lets
            them go.
        exclude: what stays as it is: name patterns (`"layer1.*"`), module classes or modules.
        include: what alone may get narrower, in the same words.
        same: layers of one width that keep the same places, in the same words: one group; a list of lists for several.
        at_least: channels that every layer keeps: a number, a share ("25%"), or one of these per name pattern. Left
            out, an "auto" policy that is "priced" keeps 40 % of each, or 25, 12.5 or 6.25 % where that would take more
            than half of a budget; 0 for any number.
        multiple: widths that change are multiples of this.
        grow: where all budgets are above the model's own figures, widen it evenly up to them, as `widen` does.
        weights: "keep", or "reset" to train the result from scratch.
        recover: refit what is left on `data`, by a method of the function `recover`; True for its "auto".
        certify: compare weights and float64 outputs too: outputs at the smallest size at which the forward takes the
            same steps ("small"; the certificate says which), or at the size of the example inputs ("full"); False for
            the structural check alone, which always runs, at the size of the example inputs.
        seed: of the certificate's input, and of the noise that stands in for answers that are no classes.
        progress: called with the name of each stage, and with how far it is.

    Raises:
        BudgetError: a budget is missing, no positive number, or cannot be met; says what can.
        NothingToAllocateError: no neuron can be removed; says why.
        CriterionError: the criterion has nothing to rank this model by, or needs data.
        DataError: the data are empty or do not fit the model, or the loss is no finite scalar, or given without data.
        UnsupportedModelError, InputError, TraceError: the model cannot be traced; says what to pass instead.
        CertificateError, CostMismatchError: the result failed its own checks, and is not returned.
    """
    check_choice("weights", weights, get_args(Weights))
    settings = Settings(policy, criterion, scope, fill, groups, norms, exclude, include, same, at_least, multiple)
    method = asked_method(recover, data, weights)
    limits = Limits(flops, params, activations, peak_activations, latency)
    given = Data.given(data, loss, seed, progress)
    if grow and has_room_to_grow(model, limits, example_inputs, settings):
        result = widen_model(
            model, by_budgets(limits), example_inputs, settings, weights=weights, numeric=certify, seed=seed,
            progress=progress,
        )  # fmt: skip
        if method is not None:
            result.notes.append("nothing was dropped, so that there was nothing to recover")
        return replace(result, model=adapters.wrapped_like(model, result.model))
    if method is None or given is None:
        result = run(
            model, limits, example_inputs, settings, data=given, weights=weights, numeric=certify, seed=seed,
            progress=progress,
        )  # fmt: skip
    else:
        result = run_recovered(
            model, limits, example_inputs, settings, given, method, numeric=certify, seed=seed, progress=progress
        )
    return replace(result, model=adapters.wrapped_like(model, result.model))


@checked
@as_usual
def recover(
    result: Result,
    data: Any,
    method: Method = "auto",
    *,
    samples: int = RECOVERING.samples,
    memory: Limit = RECOVERING.memory,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Make a smaller network accurate again, in minutes and without labels or training.

    The forward is led through layer by layer. What each layer that reads is to give is what the original's gave on the
    same inputs; what it has for that is what its forerunners, refitted already, now give. That is a ridge regression
    toward its weights. An eighth of the inputs is held back: they decide how strong the ridge is, how far a layer goes,
    and whether it changes at all.

    Args:
        result: from `allocate`; it and its model stay as they are, and so does the original, `result.graph.model`.
        data: a few hundred inputs like those that the network is for: a tensor, or a loader of tensors, of (inputs,
            target) pairs or of dicts. Labels are not looked at.
        method: "least_squares" as above; "batch_norm" takes the running statistics anew; "fold" puts the means of what
            was dropped into offsets; "auto" tries batch_norm, least_squares, and both, and gives what is nearest to
            the original on the inputs held back, which may be the network as it was cut.
            "distil" trains what least squares gives on the original's outputs, without labels, and takes minutes more.
        samples: inputs to look at, at most; all of them are held in memory.
        memory: bytes that what forwards hold while they wait for each other, and a layer's rows, may take: a number, or
            text such as "2GB"; None for half of what is free. The rest lies in a temporary file without a name, in the
            folder that TMPDIR says. It makes no difference to what is found.
        seed: of the positions that are looked at.
        progress: called with how far it is.

    Returns:
        A new result; its `recovery` says what was done, per layer what it changed, and how far the outputs are from the
        original's, before and after: of logits by Kullback-Leibler divergence in nats, of other outputs by squared
        difference as a share of the original's square. Its certificate is that of the cut.

    Raises:
        DataError: the data are empty, a single input, not finite, all the same, or do not fit the model; or they take
            other paths through it.
        RecoveryError: no layer can be refitted, or the network cannot be trained where it is to be; says why.
        UnknownNameError: no such method.
        InputError: this is no result, `samples` no number of them, or `memory` no number of bytes.
        FileError: there is no room for the temporary file.
    """
    if samples < 2:
        raise InputError(
            f"samples={as_given(samples)} is no whole number from 2 on: one to fit and one to judge by are the least"
        )
    return recover_result(result, data, method, samples=samples, memory=memory, seed=seed, progress=progress)


@checked
@as_usual
def trace(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    groups: Groups = DEFAULTS.groups,
    norms: Norms = DEFAULTS.norms,
    exclude: Any = DEFAULTS.exclude,
    include: Any = DEFAULTS.include,
    same: Any = DEFAULTS.same,
) -> ChannelGraph:
    """Find a model's neurons, blocks and cost, without running or copying its weights.

    Args:
        model, example_inputs, groups, norms, exclude, include, same: as for `allocate`.

    Raises:
        UnsupportedModelError: not a plain module; says what to pass instead.
        InputError: the inputs don't fit the model.
        TraceError: the model's forward raised.
    """
    settings = Settings(groups=groups, norms=norms, exclude=exclude, include=include, same=same)
    return trace_model(check_model(model), example_inputs, settings)


@checked
@as_usual
def score(
    graph: ChannelGraph,
    criterion: Any = DEFAULTS.criterion,
    data: Any = None,
    loss: Loss | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """Rank the neurons of a traced model.

    Args:
        graph: from `trace`.
        criterion: a name, or "auto", which is "fisher" with data and "group_norm" without. Of weights alone
            "group_norm", "magnitude", "bn_scale", "fpgm", "random"; with data "fisher", "activation",
            "reconstruction", "surgeon", and with a loss "taylor". Several names, whose rankings are averaged. A
            function of the graph and of a look-up of tensors by name, as `criterion` registers. One of
            Torch-Pruning's importances. An array of one number per neuron, in the order of `graph.neurons`, the higher
            the more it matters, NaN where a neuron has to stay. Or, by the names of parameters, arrays of their
            shapes, whose entries are added up over everything that goes with a neuron.
        data, loss, seed, progress: as for `allocate`.

    Raises:
        UnknownNameError: no such criterion, or no such parameter.
        CriterionError: it has nothing to rank this model by, needs data, or the shapes do not fit.
        DataError: the data do not fit the model, or the loss is no finite scalar.
    """
    return score_graph(graph, criterion, Data.given(data, loss, seed, progress))


@checked
@as_usual
def plan(
    graph: ChannelGraph,
    scores: Scores | None = None,
    flops: Limit = None,
    policy: Policy | str = DEFAULTS.policy,
    *,
    params: Limit = None,
    activations: Limit = None,
    peak_activations: Limit = None,
    scope: Scope = DEFAULTS.scope,
    fill: bool = DEFAULTS.fill,
    at_least: Any = DEFAULTS.at_least,
    multiple: int = DEFAULTS.multiple,
) -> Allocation:
    """Choose the neurons to keep under a budget, and check that the rewritten forward fits.

    Args:
        graph: from `trace`.
        scores: from `score`, or of the caller's own making; None for the criterion that `allocate` would take.
        flops, params, activations, peak_activations: budgets, as for `allocate`; half of the FLOPs where there is
            none.
        policy: "per_block" (one width multiplier, the best in each block; branches compete), "global" (one
            ranking), "isomorphic" (a ranking for each kind and shape of layer), "uniform" (every branch the same
            share), "priced" (whatever is worth more than a price level times its cost), or "auto" for what suits the
            criterion: "priced" where scores add up, "per_block" for bn_scale, else "global".
        scope, fill, at_least, multiple: as for `allocate`.

    Raises:
        BudgetError, NothingToAllocateError: as for `allocate`.
        CriterionError: there is not one score per neuron.
    """
    limits = Limits(flops, params, activations, peak_activations)
    if not limits.given():
        limits = Limits("50%")
    settings = Settings(policy=policy, scope=scope, fill=fill, at_least=at_least, multiple=multiple).checked()
    warn_of_unmatched(Widths(at_least).unmatched(graph))
    followed, budgets = settled(graph, budgets_of(graph, limits), settings)
    if scores is not None:
        scores = scores.on(graph, followed)
    return choose(followed, budgets, settings, scores).allocation


@checked
@as_usual
def sweep(
    model: nn.Module,
    flops: Sequence[float | str] | None = None,
    *,
    params: Sequence[float | str] | None = None,
    activations: Sequence[float | str] | None = None,
    peak_activations: Sequence[float | str] | None = None,
    data: Any = None,
    loss: Loss | None = None,
    evaluate: Evaluate | None = None,
    example_inputs: Any = None,
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> Sweep:
    """Allocations for many budgets: the model is traced and scored once, and each lies within the one before it.

    Args:
        model: the trained network; not changed.
        flops, params, activations, peak_activations: budgets of one of these metrics, as for `allocate`.
        evaluate: called with the smaller network of each budget; gives a number, or several by name, for the table
            and the plot.
        data, loss, example_inputs, seed, progress: as for `allocate`.
        settings: how neurons are chosen, as for `allocate`: policy, criterion, scope, fill, groups, norms, exclude,
            include, same, at_least, multiple.

    Returns:
        One point per budget, the largest first: printable with rich, `to_csv()` and `plot(path)`. `rewrite` gives the
        network of a point's allocation.

    Raises:
        InputError: there is no list of budgets, or lists for several metrics.
        BudgetError, NothingToAllocateError, CriterionError, DataError, UnsupportedModelError, InputError, TraceError:
            as for `allocate`.
    """
    lists = {"flops": flops, "params": params, "activations": activations, "peak_activations": peak_activations}
    given = Data.given(data, loss, seed, progress)
    return sweep_model(
        model, lists, example_inputs, Settings.named(settings), data=given, evaluate=evaluate, progress=progress
    )


@checked
@as_usual
def iterate(
    model: nn.Module,
    flops: Limit = None,
    *,
    params: Limit = None,
    activations: Limit = None,
    peak_activations: Limit = None,
    steps: int = 5,
    schedule: Sequence[float] | None = None,
    train: Callable[[nn.Module], Any],
    grow: float | None = None,
    data: Any = None,
    loss: Loss | None = None,
    recover: bool | Method = RECOVERING.recover,
    example_inputs: Any = None,
    certify: Certify = "small",
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> Iterated:
    """Make a network smaller step by step, and train it after each.

    Args:
        model: the trained network; not changed.
        flops, params, activations, peak_activations: the last step's budgets, as for `allocate`.
        steps: how many; every step takes the same factor off.
        schedule: instead, how far each step goes, from 0 for the model's own cost to 1 for the budget, rising.
        train: called with the network of every step, and trains it in place.
        grow: instead of a schedule, MorphNet's loop: every step goes down to this share of the budget in FLOPs by
            importance, then makes all layers wider by one factor up to the budget, and trains. Each is a step of its
            own in what is returned.
        data, loss, example_inputs, certify, seed, progress: as for `allocate`, at every step.
        recover: refit the network of every step on `data` before it is trained, as for `allocate`.
        settings: how neurons are chosen, as for `sweep`; shares in `at_least` are of the widths of `model`.

    Returns:
        The last network, trained, the allocation that leads to it from `model`, and the steps.

    Raises:
        IterationError: `train` raised or changed shapes, or a step could not be made; `done` is what the steps before
            it came to.
        InputError: a schedule that does not rise to 1; `grow` with another budget than FLOPs, or no share.
        BudgetError, NothingToAllocateError, CriterionError, DataError, UnsupportedModelError, InputError, TraceError:
            as for `allocate`, before anything was trained.
    """
    method = asked_method(recover, data, "keep")
    return iterate_model(
        model,
        Limits(flops, params, activations, peak_activations),
        example_inputs,
        Settings.named(settings),
        schedule=even_schedule(steps) if schedule is None else schedule,
        train=train,
        grow=grow,
        data=Data.given(again_and_again(data), loss, seed, progress),
        recover=method,
        numeric=certify,
        seed=seed,
        progress=progress,
    )


@checked
@as_usual
def rewrite(model: nn.Module, allocation: Allocation, weights: Weights = "keep") -> nn.Module:
    """Copy `model` with only the neurons that the allocation keeps.

    Args:
        model: the network that the allocation was made for, or a fresh build of it; not changed.
        allocation: what to keep.
        weights: "keep", or "reset" to train from scratch.

    Raises:
        AllocationMismatchError: the allocation was made for another architecture.
    """
    check_choice("weights", weights, get_args(Weights))
    return rewrite_model(model, allocation, weights)


@checked
@as_usual
def apply(model: nn.Module, allocation: Allocation | str | Path, weights: Weights = "keep") -> nn.Module:
    """`rewrite` with an allocation that may also be the path of its file: `.json`, or a saved result.

    Raises:
        FileError: the file cannot be read.
        AllocationMismatchError: the allocation was made for another architecture.
    """
    return rewrite(model, _allocation(allocation), weights)


def _allocation(allocation: Allocation | str | Path) -> Allocation:
    return allocation if isinstance(allocation, Allocation) else load_allocation(allocation)


@checked
@as_usual
def verify(
    model: nn.Module,
    small: nn.Module,
    allocation: Allocation | str | Path,
    *,
    example_inputs: Any = None,
    numeric: Certify = "small",
    seed: int = 0,
) -> Certificate:
    """Check that `small` is `model` minus the neurons that the allocation drops.

    Args:
        model: the original network.
        small: the rewritten one. Of one that was recovered, the tensors that its record names are put back as they
            were cut, and this is proven; `refitted` in the certificate says so.
        allocation: what it should have kept, or the path of its file: `.json`, or a saved result.
        example_inputs: as for `allocate`; None for one tensor of the size that the allocation was made for.
        numeric: compare weights and float64 outputs too, as `certify` says for `allocate`. A model that was trained
            since fails both; with False, whether its structure still is the original's can be asked alone.
        seed: of the input they are compared on.

    Returns:
        The certificate; its `ok` says whether all checks passed.

    Raises:
        FileError: the file cannot be read.
        AllocationMismatchError: the allocation was made for another architecture.
    """
    check_certify(numeric)
    return verify_model(model, small, _allocation(allocation), example_inputs, numeric=numeric, seed=seed)
