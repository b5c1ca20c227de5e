"""From a plan to an allocation that runs: set attributes, trace the result, freeze what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from allocator import adapters
from allocator.errors import NothingToAllocateError, RewriteError
from allocator.flow.facts import Attribute, Facts
from allocator.flow.flow import Flow
from allocator.flow.follow import RuleError, run_rules
from allocator.flow.labels import Slots
from allocator.flow.options import Options, Place
from allocator.graph.build import build_graph
from allocator.graph.channel_graph import ChannelGraph
from allocator.modules import modules_of, shapes_of
from allocator.planning.search import Plan
from allocator.rewriting.allocation import Allocation, architecture_hash
from allocator.rewriting.kept import kept_of
from allocator.rewriting.materialise import (
    describes_itself,
    materialise,
    norms_without_tensors,
    sliced,
    sliced_on_meta,
    standard_attributes,
)
from allocator.torch_private import ConvolutionBase
from allocator.tracing.calls import Op
from allocator.tracing.record import ForwardError, record
from allocator.verifying.structure import Image, Mismatch, compare, numbers_in

MAX_ROUNDS = 24
Planner = Callable[[ChannelGraph], Plan]


@dataclass
class Settled:
    """A plan whose rewritten forward was traced and found to be the image of the original.

    Attributes:
        graph: the neurons, with those frozen that did not fit.
        plan: the choice.
        allocation: the choice as data.
        notes: what had to be frozen or set on the way.
    """

    graph: ChannelGraph
    plan: Plan
    allocation: Allocation
    notes: list[str]


def settle(model: nn.Module, graph: ChannelGraph, planner: Planner) -> Settled:
    """Plan, trace the rewritten model on meta tensors, repair, until the structural check passes.

    Where the forward no longer fits, a module attribute that equals the old size is set to the new one for
    all modules of that class; failing that, the parts of a split are made equal; failing that, the neurons
    at the operator are frozen in all modules of that class, and the plan is made again.

    Raises:
        RewriteError: no plan was found that runs.
    """
    mends = _Mends()
    notes: list[str] = []
    for _ in range(MAX_ROUNDS):
        try:
            plan = planner(graph)
        except NothingToAllocateError as error:
            error.reasons[:0] = notes
            raise
        allocation = describe(model, graph, plan, mends.pieces)
        mismatch = check_structure(model, graph, plan.kept, allocation)
        if mismatch is None:
            allocation = _leave_alone(model, graph, plan, mends, allocation)
            return Settled(graph, plan, allocation, notes)
        graph = _repair(model, graph, plan, mismatch, mends, notes)
    raise RewriteError(
        f"the rewritten forward did not fit after {MAX_ROUNDS} plans; the last time at {mismatch}: "
        "exclude this module with exclude=[...], or register an adapter for its class (docs/extending.md)"
    )


def _leave_alone(
    model: nn.Module, graph: ChannelGraph, plan: Plan, mends: _Mends, allocation: Allocation
) -> Allocation:
    """Of the attributes that have the size of a split's parts, change only those that the forward needs changed."""
    changed = {(path, name) for path, values in allocation.attributes.items() for name in values}
    doubtful = [(a.module, a.name) for a in graph.facts.attributes if (a.module, a.name) in changed]
    alone: set[tuple[str, str]] = set()
    for kind in dict.fromkeys((_class_name(model, path), name) for path, name in doubtful):
        tried = alone | {(path, name) for path, name in doubtful if (_class_name(model, path), name) == kind}
        other = describe(model, graph, plan, mends.pieces, tried)
        if check_structure(model, graph, plan.kept, other) is None:
            allocation, alone = other, tried
    return allocation


