"""The certificate: proof that the rewritten model is the original minus the neurons that were dropped."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from allocator.errors import CertificateError
from allocator.flow.labels import FROZEN
from allocator.graph.channel_graph import ChannelGraph
from allocator.graph.neurons import components
from allocator.modules import tensor_names
from allocator.rewriting.index_map import Maps, mapped_shape
from allocator.tracing.inputs import device_of
from allocator.verifying.float64 import Draw, Rows, part_of, run_float64

TOLERANCE = 1e-9
# Below this effect of the dropped neurons, agreement of the outputs to `TOLERANCE` shows little.
MEASURABLE = 1e-6


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
        weights: every parameter and buffer is, bit for bit, the slice of the original's that the allocation
            names; None if not compared. False for a model that was trained since.
        effect: how much the original's outputs change when the dropped neurons are cut, in the same measure
            as `relative_error`: what a mistake would have changed; None if not measured.
        drawn: the outputs were compared on weights drawn from the seed too, and `effect` is theirs: with the
            model's own, neurons do not reach the outputs (an untrained network whose signal dies away, or
            residual branches whose last scale is zero), so that their agreement would show little.
        refitted: of a model that was recovered, how many inputs its weights were refitted on after the cut; then
            `weights` and `relative_error` are of the cut. None where they were not.
    """

    structural: bool
    relative_error: float | None
    exact: bool
    seed: int
    input_shapes: tuple[tuple[int, ...], ...]
    outputs: int
    weights: bool | None = None
    effect: float | None = None
    drawn: bool = False
    refitted: int | None = None

    @property
    def ok(self) -> bool:
        """Whether every check that was made passed."""
        if not self.structural or self.weights is False:
            return False
        return self.relative_error is None or not self.exact or self.relative_error <= TOLERANCE

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "ok": self.ok, "tolerance": TOLERANCE}

    def __str__(self) -> str:
        if not self.structural:
            return "FAILED: an index, a call or a number of the forward is not the image of the original's"
        said = ["every index accounted for"]
        if self.weights is not None:
            said.append("weights the original's bit for bit" if self.weights else "weights NOT the original's")
        if self.relative_error is None:
            said.append("outputs not compared")
        else:
            nature = "" if self.exact else " (inexact by nature: a norm runs over dropped channels)"
            drawn = " on drawn weights too" if self.drawn else ""
            said.append(f"float64 outputs within {self.relative_error:.1e}{drawn}{nature}")
        after = "" if self.refitted is None else f"; structure proven, weights refitted on {self.refitted} inputs"
        return f"{'passed' if self.ok else 'FAILED'}: {', '.join(said)}{after}"


@dataclass(frozen=True)
class Comparison:
    """Outputs of two models side by side, in float64.

    Attributes:
        error: largest difference over all outputs, relative to the largest original output; infinite where an
            output is missing, or finite in one model alone.
        effect: how much cutting the dropped neurons changes the original's outputs, in the same measure.
        outputs: number of output tensors compared.
        drawn: whether weights drawn from the seed were compared too; then `effect` is theirs.
    """

    error: float
    effect: float
    outputs: int
    drawn: bool = False


def certify(
    graph: ChannelGraph, kept: np.ndarray, maps: Maps, small: nn.Module, *, seed: int = 0, numeric: bool = True
) -> Certificate:
    """The certificate of a rewritten model that passed the structural check.

    Args:
        graph: the original's neurons.
        kept: (neurons,) bool, which of them it kept.
        maps: where each index of its tensors comes from.
        small: the rewritten model.
        seed: of the input that the two are compared on.
        numeric: compare weights and float64 outputs too.
    """
    shapes = _input_shapes(graph)
    if not numeric:
        return Certificate(True, None, graph.exact, seed, shapes, 0)
    same = weights_match(graph, maps, small)
    found = compare_outputs(graph, kept, maps, small, seed)
    return Certificate(True, found.error, graph.exact, seed, shapes, found.outputs, same, found.effect, found.drawn)


def no_certificate(graph: ChannelGraph, seed: int = 0) -> Certificate:
    """The certificate of a model that did not pass the structural check."""
    return Certificate(False, None, graph.exact, seed, _input_shapes(graph), 0)


def _input_shapes(graph: ChannelGraph) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(t.shape) for t in graph.inputs.tensors())


def names_and_shapes_match(graph: ChannelGraph, maps: Maps, small: nn.Module) -> bool:
    """Whether a rewritten model has the tensors that the maps call for, and no others."""
    found = tensor_names(small)
    empty = {name for name, dims in maps.items() if any(dim is not None and not len(dim) for dim in dims)}
    gone = {name.rpartition(".")[0] for name in empty}
    for name, shape in graph.slots.shapes.items():
        expected = mapped_shape(shape, maps[name]) if name in maps else shape
        tensor = found.pop(name, None)
        if tensor is None and name.rpartition(".")[0] in gone:
            continue
        if tensor is None or tuple(tensor.shape) != expected:
            return False
    return not found


