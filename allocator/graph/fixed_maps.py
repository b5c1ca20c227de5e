"""Fixed layers at the ends of a network: what they read or write are an image's channels, and no neurons.

A network for images may begin or end with a layer that is not trained: it takes the mean off and puts it back, or turns
colours into brightness. Of its weights nothing tells that the three channels on its other side are no neurons either.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from allocator.flow.facts import Facts, Frozen
from allocator.flow.labels import FROZEN, Slots
from allocator.graph.neurons import components

MOST_CHANNELS = 4
"""Of an image: red, green, blue and how much it covers."""


def freeze_beyond_fixed_maps(tensors: Mapping[str, torch.Tensor], slots: Slots, facts: Facts) -> None:
    """Where one side of a fixed map must stay, so must the other.

    Args:
        tensors: the model's parameters and buffers, by name.
        slots: their numbers.
        facts: what the rules noted; added to.
    """
    maps = _fixed_maps(tensors, slots, facts)
    while maps:
        component = components(slots.total, _all_ties(facts))
        frozen = component == component[FROZEN]
        begun = [pair for pair in maps if frozen[pair[0]].all() or frozen[pair[1]].all()]
        for pair in begun:
            for label in pair:
                name = slots.name_of(int(label[0]))
                facts.frozen.append(Frozen(label, name.rpartition(".")[0], "a fixed layer at an end of the network"))
        if not begun:
            break
        maps = [pair for pair in maps if not any(pair is each for each in begun)]


def _all_ties(facts: Facts) -> list[tuple[np.ndarray, np.ndarray]]:
    ties = [(tie.a, tie.b) for tie in facts.ties]
    return ties + [(each.label, np.full(len(each.label), FROZEN)) for each in facts.frozen]


def _fixed_maps(tensors: Mapping[str, torch.Tensor], slots: Slots, facts: Facts) -> list[tuple[np.ndarray, np.ndarray]]:
    """Labels of both sides of every weight that maps channels to channels, pixel by pixel, and is not learned."""
    written = {int(each.label.flat[0]) for each in facts.written if each.label.size}
    read = {int(label.flat[0]) for label in facts.read if label.size}
    maps = []
    for name, tensor in tensors.items():
        if tensor.dim() < 2 or any(size != 1 for size in tensor.shape[2:]) or not _is_fixed(tensor):
            continue
        first, second = (label for label in slots.labels(name)[:2])
        for ahead, behind in ((first, second), (second, first)):
            if int(ahead[0]) in written and int(behind[0]) in read:
                maps.append((ahead, behind))
                break
    return maps


def _is_fixed(weight: torch.Tensor) -> bool:
    """Whether a weight is an image's channels mixed as nobody learned it, or any channels scaled one by one.

    One that is nothing but zeros scales none: a layer begins so that is to be of no effect at first.
    """
    rows, columns = weight.shape[:2]
    learned = isinstance(weight, nn.Parameter) and weight.requires_grad
    if not learned and max(rows, columns) <= MOST_CHANNELS:
        return True
    if rows != columns or rows == 1 or weight.is_meta or weight.layout is not torch.strided:
        return False
    matrix = weight.detach().reshape(rows, columns)
    diagonal = matrix.diagonal()
    return bool(diagonal.any()) and bool((matrix == torch.diag(diagonal)).all())
