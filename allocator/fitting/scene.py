"""What there is to look at where a rewritten forward does not fit: a call's labels, and the modules that are alike."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import nn

from allocator.fitting.mends import Mends
from allocator.flow.flow import Flow
from allocator.flow.labels import Label
from allocator.graph.channel_graph import ChannelGraph
from allocator.planning.plan import Plan
from allocator.tracing.calls import Op


@dataclass
class Scene:
    """What there is to look at where a forward does not fit."""

    graph: ChannelGraph
    flow: Flow
    plan: Plan
    mends: Mends

    @cached_property
    def times(self) -> np.ndarray:
        """(slots,) how many there will be of each."""
        return np.asarray(self.graph.stays(self.plan.kept)).astype(np.int64)

    @property
    def place(self) -> int:
        """Which of the graph's flows it is in."""
        return self.graph.flows.index(self.flow)

    def changes(self, label: Label) -> bool:
        """Whether there will be another number of some of these slots."""
        return label is not None and bool((self.times[label] != 1).any())


def labels_of(flow: Flow, op: Op) -> Iterable[np.ndarray]:
    """Labels of all dims of what a call reads and gives; of one that repeats them, as samples in a row, once too."""
    for value in (*op.inputs(), *op.outputs):
        for label in flow.labels(value):
            if label is not None:
                yield label
                first = np.unique(label, return_index=True)[1]
                if len(first) < len(label):
                    yield label[np.sort(first)]


def meant(graph: ChannelGraph, path: str, before: Collection[str]) -> set[str]:
    """The module alone; all of its class where others of them did not fit before."""
    alike = alike_modules(graph.modules, path)
    return {path} if alike.isdisjoint(set(before) - {path}) else alike


def alike_modules(modules: dict[str, nn.Module], path: str) -> set[str]:
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