def weights_match(graph: ChannelGraph, maps: Maps, small: nn.Module) -> bool:
    """Whether every tensor of the rewritten model is, bit for bit, the part of the original's that the maps name.

    The indices come from the graph's neurons, not from the allocation that the rewrite followed. One tensor
    is copied at a time.

    Args:
        graph: the original's neurons.
        maps: where each index comes from.
        small: the rewritten model; its names and shapes are taken as checked.
    """
    found = tensor_names(small)
    for name, tensor in graph.tensors.items():
        if name in found and not _same_bits(part_of(tensor.detach(), maps.get(name, ())), found[name].detach()):
            return False
    return True


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality that tells +0 from -0 and holds for NaN."""
    if a.dtype != b.dtype or a.shape != b.shape or a.layout != b.layout:
        return False
    a, b = (t if t.layout is torch.strided else t.to_dense() for t in (a, b))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(a.element_size(), torch.uint8)
    flat_a, flat_b = (t.reshape(-1).contiguous().view(bits) for t in (a, b.to(a.device)))
    return torch.equal(flat_a, flat_b)


def compare_outputs(graph: ChannelGraph, kept: np.ndarray, maps: Maps, small: nn.Module, seed: int) -> Comparison:
    """Compare the two models in float64 on one input drawn from the seed.

    Where neurons do not reach the outputs with the model's own weights, weights drawn from the seed are
    compared as well. A model that needs values is compared on its example inputs alone, since
    others may take another path.

    Args:
        graph: the original's neurons; of its weights, every one that reads a dropped neuron counts as zero.
        kept: (neurons,) bool.
        maps: where each index of the rewritten model's tensors comes from.
        small: the rewritten model.
        seed: of the input, and of the weights where they are drawn.
    """
    own = _compare(graph, kept, maps, small, seed, drawn=False)
    reached = own.effect >= MEASURABLE and not _silenced(graph)
    if reached or kept.all() or graph.flow.trace.mode == "real":
        return own
    drawn = _compare(graph, kept, maps, small, seed, drawn=True)
    if not np.isfinite(drawn.effect):
        return own
    return Comparison(max(own.error, drawn.error), drawn.effect, own.outputs, drawn=True)


def _silenced(graph: ChannelGraph) -> bool:
    """Whether a norm's scale or a layer's weight is zero throughout: what it multiplies reaches no output."""
    scales = {gamma.name for gamma in graph.facts.gammas}
    for name, parameter in graph.model.named_parameters():
        multiplies = parameter.dim() > 1 or name in scales
        if multiplies and parameter.numel() and not bool(parameter.any()):
            return True
    return False


def _compare(
    graph: ChannelGraph, kept: np.ndarray, maps: Maps, small: nn.Module, seed: int, *, drawn: bool
) -> Comparison:
    model = graph.model
    draw = Draw(graph, seed) if drawn else None
    inputs = graph.inputs.noise(seed, device_of(model), torch.float64)
    if graph.flow.trace.mode == "real":
        inputs = graph.inputs
    cut = run_float64(model, inputs, zeroed=_zeroed_rows(graph, kept), draw=draw)
    told = not kept.all() and any(t.numel() for t in cut)  # a detector may find nothing: then nothing is compared
    effect = _difference(run_float64(model, inputs, draw=draw), cut) if told else 0.0
    if draw is not None:
        draw = Draw(graph, seed, maps)
    result = run_float64(small, inputs, draw=draw)
    return Comparison(_difference(cut, result), effect, len(cut))


def _difference(reference: list[torch.Tensor], result: list[torch.Tensor]) -> float:
    """Largest difference over all outputs, each relative to its largest finite reference value.

    Infinite where shapes differ, or where one output is NaN or infinite and the other is not so in the same way.
    """
    if [t.shape for t in reference] != [t.shape for t in result]:
        return float("inf")
    worst = 0.0
    for a, b in zip(reference, result, strict=True):
        if any(not torch.equal(kind(a), kind(b)) for kind in (torch.isnan, torch.isposinf, torch.isneginf)):
            return float("inf")
        finite = a.isfinite()
        if finite.any():
            a, b = a[finite], b[finite]
            scale = max(float(a.abs().max()), torch.finfo(torch.float64).tiny)
            worst = max(worst, float((a - b).abs().max()) / scale)
    return worst


def _zeroed_rows(graph: ChannelGraph, kept: np.ndarray) -> Rows:
    """Per parameter, the (dim, indices) to read as zero: those that multiply a dropped neuron.

    Of a weight that the forward adds up from several (W + B @ A), all of them. Where two activations are
    multiplied and summed no weight reads the neuron; then its writers are zeroed.
    """
    dropped = ~graph.stays(kept)
    slots = np.zeros(graph.slots.total, dtype=bool)
    for label in graph.facts.read:
        slots[label] = True
    if graph.facts.computed_ties:
        together = components(graph.slots.total, [(tie.a, tie.b) for tie in graph.facts.computed_ties])
        slots = np.isin(together, np.unique(together[slots]))
    for label in graph.facts.multiplied:
        units = np.unique(graph.units(label))
        slots |= np.isin(graph.unit_of_slot, units)
    slots &= dropped
    slots[FROZEN] = False
    rows: Rows = {}
    for name, shape in graph.slots.shapes.items():
        for dim, (start, size) in enumerate(zip(graph.slots.base[name], shape, strict=True)):
            indices = np.flatnonzero(slots[start : start + size])
            if len(indices):
                rows.setdefault(name, []).append((dim, indices))
    return rows


def require(certificate: Certificate, what: str) -> Certificate:
    """Return the certificate, or raise CertificateError where a check failed."""
    if not certificate.ok:
        raise CertificateError(f"{what} is not the original minus the dropped neurons: {certificate}")
    return certificate
