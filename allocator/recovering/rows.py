"""What a layer reads and writes at sampled positions, as rows of a linear regression.

Everything is written in groups (of a grouped convolution; one for all else): (groups, rows, columns).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from allocator.recovering.after import Affine, After
from allocator.recovering.shelf import Kept, Shelf
from allocator.recovering.targets import Part
from allocator.recovering.walk import Stop


@dataclass(frozen=True)
class Layout:
    """How a weight is a matrix per group: outputs by unknowns.

    Attributes:
        shape: of the parameter.
        groups: of outputs that read inputs of their own.
        transposed: whether inputs come first in the parameter.
    """

    shape: tuple[int, ...]
    groups: int
    transposed: bool

    @classmethod
    def of(cls, stop: Stop, parameter: torch.Tensor) -> Layout:
        """That of the parameter that a call multiplies by."""
        if stop.operator.declared.window is None:
            return cls(tuple(parameter.shape), 1, not stop.turned)
        transposed = bool(stop.arg("transposed"))
        return cls(tuple(parameter.shape), int(stop.arg("groups") or 1), transposed)

    def matrices(self, parameter: torch.Tensor) -> torch.Tensor:
        """(groups, outputs per group, unknowns per output)."""
        wide = parameter.detach()
        if not self.transposed:
            return wide.reshape(self.groups, self.shape[0] // self.groups, -1)
        return wide.reshape(self.groups, self.shape[0] // self.groups, *self.shape[1:]).transpose(1, 2).flatten(2)

    def parameter(self, matrices: torch.Tensor) -> torch.Tensor:
        """The reverse of `matrices`."""
        if not self.transposed:
            return matrices.reshape(self.shape)
        inputs = self.shape[0] // self.groups
        wide = matrices.reshape(self.groups, self.shape[1], inputs, *self.shape[2:])
        return wide.transpose(1, 2).reshape(self.shape)


@dataclass(frozen=True)
class Wanted:
    """What the smaller network's layer is to give, of what the original's gave.

    Attributes:
        layout: of the weight.
        outputs: those of the original's outputs that it has; None for all.
        after: what follows the layer.
        affine: the batch norm among that, for these outputs.
        windowed: whether it slides over pixels.
        dtype: to compute in.
    """

    layout: Layout
    outputs: torch.Tensor | None
    after: After
    affine: Affine
    windowed: bool
    dtype: torch.dtype


class Rows:
    """What one layer reads and should give at sampled positions, part by part of the inputs.

    Args:
        wanted: of the layer.
        most: rows to look at, of all inputs together.
        inputs: how many these are.
        generator: draws the positions.
        shelf: where the rows lie.

    Attributes:
        seen: how many rows there are to fit.
        pads: whether some outputs read fewer inputs than others do.
        why: the layer can't be refitted, for this reason; "" where it can.
        as_it_is: what the smaller network's layer reads of the first part, and what it gives with its old weights.
    """

    def __init__(self, wanted: Wanted, most: int, inputs: int, generator: torch.Generator, shelf: Shelf) -> None:
        self.wanted, self.most, self.inputs, self.generator, self.shelf = wanted, most, inputs, generator, shelf
        self.seen, self.pads, self.why = 0, False, ""
        self.as_it_is: Part | None = None
        self._parts: list[tuple[bool, list[Kept]]] = []

    def add(self, original: Stop, small: Stop, inputs: int, *, held: bool) -> None:
        """Those of a part of the inputs, whose forwards wait at the layer: the original after it ran.

        Args:
            original, small: where they wait.
            inputs: how many these are.
            held: back, or to be fitted.
        """
        if original.x.shape[0] != small.x.shape[0]:
            self.why = "it reads another number of rows than the original's"
        elif small.x._version != small.version:
            self.why = "what it reads is written over"
        if self.why:
            return
        samples = small.x.shape[0] if self.wanted.windowed else 1
        share = max(self.most * inputs // (self.inputs * samples), 1)
        count = math.prod(original.sizes[2:]) if self.wanted.windowed else small.x.shape[0]
        positions = _drawn(count, share, self.generator)
        self.seen += 0 if held else samples * len(positions)
        positions = positions.to(small.x.device)
        x = read(small, positions, original.sizes, self.wanted.dtype)
        if self.as_it_is is None:
            self.as_it_is = Part(x, self._grouped(self._at(small.run(), positions, None)))
            self.pads = pads(original)
        y, ends = self._wanted(original, small, positions)
        self._parts.append((held, [self.shelf.keep(each) for each in (x, y, *(ends or ()))]))

    def parts(self, held: bool) -> Iterator[Part]:
        """Part by part of the inputs to fit, or of those held back."""
        for back, kept in self._parts:
            if back == held:
                x, y, *ends = (each.tensor() for each in kept)
                yield Part(x, y, (ends[0], ends[1]) if ends else None)

    def drop(self) -> None:
        """They are not needed any more."""
        for _, kept in self._parts:
            for each in kept:
                each.drop()
        self._parts = []

    def _wanted(
        self, original: Stop, small: Stop, positions: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """What should come out, or is missing where it is added to something; and beyond which ends it may be any."""
        after, affine = self.wanted.after, self.wanted.affine
        if original.meeting is None or small.meeting is None:
            assert original.result is not None
            y = self._at(original.result, positions, self.wanted.outputs)
            low, high = (y.new_full(y.shape[1:], end)[None] for end in (after.low, after.high))
        else:
            assert original.meeting.result is not None
            there = self._at(small.meeting.other, positions, None)
            y = affine.back(self._at(original.meeting.result, positions, self.wanted.outputs) - there)
            low, high = after.low - there, after.high - there
        if not after.cuts_off:
            return self._grouped(y), None
        low, high = affine.limits(low, high)
        return self._grouped(y), (self._grouped(low), self._grouped(high))

    def _at(self, tensor: torch.Tensor, positions: torch.Tensor, outputs: torch.Tensor | None) -> torch.Tensor:
        """(rows, channels) of a tensor that has channels where the layer's output has them."""
        if self.wanted.windowed:
            found = tensor.flatten(2)[:, :, positions].transpose(1, 2).flatten(0, 1)
        else:
            found = tensor.flatten(0, -2)[positions]
        return (found if outputs is None else found[:, outputs.to(found.device)]).to(self.wanted.dtype)

    def _grouped(self, found: torch.Tensor) -> torch.Tensor:
        return found.reshape(found.shape[0], self.wanted.layout.groups, -1).transpose(0, 1)


