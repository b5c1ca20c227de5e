"""Labels: which index of which parameter a channel came from.

A label is the number of a *slot*, one index of one dim of one parameter or buffer; slot 0 stands for "must stay". A
tensor has one array of labels per dim, or None for a dim without channels (batch, pixels, tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

Label = np.ndarray | None
Labels = tuple[Label, ...]

FROZEN = 0


@dataclass(frozen=True)
class Slots:
    """Numbers for every index of every dim of every parameter and buffer.

    Attributes:
        base: per tensor name, the first slot of each dim.
        shapes: per tensor name, its sizes.
        total: number of slots, with the frozen one.
        numbers: per vector of whole numbers among the buffers, what is in it: these may name channels.
    """

    base: dict[str, tuple[int, ...]]
    shapes: dict[str, tuple[int, ...]]
    total: int
    numbers: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], numbers: Mapping[str, np.ndarray] | None = None) -> Slots:
        """Number the dims of tensors with these sizes."""
        base: dict[str, tuple[int, ...]] = {}
        following = FROZEN + 1
        for name, shape in shapes.items():
            starts = []
            for size in shape:
                starts.append(following)
                following += size
            base[name] = tuple(starts)
        return cls(base, dict(shapes), following, numbers or {})

    def labels(self, name: str) -> tuple[np.ndarray, ...]:
        """Labels of a parameter or buffer: its own slots."""
        sizes = self.shapes[name]
        return tuple(np.arange(start, start + n) for start, n in zip(self.base[name], sizes, strict=True))

    def name_of(self, slot: int) -> str:
        """The parameter or buffer that a slot is of; "" for the frozen one."""
        row = int(np.searchsorted(self.starts, slot, side="right")) - 1
        return self.names[row][1] if row >= 0 else ""

    @cached_property
    def names(self) -> list[tuple[int, str, int]]:
        """(first slot, tensor name, dim) in ascending order, for looking a slot up by bisection."""
        return [(start, name, dim) for name, starts in self.base.items() for dim, start in enumerate(starts)]

    @cached_property
    def starts(self) -> np.ndarray:
        """The first slots of `names`."""
        return np.array([start for start, _, _ in self.names], dtype=np.int64)
