"""The certificate: proof that the rewritten model is the original minus the neurons that were dropped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from .errors import CertificateError
from .flow import FROZEN
from .graph import ChannelGraph
from .inputs import Inputs, device_of
from .skeleton import skeleton, tensor_names
from .tracing import tensors_in

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Certificate:
    """What was checked, so that anyone can check it again.

    Attributes:
        structural: every call of the rewritten forward is the image of the original's, index by index.
        relative_error: largest difference of the two float64 outputs over the largest output, where the
            original has every weight that reads a dropped neuron set to zero; None if not measured.
        exact: whether the mathematics says that the two are equal; False where a norm over channels runs
            over dropped ones.
        seed: of the standard normal input.
        input_shapes: of the inputs.
        outputs: number of output tensors compared.
    """

    structural: bool
    relative_error: float | None
    exact: bool
    seed: int
    input_shapes: tuple[tuple[int, ...], ...]
    outputs: int

    @property
    def ok(self) -> bool:
        """Whether every check that was made passed."""
        if not self.structural:
            return False
        return self.relative_error is None or not self.exact or self.relative_error <= TOLERANCE

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "ok": self.ok, "tolerance": TOLERANCE}

    def __str__(self) -> str:
        if self.relative_error is None:
            return f"structural check {'passed' if self.structural else 'FAILED'}, numeric check not made"
        verdict = "passed" if self.ok else "FAILED"
        nature = "" if self.exact else ", inexact by nature: a norm runs over dropped channels"
        return f"{verdict}: every index accounted for, float64 outputs within {self.relative_error:.1e}{nature}"


def numeric_error(
    model: nn.Module, small: nn.Module, graph: ChannelGraph, kept: np.ndarray, inputs: Inputs, seed: int
) -> tuple[float, int]:
    """Compare the two models in float64.

    Args:
        model: the original; every weight that reads a dropped neuron counts as zero.
        small: the rewritten model.
        graph: the original's neurons.
        kept: (neurons,) bool.
        inputs: shapes to draw a standard normal input for.
        seed: of that input.

    Returns:
        (relative error, number of output tensors compared). The error is the largest difference over all
        outputs, relative to the largest original output; infinite where an output is missing or not finite.
    """
    zeroed = _zeroed_rows(graph, kept)
    reference = run_float64(model, inputs, seed, zeroed)
    result = run_float64(small, inputs, seed, {})
    if [t.shape for t in reference] != [t.shape for t in result]:
        return float("inf"), len(reference)
    worst = 0.0
    for a, b in zip(reference, result, strict=True):
        if not a.numel():
            continue
        scale = max(float(a.abs().max()), torch.finfo(torch.float64).tiny)
        error = float((a - b).abs().max()) / scale
        worst = max(worst, error if np.isfinite(error) else float("inf"))
    return worst, len(reference)


def _zeroed_rows(graph: ChannelGraph, kept: np.ndarray) -> dict[str, list[tuple[int, np.ndarray]]]:
    """Per parameter, the (dim, indices) to read as zero: those that multiply a dropped neuron.

    Where two activations are multiplied and summed no weight reads the neuron; then its writers are zeroed.
    """
    dropped = np.append(~kept, False)[graph.unit_of_slot]
    slots = np.zeros(graph.slots.total, dtype=bool)
    for label in graph.facts.read:
        slots[label] = True
    for label in graph.facts.mixed:
        units = np.unique(graph.units(label))
        slots |= np.isin(graph.unit_of_slot, units)
    slots &= dropped
    slots[FROZEN] = False
    rows: dict[str, list[tuple[int, np.ndarray]]] = {}
    for name, shape in graph.slots.shapes.items():
        for dim, (start, size) in enumerate(zip(graph.slots.base[name], shape, strict=True)):
            indices = np.flatnonzero(slots[start : start + size])
            if len(indices):
                rows.setdefault(name, []).append((dim, indices))
    return rows


def run_float64(
    model: nn.Module, inputs: Inputs, seed: int, zeroed: dict[str, list[tuple[int, np.ndarray]]]
) -> list[torch.Tensor]:
    """Output tensors of an eval-mode forward in float64; weights are converted one call at a time."""
    copied = skeleton(model, lambda _, t: t).eval()
    device = device_of(model)
    drawn = inputs.noise(seed, device, torch.float64)
    with torch.no_grad(), _precise(), _Float64(copied, zeroed):
        output = copied(*drawn.args, **drawn.kwargs)
    return [t.to("cpu", torch.float64) for t in tensors_in(output)]


@contextlib.contextmanager
def _precise() -> Iterator[None]:
    """New tensors are float64, and cuDNN does not pick reduced precision for speed."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
            yield
    finally:
        torch.set_default_dtype(default)


class _Float64(TorchFunctionMode):
    """Runs every function in float64, with rows of some parameters read as zero; copies one weight at a time."""

    def __init__(self, model: nn.Module, zeroed: dict[str, list[tuple[int, np.ndarray]]]) -> None:
        super().__init__()
        names = tensor_names(model)
        self.rows = {id(names[name]): rows for name, rows in zeroed.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__get__" and func.__self__.__name__ not in _VIEWS:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(self._convert, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _convert(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.dtype):
            return torch.float64 if leaf in (torch.float32, torch.float16, torch.bfloat16) else leaf
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            return leaf
        wide = leaf.to(torch.float64)
        rows = self.rows.get(id(leaf))
        if rows is not None:
            wide = wide.clone() if wide is leaf else wide
            for dim, indices in rows:
                wide.index_fill_(dim, torch.as_tensor(indices, device=wide.device), 0)
        return wide


_VIEWS = frozenset({"T", "mT", "H", "mH", "data", "real"})


def require(certificate: Certificate, what: str) -> Certificate:
    """Return the certificate, or raise CertificateError where a check failed."""
    if not certificate.ok:
        raise CertificateError(f"{what} is not the original minus the dropped neurons: {certificate}")
    return certificate