def describe(
    model: nn.Module,
    graph: ChannelGraph,
    plan: Plan,
    mends: dict[tuple[str, str], tuple[np.ndarray, ...]] | None = None,
    alone: Collection[tuple[str, str]] = (),
) -> Allocation:
    """A plan as an allocation: indices per tensor, attributes per module.

    Args:
        model: the original model.
        graph: its neurons.
        plan: the choice.
        mends: further attributes that follow the kept channels, with their labels.
        alone: attributes that stay as they are, though a split has their value for its size.
    """
    indices = kept_of(graph, plan.kept)
    stays = graph.stays(plan.kept)
    shapes: dict[str, Sequence[int]] = {
        name: [n if i is None else len(i) for n, i in zip(graph.slots.shapes[name], dims, strict=True)]
        for name, dims in indices.items()
    }
    groups = {name: int(stays[slots].sum()) for name, slots in graph.facts.groups.items() if name in indices}
    absent = [
        other
        for layer, together in graph.optional.items()
        if shapes.get(f"{layer}.weight", [1])[0] == 0
        for other in together
    ]
    attributes = standard_attributes(graph.modules, graph.tensors, shapes, groups, absent)
    for path, name, value in _following(model, graph, stays, mends or {}, alone):
        attributes.setdefault(path, {})[name] = value
    for path, name, value in _declared(graph, stays):
        attributes.setdefault(path, {})[name] = value
    kept = {
        name: [None if d is None else d.tolist() for d in dims]
        for name, dims in indices.items()
        if not any(name.startswith(f"{layer}.") for layer in absent)
    }
    _add_rows(graph.modules, kept, groups)
    return Allocation(
        kept=kept,
        attributes=attributes,
        absent=absent,
        architecture=architecture_hash(graph.slots.shapes),
        flops_asked=float(plan.asked),
        flops_before=graph.flops,
        flops_after=plan.flops,
        policy=plan.policy,
        criterion=plan.criterion,
        scope=plan.scope,
        groups=graph.options.groups,
        norms=graph.options.norms,
        input_shapes=[list(t.shape) for t in graph.inputs.tensors()],
    )


def _following(
    model: nn.Module,
    graph: ChannelGraph,
    stays: np.ndarray,
    mends: dict[tuple[str, str], tuple[np.ndarray, ...]],
    alone: Collection[tuple[str, str]],
) -> Iterator[tuple[str, str, Any]]:
    """(module, attribute, new value) of attributes that are numbers of channels, which no tensor of theirs tells."""
    for path, name, label in norms_without_tensors(graph.flow):
        if not stays[label].all():
            yield path, name, int(stays[label].sum())
    found = [Attribute(path, name, pieces) for (path, name), pieces in mends.items()]
    for attribute in (*graph.facts.attributes, *found):
        if (attribute.module, attribute.name) in alone:
            continue
        current = getattr(model.get_submodule(attribute.module), attribute.name)
        value = _attribute_value(current, [int(stays[piece].sum()) for piece in attribute.pieces])
        if value != (list(current) if isinstance(current, tuple) else current):
            yield attribute.module, attribute.name, value


def _declared(graph: ChannelGraph, stays: np.ndarray) -> Iterator[tuple[str, str, Any]]:
    """(module, attribute, new value) of attributes that an adapter knows, where the value changes."""
    first = {id(tensor): name for name, tensor in graph.tensors.items()}

    def keep(tensor: torch.Tensor, dim: int) -> np.ndarray:
        name = first[id(tensor)]
        start = graph.slots.base[name][dim]
        return stays[start : start + tensor.shape[dim]]

    for path, module, adapter in adapters.adapted(graph.modules):
        if adapter.sizes is None:
            continue
        whole = adapters.sizes_of(path, module, adapter)
        for name, value in adapters.sizes_of(path, module, adapter, keep).items():
            if value != whole[name]:
                yield path, name, list(value) if isinstance(value, tuple) else value


def _attribute_value(current: Any, sizes: list[int]) -> Any:
    if isinstance(current, int) and len(set(sizes)) == 1:
        return sizes[0]
    return sizes


def _add_rows(modules: Mapping[str, nn.Module], kept: dict[str, list[Any]], groups: dict[str, int]) -> None:
    """Dim 1 of a grouped weight is written out as one row of columns per output that stays."""
    for path, module in modules.items():
        name = f"{path}.weight".lstrip(".")
        if isinstance(module, ConvolutionBase) and module.groups > 1 and not module.transposed:
            dims = kept.get(name)
            if dims is not None and dims[1] is not None:
                rows = module.weight.shape[0] if dims[0] is None else len(dims[0])
                dims[1] = [dims[1]] * rows


