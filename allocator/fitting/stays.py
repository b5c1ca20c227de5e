"""Where a rewritten forward does not fit, and nothing follows: which neurons stay, and what is said of them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from allocator import adapters
from allocator.errors import RewriteError
from allocator.fitting.counted import layers_counted
from allocator.fitting.scene import Scene, labels_of, meant
from allocator.flow.flow import Flow
from allocator.flow.options import Options, Place, gives_dim
from allocator.graph.channel_graph import ChannelGraph
from allocator.modules import lies_within
from allocator.tracing.calls import Op
from allocator.verifying.structure import Mismatch, numbers_in

_NEAR = 3  # calls before a module that raises, of which one gave it what it got


def stay(scene: Scene, mismatch: Mismatch, op: Op, notes: list[str]) -> Options:
    """Keep neurons, so that a call fits; `notes` says which."""
    graph, flow = scene.graph, scene.flow
    given = _given(scene, mismatch, op)
    if given is not None:
        hint = _hint(graph.modules[mismatch.module or ""], flow, given)
        notes.append(f"the neurons at {given} stay: {mismatch.module} is given them, and {mismatch.what}{hint}")
        return graph.options.freezing([flow.places[given.index]._replace(part="gives")])
    counted = _counted_elsewhere(scene, mismatch, op)
    writers = [layer for _, layers in counted for layer in layers]
    more = {place for each in writers for place in _freezing(graph, flow, each, "gives").frozen} - graph.options.frozen
    for each, layers in counted if more else ():
        what = f"{' and '.join(map(str, layers))} stay, which {each.op} counts: {each.what}"
        notes.append(f"the neurons at {what}{_hint(graph.modules[op.module], flow, op)}")
    if more:
        return graph.options.freezing(more)
    notes.append(f"the neurons at {op} stay: {mismatch.what}{_hint(graph.modules[op.module], flow, op)}")
    return _freeze(scene, mismatch, op)


def _counted_elsewhere(scene: Scene, mismatch: Mismatch, op: Op) -> list[tuple[Mismatch, list[Op]]]:
    """Calls that count the channels of others than they read and give, and what gives these; none for its own."""
    whole = not any(map(scene.changes, labels_of(scene.flow, op)))
    if mismatch.module is not None or not (mismatch.is_number or whole):
        return []
    return layers_counted(scene, mismatch)


def _given(scene: Scene, mismatch: Mismatch, op: Op) -> Op | None:
    """What made the neurons that a module was given which raised before it made a call; None where that is not so.

    The call that the forward stopped at is then of another module, which has nothing to do with it.
    """
    flow, where = scene.flow, mismatch.module
    if not where or not op.module or lies_within(op.module, [where]) or lies_within(where, [op.module]):
        return None
    for other in flow.trace.ops[max(op.index - _NEAR, 0) : op.index][::-1]:
        if flow.places[other.index]._replace(part="gives") in scene.graph.options.frozen:
            return None
        if any(map(scene.changes, labels_of(flow, other))):
            return other
    return None


def _freeze(scene: Scene, mismatch: Mismatch, op: Op) -> Options:
    """Keep the neurons at a call; where it loses none (a number in it changed), those at the last before it.

    What its module does comes first, also what it would do next: a module may check its sizes before it does anything.
    Of a call that was not made, since the forward raised before, what it was to read: what it would have given had no
    part in it, and may be a whole stream's. Of one that gives other sizes, the dims that these are of.
    """
    graph, flow = scene.graph, scene.flow
    lost = [(which, dim) for which, dim in mismatch.dims if scene.changes(flow.labels(op.outputs[which])[dim])]
    if lost:
        dims = [_freezing(graph, flow, op, gives_dim(*at)).frozen for at in lost]
        return graph.options.freezing(frozenset[Place]().union(*dims))
    ops = flow.trace.ops
    read = (label for i in op.inputs() if flow.trace.values[i].name is None for label in flow.labels(i))
    reads_less = mismatch.module is not None and any(map(scene.changes, read))
    if reads_less and not graph.options.freezes(flow.places[op.index], "reads"):
        return _freezing(graph, flow, op, "reads")
    nearest = [*ops[: op.index][::-1], *ops[op.index :]]
    within = [other for other in nearest if not op.module or lies_within(other.module, [op.module])]
    for culprit in (op, *within, *nearest):
        if any(map(scene.changes, labels_of(flow, culprit))):
            return _freezing(graph, flow, culprit, "")
    raise RewriteError(f"the rewritten forward does not fit at {op}, though all its neurons stay")


def _freezing(graph: ChannelGraph, flow: Flow, culprit: Op, part: str) -> Options:
    """With the neurons at a call frozen, or with a part of them.

    Where another module of the class came before, the same call is meant in all of them, but not where it splits heads
    of an attention and here none, or the other way: of a single head nothing in a view tells. Where one is named a
    second time, all its calls are meant.
    """
    place = flow.places[culprit.index]
    named = {(other.module, other.operator) for other in graph.options.frozen if other.part == part}
    call = None if (place.module, place.operator) in named else place.call
    modules = meant(graph, culprit.module, {module for module, operator in named if operator == place.operator})
    in_heads = {flow.places[other.index]: flow.heads_at(other) is not None for other in flow.trace.ops}
    here = in_heads[place]
    places = [Place(path, culprit.name, call) for path in modules]
    return graph.options.freezing(each._replace(part=part) for each in places if in_heads.get(each, here) == here)


def _hint(module: nn.Module, flow: Flow, op: Op) -> str:
    """Which attributes of the running module may be sizes that the forward reads, and how to say what they follow."""
    sizes = {n for value in (*op.inputs(), *op.outputs) for n in flow.shape(value) if n > 1}
    sizes |= {n for n in numbers_in((op.args, op.kwargs)) if type(n) in (int, float) and n not in (0, 1)}
    held = []
    for name, value in vars(module).items():
        plain = not name.startswith("_") and type(value) in (int, float, list, tuple)
        if plain and _any_of(value, sizes):
            held.append(f"{name}={value!r}")
    read = f"; its forward may read {', '.join(held)}" if held else ""
    return f"{read}; {adapters.how_to(module)}"


def _any_of(value: Any, sizes: Collection[Any]) -> bool:
    items = value if isinstance(value, (list, tuple)) else [value]
    return any(type(item) in (int, float) and item in sizes for item in items)
