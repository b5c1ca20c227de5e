"""Which layers a call hangs on that does not fit, though what it reads and gives is right: found by halves.

As where a number in it is made of a channel count: a temperature, a mean by hand, a share of the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from allocator.errors import RewriteError
from allocator.fitting.check import check_plan
from allocator.flow.facts import Attribute
from allocator.graph.channel_graph import ChannelGraph
from allocator.planning.plan import Plan
from allocator.tracing.calls import Op
from allocator.verifying.structure import Mismatch

MOST_CHECKS = 48
"""Rewritten forwards that are looked at for one call."""


def layers_counted(
    graph: ChannelGraph, plan: Plan, mismatch: Mismatch, mends: Sequence[Attribute], own: np.ndarray
) -> list[Op]:
    """The calls whose channels a call hangs on beside its own, as each of them alone shows.

    Args:
        graph, plan: the neurons, and what was chosen of them.
        mismatch: a call that does not fit.
        mends: attributes that follow the kept channels.
        own: neurons among what the call itself reads and gives.

    Returns:
        Nothing where it is for all of its own that the call does not fit.
    """
    layers = graph.branch_of
    gone = np.unique(layers[~plan.kept])
    at_it = np.intersect1d(gone, layers[own])
    trial = _Trial(graph, plan, mismatch, mends)
    try:
        if len(at_it) and trial.differs(at_it):
            found = trial.among(at_it) if len(at_it) > 1 else []
        else:
            found = trial.among(gone)
    except _NotFound:
        return []
    alone = sorted(found) == at_it.tolist()
    return [op for layer in found for op in _writers(graph, layer)] if not alone else []


class _NotFound(RewriteError):
    """It took too long."""


@dataclass
class _Trial:
    """Plans of which only some layers are cut."""

    graph: ChannelGraph
    plan: Plan
    mismatch: Mismatch
    mends: Sequence[Attribute]
    checks: int = 0

    def among(self, layers: np.ndarray) -> list[int]:
        """Those of these layers that make the difference; all of them where none does so alone."""
        if not self.differs(layers):
            return []
        if len(layers) == 1:
            return [int(layers[0])]
        half = len(layers) // 2
        return self.among(layers[:half]) + self.among(layers[half:]) or layers.tolist()

    def differs(self, layers: np.ndarray) -> bool:
        """Whether the call does not fit where these layers alone are cut."""
        self.checks += 1
        if self.checks > MOST_CHECKS:
            raise _NotFound
        kept = self.plan.kept | ~np.isin(self.graph.branch_of, layers)
        found = check_plan(self.graph, replace(self.plan, kept=kept), self.mends)
        at, op = self.mismatch, None if found is None else found.op
        return found is not None and op is not None and (found.forward, op) == (at.forward, at.op)


def _writers(graph: ChannelGraph, layer: int) -> list[Op]:
    """The first call that gives what a layer writes."""
    written = graph.facts.written[layer]
    for flow in graph.flows:
        for op in flow.trace.ops:
            labels = [label for i in op.outputs for label in flow.labels(i) if label is not None]
            if any(np.isin(written.label, label).any() for label in labels):
                return [op]
    return []
