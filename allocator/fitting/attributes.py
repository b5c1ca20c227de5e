"""Where a rewritten forward does not fit: attributes that hold a size, and may follow the kept channels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
    owners = [op.module]
    if running is not None and (not running or lies_within(op.module, [running])):
        owners.append(running)
    for owner in owners:
        attribute = _mend(scene, op, owner)
        if attribute is not None:
            others = alike_modules(graph.modules, owner)
            _note(scene, [(path, attribute) for path in others], type(graph.modules[owner]), notes)
            return True
    several = mends.together((scene.place, op.index))
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
    # One number may be the size of several dims there: the same call of the others is what tells which is meant.
    for other in sorted(alike, key=lambda other: places[other.index].call != places[op.index].call):
        path = owners[other.module]
        again = _attribute_of_size(scene, other, path, only=name)
        if again is not None and (path, name) not in fresh:
            scene.mends.pieces[path, name] = again[1]
            fresh.append((path, name))
    scene.mends.trial = (scene.place, op.index), fresh
    return name


def _attribute_of_size(
    scene: Scene, op: Op, owner: str, only: str | None = None
) -> tuple[str, tuple[np.ndarray, ...]] | None:
    """An attribute of a module that equals the old size of a dim of a call's that shrinks, and the dim's labels.

    It may also hold the sizes of several dims of the result in order, as of a view.
    """
    module = scene.graph.modules[owner]
    taken = _taken(scene, owner, module)
    held = _attributes(module)
    attributes = {name: current for name, current in held if name not in taken and only in (None, name)}
    for label in (*_up_to(scene.flow, op), *labels_of(scene.flow, op)):
        for name, current in attributes.items() if scene.changes(label) else ():
            if counts(scene.flow, name, current, label) and not scene.mends.was_wrong((owner, name), (label,)):
                return name, (label,)
    # A single number is the plainer reading; lists of sizes are looked at only where there is none.
    for name, current in attributes.items():
        whole = isinstance(current, (list, tuple)) and all(type(n) is int for n in current) and name not in _STRUCTURAL
        for pieces in (_dims_of_sizes(scene.flow, op, current), _one_of_sizes(scene, op, current)) if whole else ():
            if any(map(scene.changes, pieces)) and not scene.mends.was_wrong((owner, name), pieces):
                return name, pieces
    return None


def _up_to(flow: Flow, op: Op) -> Iterable[np.ndarray]:
    """Of a slice, labels of what lies before its end and before its start: numbers that are read there count these.

    Of a number below zero, labels of as many at the end of the dim.
    """
    label = flow.labels(op.inputs()[0])[int(op.arg("dim") or 0)] if op.takes_range() else None
    if label is not None:
        for number in (op.arg("end"), op.arg("start")):
            if number is not None:
                yield label[:number] if number > 0 else label[number:]


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, value) of a module's attributes, and of what its mappings hold by name."""
    for name, value in vars(module).items():
        yield name, value
        if isinstance(value, dict):
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


def _dims_of_sizes(flow: Flow, op: Op, sizes: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Labels of the dims of a result that have these sizes in this order; of a dim without channels, ones that stay."""
    for value in op.outputs[:1]:
        shape, labels = flow.shape(value), flow.labels(value)
        for first in range(len(shape)):
            dims = slice(first, first + len(sizes))
            if shape[dims] == tuple(sizes):
                pairs = zip(sizes, labels[dims], strict=True)
                return tuple(np.full(n, FROZEN) if label is None else label for n, label in pairs)
    return ()


def _one_of_sizes(scene: Scene, op: Op, sizes: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Labels of the numbers in a list, as of widths layer by layer: one is a dim's that shrinks, the others stay."""
    for label in filter(scene.changes, labels_of(scene.flow, op)):
        if sizes.count(len(label)) == 1:
            return tuple(label if n == len(label) else np.full(n, FROZEN) for n in sizes)
    return ()
