"""Where a rewritten forward does not fit: let an attribute follow, keep the parts of a split equal, or freeze."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from allocator import adapters
from allocator.errors import RewriteError
from allocator.fitting.counted import layers_counted
from allocator.fitting.mends import Mends
from allocator.flow.flow import Flow
from allocator.flow.labels import FROZEN
from allocator.flow.options import Options, Pair, Place, gives_dim
from allocator.graph.build import rebuilt
from allocator.graph.channel_graph import ChannelGraph
from allocator.modules import attribute_of, lies_within
from allocator.planning.plan import Plan
from allocator.rewriting.attributes import told_by_tensors
from allocator.rewriting.describe import AttributeKey
from allocator.tracing.calls import Op
from allocator.verifying.structure import Mismatch, numbers_in

# Attributes that count something else, even where they happen to equal a number of channels.
_STRUCTURAL = frozenset({"groups", "num_heads", "stride", "padding", "dilation", "kernel_size", "training"})

_NEAR = 3  # calls before a module that raises, of which one gave it what it got


def repair(graph: ChannelGraph, plan: Plan, mismatch: Mismatch, mends: Mends, notes: list[str]) -> ChannelGraph:
    """Set an attribute, tie parts, or freeze; returns the graph to plan on.

    Args:
        graph: the neurons that were planned on.
        plan: what was chosen of them.
        mismatch: where the rewritten forward does not fit.
        mends: attributes that follow; changed in place.
        notes: what was done; added to.
    """
    op = mismatch.op
    if op is None:
        raise RewriteError(f"the rewritten forward does not fit: {mismatch}")
    flow = graph.flows[mismatch.forward]
    place = mismatch.forward, op.index
    stopped_before = mends.judge(place)
    mends.retract(notes)
    if stopped_before:  # by what was tried: without it, the forward gets to where it did not fit
        return graph
    given_up = mends.ties_in_vain(place, notes)
    scene = _Scene(graph, flow, plan, mends)
    if _follows(scene, op, mismatch.module, notes):
        return rebuilt(graph, graph.options.untying(given_up)) if given_up else graph
    given = _given(graph, flow, mismatch, plan)
    counted = _counted_by_one(scene, op)
    if counted:
        kind = type(graph.modules[op.module]).__name__
        notes.append(f"of {kind}, neurons that one attribute counts go together, place by place: {mismatch.what}")
        return rebuilt(graph, graph.options.untying(given_up).tying(counted))
    for find, said in _TIES.items():
        pairs = find(scene, op, mismatch.what) - mends.apart - graph.options.tied
        if pairs:
            notes.append(f"neurons at {op} {said}: {mismatch.what}")
            mends.tied = (mismatch.forward, op.index), pairs, notes[-1]
            return rebuilt(graph, graph.options.untying(given_up).tying(pairs))
    if op.declared.splits and op.declared.sized and op.module not in graph.options.equal_parts:
        notes.append(f"the parts of {op} stay equal: {mismatch.what}")
        options = graph.options.equalising(_meant(graph, op.module, graph.options.equal_parts))
    elif given is not None:
        hint = _hint(graph.modules[mismatch.module or ""], flow, given)
        notes.append(f"the neurons at {given} stay: {mismatch.module} is given them, and {mismatch.what}{hint}")
        options = graph.options.freezing([flow.places[given.index]._replace(part="gives")])
    else:
        counted_at = _counted_elsewhere(scene, mismatch, op)
        places = {place for each in counted_at for place in _freezing(graph, flow, each, "gives").frozen}
        more = places - graph.options.frozen
        where = f"{' and '.join(map(str, counted_at))} stay, which {op} counts" if more else f"{op} stay"
        notes.append(f"the neurons at {where}: {mismatch.what}{_hint(graph.modules[op.module], flow, op)}")
        options = graph.options.freezing(more) if more else _freeze(graph, flow, mismatch, op, plan)
    before = {place.module for place in graph.options.frozen} | graph.options.equal_parts
    mends.forget(_meant(graph, op.module, before))
    mends.retract(notes)
    return rebuilt(graph, options.untying(given_up))


# Attributes that follow -----------------------------------------------------------------------------


@dataclass
class _Scene:
    """What there is to look at where a forward does not fit."""

    graph: ChannelGraph
    flow: Flow
    plan: Plan
    mends: Mends


def _follows(scene: _Scene, op: Op, running: str | None, notes: list[str]) -> bool:
    """Let an attribute follow that may make a call fit, or several at once of which none did; whether there is one.

    Args:
        scene: what there is to look at.
        op: the call that does not fit.
        running: path of the module in which the forward stopped: a block may check what its layers do.
        notes: what was done; added to.
    """
    graph, mends = scene.graph, scene.mends
    for owner in dict.fromkeys((op.module, running)):
        if owner is None or (owner and not lies_within(op.module, [owner])):
            continue
        attribute = _mend(scene, op, owner)
        if attribute is not None:
            others = _alike_modules(graph.modules, owner)
            _note(scene, [(path, attribute) for path in others], type(graph.modules[owner]), notes)
            return True
    several = mends.together((graph.flows.index(scene.flow), op.index))
    for path, attribute in several:
        _note(scene, [(path, attribute)], type(graph.modules[path]), notes)
    return bool(several)


def _note(scene: _Scene, keys: list[AttributeKey], kind: type, notes: list[str]) -> None:
    """Say that an attribute of a class follows, once."""
    note = f"{keys[0][1]!r} of {kind.__name__} follows the kept channels"
    if note not in scene.mends.notes:
        notes.append(note)
    scene.mends.notes.setdefault(note, []).extend(keys)


def _mend(scene: _Scene, op: Op, owner: str) -> str | None:
    """Let an attribute of a module follow the kept channels, in all of its class; the attribute's name.

    Args:
        scene: what there is to look at.
        op: the call that does not fit.
        owner: path of the module that made it, or of one around that.
    """
    found = _attribute_of_size(scene, op, owner)
    if found is None:
        return None
    name, fresh = found[0], []
    inside = op.module[len(owner) :]
    owners = {path + inside: path for path in _alike_modules(scene.graph.modules, owner)}
    places = scene.flow.places
    alike = [other for other in scene.flow.trace.ops if other.module in owners and other.name == op.name]
    if op.takes_range():
        alike = [other for other in alike if other.arg("dim") == op.arg("dim")]
    # One number may be the size of several dims there: the same call of the others is what tells which is meant.
    for other in sorted(alike, key=lambda other: places[other.index].call != places[op.index].call):
        path = owners[other.module]
        again = _attribute_of_size(scene, other, path, only=name)
        if again is not None and (path, name) not in fresh:
            scene.mends.pieces[path, name] = again[1]
            fresh.append((path, name))
    scene.mends.trial = (scene.graph.flows.index(scene.flow), op.index), fresh
    return name


def _attribute_of_size(
    scene: _Scene, op: Op, owner: str, only: str | None = None
) -> tuple[str, tuple[np.ndarray, ...]] | None:
    """An attribute of a module that equals the old size of a dim of a call's that shrinks, and the dim's labels.

    It may also hold the sizes of several dims of the result in order, as of a view.
    """
    module = scene.graph.modules[owner]
    taken = _taken(scene, owner, module)
    attributes = {}
    for name, current in _attributes(module):
        if name not in taken and only in (None, name):
            attributes[name] = current
    stays = scene.graph.stays(scene.plan.kept)
    wrong = {name: scene.mends.wrong[owner, name] for name in attributes if (owner, name) in scene.mends.wrong}
    for label in _up_to(scene.flow, op):
        for name, current in attributes.items() if not (stays[label] == 1).all() else ():
            tried = any(len(each) == 1 and np.array_equal(each[0], label) for each in wrong.get(name, ()))
            if _counts(scene.flow, name, current, label) and not tried:
                return name, (label,)
    attributes = {name: current for name, current in attributes.items() if name not in wrong}
    # A single number is the plainer reading; lists of sizes are looked at only where there is none.
    for label in _labels_of(scene.flow, op):
        if (stays[label] == 1).all():
            continue
        for name, current in attributes.items():
            if _counts(scene.flow, name, current, label):
                return name, (label,)
    for name, current in attributes.items():
        for pieces in (_dims_of_sizes(scene.flow, op, current), _one_of_sizes(scene, op, name, current)):
            if pieces is not None and not all((stays[piece] == 1).all() for piece in pieces):
                return name, pieces
    return None


def _up_to(flow: Flow, op: Op) -> Iterable[np.ndarray]:
    """Of a slice, labels of what lies before its end and before its start: numbers that are read there count these."""
    if not op.takes_range() or op.arg("step") != 1:
        return
    label = flow.labels(op.inputs()[0])[int(op.arg("dim") or 0)]
    if label is None:
        return
    for number in (op.arg("end"), op.arg("start")):
        if number is not None and 0 < number <= len(label):
            yield label[:number]


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, value) of a module's attributes, and of what its mappings hold by name."""
    for name, value in vars(module).items():
        yield name, value
        if isinstance(value, dict) and not name.startswith("_"):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items() if type(key) is str and "." not in key)


