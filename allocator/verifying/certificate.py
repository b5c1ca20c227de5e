"""The certificate: proof that the rewritten model is the original minus the neurons that were dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from allocator.errors import CertificateError
from allocator.graph.channel_graph import ChannelGraph
from allocator.modules import tensor_names
from allocator.rewriting.index_map import Maps, mapped_shape, renumber
from allocator.settings import Certify
from allocator.tracing.inputs import Inputs
from allocator.verifying.comparison import TOLERANCES, compare_outputs
from allocator.verifying.float64 import part_of
from allocator.verifying.smaller import smaller_inputs


@dataclass(frozen=True)
class Certificate:
    """What was checked, so that anyone can check it again.

    Attributes:
        structural: every call of the rewritten forward is the image of the original's, index by index.
        relative_error: largest difference of a number in the two float64 outputs over the largest of its kind, where
            the original has every weight that reads a dropped neuron set to zero; None if not measured.
        exact: whether the mathematics says that the two are equal; False where a norm over channels runs
            over dropped ones.
        seed: of the standard normal input.
        input_shapes: of the inputs.
        outputs: number of output tensors compared.
        weights: every parameter and buffer is, bit for bit, the slice of the original's that the allocation
            names; None if not compared. False for a model that was trained since.
        effect: how much the original's outputs change when the dropped neurons are cut, in the same measure
            as `relative_error`: what a mistake would have changed; None if not measured. To about 1e-6: where it is
            large, the original as it is was run in float32.
        drawn: the outputs were compared on weights drawn from the seed too, and `effect` is theirs: with the
            model's own, neurons do not reach the outputs (an untrained network whose signal dies away, or
            residual branches whose last scale is zero), so that their agreement would show little.
        shown: the outputs could be compared, and depend on the dropped neurons; without that, their agreement shows
            nothing. True where nothing was dropped or measured, and where `unread`.
        compared: numbers in the outputs that were compared, over all inputs that were tried.
        dtype: what was computed in; "float32" where the forward refuses float64.
        compared_shapes: of the inputs that the outputs were compared on first: those of `input_shapes`, or with fewer
            pixels where the forward takes the same steps; none if not measured.
        refitted: of a model that was recovered, how many inputs its weights were refitted on after the cut; then
            `weights` and `relative_error` are of the cut. None where they were not.
        widens: of a wider network. It computes what the original does, and the original is what is left of it without
            the neurons that were added: these are the dropped ones above.
        unread: no output reads the dropped neurons, as those of a branch that ends dead, so that `effect` is none.
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
    shown: bool = True
    compared: int = 0
    dtype: str = "float64"
    compared_shapes: tuple[tuple[int, ...], ...] = ()
    refitted: int | None = None
    widens: bool = False
    unread: bool = False

    @property
    def tolerance(self) -> float:
        """The largest relative error that passes."""
        return TOLERANCES[self.dtype]

    @property
    def agrees(self) -> bool:
        """Whether nothing that was looked at differs."""
        if not self.structural or self.weights is False:
            return False
        return self.relative_error is None or not self.exact or self.relative_error <= self.tolerance

    @property
    def ok(self) -> bool:
        """Whether every check that was made passed."""
        return self.agrees and self.shown

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "ok": self.ok, "tolerance": self.tolerance}

    def __str__(self) -> str:
        if not self.structural:
            return "FAILED: an index, a call or a number of the forward is not the image of the original's"
        said = ["every index accounted for, both ways" if self.widens else "every index accounted for"]
        if self.weights is not None:
            said.append("weights the original's bit for bit" if self.weights else "weights NOT the original's")
        if self.relative_error is None:
            said.append("outputs not compared")
        else:
            nature = "" if self.exact else " (inexact by nature: a norm runs over dropped channels)"
            drawn = " on drawn weights too" if self.drawn else ""
            said.append(f"{self.dtype} outputs within {self.relative_error:.1e}{self._where()}{drawn}{nature}")
        if not self.shown:
            neurons = "added" if self.widens else "dropped"
            said.append(f"but none of them was seen to depend on the {neurons} neurons")
        elif self.unread:
            said.append("none of them reads the dropped neurons")
        verdict = "passed" if self.ok else "NOT SHOWN" if self.agrees else "FAILED"
        after = "" if self.refitted is None else f"; structure proven, weights refitted on {self.refitted} inputs"
        return f"{verdict}: {', '.join(said)}{after}"

    def _where(self) -> str:
        if self.compared_shapes in ((), self.input_shapes):
            return ""
        return f" at {' and '.join('x'.join(map(str, shape)) for shape in self.compared_shapes)}"


