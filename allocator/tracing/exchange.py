"""What no forward runs, put where one like it ran: heads of other tasks, norms of other domains, layers of other sizes.

A forward takes one of them by its arguments or by its data; which, a trace does not see. Where another stands in its
place, what it reads and gives is what that one does, and follows.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import nn

from allocator.modules import modules_of, tensor_names

MOST_ROUNDS = 16
"""Forwards with others in place of what ran, at most."""


class Exchange(NamedTuple):
    """Two members of a module, of which one ran and the other did not: their keys in it."""

    holder: str
    ran: str
    other: str

    def __str__(self) -> str:
        prefix = f"{self.holder}." if self.holder else ""
        return f"{prefix}{self.other} in place of {prefix}{self.ran}"


@contextlib.contextmanager
def exchanged(modules: Mapping[str, nn.Module], exchanges: Iterable[Exchange]) -> Iterator[None]:
    """Let these members of modules change places meanwhile; modules and parameters keep the names that they have."""
    for each in exchanges:
        _exchange(modules[each.holder], each)
    try:
        yield
    finally:
        for each in exchanges:
            _exchange(modules[each.holder], each)


def _exchange(holder: nn.Module, each: Exchange) -> None:
    members = _members(holder)
    members[each.ran], members[each.other] = members[each.other], members[each.ran]


def _members(holder: nn.Module) -> dict[str, nn.Module | nn.Parameter | None]:
    of_parameters = isinstance(holder, (nn.ParameterList, nn.ParameterDict))
    return holder._parameters if of_parameters else holder._modules  # type: ignore[return-value]


def rounds_of(
    modules: Mapping[str, nn.Module], read: Collection[str], unread: Collection[str]
) -> list[tuple[Exchange, ...]]:
    """Which members to exchange, forward by forward, until all that was not read has stood in for one that was.

    Args:
        modules: a model's, by their paths.
        read: names of the parameters and buffers that the forward reads in which they are exchanged.
        unread: names of those that no forward reads.
    """
    names = tensor_names(modules[""], modules).items()
    tensors = {id(tensor): name in read for name, tensor in names if name in read or name in unread}
    paths = {id(module): path for path, module in modules.items()}
    rounds: list[list[Exchange]] = []
    waiting = [modules[""]]
    while waiting:
        holder = waiting.pop()
        known = {key: _was_read(member, tensors) for key, member in _members(holder).items() if member is not None}
        waiting += [each for key, each in holder._modules.items() if each is not None and known.get(key)]
        for number, ran, other in _pairs(holder, known):
            rounds += [[]] if number == len(rounds) else []
            rounds[number].append(Exchange(paths[id(holder)], ran, other))
    return [tuple(each) for each in rounds[:MOST_ROUNDS]]


def _was_read(member: nn.Module | nn.Parameter, tensors: Mapping[int, bool]) -> bool | None:
    """Whether some of a member's tensors was read; None of one that has none."""
    own = [member] if isinstance(member, nn.Parameter) else tensor_names(member).values()
    found = [tensors[id(tensor)] for tensor in own if id(tensor) in tensors]
    return any(found) if found else None


def _pairs(holder: nn.Module, known: Mapping[str, bool | None]) -> Iterator[tuple[int, str, str]]:
    """(how often it was taken before, what ran, what did not): the likest in size, and of these all in turn.

    Of its class, but in a list or a dict of modules of any.
    """
    members, taken = _members(holder), Counter[str]()
    ran = [key for key, was_read in known.items() if was_read]
    of_any_class = isinstance(holder, (nn.ModuleList, nn.ModuleDict))
    for other, was_read in known.items():
        alike = [key for key in ran if type(members[key]) is type(members[other])] or ran * of_any_class
        if was_read is False and alike:
            own = _sizes(members[other])
            likest = max(alike, key=lambda key: (len(own & _sizes(members[key])), -taken[key]))
            yield taken[likest], likest, other
            taken[likest] += 1


def _sizes(member: nn.Module | nn.Parameter | None) -> set[tuple[str, int, int]]:
    """(name, dim, size) of all its tensors."""
    tensors = tensor_names(member, modules_of(member)) if isinstance(member, nn.Module) else {"": member}
    return {(name, dim, n) for name, each in tensors.items() if each is not None for dim, n in enumerate(each.shape)}
