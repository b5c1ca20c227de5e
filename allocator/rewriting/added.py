"""What the indices that a wider network adds are filled with, so that it computes what the original does.

Every added index is modelled on one that is there, its *source*. By init "zero" the weights that read an added neuron
are zero, and those that write it are drawn anew, as large as the source's; where averages are taken over it and others
(a layer norm), they are the source's. By init "copy" (Net2Wider: Chen, Goodfellow
and Shlens, ICLR 2016) those that write it are the source's, and those that read the two, or more, are shares of what
read the source: unequal, so that training moves them apart, and such that they add up without a rounding error.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from allocator.rewriting.index_map import Maps, added_places

Places = list[int]
Which = Mapping[str, Sequence[np.ndarray]]
Averaged = Sequence[Places | None] | None
LEAST, MOST = 0.55, 0.75
"""The share of a weight that its first copy takes, and of what is left each further one."""


@dataclass(frozen=True)
class Filling:
    """How added indices are filled.

    Attributes:
        init: "zero" or "copy".
        seed: of what is drawn.
        reads: per tensor and dim, the added indices that read a neuron; None for a dim without any.
        averaged: in the same way those of neurons that averages are taken over, which init "zero" copies too.
    """

    init: str
    seed: int
    reads: dict[str, list[Places | None]]
    averaged: dict[str, list[Places | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, added: Mapping[str, Any]) -> Filling | None:
        """As an allocation holds it; None where nothing was added."""
        return cls(added["init"], added["seed"], added["reads"], added.get("averaged", {})) if added else None

    @classmethod
    def by(cls, init: str, seed: int, maps: Maps, reads: Which, averaged: Which) -> Filling:
        """The filling of what maps add.

        Args:
            init, seed: see above.
            maps: where each index comes from.
            reads: per tensor and dim, (n,) bool, which indices of the original read a neuron.
            averaged: in the same way those of neurons that averages are taken over.
        """
        return cls(init, seed, added_where(maps, reads), added_where(maps, averaged) if init == "zero" else {})

    def to_dict(self) -> dict[str, Any]:
        """As an allocation holds it."""
        said: dict[str, Any] = {"init": self.init, "seed": self.seed, "reads": self.reads}
        return said | ({"averaged": self.averaged} if self.averaged else {})

    def fill(self, name: str, taken: torch.Tensor, sources: Sequence[Any], *, like: torch.Tensor) -> torch.Tensor:
        """A tensor in which every added index repeats its source, with the values that it is to have.

        Args:
            name: of the parameter or buffer.
            taken: what `index_map.take` gave; changed in place.
            sources: per dim the source indices, as in an allocation.
            like: the original's, which tells a parameter from a buffer.
        """
        if taken.is_complex():
            self.fill(name, torch.view_as_real(taken), sources, like=like)
        if not taken.is_floating_point():
            return taken
        reads = self.reads.get(name) or [None] * len(sources)
        if self.init == "copy":
            for dim, source, places in _dims(sources, reads):
                for share in _shares(source, places, self.seed):
                    share.split(taken, dim)
            return taken
        if like.dim() > 1 and isinstance(like, nn.Parameter):
            generator = torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()))
            for dim, source, places in _dims(sources, reads):
                _draw(taken, dim, np.setdiff1d(added_places(source), places), generator)
            for dim, source, places in _dims(sources, self.averaged.get(name) or [None] * len(sources)):
                first = taken.index_select(dim, _index(first_places(source)[source[places]], taken))
                taken.index_copy_(dim, _index(places, taken), first)
        for dim, _, places in _dims(sources, reads):
            taken.index_fill_(dim, _index(places, taken), 0)
        return taken

    def is_neutral(self, name: str, wide: torch.Tensor, sources: Sequence[Any], averaged: Averaged = None) -> bool:
        """Whether what was added changes nothing: of init "zero" that it is zero, of "copy" that it is a copy.

        Args:
            name: of the parameter or buffer.
            wide: the wider network's, with the shares of copies put together, as `undo` does.
            sources: per dim the source indices.
            averaged: per dim the added ones of neurons that averages are taken over, which are copies by any init.
        """
        reads = self.reads.get(name) or [None] * len(sources)
        for dim, source, places in _dims(sources, reads):
            added = added_places(source)
            if self.init == "zero":
                if bool(wide.index_select(dim, _index(places, wide)).any()):
                    return False
                added = np.array((averaged[dim] if averaged else None) or [], dtype=np.int64)
            rest = np.setdiff1d(added, places)
            a, b = (wide.index_select(dim, _index(p, wide)) for p in (rest, first_places(source)[source[rest]]))
            if not torch.equal(a, b):
                return False
        return True

    def undo(self, name: str, wide: torch.Tensor, sources: Sequence[Any]) -> torch.Tensor:
        """A tensor of the wider network in which the first of several copies reads all that they share again."""
        if self.init != "copy" or name not in self.reads:
            return wide
        if wide.is_complex():
            return torch.view_as_complex(self.undo(name, torch.view_as_real(wide), sources))
        if not wide.is_floating_point():
            return wide
        wide = wide.clone()
        for dim, source, places in _dims(sources, self.reads[name]):
            for share in reversed(list(_shares(source, places, self.seed))):
                share.join(wide, dim)
        return wide


def added_where(maps: Maps, which: Which) -> dict[str, list[Places | None]]:
    """Per tensor and dim, the added indices whose source is one of those that `which`, (n,) bool each, names."""
    found: dict[str, list[Places | None]] = {}
    for name, dims in maps.items():
        places: list[Places | None] = [None] * len(dims)
        for d, index_map in enumerate(dims):
            if index_map is not None:
                added = index_map.added
                places[d] = added[which[name][d][index_map.source[added]]].tolist() or None
        if any(places):
            found[name] = places
    return found


def _dims(sources: Sequence[Any], reads: Sequence[Places | None]) -> Iterator[tuple[int, np.ndarray, Places]]:
    """(dim, its source indices, added ones that read) of the dims that have a map."""
    for dim, indices in enumerate(sources):
        if indices is not None:
            source = np.asarray(indices, dtype=np.int64)
            yield dim, source if source.ndim == 1 else source[0], reads[dim] or []


def first_places(source: np.ndarray) -> np.ndarray:
    """Per index of the original, the first place where it is the source."""
    first = np.zeros(source.max(initial=-1) + 1, dtype=np.int64)
    indices, places = np.unique(source, return_index=True)
    first[indices] = places
    return first


@dataclass(frozen=True)
class _Share:
    """What places have of their weights, the rest of which the next copies have."""

    places: np.ndarray
    following: np.ndarray
    shares: np.ndarray

    def split(self, tensor: torch.Tensor, dim: int) -> None:
        """Leave each place its share, and give the next copy the rest.

        By Sterbenz's lemma the rest has no rounding error where the share is a half at least: the two add up to what
        was there, to the last bit.
        """
        here, there = _index(self.places, tensor), _index(self.following, tensor)
        whole = tensor.index_select(dim, here)
        shares = torch.as_tensor(self.shares, device=tensor.device, dtype=tensor.dtype)
        kept = whole * shares.reshape(-1, *[1] * (tensor.dim() - dim - 1))
        tensor.index_copy_(dim, here, kept)
        tensor.index_copy_(dim, there, whole - kept)

    def join(self, tensor: torch.Tensor, dim: int) -> None:
        """Give each place the rest back."""
        here, there = _index(self.places, tensor), _index(self.following, tensor)
        kept, rest = tensor.index_select(dim, here), tensor.index_select(dim, there)
        # Of a negative zero nothing is left to give back, and adding that would lose its sign.
        tensor.index_copy_(dim, here, torch.where(rest == 0, kept, kept + rest))


def _shares(source: np.ndarray, reads: Places, seed: int) -> Iterator[_Share]:
    """Which places split their weights with which, copy after copy."""
    places = np.array(reads, dtype=np.int64)
    shares = np.random.default_rng(seed).uniform(LEAST, MOST, source.max(initial=0) + 1)
    latest = first_places(source)
    while len(places):
        _, first = np.unique(source[places], return_index=True)
        following = places[first]
        yield _Share(latest[source[following]], following, shares[source[following]])
        latest[source[following]] = following
        places = np.delete(places, first)


def _draw(tensor: torch.Tensor, dim: int, places: np.ndarray, generator: torch.Generator) -> None:
    """Draw what these indices hold, with the mean and deviation of what they hold now; a single number stays."""
    if not len(places):
        return
    index = _index(places, tensor)
    rows = tensor.index_select(dim, index)
    others = [d for d in range(tensor.dim()) if d != dim]
    deviation, mean = torch.std_mean(rows, others, correction=0, keepdim=True)
    noise = torch.randn(rows.shape, generator=generator).to(rows)
    tensor.index_copy_(dim, index, noise.mul_(deviation).add_(mean))


def _index(places: Sequence[int] | np.ndarray, tensor: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(np.asarray(places, dtype=np.int64), device=tensor.device)