def _counts(flow: Flow, name: str, current: Any, label: np.ndarray) -> bool:
    """Whether an attribute may be the number of a dim's channels; what shapes a layer is that only of heads."""
    if type(current) is not int or current != len(label):
        return False
    return name not in _STRUCTURAL or (name == "num_heads" and flow.counts_heads(label))


def _dims_of_sizes(flow: Flow, op: Op, sizes: Any) -> tuple[np.ndarray, ...] | None:
    """Labels of the dims of a result that have these sizes in this order; of a dim without channels, ones that stay."""
    whole = isinstance(sizes, (list, tuple)) and len(sizes) > 0 and all(type(n) is int for n in sizes)
    shape = flow.shape(op.outputs[0]) if whole and op.outputs else ()
    for first in range(len(shape) - len(sizes) + 1 if shape else 0):
        if shape[first : first + len(sizes)] == tuple(sizes):
            labels = flow.labels(op.outputs[0])[first : first + len(sizes)]
            return tuple(np.full(n, FROZEN) if label is None else label for n, label in zip(sizes, labels, strict=True))
    return None


def _one_of_sizes(scene: _Scene, op: Op, name: str, sizes: Any) -> tuple[np.ndarray, ...] | None:
    """Labels of the numbers in a list, as of widths layer by layer: one is a dim's that shrinks, the others stay."""
    whole = isinstance(sizes, (list, tuple)) and name not in _STRUCTURAL and all(type(n) is int for n in sizes)
    stays = scene.graph.stays(scene.plan.kept)
    for label in _labels_of(scene.flow, op) if whole else ():
        if list(sizes).count(len(label)) == 1 and not (stays[label] == 1).all():
            return tuple(label if n == len(label) else np.full(n, FROZEN) for n in sizes)
    return None


