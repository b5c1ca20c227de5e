"""Where a rewritten forward does not fit: neurons that go together, place by place, since one number counts both."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import numpy as np

from allocator.fitting.attributes import counts
from allocator.fitting.scene import Scene, alike_modules, labels_of
from allocator.flow.options import Pair
from allocator.modules import attribute_of, lies_within
from allocator.tracing.calls import Op


def counted_by_one(scene: Scene, op: Op) -> set[Pair]:
    """Of a call, and its like in modules of the class, slots that an attribute counts which follows others already.

    Heads of keys and of values may be told apart where layers lie between them; one number is both.
    """
    flow, here = scene.flow, scene.flow.places[op.index]
    alike = alike_modules(scene.graph.modules, op.module)
    pairs, needed = set[Pair](), False
    for other in flow.trace.ops:
        place = flow.places[other.index]
        if place.module not in alike or place != here._replace(module=place.module):
            continue
        for (path, name), pieces in scene.mends.pieces.items():
            current = attribute_of(scene.graph.modules[path], name)
            for label in labels_of(flow, other) if path == place.module else ():
                if counts(flow, name, current, label):
                    pairs.add(_pair(label, pieces[0]))
                    needed |= other is op and _differ(scene, label, pieces[0])
    return pairs - scene.graph.options.tied if needed else set()


def sized_like_another(scene: Scene, op: Op, what: str) -> Iterator[set[Pair]]:
    """Slots along a dim that a call was given the size of, and those of an earlier tensor's dim of that size.

    As of `y.view(*x.shape)`, which takes it that both are equally wide; `what` names the size that it got.
    """
    flow = scene.flow
    got = set(map(int, re.findall(r"\d+", what)))
    sized = op.outputs if op.declared.sized and op.declared.reshapes else ()
    for label in (label for value in sized for label in flow.labels(value) if label is not None):
        for other in reversed(flow.trace.ops[: op.index]):
            within = not op.module or lies_within(other.module, [op.module])
            for like in labels_of(flow, other) if within else ():
                free = (scene.graph.unit_of_slot[like] >= 0).any()
                if free and len(like) == len(label) and _differ(scene, label, like) and scene.times[like].sum() in got:
                    yield {_pair(label, like)}


def in_shares(scene: Scene, op: Op, what: str) -> Iterator[set[Pair]]:
    """Slots of the shares of a dim that a call takes some of, as of `x[:, : x.shape[1] // 4]`: each loses the same."""
    label = scene.flow.labels(op.inputs()[0])[int(op.arg("dim") or 0)] if op.takes_range() else None
    if label is not None:
        start, end, _ = slice(op.arg("start"), op.arg("end")).indices(len(label))
        size = math.gcd(start, end, len(label))
        first, *others = label.reshape(-1, size)
        yield {_pair(first, share) for share in others if size > 1}


def _differ(scene: Scene, one: np.ndarray, other: np.ndarray) -> bool:
    """Whether of some slots there are others left than of those that are in their places."""
    return bool((scene.times[one] != scene.times[other]).any())


def _pair(one: np.ndarray, other: np.ndarray) -> Pair:
    """Slots that go together, in one order whichever is named first."""
    first, second = sorted((tuple(one.tolist()), tuple(other.tolist())))
    return first, second


TIES = {
    sized_like_another: "go together with others that a size of theirs is read from",
    in_shares: "go from all shares of the dim alike",
}
