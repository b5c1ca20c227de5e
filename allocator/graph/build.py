"""From a model to its channel graph: trace, follow, freeze what must stay, number the neurons."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

import allocator.operators  # noqa: F401  (declares the operators)
from allocator import adapters
from allocator.errors import InputError
from allocator.flow.facts import Attribute, Facts, Frozen, Gamma, Multiple, Tie
from allocator.flow.flow import Flow
from allocator.flow.follow import run_rules
from allocator.flow.labels import Slots
from allocator.flow.options import Options, gives_dim
from allocator.graph.channel_graph import ChannelGraph
from allocator.graph.fixed_maps import freeze_beyond_fixed_maps
from allocator.graph.neurons import number_neurons
from allocator.graph.selection import as_items, selected
from allocator.modules import attribute_of, numbers_of, tensor_names
from allocator.tracing.calls import Trace
from allocator.tracing.forwards import Forwards, more_forwards, usual_forwards, with_shapes_too
from allocator.tracing.inputs import Inputs


def build_graph(
    model: nn.Module, inputs: Inputs, options: Options | None = None, forwards: Forwards | None = None
) -> ChannelGraph:
    """Trace `model` and follow its channels.

    Args:
        model: any module that can be traced; it is not changed.
        inputs: example inputs.
        options: how channels are followed.
        forwards: what was recorded of it before.

    Raises:
        TraceError: the forward raised.
    """
    forwards = usual_forwards(model, inputs) if forwards is None else forwards
    trace, *others = forwards.traces
    tensors = tensor_names(model, trace.modules)
    slots = Slots.of({name: tuple(tensor.shape) for name, tensor in tensors.items()}, numbers_of(model))
    flow, facts, options = _follow(trace, slots, options or Options())
    _freeze_misfits(flow, options)
    _freeze_for_unseen(flow, forwards.unseen)
    facts.attributes += _declared_widths(flow)
    flows = _follow_others(others, slots, options)
    if flows:
        facts = facts.with_others([other.facts for other in flows], number_neurons(slots, facts)[0])
    notes = [*forwards.notes, *facts.advice.values()]
    for name in adapters.norm_scales(trace.modules):
        facts.gammas.append(Gamma(slots.labels(name)[0], name))
    for path, name, dim, of in adapters.multiples(trace.modules):
        facts.multiples.append(Multiple(slots.labels(name)[dim], path, of))
    _heed_the_caller(trace.modules, options, slots, facts)
    _heed_the_adapters(trace.modules, slots, facts)
    _spare(trace.modules, options, slots, facts)
    freeze_beyond_fixed_maps(tensors, slots, facts)
    component, unit_of_slot, size = number_neurons(slots, facts)
    return ChannelGraph(
        model,
        flow,
        tuple(flows),
        slots,
        facts,
        inputs,
        options,
        adapters.optional_branches(trace.modules),
        component,
        unit_of_slot,
        size,
        notes,
        forwards,
    )


def elsewhere(graph: ChannelGraph) -> ChannelGraph:
    """The graph with forwards in other modes, batches and sizes, so that what is planned on it holds there too."""
    if graph.wider is None:
        forwards = more_forwards(graph.model, graph.forwards)
        flows = _follow_others(forwards.traces[len(graph.flows) :], graph.slots, graph.options)
        if graph.facts.with_others([flow.facts for flow in flows], graph.component) is graph.facts:
            wider = replace(graph, others=(*graph.others, *flows), forwards=forwards)
        else:
            wider = build_graph(graph.model, graph.inputs, graph.options, forwards)
            wider.notes[:] = dict.fromkeys([*graph.notes, *wider.notes])
            wider.speed = graph.speed
        graph.wider = wider.wider = wider
    return graph.wider


def with_shapes(graph: ChannelGraph, shapes: Sequence[Sequence[int]]) -> ChannelGraph:
    """The graph with forwards on inputs of these shapes as well, where there can be such."""
    forwards = with_shapes_too(graph.model, graph.forwards, shapes)
    return build_graph(graph.model, graph.inputs, graph.options, forwards)


def with_narrower_groups(graph: ChannelGraph) -> ChannelGraph:
    """The graph of the same forwards in which all groups of a convolution keep the same places."""
    narrower = rebuilt(graph, replace(graph.options, groups="width"))
    narrower.notes[:] = dict.fromkeys([*graph.notes, *narrower.notes])
    narrower.speed = graph.speed
    return narrower


def without_forward(graph: ChannelGraph, which: int, why: str) -> ChannelGraph:
    """The graph without one of its flows, in whose mode or size a result need not work."""
    others = [*graph.others[: which - 1], *graph.others[which:]]
    forwards = graph.forwards.without(graph.flows[which].trace, why)
    narrower = replace(graph, others=tuple(others), forwards=forwards)
    narrower.wider = narrower
    return narrower


def rebuilt(graph: ChannelGraph, options: Options) -> ChannelGraph:
    """The graph of the same forwards with other options."""
    return build_graph(graph.model, graph.inputs, options, graph.forwards)


def _follow_others(traces: Iterable[Trace], slots: Slots, options: Options) -> list[Flow]:
    """The flows of further forwards, each with facts of its own, as the views of each split dims."""
    flows = [_follow(trace, slots, replace(options, heads=None, channels={}))[0] for trace in traces]
    for flow in flows:
        _freeze_misfits(flow, options)
    return flows


def _follow(trace: Trace, slots: Slots, options: Options) -> tuple[Flow, Facts, Options]:
    """The flow of a trace; once more where it shows which of the dims that a view makes holds heads or channels.

    Heads that can't go, as where they are mixed with one another, get narrower instead, all alike.
    """
    flow, facts = _flow_of(trace, slots, options)
    if options.heads is not None:
        return flow, facts, options
    heads, narrower = flow.found_heads(), flow
    options = replace(options, heads=heads, channels=flow.found_channels())
    if options.heads or options.channels:
        flow, facts = _flow_of(trace, slots, options)
    stuck = flow.heads_that_stay(number_neurons(slots, facts)[1]) if heads else set()
    if stuck:
        stuck &= narrower.widths_that_go(number_neurons(slots, narrower.facts)[1])
    if stuck:
        options = replace(options, heads={place: dim for place, dim in heads.items() if place not in stuck})
        flow, facts = _flow_of(trace, slots, options)
    return flow, facts, options


def _flow_of(trace: Trace, slots: Slots, options: Options) -> tuple[Flow, Facts]:
    facts = Facts()
    return run_rules(trace, slots, facts, options), facts


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


def _heed_the_caller(modules: Mapping[str, nn.Module], options: Options, slots: Slots, facts: Facts) -> None:
    """Freeze what is excluded or not included, and tie what is to stay alike."""
    for name in selected(modules, slots.shapes, options.exclude, "exclude"):
        for label in slots.labels(name):
            facts.frozen.append(Frozen(label, "", "excluded by the caller"))
    if options.include:
        included = selected(modules, slots.shapes, options.include, "include")
        for label, _ in facts.written:  # what others write; that they read less is no change of theirs
            if slots.name_of(int(label[0])) not in included:
                facts.frozen.append(Frozen(label, "", "not included by the caller"))
    facts.ties += [Tie(np.array(one), np.array(other)) for one, other in sorted(options.tied)]
    for group in options.same:
        _tie_alike(modules, as_items(group, "same"), slots, facts)


def _tie_alike(modules: Mapping[str, nn.Module], group: tuple[Any, ...], slots: Slots, facts: Facts) -> None:
    """What the layers of a group write goes together, place by place."""
    names = selected(modules, slots.shapes, group, "same")
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


def _heed_the_adapters(modules: Mapping[str, nn.Module], slots: Slots, facts: Facts) -> None:
    """Layers that make the model's answer keep their outputs; and places that adapters know of go together, or stay."""
    for path, one, other in adapters.places_together(modules):
        label = slots.labels(one[0])[one[1]][one[2]]
        if other is None:
            facts.frozen.append(Frozen(label, path, "its module's adapter says so"))
        else:
            facts.ties.append(Tie(label, slots.labels(other[0])[other[1]][other[2]]))
    for path in adapters.output_layers(modules):
        name = f"{path}.weight"
        if name in slots.shapes:
            facts.frozen.append(Frozen(slots.labels(name)[0], path, "a head of the model"))