def _counted_by_one(scene: _Scene, op: Op) -> set[Pair]:
    """Of a call, and its like in modules of the class, slots that an attribute counts which follows others already.

    Heads of keys and of values may be told apart where layers lie between them; one number is both.
    """
    flow, stays = scene.flow, scene.graph.stays(scene.plan.kept)
    alike, here = _alike_modules(scene.graph.modules, op.module), flow.places[op.index]
    found: dict[Pair, bool] = {}
    for other in flow.trace.ops:
        place = flow.places[other.index]
        if place.module not in alike or place != here._replace(module=place.module):
            continue
        for (path, name), pieces in scene.mends.pieces.items() if place.module else ():
            current = attribute_of(scene.graph.modules[path], name)
            for label in _labels_of(flow, other) if path == place.module and len(pieces) == 1 else ():
                if _counts(flow, name, current, label) and len(label) == len(pieces[0]):
                    pair = tuple(label.tolist()), tuple(pieces[0].tolist())
                    differ = (stays[label] != stays[pieces[0]]).any()
                    found.setdefault(pair, other is op and bool(differ))
    new = found.keys() - scene.graph.options.tied
    return new if any(found[pair] for pair in new) else set()


def _sized_like_another(scene: _Scene, op: Op, what: str) -> set[Pair]:
    """Slots along a dim that a call was given the size of, and those of an earlier tensor's dim of that size.

    As of `y.view(*x.shape)`, which takes it that both are equally wide; `what` names the size that it got.
    """
    flow, stays = scene.flow, scene.graph.stays(scene.plan.kept)
    got = set(map(int, re.findall(r"\d+", what)))
    sized = op.outputs if op.declared.sized and op.declared.reshapes else ()
    for label in (label for value in sized for label in flow.labels(value) if label is not None):
        for other in reversed(flow.trace.ops[: op.index]):
            within = not op.module or lies_within(other.module, [op.module])
            for like in _labels_of(flow, other) if within else ():
                pair = tuple(label.tolist()), tuple(like.tolist())
                differ = len(like) == len(label) > 1 and (stays[label] != stays[like]).any()
                known = scene.graph.options.tied | scene.mends.apart
                if (
                    differ
                    and (scene.graph.unit_of_slot[like] >= 0).any()
                    and int(stays[like].sum()) in got
                    and not {pair, pair[::-1]} & known
                ):
                    return {pair}
    return set()


