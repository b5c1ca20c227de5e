"""What a layer reads and writes at sampled positions, as rows of a linear regression.

Everything is written in groups (of a grouped convolution; one for all else): (groups, rows, columns).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from allocator.recovering.samples import size_of
from allocator.recovering.walk import Stop, Walk
from allocator.tracing.inputs import Inputs


@dataclass
class Pair:
    """The same inputs on their way through the original and the smaller network; `held` back, or to be fitted."""

    original: Walk
    small: Walk
    inputs: Inputs
    held: bool


Stops = Sequence[tuple[Pair, Stop, Stop]]
"""Per part of the inputs, where the original and the smaller network wait."""


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
        """(groups, outputs per group, unknowns per output), float64."""
        wide = parameter.detach().double()
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


class Rows:
    """What one layer reads and should give at sampled positions, made anew whenever it is asked for.

    Args:
        stops: where all forwards wait.
        layout: of the smaller network's weight.
        outputs: of the original's outputs those that the smaller layer gives; None for all.
        most: rows to look at, of all inputs together.
        generator: draws the positions.
    """

    def __init__(
        self, stops: Stops, layout: Layout, outputs: torch.Tensor | None, most: int, generator: torch.Generator
    ) -> None:
        self.stops, self.layout, self.outputs = stops, layout, outputs
        inputs = sum(size_of(pair.inputs) for pair, _, _ in stops)
        self.positions, self.seen = [], 0
        for pair, original, small in stops:
            assert original.result is not None
            windowed = small.operator.declared.window is not None
            samples = small.x.shape[0] if windowed else 1
            share = max(most * size_of(pair.inputs) // (inputs * samples), 1)
            positions = positions_of(original.result, windowed, share, generator)
            self.positions.append(positions)
            self.seen += 0 if pair.held else samples * len(positions)

    def pairs(self) -> Iterator[tuple[bool, torch.Tensor, torch.Tensor]]:
        """Part by part: whether it is held back; (groups, rows, n) what is read; (groups, rows, outputs)."""
        for (pair, original, small), positions in zip(self.stops, self.positions, strict=True):
            assert original.result is not None
            x = read(small, positions, original.result.shape)
            yield pair.held, x, written(original, positions, self.outputs, self.layout.groups)


def positions_of(result: torch.Tensor, windowed: bool, most: int, generator: torch.Generator) -> torch.Tensor:
    """(at most `most`) places of an output to look at: pixels of every sample, or rows."""
    count = math.prod(result.shape[2:]) if windowed else result.shape[0]
    if count <= most:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:most].sort().values


def written(stop: Stop, positions: torch.Tensor, kept: torch.Tensor | None, groups: int) -> torch.Tensor:
    """(groups, rows, outputs per group), float64: what a layer gave at these positions.

    Args:
        stop: after the layer ran.
        positions: from `positions_of`.
        kept: outputs to take; None for all.
        groups: of the layer whose outputs these will be.
    """
    assert stop.result is not None
    positions = positions.to(stop.result.device)
    if stop.operator.declared.window is None:
        found = stop.result[positions]
    else:
        found = stop.result.flatten(2)[:, :, positions].transpose(1, 2).flatten(0, 1)
    found = found if kept is None else found[:, kept.to(found.device)]
    return found.double().reshape(found.shape[0], groups, -1).transpose(0, 1)


def read(stop: Stop, positions: torch.Tensor, sizes: torch.Size) -> torch.Tensor:
    """(groups, rows, unknowns per output), float64: what a layer reads to give its output at these positions.

    Args:
        stop: before or after the layer runs.
        positions: from `positions_of`.
        sizes: of the layer's output.
    """
    positions = positions.to(stop.x.device)
    if stop.operator.declared.window is None:
        return stop.x[positions].double()[None]
    index, valid = _sources(stop, positions, sizes[2:])
    groups = int(stop.arg("groups") or 1)
    patches = stop.x.flatten(2)[:, :, index.flatten()].double() * valid.flatten()
    samples, channels = stop.x.shape[:2]
    patches = patches.reshape(samples, groups, channels // groups, len(positions), -1)
    return patches.permute(1, 0, 3, 2, 4).reshape(groups, samples * len(positions), -1)


def _sources(stop: Stop, positions: torch.Tensor, sizes: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
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
            inside, there = there % stride == 0, there.div(stride, rounding_mode="floor")
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
