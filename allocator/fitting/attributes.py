"""Where a rewritten forward does not fit: attributes that hold a size, and may follow the kept channels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import nn

from allocator import adapters
from allocator.fitting.scene import Scene, alike_modules, labels_of
from allocator.flow.flow import Flow
from allocator.flow.labels import FROZEN
from allocator.modules import lies_within
from allocator.rewriting.attributes import told_by_tensors
from allocator.rewriting.describe import AttributeKey
from allocator.tracing.calls import Op

# Attributes that count something else, even where they happen to equal a number of channels.
_STRUCTURAL = frozenset({"groups", "num_heads", "stride", "padding", "dilation", "kernel_size", "training"})


def follows(scene: Scene, op: Op, running: str | None, notes: list[str]) -> bool:
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
            others = alike_modules(graph.modules, owner)
            _note(scene, [(path, attribute) for path in others], type(graph.modules[owner]), notes)
            return True
    several = mends.together((graph.flows.index(scene.flow), op.index))
    for path, attribute in several:
        _note(scene, [(path, attribute)], type(graph.modules[path]), notes)
    return bool(several)


def _note(scene: Scene, keys: list[AttributeKey], kind: type, notes: list[str]) -> None:
    """Say that an attribute of a class follows, once."""
    note = f"{keys[0][1]!r} of {kind.__name__} follows the kept channels"
    if note not in scene.mends.notes:
        notes.append(note)
    scene.mends.notes.setdefault(note, []).extend(keys)


def _mend(scene: Scene, op: Op, owner: str) -> str | None:
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
    owners = {path + inside: path for path in alike_modules(scene.graph.modules, owner)}
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
    scene: Scene, op: Op, owner: str, only: str | None = None
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
            if counts(scene.flow, name, current, label) and not tried:
                return name, (label,)
    attributes = {name: current for name, current in attributes.items() if name not in wrong}
    # A single number is the plainer reading; lists of sizes are looked at only where there is none.
    for label in labels_of(scene.flow, op):
        if (stays[label] == 1).all():
            continue
        for name, current in attributes.items():
            if counts(scene.flow, name, current, label):
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


def _taken(scene: Scene, path: str, module: nn.Module) -> set[str]:
    """Attributes of a module that follow already, by what its adapter says or of themselves too."""
    names = {each.name for each in scene.graph.facts.attributes if each.module == path}
    names |= {name for owner, name in scene.mends.pieces if owner == path}
    names |= told_by_tensors(module)
    adapter = adapters.find(module)
    if adapter is not None:
        names |= adapters.sizes_of(path, module, adapter).keys()
    return names


def counts(flow: Flow, name: str, current: Any, label: np.ndarray) -> bool:
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


def _one_of_sizes(scene: Scene, op: Op, name: str, sizes: Any) -> tuple[np.ndarray, ...] | None:
    """Labels of the numbers in a list, as of widths layer by layer: one is a dim's that shrinks, the others stay."""
    whole = isinstance(sizes, (list, tuple)) and name not in _STRUCTURAL and all(type(n) is int for n in sizes)
    stays = scene.graph.stays(scene.plan.kept)
    for label in labels_of(scene.flow, op) if whole else ():
        if list(sizes).count(len(label)) == 1 and not (stays[label] == 1).all():
            return tuple(label if n == len(label) else np.full(n, FROZEN) for n in sizes)
    return None
