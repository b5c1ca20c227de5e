"""What a forward that waits has made and still uses, so that it can lie elsewhere until the forward goes on."""

from __future__ import annotations

from typing import Any

import torch

from allocator.recovering.shelf import Shelf
from allocator.torch_private import StorageReference, storage_of, tree_flatten


class Holdings:
    """Storages that the calls of one forward made, as long as anybody holds them.

    Args:
        shelf: where they lie while the forward waits.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._made: set[StorageReference] = set()

    def before(self, given: Any) -> list[StorageReference]:
        """Storages that a call is given; another forward's may be among them, where the model's code shares it."""
        found = references(given)
        away = [each for each in found if (storage := storage_of(each)) is not None and not storage.nbytes()]
        if away:
            self._shelf.take(away)
        return found

    def after(self, given: list[StorageReference], result: Any, *, writes: bool) -> None:
        """What a call made is held from now on, and what it wrote to is no more as it was laid down.

        Args:
            given: storages that the call was given.
            result: what it gave.
            writes: whether it writes to what it is given.
        """
        self._made.update(each for each in references(result) if each not in given)
        if writes:
            self.written(given)

    def written(self, storages: list[StorageReference]) -> None:
        """These are no more as they were laid down."""
        for each in storages:
            self._shelf.forget(each)

    def lay(self) -> None:
        """The forward waits, and others go on."""
        self._made = {each for each in self._made if self._there(each)}
        self._shelf.lay(self._made)

    def take(self) -> None:
        """The forward is looked at, or goes on."""
        self._shelf.take(self._made)

    def _there(self, reference: StorageReference) -> bool:
        if not reference.expired():
            return True
        self._shelf.forget(reference)
        return False


def references(tree: Any) -> list[StorageReference]:
    """Those of the storages of all plain tensors with values in some arguments or results."""
    leaves, _ = tree_flatten(tree)
    return [
        StorageReference(leaf.untyped_storage())
        for leaf in leaves
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and not leaf.is_meta
    ]