def check_structure(model: nn.Module, graph: ChannelGraph, kept: np.ndarray, allocation: Allocation) -> Mismatch | None:
    """Trace the rewritten model on meta tensors and compare; None where it is the image of the original."""
    on_meta = graph.flow.trace.mode == "meta"
    small = materialise(model, allocation, sliced_on_meta if on_meta else sliced)
    return compare_models(graph, kept, small, copied=on_meta)


def compare_models(graph: ChannelGraph, kept: np.ndarray, small: nn.Module, *, copied: bool = False) -> Mismatch | None:
    """Trace a rewritten model and compare it with the original, in eval and, where it differs, train mode.

    Args:
        graph: of the original.
        kept: (neurons,) bool.
        small: the rewritten model.
        copied: `small` is a copy on meta tensors, to be used up.
    """
    slots = Slots.of(shapes_of(small))
    image = Image(graph, kept, slots)
    for flow in graph.flows:
        error: Exception | None = None
        last = copied and flow is graph.flows[-1]
        try:
            mode, training = flow.trace.mode, flow.trace.training
            trace = record(small, graph.inputs, mode, training=training, copied=last)
        except ForwardError as raised:
            trace, error = raised.partial, raised.cause
        try:
            new = run_rules(trace, slots, Facts(), graph.options)
        except RuleError as failed:
            new, error = failed.flow, failed
        mismatch = compare(flow, new, image, graph.facts.groups, error)
        if mismatch is not None:
            return mismatch
    return None


@dataclass
class _Mends:
    """Module attributes that follow the kept channels, because the forward reads them as sizes.

    Attributes:
        pieces: per (module, attribute) the labels whose kept count is its value.
        trial: the last ones, and the place (train mode, index) of the call that they are for.
        wrong: those that did not help there.
    """

    pieces: dict[tuple[str, str], tuple[np.ndarray, ...]] = field(default_factory=dict)
    trial: tuple[tuple[bool, int], list[tuple[str, str]]] | None = None
    wrong: set[tuple[str, str]] = field(default_factory=set)

    def judge(self, place: tuple[bool, int]) -> None:
        """Take the last ones back if the forward got no further with them."""
        if self.trial is not None and place <= self.trial[0]:
            for key in self.trial[1]:
                self.pieces.pop(key, None)
                self.wrong.add(key)
        self.trial = None

    def forget(self, paths: set[str]) -> None:
        """Take all of these modules back."""
        for key in [key for key in self.pieces if key[0] in paths]:
            del self.pieces[key]


def _repair(
    model: nn.Module, graph: ChannelGraph, plan: Plan, mismatch: Mismatch, mends: _Mends, notes: list[str]
) -> ChannelGraph:
    """Set an attribute, tie parts, or freeze; returns the graph to plan on."""
    op = mismatch.op
    flow = graph.flow if any(op is other for other in graph.flow.trace.ops) else graph.training_flow
    assert flow is not None
    mends.judge((flow.trace.training, op.index))
    alike = _alike_modules(model, op.module)
    attribute = _mend(model, graph, flow, op, alike, plan, mends)
    if attribute is not None:
        notes.append(f"{attribute!r} of {_class_name(model, op.module)} follows the kept channels")
        return graph
    options = graph.options
    if op.declared.stands_for == "split" and not alike <= options.equal_parts:
        notes.append(f"the parts of {op} stay equal: {mismatch.what}")
        options = options.equalising(alike)
    else:
        notes.append(f"the neurons at {op} stay: {mismatch.what}{_hint(model, flow, op)}")
        options = _freeze(flow, options, op, plan, graph)
    mends.forget(alike)
    return build_graph(model, graph.inputs, options)


def _mend(
    model: nn.Module, graph: ChannelGraph, flow: Flow, op: Op, alike: set[str], plan: Plan, mends: _Mends
) -> str | None:
    """Let an attribute of the running module, and of all of its class, follow the kept channels; its name."""
    found = _attribute_of_size(model, flow, op, plan, graph, mends)
    if found is None:
        return None
    attribute, fresh = found[0], []
    for other in _alike(flow, op, alike):
        again = _attribute_of_size(model, flow, other, plan, graph, mends, attribute)
        if again is not None:
            mends.pieces[other.module, attribute] = (again[1],)
            fresh.append((other.module, attribute))
    mends.trial = (flow.trace.training, op.index), fresh
    return attribute