def _spare(modules: Mapping[str, nn.Module], options: Options, slots: Slots, facts: Facts) -> None:
    """Layers that are none of the model's own (an adapter's rank) keep their outputs, unless the caller means them."""
    spared = [f"{path}.weight" for path in adapters.spared_layers(modules)]
    included = selected(modules, slots.shapes, options.include, "include") if spared else set()
    for name in spared:
        if name in slots.shapes and name not in included:
            facts.frozen.append(Frozen(slots.labels(name)[0], "", "part of an adapter, and not included by name"))


def _freeze_for_unseen(flow: Flow, names: Collection[str]) -> None:
    """What a layer could read that runs in train mode only, where no forward could be recorded: dims of its size."""
    for name in names:
        shape = flow.slots.shapes[name]
        if len(shape) < 2 or not name.endswith("weight"):
            continue
        for value in range(len(flow.trace.values)) if len(shape) > 1 else ():
            for label in flow.labels(value):
                if value in flow.active and label is not None and len(label) == shape[1]:
                    reason = f"{name} may read them in train mode, which could not be traced"
                    flow.facts.frozen.append(Frozen(label, "", reason))


def _freeze_misfits(flow: Flow, options: Options) -> None:
    """What a repair found: calls at which the rewritten forward does not fit unless their neurons stay."""
    named = {place[:2] for place in options.frozen}
    for op, place in zip(flow.trace.ops, flow.places, strict=True) if named else ():
        if place[:2] not in named:
            continue
        # What is learned is read too, but holds what the call gives as well: it goes with what meets it.
        both = options.freezes(place, "reads") and options.freezes(place, "gives")
        reads = [i for i in op.inputs() if both or flow.trace.values[i].name is None]
        for part, values in (("reads", reads), ("gives", op.outputs)):
            for value in values if options.freezes(place, part) else ():
                for label in flow.labels(value):
                    flow.freeze(label, op, _MISFIT)
        for which, value in enumerate(op.outputs):
            for dim, label in enumerate(flow.labels(value)):
                if options.freezes(place, gives_dim(which, dim)):
                    flow.freeze(label, op, _MISFIT)


_MISFIT = "the rewritten forward did not fit here"
