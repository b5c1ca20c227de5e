"""Looking at data with several processes: each at its share, and all know what the others found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from allocator.errors import DataError, in_words

Found = TypeVar("Found")


def count() -> int:
    """How many processes `torch.distributed` runs on; one where it does not run."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gathered(look: Callable[[], Found]) -> list[Found]:
    """What `look` found on every rank, in the order of the ranks. All of them have to call this.

    Raises:
        DataError: it raised on another rank, which ends all of them, so that none waits for it.
    """
    if count() == 1:
        return [look()]
    found: Found | None = None
    own: Exception | None = None
    try:
        found = look()
    except Exception as error:
        own = error
    everything: list[Any] = [None] * count()
    torch.distributed.all_gather_object(everything, (found, own and in_words(own)))
    if own is not None:
        raise own
    for rank, (_, said) in enumerate(everything):
        if said is not None:
            raise DataError(f"rank {rank} could not look at its data: {said}")
    return [each for each, _ in everything]


def add_up(tensor: torch.Tensor) -> None:
    """The sum over all ranks, in place."""
    if count() > 1:
        torch.distributed.all_reduce(tensor)
