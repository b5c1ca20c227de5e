"""From a model to its channel graph: trace, follow, freeze what must stay, number the neurons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

import allocator.operators  # noqa: F401  (declares the operators)
from allocator import adapters
from allocator.errors import InputError
from allocator.flow.facts import Attribute, Facts, Frozen, Gamma, Tie
from allocator.flow.flow import Flow
from allocator.flow.follow import run_rules
from allocator.flow.labels import Slots
from allocator.flow.options import Options
from allocator.graph.channel_graph import ChannelGraph
from allocator.graph.neurons import number_neurons
from allocator.graph.selection import as_items, selected
from allocator.modules import attribute_of, tensor_names
from allocator.tracing.calls import Trace
from allocator.tracing.inputs import Inputs
from allocator.tracing.record import ForwardError, record, trace_forward
from allocator.tracing.value_sized import value_sized


def build_graph(model: nn.Module, inputs: Inputs, options: Options | None = None) -> ChannelGraph:
    """Trace `model` and follow its channels.

    Args:
        model: any module that can be traced; it is not changed.
        inputs: example inputs.
        options: how channels are followed.

    Raises:
        TraceError: the forward raised.
    """
    trace = trace_forward(model, inputs)
    tensors = tensor_names(model)
    slots = Slots.of({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    notes = [inputs.assumed] if inputs.assumed else []
    flow, facts, options = _follow(trace, slots, options or Options())
    training_flow = None
    # A buffer without dims (a counter) has no channels to lose.
    learned = {name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter) or tensor.dim()}
    unused = learned - {value.name for value in trace.values}
    if unused and trace.mode == "meta":
        try:
            training = record(model, inputs, training=True)
            training_flow = run_rules(training, slots, facts, options)
        except ForwardError as error:
            notes.append(f"parameters and buffers used in train mode only stay as they are: {error}")
    by_value = sorted({op.name for op in value_sized(trace)})
    if by_value:
        notes.append(f"results whose size depends on values count at their largest ({', '.join(by_value)})")
    notes += facts.advice.values()
    facts.attributes += _declared_widths(flow)
    for name in adapters.norm_scales(trace.modules):
        facts.gammas.append(Gamma(slots.labels(name)[0], name))
    _heed_the_caller(model, options, slots, facts)
    _freeze_answers(trace.modules, slots, facts)
    for each in (flow, training_flow):
        if each is not None and options.frozen:
            _freeze_misfits(each, options)
    component, unit_of_slot, size = number_neurons(slots, facts)
    return ChannelGraph(
        model,
        flow,
        training_flow,
        slots,
        facts,
        inputs,
        options,
        adapters.optional_branches(trace.modules),
        component,
        unit_of_slot,
        size,
        notes,
    )


def _follow(trace: Trace, slots: Slots, options: Options) -> tuple[Flow, Facts, Options]:
    """The flow of a trace; once more where it shows which of the dims that a view makes holds heads or channels."""
    facts = Facts()
    flow = run_rules(trace, slots, facts, options)
    if options.heads is None:
        options = replace(options, heads=flow.found_heads(), channels=flow.found_channels())
        if options.heads or options.channels:
            facts = Facts()
            flow = run_rules(trace, slots, facts, options)
    return flow, facts, options


def _declared_widths(flow: Flow) -> list[Attribute]:
    """Attributes that, by an adapter, count the channels of what some module returns."""
    declared = adapters.widths(flow.trace.modules)
    last: dict[str, int] = {}
    if declared:
        for op in flow.trace.ops:
            path = op.module
            while path:
                last[path] = op.outputs[-1] if op.outputs else last.get(path, -1)
                path = path.rpartition(".")[0]
    found = []
    for path, name, inner in declared:
        labels = flow.labels(last[inner]) if inner in last else ()
        width = attribute_of(flow.trace.modules[path], name)
        counted = [label for label in labels if label is not None and len(label) == width]
        found += [Attribute(path, name, (counted[0],), declared=True)] if counted else []
    return found


def _heed_the_caller(model: nn.Module, options: Options, slots: Slots, facts: Facts) -> None:
    """Freeze what is excluded or not included, and tie what is to stay alike."""
    for name in selected(model, options.exclude):
        for label in slots.labels(name):
            facts.frozen.append(Frozen(label, "", "excluded by the caller"))
    if options.include:
        included = selected(model, options.include)
        for label, _ in facts.written:  # what others write; that they read less is no change of theirs
            if slots.name_of(int(label[0])) not in included:
                facts.frozen.append(Frozen(label, "", "not included by the caller"))
    for group in options.same:
        _tie_alike(model, as_items(group), slots, facts)


def _tie_alike(model: nn.Module, group: tuple[Any, ...], slots: Slots, facts: Facts) -> None:
    """What the layers of a group write goes together, place by place."""
    names = selected(model, group)
    written = {id(label): label for label, _ in facts.written}.values()
    labels = [label for label in written if slots.name_of(int(label[0])) in names]
    for label in labels[1:]:
        if len(label) != len(labels[0]):
            first, other = (slots.name_of(int(each[0])) for each in (labels[0], label))
            raise InputError(
                f"same={group!r}: {first} writes {len(labels[0])} channels and {other} {len(label)}; only layers of "
                "one width can stay alike"
            )
        facts.ties.append(Tie(label, labels[0]))


def _freeze_answers(modules: Mapping[str, nn.Module], slots: Slots, facts: Facts) -> None:
    """Layers that make the model's answer keep their outputs, whatever is done with them afterwards."""
    for path in adapters.output_layers(modules):
        name = f"{path}.weight"
        if name in slots.shapes:
            facts.frozen.append(Frozen(slots.labels(name)[0], path, "a head of the model"))


def _freeze_misfits(flow: Flow, options: Options) -> None:
    """What a repair found: calls at which the rewritten forward does not fit unless their neurons stay."""
    for op, place in zip(flow.trace.ops, flow.places, strict=True):
        if options.freezes(place):
            for value in (*op.inputs(), *op.outputs):
                for label in flow.labels(value):
                    flow.freeze(label, op, "the rewritten forward did not fit here")
