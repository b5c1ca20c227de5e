"""What follows a layer right away and says which of its outputs matter: a batch norm, a sum, an activation.

Behind a batch norm the refit still is of the layer's own outputs. Where these are added to another branch, the layer is
asked for what is missing to the original's sum, so that errors do not pile up along a residual stream (after He et al.,
ICCV 2017). Beyond the limits of an activation that cuts off, what a layer gives makes no difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from allocator.tracing.calls import Op, Ref, Trace

_PROBE = torch.linspace(-16, 16, 513)
_NORM = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class After:
    """min(max(norm(y) + other, low), high) of what a layer gives, where these follow.

    Attributes:
        channels: how many the layer has.
        norm: of a batch norm the names of scale, shift, mean and variance, None each where it has none; () for no norm.
        eps: of the batch norm.
        meets: whether another activation is added.
        low, high: infinite where nothing is cut off.
    """

    channels: int
    norm: tuple[str | None, ...] = ()
    eps: float = 0.0
    meets: bool = False
    low: float = -torch.inf
    high: float = torch.inf

    @property
    def cuts_off(self) -> bool:
        """Whether there are limits."""
        return self.low > -torch.inf or self.high < torch.inf

    def affine(self, tensors: Mapping[str, torch.Tensor], kept: torch.Tensor | None, dtype: torch.dtype) -> Affine:
        """What the batch norm does to the channels that are kept; nothing where there is none."""
        if not self.norm:
            return Affine(None, None, None)
        scale, shift, mean, var = (None if name is None else tensors[name].detach().double() for name in self.norm)
        assert mean is not None
        assert var is not None
        slope = (var + self.eps).rsqrt() * (1.0 if scale is None else scale)
        parts = slope, torch.zeros_like(mean) if shift is None else shift, mean
        return Affine(*((part if kept is None else part[kept.to(part.device)]).to(dtype) for part in parts))


@dataclass(frozen=True)
class Affine:
    """y -> slope * (y - mean) + shift, per channel, which come last; None each for y itself."""

    slope: torch.Tensor | None
    shift: torch.Tensor | None
    mean: torch.Tensor | None

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        """What comes of (..., channels)."""
        if self.slope is None or self.shift is None or self.mean is None:
            return y
        return self.slope * (y - self.mean) + self.shift

    def back(self, value: torch.Tensor) -> torch.Tensor:
        """What it comes of; the mean where everything gives the same."""
        if self.slope is None or self.shift is None or self.mean is None:
            return value
        return torch.where(self.slope == 0, self.mean, self.mean + (value - self.shift) / self.slope)

    def limits(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where (..., channels) limits lie before it; a channel of slope zero has none."""
        if self.slope is None:
            return low, high
        a, b = self.back(low), self.back(high)
        a, b = torch.where(self.slope < 0, b, a), torch.where(self.slope < 0, a, b)
        flat = self.slope == 0
        return torch.where(flat, -torch.inf, a), torch.where(flat, torch.inf, b)


def what_follows(trace: Trace, op: Op, channels: int) -> After:
    """What comes right after a call.

    Args:
        trace: of the forward.
        op: the layer's call.
        channels: of its output.
    """
    norm: tuple[str | None, ...] = ()
    eps, last = 0.0, op
    following = _only_reader(trace, op)
    if following is not None and "running_mean" in following.operator.arguments:
        names = tuple(_name(trace, following, argument) for argument in _NORM)
        if None not in names[2:]:
            norm, eps, last = names, float(following.arg("eps")), following
            following = _only_reader(trace, following)
    meets = following is not None and _is_sum(trace, following, op, last)
    if meets:
        following = _only_reader(trace, following)
    low, high = (-torch.inf, torch.inf) if following is None else _ends(following)
    return After(channels, norm, eps, meets, low, high)


def _name(trace: Trace, op: Op, argument: str) -> str | None:
    """The name of the parameter or buffer that is an argument of a call."""
    given = op.arg(argument)
    return trace.values[given.index].name if isinstance(given, Ref) else None


def _only_reader(trace: Trace, op: Op | None) -> Op | None:
    """The call that alone reads what a call gives; None where there are several, or it is an output of the model."""
    if op is None:
        return None
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


def _is_sum(trace: Trace, op: Op, layer: Op, last: Op) -> bool:
    """Whether a call adds two activations of one shape, the other of which comes of no later layer than this one."""
    values = [trace.values[i] for i in op.inputs()]
    if len(values) != 2 or values[0].shape != values[1].shape or any(value.name is not None for value in values):
        return False
    others = [i for i in op.inputs() if i not in last.outputs]
    if not op.operator.pointwise or len(others) != 1 or _made_by_later_layer(trace, others[0], layer):
        return False
    rest = [item for item in op.args if not isinstance(item, Ref)]
    try:
        result = op.target(torch.tensor([1.0]), torch.tensor([4.0]), *rest, **op.kwargs)
    except Exception:  # whatever a call makes of other numbers than its own, it is no sum then
        return False
    return isinstance(result, torch.Tensor) and result.tolist() == [5.0]


def _made_by_later_layer(trace: Trace, value: int, layer: Op) -> bool:
    """Whether a value comes of a layer that runs after another, with at most a batch norm between."""
    for _ in range(2):
        made = next((op for op in trace.ops if value in op.outputs), None)
        if made is None or made.index < layer.index:
            return False
        if made.declared.read_dim is not None:
            return True
        value = made.inputs()[0] if made.inputs() else -1
    return False


def _ends(op: Op) -> tuple[float, float]:
    """The limits of a call that gives what lies between them, and the nearer of them for the rest; found by trying."""
    nothing = (-torch.inf, torch.inf)
    tensors = [item for item in op.args if isinstance(item, Ref)]
    if not op.operator.pointwise or len(tensors) != 1 or not isinstance(op.args[0], Ref):
        return nothing
    try:
        result = op.target(_PROBE.clone(), *op.args[1:], **op.kwargs)
    except Exception:  # whatever a call makes of other numbers than its own, it cuts nothing off then
        return nothing
    if not isinstance(result, torch.Tensor) or result.shape != _PROBE.shape or result.dtype != _PROBE.dtype:
        return nothing
    low, high = float(result.min()), float(result.max())
    if low == high or not torch.equal(result, _PROBE.clamp(low, high)):
        return nothing
    return low if low > _PROBE[0] else -torch.inf, high if high < _PROBE[-1] else torch.inf
