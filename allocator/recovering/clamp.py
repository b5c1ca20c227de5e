"""Activations that cut off: beyond their limits, what the layer before them gives makes no difference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from allocator.tracing.calls import Op, Ref, Trace

_PROBE = torch.linspace(-16, 16, 513)
Limits = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Clamp:
    """y -> min(max(z, low), high), with z what a batch norm in between makes of y, if there is one.

    Attributes:
        low, high: infinite where there is none.
        channels: how many there are.
        norm: of the batch norm the names of scale, shift, mean and variance, None each where it has none; None where
            there is no norm.
        eps: of the batch norm.
    """

    low: float
    high: float
    channels: int
    norm: tuple[str | None, ...] | None = None
    eps: float = 0.0

    def limits(self, tensors: Mapping[str, torch.Tensor]) -> Limits:
        """(channels,) of y below which, and above which, nothing changes; float64.

        Args:
            tensors: the model's, by name.
        """
        low, high = (torch.full((self.channels,), end, dtype=torch.float64) for end in (self.low, self.high))
        if self.norm is None:
            return low, high
        scale, shift, mean, var = (None if name is None else tensors[name].detach().double() for name in self.norm)
        assert mean is not None
        assert var is not None
        slope = (var + self.eps).rsqrt() * (1.0 if scale is None else scale)
        shift = torch.zeros_like(mean) if shift is None else shift
        low, high = (mean + (end.to(mean) - shift) / slope for end in (low, high))
        turned = slope < 0
        low, high = torch.where(turned, high, low), torch.where(turned, low, high)
        flat = slope == 0  # whatever it gives, nothing comes of it
        return low.masked_fill(flat, -torch.inf), high.masked_fill(flat, torch.inf)


def clamp_after(trace: Trace, op: Op, norm: Op | None) -> Clamp | None:
    """The activation that alone reads what a call gives, or what the batch norm after it does, if it cuts off."""
    activation = only_reader(trace, op if norm is None else norm)
    found = None if activation is None else _ends(activation)
    if found is None:
        return None
    shape = trace.values[op.outputs[0]].shape
    channels = shape[-1] if op.declared.window is None else shape[1]
    if norm is None:
        return Clamp(*found, channels)
    names = []
    for argument in ("weight", "bias", "running_mean", "running_var"):
        given = norm.arg(argument)
        names.append(trace.values[given.index].name if isinstance(given, Ref) else None)
    if None in names[2:]:
        return None
    return Clamp(*found, channels, tuple(names), float(norm.arg("eps")))


def only_reader(trace: Trace, op: Op) -> Op | None:
    """The call that alone reads what a call gives; None where there are several, or it is an output of the model."""
    output = op.outputs[0]
    reading = [
        other
        for other in trace.ops
        if any(i == output or trace.values[i].base == output for i in other.inputs()) and other is not op
    ]
    first = reading[0] if reading else None
    if first is None or output in trace.outputs:
        return None
    if first.writes() and first.outputs == (output,):  # in place: whoever reads then reads what it made
        return first
    return first if len(reading) == 1 else None


def _ends(op: Op) -> tuple[float, float] | None:
    """The limits of a call that gives what lies between them, and the nearer of them for the rest; found by trying."""
    tensors = [item for item in op.args if isinstance(item, Ref)]
    if not op.operator.pointwise or len(tensors) != 1 or not isinstance(op.args[0], Ref):
        return None
    try:
        result = op.target(_PROBE.clone(), *op.args[1:], **op.kwargs)
    except Exception:  # whatever a call makes of other numbers than its own, it is no clamp then
        return None
    if not isinstance(result, torch.Tensor) or result.shape != _PROBE.shape or result.dtype != _PROBE.dtype:
        return None
    low, high = float(result.min()), float(result.max())
    if low == high or not torch.equal(result, _PROBE.clamp(low, high)):
        return None
    ends = (low if low > _PROBE[0] else -torch.inf, high if high < _PROBE[-1] else torch.inf)
    return None if ends == (-torch.inf, torch.inf) else ends
