"""Module attributes that hold sizes: which of them a forward is likely to read, and what they follow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from allocator import adapters
from allocator.flow.facts import Attribute
from allocator.flow.labels import Label, Slots
from allocator.modules import lies_within
from allocator.torch_private import ConvolutionBase, tree_flatten


def attributes_of_groups(
    path: str, module: nn.Module, representatives: np.ndarray, *, owns_weight: bool
) -> list[Attribute]:
    """Attributes that count the groups of a layer whose groups come and go whole.

    Torch's own layers are told by their weight how many there are; other modules hold the number as an attribute.

    Args:
        path, module: the running module.
        representatives: one slot per group.
        owns_weight: whether the weight is a parameter and not computed.
    """
    if isinstance(module, ConvolutionBase) or (owns_weight and isinstance(module, nn.GroupNorm)):
        return []
    count = len(representatives)
    names = [name for name, value in vars(module).items() if "groups" in name and type(value) is int and value == count]
    return [Attribute(path, name, (representatives,)) for name in names]


def stored_in(path: str, module: nn.Module | None, slots: Slots, rows: Label) -> str | None:
    """Of a convolution whose weight is computed, the parameter within it whose rows that weight has."""
    if rows is None or not rows.size or not isinstance(module, ConvolutionBase):
        return None
    name = slots.name_of(int(rows[0]))
    own = name and lies_within(name, [path]) and np.array_equal(slots.labels(name)[0], rows)
    return name if own else None


def attributes_of_sizes(
    path: str, module: nn.Module, sizes: object, pieces: Sequence[np.ndarray]
) -> list[Attribute] | None:
    """Attributes that hold the sizes of a split, so that each of its parts may shrink by itself.

    Args:
        path, module: the running module.
        sizes: what the split was called with, one size or several.
        pieces: labels of the parts.

    Returns:
        The attributes that have to follow, none where the module's adapter says how; of parts that are as large as one
        another, one for the first. None where no attribute holds the sizes, or all parts are alike.
    """
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):  # its gates, which it tells apart by nothing but their number
        return None
    if _declared(module, sizes):
        return []
    fields = vars(module)
    whole = [name for name, value in fields.items() if _same_sizes(value, sizes)]
    if whole:
        return [Attribute(path, name, tuple(pieces)) for name in whole]
    if isinstance(sizes, int):
        return None
    first_of = {len(piece): piece for piece in reversed(pieces)}
    if len(first_of) < min(len(pieces), 2):
        return None
    found = []
    for size, piece in reversed(first_of.items()):
        names = [name for name, value in fields.items() if type(value) is int and value == size]
        if not names:
            return None
        found.append(Attribute(path, names[0], (piece,)))
    return found


def not_told_apart(
    module: nn.Module, sizes: object, pieces: Sequence[np.ndarray], attributes: Sequence[Attribute]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of parts of a split that have to stay equal: the adapter, or an attribute, is one number for the two.

    Args:
        module: the running module.
        sizes, pieces: as for `attributes_of_sizes`.
        attributes: what that gave.
    """
    if not isinstance(sizes, (list, tuple)):
        return []  # one number may become a list of them
    known = Counter([*_known(module), *(len(each.pieces[0]) for each in attributes if len(each.pieces) == 1)])
    pairs, alike = [], dict[int, list[np.ndarray]]()
    for piece in pieces:
        alike.setdefault(len(piece), []).append(piece)
    for size, parts in alike.items():
        if 0 < known[size] < len(parts):
            pairs += [(part, parts[0]) for part in parts[1:]]
    return pairs


def _declared(module: nn.Module, sizes: object) -> bool:
    """Whether the module's adapter says how these sizes follow the channels."""
    known = set(_known(module))
    return bool(known) and known.issuperset(sizes if isinstance(sizes, (list, tuple)) else [sizes])


def _known(module: nn.Module) -> list[Any]:
    """The numbers that the module's adapter gives."""
    adapter = adapters.find(module)
    if adapter is None or adapter.sizes is None:
        return []
    numbers: list[Any] = tree_flatten(adapters.sizes_of("", module, adapter))[0]
    return numbers


def _same_sizes(value: object, sizes: object) -> bool:
    if isinstance(sizes, int):
        return type(value) is int and value == sizes
    return isinstance(value, (list, tuple)) and isinstance(sizes, (list, tuple)) and list(value) == list(sizes)
