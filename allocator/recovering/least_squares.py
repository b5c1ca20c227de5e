"""From the first layer to the last, each refitted to give what the original's gives, from what it now reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import nn

from allocator.clock import Progress, bar
from allocator.errors import DataError
from allocator.modules import skeleton, tensor_names
from allocator.recovering.readers import Reader
from allocator.recovering.record import Layer
from allocator.recovering.ridge import refit
from allocator.recovering.rows import Layout, Pair, Rows, Stops, Wanted, pads
from allocator.recovering.samples import Samples
from allocator.recovering.targets import predicted
from allocator.recovering.walk import Walk

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
        seed: of the positions that are looked at.
        progress: called with how far it is.

    Raises:
        DataError: the networks do not take the inputs, or take another way for some of them.
    """
    layers: list[Layer] = []
    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as stack, bar("refitting", progress, len(readers)) as advance:
        pairs = []
        watched = {name: reader.after.meets for name, reader in readers.items()}
        for held, parts in ((False, samples.seen), (True, samples.held)):
            for inputs in parts:
                walks = [Walk(_of_its_own(each), inputs, watched, after=each is model) for each in (model, small)]
                for walk in walks:
                    stack.callback(walk.close)
                pairs.append(Pair(walks[0], walks[1], inputs, held))
        fitting = _Fitting(model, small, stays, weights, generator)
        while True:
            stops = _advance(pairs)
            if not stops:
                return layers
            reader = readers[stops[0][1].weight]
            if reader.after.meets and stops[0][1].meeting is None:
                continue  # its turn comes at the sum
            layers.append(fitting.fit(reader, stops))
            advance(reader.weight)


def _of_its_own(model: nn.Module) -> nn.Module:
    """The same tensors in modules that no other forward shares: one may keep in a module what it reads later."""
    return skeleton(model, lambda _, tensor: tensor)


def _advance(pairs: Sequence[Pair]) -> Stops:
    """Lead all forwards to the next layer, or sum; none at the end.

    Raises:
        DataError: they are not all at the same.
    """
    stops = [(pair, pair.original.advance(), pair.small.advance()) for pair in pairs]
    places = {None if stop is None else (stop.weight, stop.meeting is None) for _, *both in stops for stop in both}
    if len(places) > 1:
        said = ", ".join(sorted({place[0] if place else "the end" for place in places}))
        raise DataError(f"the forward takes another path for some inputs ({said}): nothing can be lined up")
    return [(pair, a, b) for pair, a, b in stops if a is not None and b is not None]


class _Fitting:
    """The refit of one layer after the other."""

    def __init__(
        self, model: nn.Module, small: nn.Module, stays: np.ndarray, weights: bool, generator: torch.Generator
    ) -> None:
        self.originals, self.tensors = tensor_names(model), tensor_names(small)
        self.stays, self.weights, self.generator = stays, weights, generator

    @torch.no_grad()
    def fit(self, reader: Reader, stops: Stops) -> Layer:
        """Refit a layer that all forwards wait at, or at the sum after it."""
        if any(a.x.shape[0] != b.x.shape[0] for _, a, b in stops):
            return Layer(reader.weight, None, None, note="it reads another number of rows than the original's")
        if any(small.x._version != small.version for _, _, small in stops):
            return Layer(reader.weight, None, None, note="what it reads is written over")
        layout = Layout.of(stops[0][2], self.tensors[reader.weight])
        start = self._start(reader, layout)
        dtype = start.dtype
        unknowns = start.shape[2] - 1
        outputs = self._outputs(reader)
        wanted = Wanted(layout, outputs, reader.after, reader.after.affine(self.originals, outputs, dtype), dtype)
        rows = Rows(stops, wanted, max(ROWS, ROWS_PER_UNKNOWN * unknowns), self.generator)
        there = rows.as_it_is()
        off = (predicted(there.x, start) - there.y).norm()
        if bool(off > FAR * there.y.norm()):
            return Layer(reader.weight, None, None, note="it gives other numbers than weight and bias make")
        fewer = rows.seen < unknowns
        found = refit(rows.parts, start, offset=reader.offset is not None, weights=self.weights, few=fewer)
        if found.solution is not None:
            self._write(reader, layout, found.solution)
            self._redo(reader, stops, dtype)
        note = f"{rows.seen} rows for {unknowns} unknowns" if self.weights and fewer else ""
        if not self.weights and found.step and pads(stops[0][1]):
            note = "a constant is not exact where it reads padding"
        strength = found.strength if math.isfinite(found.strength) and found.step else None
        return Layer(reader.weight, found.before, found.after, rows.seen, strength, found.step, note)

    def _redo(self, reader: Reader, stops: Stops, dtype: torch.dtype) -> None:
        """Where the forwards wait at the sum, what came of the layer with its old weights is made anew."""
        affine = reader.after.affine(self.tensors, None, dtype)
        for _, _, small in stops:
            if small.meeting is not None:
                channels = 1 if small.operator.declared.window is not None else -1
                again = affine(small.run().to(dtype).movedim(channels, -1)).movedim(-1, channels)
                small.meeting.own.copy_(again.reshape(small.meeting.own.shape))

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
