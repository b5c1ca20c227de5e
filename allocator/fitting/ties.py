"""Where a rewritten forward does not fit: neurons that go together, place by place, since one number counts both."""

from __future__ import annotations

import math
import re

from allocator.fitting.attributes import counts
from allocator.fitting.scene import Scene, alike_modules, labels_of
from allocator.flow.options import Pair
from allocator.modules import attribute_of, lies_within
from allocator.tracing.calls import Op

_MOST_SHARES = 16


def counted_by_one(scene: Scene, op: Op) -> set[Pair]:
    """Of a call, and its like in modules of the class, slots that an attribute counts which follows others already.

    Heads of keys and of values may be told apart where layers lie between them; one number is both.
    """
    flow, stays = scene.flow, scene.graph.stays(scene.plan.kept)
    alike, here = alike_modules(scene.graph.modules, op.module), flow.places[op.index]
    found: dict[Pair, bool] = {}
    for other in flow.trace.ops:
        place = flow.places[other.index]
        if place.module not in alike or place != here._replace(module=place.module):
            continue
        for (path, name), pieces in scene.mends.pieces.items() if place.module else ():
            current = attribute_of(scene.graph.modules[path], name)
            for label in labels_of(flow, other) if path == place.module and len(pieces) == 1 else ():
                if counts(flow, name, current, label) and len(label) == len(pieces[0]):
                    pair = tuple(label.tolist()), tuple(pieces[0].tolist())
                    differ = (stays[label] != stays[pieces[0]]).any()
                    found.setdefault(pair, other is op and bool(differ))
    new = found.keys() - scene.graph.options.tied
    return new if any(found[pair] for pair in new) else set()


def sized_like_another(scene: Scene, op: Op, what: str) -> set[Pair]:
    """Slots along a dim that a call was given the size of, and those of an earlier tensor's dim of that size.

    As of `y.view(*x.shape)`, which takes it that both are equally wide; `what` names the size that it got.
    """
    flow, stays = scene.flow, scene.graph.stays(scene.plan.kept)
    got = set(map(int, re.findall(r"\d+", what)))
    sized = op.outputs if op.declared.sized and op.declared.reshapes else ()
    for label in (label for value in sized for label in flow.labels(value) if label is not None):
        for other in reversed(flow.trace.ops[: op.index]):
            within = not op.module or lies_within(other.module, [op.module])
            for like in labels_of(flow, other) if within else ():
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


def in_shares(scene: Scene, op: Op, what: str) -> set[Pair]:
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


TIES = {
    sized_like_another: "go together with others that a size of theirs is read from",
    in_shares: "go from all shares of the dim alike",
}