def _drawn(count: int, most: int, generator: torch.Generator) -> torch.Tensor:
    """(at most `most`) places of an output to look at: pixels of every sample, or rows."""
    if count <= most:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:most].sort().values


def read(stop: Stop, positions: torch.Tensor, sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """(groups, rows, unknowns per output): what a layer reads to give its output at these positions.

    Args:
        stop: before or after the layer runs.
        positions: pixels of every sample, or rows.
        sizes: of the layer's output.
        dtype: of what is returned.
    """
    if stop.operator.declared.window is None:
        return stop.x[positions].to(dtype)[None]
    index, valid = _sources(stop, positions, sizes[2:])
    groups = int(stop.arg("groups") or 1)
    patches = stop.x.flatten(2)[:, :, index.flatten()].to(dtype).mul_(valid.flatten())
    samples, channels = stop.x.shape[:2]
    patches = patches.reshape(samples, groups, channels // groups, len(positions), -1)
    return patches.permute(1, 0, 3, 2, 4).reshape(groups, samples * len(positions), -1)


def pads(stop: Stop) -> bool:
    """Whether some outputs of a layer that has run read fewer inputs than others do."""
    if stop.operator.declared.window is None or math.prod(stop.matrix.shape[2:]) == 1:
        return False
    _, valid = _sources(stop, torch.arange(math.prod(stop.sizes[2:])), stop.sizes[2:])
    return not bool(valid.all())


def _sources(stop: Stop, positions: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions, kernel places): which input pixel each reads, flattened; and whether it is one, or padding."""
    device = positions.device
    index = torch.zeros(len(positions), 1, dtype=torch.long, device=device)
    valid = torch.ones(len(positions), 1, dtype=torch.bool, device=device)
    kernel, source = stop.matrix.shape[2:], stop.x.shape[2:]
    places = torch.stack(torch.unravel_index(positions, tuple(sizes)), 1)
    transposed = bool(stop.arg("transposed"))
    for axis in range(len(kernel)):
        stride, padding, dilation = (int(_along(stop.arg(name), axis)) for name in ("stride", "padding", "dilation"))
        offset = torch.arange(kernel[axis], device=device) * dilation
        at = places[:, axis, None]
        if transposed:  # the output pixel that input i reaches by kernel place k is i * stride - padding + k * dilation
            there = at + padding - offset
            inside, there = there % stride == 0, there // stride
        else:
            there = at * stride - padding + offset
            inside = torch.ones_like(there, dtype=torch.bool)
        inside &= (there >= 0) & (there < source[axis])
        there = there.clamp(0, source[axis] - 1)
        index = (index[:, :, None] * source[axis] + there[:, None, :]).flatten(1)
        valid = (valid[:, :, None] & inside[:, None, :]).flatten(1)
    return index, valid


def _along(value: object, axis: int) -> int:
    """One axis of an argument that is a number for all, or one per axis."""
    if isinstance(value, (list, tuple)):
        return int(value[axis if len(value) > 1 else 0])
    return int(value)  # type: ignore[call-overload]