_MOST_SHARES = 16


def _in_shares(scene: _Scene, op: Op, what: str) -> set[Pair]:
    """Slots of the shares of a dim that a call takes some of, as of `x[:, : x.shape[1] // 4]`: each loses the same."""
    if not op.takes_range() or op.arg("step") != 1:
        return set()
    label = scene.flow.labels(op.inputs()[0])[int(op.arg("dim") or 0)]
    if label is None:
        return set()
    start, end, _ = slice(op.arg("start"), op.arg("end")).indices(len(label))
    size = math.gcd(start, end, len(label))
    if not 1 < len(label) // size <= _MOST_SHARES or size == 1:
        return set()
    first, *others = (tuple(share.tolist()) for share in label.reshape(-1, size))
    return {(share, first) for share in others}


_TIES = {
    _sized_like_another: "go together with others that a size of theirs is read from",
    _in_shares: "go from all shares of the dim alike",
}


def _taken(scene: _Scene, path: str, module: nn.Module) -> set[str]:
    """Attributes of a module that follow already, by what its adapter says or of themselves too."""
    names = {each.name for each in scene.graph.facts.attributes if each.module == path}
    names |= {name for owner, name in scene.mends.pieces if owner == path}
    names |= told_by_tensors(module)
    adapter = adapters.find(module)
    if adapter is not None:
        names |= adapters.sizes_of(path, module, adapter).keys()
    return names


def _labels_of(flow: Flow, op: Op) -> Iterable[np.ndarray]:
    """Labels of all dims of what a call reads and gives; of one that repeats them, as samples side by side do, once."""
    for value in (*op.inputs(), *op.outputs):
        for label in flow.labels(value):
            if label is not None:
                yield label
                once = len(np.unique(label))
                if 1 < once < len(label) and not len(label) % once and (label.reshape(-1, once) == label[:once]).all():
                    yield label[:once]


def _counted_elsewhere(scene: _Scene, mismatch: Mismatch, op: Op) -> list[Op]:
    """Calls that give the channels which a call counts that reads and gives others; nothing where it counts its own."""
    graph, plan = scene.graph, scene.plan
    slots = np.concatenate([np.zeros(0, dtype=np.int64), *(label.reshape(-1) for label in _labels_of(scene.flow, op))])
    own = graph.units(slots)
    if mismatch.module is not None or not (mismatch.is_number or plan.kept[own].all()):
        return []
    return layers_counted(graph, plan, mismatch, scene.mends.attributes(), own)


# What stays -----------------------------------------------------------------------------------------


