"""What an allocation out of a file may hold: finite numbers, a few levels of lists, and entries of the right kinds.

JSON may say much that no allocation is: NaN, numbers of a thousand digits, lists within lists. Each is told here,
before anything computes with it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from allocator.errors import FileError

_DEEPEST = 32
"""Levels of lists and mappings; an allocation composed of others has eight, and attributes of modules a few more."""
_LARGEST = 2**63
"""What no index and no size reaches: they become numbers of 64 bits."""


def check_plain(data: Any) -> None:
    """Raise FileError where JSON holds a number that cannot be computed with, or lists within lists without end."""
    waiting = [(data, 0)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, (dict, list, tuple)):
            if depth == _DEEPEST:
                raise FileError(f"the allocation holds lists or mappings more than {_DEEPEST} levels deep")
            inside = value.values() if isinstance(value, dict) else value
            # Index lists are most of an allocation: looked at without a step per number.
            if _are_whole(inside):
                _check_number(min(inside, default=0))
                _check_number(max(inside, default=0))
            else:
                waiting.extend((item, depth + 1) for item in inside)
        elif isinstance(value, (int, float)):
            _check_number(value)


def _check_number(value: float) -> None:
    try:
        finite = math.isfinite(value)
    except OverflowError:  # a whole number that no float comes near
        finite = False
    if not finite:
        raise FileError(f"the allocation holds {value!r:.40}, a number that nothing can be computed with")


def check_kept(kept: Mapping[str, Any]) -> None:
    """Per tensor a list of dims, each None or indices."""
    for name, dims in kept.items():
        if not isinstance(dims, list) or not all(dim is None or is_indices(dim) for dim in dims):
            raise FileError(f"the allocation's entry for {name} is not a list of index lists")


def check_added(added: Mapping[str, Any]) -> None:
    """Nothing, or how added indices are filled."""
    if not added:
        return
    reads = added.get("reads")
    seed = added.get("seed")
    if added.get("init") not in ("zero", "copy") or type(seed) is not int or not isinstance(reads, dict):
        raise FileError("the allocation's added indices are not said to be filled by 'init', 'seed' and 'reads'")
    if not 0 <= seed < _LARGEST:
        raise FileError(f"the allocation draws what it adds from the seed {seed!r:.40}, which is none")
    check_kept(reads)
    if not isinstance(added.get("averaged", {}), dict):
        raise FileError("the allocation's added indices that averages are taken over are not a mapping")
    check_kept(added.get("averaged", {}))


def check_attributes(attributes: Mapping[str, Any]) -> None:
    """Per module a mapping; whether the module has these attributes is found when the allocation is applied."""
    for path, values in attributes.items():
        if not isinstance(values, dict):
            raise FileError(f"the allocation's attributes of {path} are not a mapping")


def check_absent(absent: Collection[Any]) -> None:
    """Paths of layers; the whole model, whose path is empty, cannot be absent."""
    if not all(isinstance(path, str) and path for path in absent):
        raise FileError("the allocation's absent layers are not a list of names")


def check_renumbered(names: Collection[Any]) -> None:
    """Names of buffers."""
    if not all(isinstance(name, str) and name for name in names):
        raise FileError("the allocation's renumbered buffers are not a list of names")


def check_costs(costs: Mapping[str, Any]) -> None:
    """Per metric a mapping of numbers."""
    for name, figures in costs.items():
        numbers = figures.values() if isinstance(figures, dict) else (figures,)
        if not isinstance(figures, dict) or not all(isinstance(n, (int, float, type(None))) for n in numbers):
            raise FileError(f"the allocation's costs in {name} are not numbers")


def check_input_shapes(shapes: Collection[Any]) -> None:
    """Per input a list of sizes."""
    for shape in shapes:
        if (
            not isinstance(shape, (list, tuple))
            or not _are_whole(shape)
            or not _fit(shape)
            or min(shape, default=0) < 0
        ):
            raise FileError("the allocation's input shapes are not lists of numbers")


def check_blocks(blocks: Collection[Any]) -> None:
    """Per block its name, its kind, and branches with channels before and after: what reports read of it."""
    for block in blocks:
        branches = block.get("branches") if isinstance(block, dict) else None
        if branches is None or not isinstance(branches, list) or not {"name", "kind"} <= block.keys():
            raise FileError("the allocation's blocks are not a list of names, kinds and branches")
        for branch in branches:
            if not isinstance(branch, dict) or not {"name", "before", "after"} <= branch.keys():
                raise FileError(f"the allocation's block {block['name']!s:.80} has a branch without channels")
            if not _are_whole((branch["before"], branch["after"])):
                raise FileError(f"the allocation's block {block['name']!s:.80} has channels that are not numbers")


def is_indices(values: Any) -> bool:
    """Whether this is a list of whole numbers, or of equally long lists of them."""
    if not isinstance(values, list):
        return False
    # By types and not by an array of them: numpy would give every entry the room of the longest text among them.
    if _are_whole(values):
        return _fit(values)
    if any(type(row) is not list for row in values):
        return False
    return len({len(row) for row in values}) == 1 and all(_are_whole(row) and _fit(row) for row in values)


def _are_whole(values: Collection[Any]) -> bool:
    """Whether all of them are whole numbers; true and false are none."""
    return {type(value) for value in values} <= {int}


def _fit(values: Sequence[int]) -> bool:
    return min(values, default=0) >= -_LARGEST and max(values, default=0) < _LARGEST
