"""Which layers a call hangs on that does not fit, though what it reads and gives is right.

As where a number in it is made of a channel count: a temperature, a mean by hand, a share of the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from allocator.errors import RewriteError
from allocator.fitting.check import check_plan
from allocator.fitting.scene import Scene, labels_of
from allocator.graph.channel_graph import ChannelGraph
from allocator.tracing.calls import Op
from allocator.verifying.structure import Mismatch

MOST_CHECKS = 48
"""Rewritten forwards that are looked at for one plan."""


def layers_counted(scene: Scene, mismatch: Mismatch) -> list[tuple[Mismatch, list[Op]]]:
    """Where a call hangs on other layers than its own: this one, and those after it of which a number alone differs.

    Args:
        scene: what there is to look at; its mends remember which layers each call hangs on.
        mismatch: a call that does not fit.

    Returns:
        Each with the calls whose channels it hangs on; nothing where the first does not fit for all of its own.
    """
    trial = _Trial(scene, mismatch.forward)
    found: list[tuple[Mismatch, list[Op]]] = []
    for each in (mismatch, *(other for other in mismatch.also if other.is_number)):
        layers = trial.elsewhere(each.op) if each.op is not None else []
        if not layers and each is mismatch:
            return []
        if layers:
            found.append((each, [op for layer in layers for op in _writers(scene.graph, layer)]))
    return found


class _NotFound(RewriteError):
    """It took too long."""


@dataclass
class _Trial:
    """Plans of which only some layers are cut, and which calls of one forward do not fit then."""

    scene: Scene
    forward: int
    seen: dict[tuple[int, ...], set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.alone = replace(self.scene.graph, flow=self.scene.flow, others=())
        self.gone: list[int] = np.unique(self.scene.graph.branch_of[self.scene.plan.kept != 1]).tolist()
        written = self.scene.graph.facts.written
        self.names = {layer: int(written[layer].label[0]) for layer in self.gone}

    def elsewhere(self, op: Op) -> list[int]:
        """The layers that a call hangs on; nothing where these are all of its own, or were not found in time."""
        units = [self.scene.graph.units(label.reshape(-1)) for label in labels_of(self.scene.flow, op)]
        own = {layer for each in units for layer in self.scene.graph.branch_of[each].tolist()}
        at_it = [layer for layer in self.gone if layer in own]
        before = self.scene.mends.counted.get((self.forward, op.index), ())
        known = [layer for layer in self.gone if self.names[layer] in before]
        try:
            if known and op.index in self.apart(known):
                found = known
            elif len(at_it) == 1 and op.index in self.apart(at_it):
                found = at_it
            else:
                found = self.hung_on(op.index)
        except _NotFound:
            return []
        self.scene.mends.counted[self.forward, op.index] = {*before, *(self.names[layer] for layer in found)}
        return found if found != at_it else []

    def hung_on(self, op: int) -> list[int]:
        """The layers of which each alone makes the difference; where none does, a smallest half that does.

        Layers are told apart by the digits of their numbers: of the two halves that a digit parts them into, one that
        makes no difference holds none of them. What is asked of one call tells of the others too.
        """
        left = self.gone
        for digit in range((len(self.gone) - 1).bit_length()):
            for side in (0, 1):
                half = [layer for i, layer in enumerate(self.gone) if i >> digit & 1 == side]
                if op not in self.apart(half):
                    left = [layer for layer in left if layer not in half]
        return left if len(left) == 1 else self.among(op, left or self.gone)

    def among(self, op: int, layers: list[int]) -> list[int]:
        """As `hung_on`, of these layers, by halves of halves."""
        if op not in self.apart(layers):
            return []
        half = len(layers) // 2
        return layers[:1] if not half else self.among(op, layers[:half]) + self.among(op, layers[half:]) or layers

    def apart(self, layers: list[int]) -> set[int]:
        """The calls that do not fit where these layers alone are cut."""
        key = tuple(layers)
        if key not in self.seen:
            if len(self.seen) == MOST_CHECKS:
                raise _NotFound
            kept = self.scene.plan.kept.copy()
            kept[~np.isin(self.scene.graph.branch_of, layers)] = 1
            found = check_plan(self.alone, replace(self.scene.plan, kept=kept), self.scene.mends.attributes())
            each = () if found is None else (found, *found.also)
            self.seen[key] = {other.op.index for other in each if other.op is not None}
        return self.seen[key]


def _writers(graph: ChannelGraph, layer: int) -> list[Op]:
    """The first call that gives what a layer writes."""
    written = graph.facts.written[layer]
    for flow in graph.flows:
        for op in flow.trace.ops:
            labels = [label for i in op.outputs for label in flow.labels(i) if label is not None]
            if any(np.isin(written.label, label).any() for label in labels):
                return [op]
    return []
