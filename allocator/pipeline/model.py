"""The channel graph of a model, with errors that say what to pass instead."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from allocator.errors import (
    AllocatorError,
    DataError,
    InputError,
    TraceError,
    UnmatchedPatternWarning,
    ValueDependentTraceWarning,
    warn,
)
from allocator.flow.options import Options
from allocator.graph.build import build_graph
from allocator.graph.channel_graph import ChannelGraph
from allocator.graph.selection import as_groups, as_items, unmatched
from allocator.planning.problem import Widths
from allocator.scoring.batches import NO_BATCH, first_sample
from allocator.settings import Settings
from allocator.tracing.inputs import Inputs, as_inputs, infer_inputs, is_size_known


def trace_model(
    model: nn.Module, example_inputs: Any, settings: Settings, data: Any = None, *, growing: bool = False
) -> ChannelGraph:
    """The channel graph of a model; raises as `allocator.trace` does.

    Args:
        model: the network.
        example_inputs: as the caller gave them.
        settings: how channels are followed.
        data: what the network is for; where the caller gave no inputs, and the model does not say how large they are,
            they are of the size of its first sample.
        growing: neurons are to be added: buffers that name channels do not follow, and of what a norm averages over
            there are equally many each, whatever the settings say.
    """
    settings = settings.checked()
    inputs, sampled = inputs_to_trace(model, example_inputs, data)
    options = options_of(settings)
    if growing:
        options = replace(options, renumbers=False, norms="even")
    try:
        graph = build_graph(model, inputs, options)
    except TraceError as error:
        raise _input_error(model, inputs, error, sampled=sampled) or error from error.__cause__
    _check_dtypes(graph)
    graph.notes += warn_of_unmatched(
        note
        for name in ("exclude", "include", "same")
        for note in unmatched(graph.modules, graph.tensors, name, getattr(options, name))
    )
    graph.notes += warn_of_unmatched(Widths(settings.at_least).unmatched(graph))
    if graph.flow.trace.mode == "real":
        message = "the forward needs values: the trace holds for inputs that take the same path"
        warn(message, ValueDependentTraceWarning)
        graph.notes.append(message)
    return graph


def warn_of_unmatched(notes: Iterable[str]) -> list[str]:
    """Warn of patterns that match nothing; gives the notes."""
    said = list(notes)
    for note in said:
        warn(note, UnmatchedPatternWarning)
    return said


def inputs_to_trace(model: nn.Module, example_inputs: Any, data: Any) -> tuple[Inputs, bool]:
    """What a model is traced with, and whether that is the first sample of the data; see `trace_model`."""
    sampled = example_inputs is None and data is not None and not is_size_known(model)
    if sampled:
        example_inputs = first_sample(data, model)
    return as_inputs(example_inputs, model), sampled


def options_of(settings: Settings) -> Options:
    """How channels are followed, of all that is set."""
    return Options(
        groups=settings.groups,
        norms=settings.norms,
        exclude=as_items(settings.exclude, "exclude"),
        include=as_items(settings.include, "include"),
        same=as_groups(settings.same, "same"),
    )


def _input_error(model: nn.Module, inputs: Inputs, error: TraceError, *, sampled: bool) -> AllocatorError | None:
    """If the model runs with inputs inferred from itself, the caller's are to blame."""
    if inputs.assumed and not sampled:
        return None
    try:
        usual = infer_inputs(model)
        build_graph(model, usual)
    except (InputError, TraceError):
        return None
    if sampled:
        flat = [t.dim() + 1 for t in inputs.tensors()] == [t.dim() for t in usual.tensors()]
        hint = f"; {NO_BATCH}" if flat else ""
        return DataError(f"{inputs.assumed}, does not fit: {error}; the model runs with {usual.describe()}{hint}")
    return InputError(f"example_inputs do not fit: {error}; the model runs with {usual.describe()}")


def _check_dtypes(graph: ChannelGraph) -> None:
    """Tensors without values may be multiplied whatever their dtypes; real ones may not."""
    values = graph.flow.trace.values
    for op in graph.flow.trace.ops:
        if not op.declared.multiplies:
            continue
        a, b = (values[op.inputs()[i]].dtype for i in op.declared.multiplies)
        if a != b:
            raise InputError(
                f"example_inputs do not fit: {op} gets {a} from {graph.inputs.describe()}, its weight is {b}; "
                f"convert one of them, for example example_inputs.to({b})"
            )
