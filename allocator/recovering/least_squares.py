"""From the first layer to the last, each refitted to give what the original's gives, from what it now reads."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from allocator.clock import Progress, bar
from allocator.modules import tensor_names
from allocator.recovering.holdings import references
from allocator.recovering.pairs import Pair, check_same, set_out
from allocator.recovering.readers import Reader
from allocator.recovering.record import Layer
from allocator.recovering.ridge import refit
from allocator.recovering.rows import Layout, Rows, Wanted
from allocator.recovering.samples import Samples
from allocator.recovering.shelf import Shelf
from allocator.recovering.targets import predicted
from allocator.recovering.walk import Stop

ROWS = 16384
"""Rows per layer that are looked at, where there are so many; more where a layer has many unknowns."""
ROWS_PER_UNKNOWN = 4
FAR = 0.02
"""Share by which a layer's output may be off what its weights make of what it reads, in bfloat16 and all."""


def fit(
    model: nn.Module,
    small: nn.Module,
    stays: np.ndarray,
    readers: dict[str, Reader],
    samples: Samples,
    *,
    weights: bool = True,
    memory: int = sys.maxsize,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Layer]:
    """Refit `small` in place.

    Args:
        model: the original, in eval mode.
        small: what is left of it, in eval mode.
        stays: (slots,) bool, which of the original's it has.
        readers: the layers, by their weights.
        samples: inputs.
        weights: refit these, not the offsets alone.
        memory: bytes that what forwards hold at a layer, and its rows, may take; the rest lies in a temporary file.
        seed: of the positions that are looked at.
        progress: called with how far it is.

    Raises:
        DataError: the networks do not take the inputs, or take another way for some of them.
        FileError: there is no room for the file.
    """
    layers: list[Layer] = []
    watched = {name: reader.after.meets for name, reader in readers.items()}
    with ExitStack() as stack, bar("refitting", progress, len(readers)) as advance:
        shelf = Shelf(memory)
        stack.callback(shelf.close)
        pairs = set_out(model, small, watched, samples, shelf, stack)
        fitting = _Fitting(model, small, stays, weights, torch.Generator().manual_seed(seed), shelf)
        while True:
            place, looked = None, None
            for number, pair in enumerate(pairs):
                with pair.at_next() as (at, original, cut):
                    place = check_same([at if number == 0 else place, at])
                    if original is not None and cut is not None:
                        looked = looked or fitting.look(readers[cut.weight], cut, pairs)
                        looked.rows.add(original, cut, pair.count, held=pair.held)
            if looked is None:
                return layers
            layers.append(fitting.fit(looked, pairs))
            advance(looked.reader.weight)


@dataclass
class _Looked:
    """A layer at which all forwards were.

    Attributes:
        reader: the layer.
        layout: of its weight.
        start: (groups, outputs, n + 1) the weights as they are, and the offset.
        rows: what it reads and should give.
    """

    reader: Reader
    layout: Layout
    start: torch.Tensor
    rows: Rows


class _Fitting:
    """The refit of one layer after the other."""

    def __init__(
        self,
        model: nn.Module,
        small: nn.Module,
        stays: np.ndarray,
        weights: bool,
        generator: torch.Generator,
        shelf: Shelf,
    ) -> None:
        self.originals, self.tensors = tensor_names(model), tensor_names(small)
        self.stays, self.weights, self.generator, self.shelf = stays, weights, generator, shelf

    @torch.no_grad()
    def look(self, reader: Reader, stop: Stop, pairs: Sequence[Pair]) -> _Looked:
        """Begin with a layer that the first of the smaller network's forwards waits at, or at the sum after it."""
        layout = Layout.of(stop, self.tensors[reader.weight])
        start = self._start(reader, layout)
        outputs = self._outputs(reader)
        affine = reader.after.affine(self.originals, outputs, start.dtype)
        windowed = stop.operator.declared.window is not None
        wanted = Wanted(layout, outputs, reader.after, affine, windowed, start.dtype)
        most = max(ROWS, ROWS_PER_UNKNOWN * (start.shape[2] - 1))
        inputs = sum(pair.count for pair in pairs)
        return _Looked(reader, layout, start, Rows(wanted, most, inputs, self.generator, self.shelf))

    @torch.no_grad()
    def fit(self, looked: _Looked, pairs: Sequence[Pair]) -> Layer:
        """Refit a layer that all forwards were at."""
        reader, rows, start = looked.reader, looked.rows, looked.start
        why = rows.why or self._unlike(rows, start)
        if why:
            rows.drop()
            return Layer(reader.weight, None, None, note=why)
        unknowns = start.shape[2] - 1
        fewer = rows.seen < unknowns
        found = refit(rows.parts, start, offset=reader.offset is not None, weights=self.weights, few=fewer)
        rows.drop()
        if found.solution is not None:
            self._write(reader, looked.layout, found.solution)
            for pair in pairs:
                pair.due = partial(self._redo, reader, pair, start.dtype)
        note = f"{rows.seen} rows for {unknowns} unknowns" if self.weights and fewer else ""
        if not self.weights and found.step and rows.pads:
            note = "a constant is not exact where it reads padding"
        strength = found.strength if math.isfinite(found.strength) and found.step else None
        return Layer(reader.weight, found.before, found.after, rows.seen, strength, found.step, note)

    def _unlike(self, rows: Rows, start: torch.Tensor) -> str:
        """Why the rows do not say what the layer does; "" where they do."""
        there = rows.as_it_is
        assert there is not None
        off = (predicted(there.x, start) - there.y).norm()
        return "it gives other numbers than weight and bias make" if bool(off > FAR * there.y.norm()) else ""

    @torch.no_grad()
    def _redo(self, reader: Reader, pair: Pair, dtype: torch.dtype, stop: Stop) -> None:
        """Where the forward waits at the sum, what came of the layer with its old weights is made anew."""
        if stop.meeting is None:
            return
        affine = reader.after.affine(self.tensors, None, dtype)
        channels = 1 if stop.operator.declared.window is not None else -1
        again = affine(stop.run().to(dtype).movedim(channels, -1)).movedim(-1, channels)
        stop.meeting.own.copy_(again.reshape(stop.meeting.own.shape))
        pair.small.holdings.written(references(stop.meeting.own))

    def _outputs(self, reader: Reader) -> torch.Tensor | None:
        """Which of the original's outputs the smaller layer gives; None for all."""
        return None if reader.outputs is None else torch.as_tensor(np.flatnonzero(self.stays[reader.outputs]))

    def _start(self, reader: Reader, layout: Layout) -> torch.Tensor:
        """(groups, outputs, n + 1): the weights as they are, and the offset."""
        matrices = layout.matrices(self.tensors[reader.weight])
        matrices = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
        offset = matrices.new_zeros(*matrices.shape[:2], 1)
        if reader.bias is not None:
            offset += self.tensors[reader.bias].detach().to(matrices.dtype).reshape(offset.shape)
        return torch.cat([matrices, offset], 2)

    def _write(self, reader: Reader, layout: Layout, solution: torch.Tensor) -> None:
        with torch.no_grad():
            self.tensors[reader.weight].copy_(layout.parameter(solution[:, :, :-1]))
            offset = solution[:, :, -1].flatten()
            if reader.bias is not None:
                self.tensors[reader.bias].copy_(offset)
            elif reader.mean is not None:  # what is taken off, so that a constant comes out less
                self.tensors[reader.mean].sub_(offset)