def certify(
    graph: ChannelGraph, kept: np.ndarray, maps: Maps, small: nn.Module, *, seed: int = 0, numeric: Certify = "small"
) -> Certificate:
    """The certificate of a rewritten model that passed the structural check.

    Args:
        graph: the original's neurons.
        kept: (neurons,) bool, which of them it kept.
        maps: where each index of its tensors comes from.
        small: the rewritten model.
        seed: of the input that the two are compared on.
        numeric: compare weights and float64 outputs too, these on the smallest inputs that the forward takes in the
            same steps ("small", which True is too), or on those of the graph ("full").
    """
    return certificate_of(graph, kept, maps, small, weights_match, seed=seed, numeric=numeric)


def certificate_of(
    graph: ChannelGraph,
    kept: np.ndarray,
    maps: Maps,
    small: nn.Module,
    same_weights: Callable[[ChannelGraph, Maps, nn.Module], bool],
    *,
    seed: int,
    numeric: Certify,
    widens: bool = False,
    copies: Maps | None = None,
) -> Certificate:
    """The certificate of two models of which the smaller passed the structural check.

    Args:
        graph, kept, maps, small, seed, numeric: as for `certify`.
        same_weights: whether the weights are those that there should be.
        widens: the smaller one came first, and the two compute the same.
        copies: per tensor of the graph's model which index holds what each holds, where there are copies that weights
            which are drawn have to be as well.
    """
    shapes = _shapes(graph.inputs)
    if not numeric:
        return Certificate(True, None, graph.exact, seed, shapes, 0, widens=widens)
    same = same_weights(graph, maps, small)
    fewer = None if numeric == "full" else smaller_inputs(graph)
    like = [graph.inputs] if fewer is None else [fewer, graph.inputs]
    found = compare_outputs(graph, kept, maps, small, seed, like, uncut=widens, copies=copies or {})
    shown = found.shows or bool(kept.all())
    compared = (found.compared, found.dtype, _shapes(found.like or graph.inputs))
    numbers = (found.outputs, same, found.effect, found.drawn, shown, *compared)
    return Certificate(True, found.error, graph.exact, seed, shapes, *numbers, widens=widens, unread=found.unread)


def no_certificate(graph: ChannelGraph, seed: int = 0) -> Certificate:
    """The certificate of a model that did not pass the structural check."""
    return Certificate(False, None, graph.exact, seed, _shapes(graph.inputs), 0)


def _shapes(inputs: Inputs) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(t.shape) for t in inputs.tensors())


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
        dims = maps.get(name, ())
        expected = part_of(tensor.detach(), dims)
        if name in graph.facts.picks and dims and dims[0] is not None:
            expected = renumber(tensor, dims[0].source)
        if name in found and not same_bits(expected, found[name].detach()):
            return False
    return True


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality that tells +0 from -0 and holds for NaN."""
    if a.dtype != b.dtype or a.shape != b.shape or a.layout != b.layout:
        return False
    a, b = (t if t.layout is torch.strided else t.to_dense() for t in (a, b))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(a.element_size(), torch.uint8)
    flat_a, flat_b = (t.reshape(-1).contiguous().view(bits) for t in (a, b.to(a.device)))
    return torch.equal(flat_a, flat_b)


_CLAIM = "the original minus the dropped neurons"


def require(certificate: Certificate, what: str, seeded: Sequence[str] = ()) -> Certificate:
    """Return the certificate, or raise CertificateError where a check failed, or showed nothing.

    Args:
        certificate: of a rewritten model.
        what: the rewritten model, in words.
        seeded: calls that draw from a generator which the forward seeds or holds.
    """
    claim = "the original with neurons that change nothing" if certificate.widens else _CLAIM
    if certificate.agrees and not certificate.shown:
        raise CertificateError(
            f"{what} was not shown to be {claim}: {certificate}; pass example_inputs "
            "that reach the outputs, or certify=False for the structural check alone"
        )
    if not certificate.ok:
        own = (
            f"; the forward draws from a generator that it seeds or holds ({', '.join(seeded)}), and what it draws, or "
            "the seed, hangs on how many channels there are: draw these numbers once, into a buffer"
        )
        raise CertificateError(f"{what} is not {claim}: {certificate}{own if seeded else ''}")
    return certificate