def _freeze(flow: Flow, options: Options, op: Op, plan: Plan, graph: ChannelGraph) -> Options:
    """Keep the neurons at a call; where it loses none (a number in it changed), those at the last before it.

    The same call is meant in all modules of the class; where one of them is named a second time, all its calls.
    """
    stays = graph.stays(plan.kept)

    def loses(other: Op) -> bool:
        labels = [label for i in (*other.inputs(), *other.outputs) for label in flow.labels(i)]
        return any(label is not None and not stays[label].all() for label in labels)

    ops = flow.trace.ops
    found = next((other for other in (op, *ops[: op.index][::-1], *ops[op.index :]) if loses(other)), None)
    if found is None:
        raise RewriteError(f"the rewritten forward does not fit at {op}, though all its neurons stay")
    place = flow.places[found.index]
    again = any(other.module == place.module and other.operator == place.operator for other in options.frozen)
    call = None if again else place.call
    return options.freezing(Place(path, found.name, call) for path in _alike_modules(graph.model, found.module))


def _hint(model: nn.Module, flow: Flow, op: Op) -> str:
    """Which attributes of the running module may be sizes that the forward reads, and how to say what they follow."""
    module = model.get_submodule(op.module)
    sizes = {n for i in (*op.inputs(), *op.outputs) for n in flow.shape(i) if n > 1}
    sizes |= {n for n in numbers_in((op.args, op.kwargs)) if type(n) in (int, float) and n not in (0, 1)}
    held = [
        f"{name}={value!r}"
        for name, value in vars(module).items()
        if not name.startswith("_") and type(value) in (int, float, list, tuple) and _any_of(value, sizes)
    ]
    read = f"; its forward may read {', '.join(held)}" if held else ""
    return f"{read}; {adapters.how_to(module)}"


def _any_of(value: Any, sizes: set[Any]) -> bool:
    items = value if isinstance(value, (list, tuple)) else [value]
    return any(type(item) in (int, float) and item in sizes for item in items)


def _alike(flow: Flow, op: Op, paths: set[str]) -> list[Op]:
    return [other for other in flow.trace.ops if other.module in paths and other.name == op.name]


def _attribute_of_size(
    model: nn.Module, flow: Flow, op: Op, plan: Plan, graph: ChannelGraph, mends: _Mends, only: str | None = None
) -> tuple[str, np.ndarray] | None:
    """An int attribute of the running module that equals the old size of a dim that shrinks."""
    module = model.get_submodule(op.module)
    stays = graph.stays(plan.kept)
    taken = {(a.module, a.name) for a in graph.facts.attributes} | mends.pieces.keys() | mends.wrong
    taken |= {(op.module, name) for name in _known_sizes(op.module, module)}
    if describes_itself(module):
        return None
    for value in (*op.inputs(), *op.outputs):
        for label in flow.labels(value):
            if label is None or stays[label].all():
                continue
            for name, current in vars(module).items():
                fixed = name in _STRUCTURAL and not (name == "num_heads" and flow.counts_heads(label))
                plain = type(current) is int and current == len(label) and not fixed
                if plain and (only is None or name == only) and (op.module, name) not in taken:
                    return name, label
    return None


def _known_sizes(path: str, module: nn.Module) -> Collection[str]:
    """Attributes whose values the module's adapter gives."""
    adapter = adapters.find(module)
    return () if adapter is None else adapters.sizes_of(path, module, adapter)


_STRUCTURAL = frozenset({"groups", "num_heads", "stride", "padding", "dilation", "kernel_size", "training"})


def _alike_modules(model: nn.Module, path: str) -> set[str]:
    """Modules of the same class; for a layer of torch's own, those in the same place of the same class of block."""
    modules = modules_of(model)
    block = path
    while block and type(modules[block]).__module__.startswith("torch.nn."):
        block = block.rpartition(".")[0]
    block = block or path
    found = {other + path[len(block) :] for other, module in modules.items() if type(module) is type(modules[block])}
    return found & modules.keys()


def _class_name(model: nn.Module, path: str) -> str:
    return type(model.get_submodule(path)).__name__