def _given(graph: ChannelGraph, flow: Flow, mismatch: Mismatch, plan: Plan) -> Op | None:
    """What made the neurons that a module was given which raised before it made a call; None where that is not so.

    The call that the forward stopped at is then of another module, which has nothing to do with it.
    """
    op, where = mismatch.op, mismatch.module
    if op is None or not where or not op.module:
        return None
    if lies_within(op.module, [where]) or lies_within(where, [op.module]):
        return None
    stays = graph.stays(plan.kept)
    for other in flow.trace.ops[max(op.index - _NEAR, 0) : op.index][::-1]:
        if flow.places[other.index]._replace(part="gives") in graph.options.frozen:
            return None
        if any((stays[label] != 1).any() for label in _labels_of(flow, other)):
            return other
    return None


def _freeze(graph: ChannelGraph, flow: Flow, mismatch: Mismatch, op: Op, plan: Plan) -> Options:
    """Keep the neurons at a call; where it loses none (a number in it changed), those at the last before it.

    What its module does comes first, also what it would do next: a module may check its sizes before it does anything.
    Of a call that was not made, since the forward raised before, what it was to read: what it would have given had no
    part in it, and may be a whole stream's. Of one that gives other sizes, the dims that these are of.
    """
    stays = graph.stays(plan.kept)
    labels = {(which, dim): flow.labels(op.outputs[which])[dim] for which, dim in mismatch.dims}
    lost = [at for at, label in labels.items() if label is not None and (stays[label] != 1).any()]
    if lost:
        dims = [_freezing(graph, flow, op, gives_dim(*at)).frozen for at in lost]
        return graph.options.freezing(frozenset[Place]().union(*dims))
    ops = flow.trace.ops
    read = (label for i in op.inputs() if flow.trace.values[i].name is None for label in flow.labels(i))
    reads_less = any(label is not None and (stays[label] != 1).any() for label in read)
    if mismatch.module is not None and reads_less and not graph.options.freezes(flow.places[op.index], "reads"):
        return _freezing(graph, flow, op, "reads")
    nearest = [*ops[: op.index][::-1], *ops[op.index :]]
    within = [other for other in nearest if not op.module or lies_within(other.module, [op.module])]
    for culprit in (op, *within, *nearest):
        if any((stays[label] != 1).any() for label in _labels_of(flow, culprit)):
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
    modules = _meant(graph, culprit.module, {module for module, operator in named if operator == place.operator})
    in_heads = {flow.places[other.index]: flow.heads_at(other) is not None for other in flow.trace.ops}
    here = in_heads[place]
    places = [Place(path, culprit.name, call) for path in modules]
    return graph.options.freezing(each._replace(part=part) for each in places if in_heads.get(each, here) == here)


def _meant(graph: ChannelGraph, path: str, before: Collection[str]) -> set[str]:
    """The module alone; all of its class where others of them did not fit before."""
    alike = _alike_modules(graph.modules, path)
    return {path} if alike.isdisjoint(set(before) - {path}) else alike


def _alike_modules(modules: dict[str, nn.Module], path: str) -> set[str]:
    """Modules of the same class; for a layer of torch's own, those in the same place of the same class of block.

    A block that another holds under a name of its own (`qkv` of an attention) is like those that are held so: wrappers
    of a convolution and its norm are all of one class, wherever they stand.
    """
    block = _block_of(modules, path)
    place = path[len(block) :]
    holder = _holder_of(modules, block)
    places = {
        other + place
        for other, module in modules.items()
        if type(module) is type(modules[block]) and _holder_of(modules, other) == holder
    }
    return places & modules.keys()


def _block_of(modules: dict[str, nn.Module], path: str) -> str:
    """The path of the nearest module that is none of torch's own; the path itself where there is none."""
    block = path
    while block and type(modules[block]).__module__.startswith("torch.nn."):
        block = block.rpartition(".")[0]
    return block or path


def _holder_of(modules: dict[str, nn.Module], path: str) -> tuple[type, str] | None:
    """The class of the module that holds a block as an attribute, and the attribute; None for one of a sequence."""
    owner, _, name = path.rpartition(".")
    if not path or name.isdigit():
        return None
    return type(modules[owner]), name


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
