"""Methods of recovery, and the choice between them by inputs that none of them saw."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from allocator.clock import Progress
from allocator.errors import DataError, RecoveryError
from allocator.graph.channel_graph import ChannelGraph
from allocator.modules import for_inference, skeleton, tensor_names
from allocator.recovering.batch_norm import take_statistics
from allocator.recovering.compare import distances
from allocator.recovering.distil import distil
from allocator.recovering.least_squares import fit
from allocator.recovering.readers import Reader, readers_of
from allocator.recovering.record import Layer, Recovery, recovery_of, remember_recovery
from allocator.recovering.room import allowed_bytes
from allocator.recovering.samples import LEAST, Samples, gather, most_at_once
from allocator.settings import METHODS, check_choice
from allocator.tracing.inputs import device_of, dtype_of
from allocator.tracing.isolation import undisturbed


@dataclass
class Subject:
    """A network to recover, and what it is compared with.

    Attributes:
        model: the original, in eval mode, with its own weights.
        small: what is left of it, in eval mode.
        stays: (slots,) bool, which of the original's it has.
        readers: the layers that can be refitted, by their weights.
        left: the weights that read dropped neurons and can't be, with the reason.
        samples: inputs, in parts.
        at_once: inputs per forward, at most; statistics are of `LEAST` at least.
        memory: bytes that what forwards hold at a layer may take.
        seed: of the positions that are looked at.
        progress: called with how far it is.
    """

    model: nn.Module
    small: nn.Module
    stays: np.ndarray
    readers: dict[str, Reader]
    left: dict[str, str]
    samples: Samples
    at_once: int
    memory: int
    seed: int
    progress: Progress | None


@dataclass
class Made:
    """A network that a method made, with what it changed."""

    method: str
    model: nn.Module
    tensors: list[str] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)


def recover(
    graph: ChannelGraph,
    kept: np.ndarray,
    small: nn.Module,
    data: Any,
    method: str = "auto",
    *,
    samples: int,
    memory: float | str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[nn.Module, Recovery]:
    """A refitted copy of `small`, and the record of what was done; see `allocator.recover`.

    Args:
        graph: the original's neurons.
        kept: (neurons,) bool, which of them `small` has.
        small: the smaller network; not changed.
        data: as for `allocator.recover`; or what was gathered of it.
        method: its name.
        samples: inputs to look at.
        memory: bytes that what forwards hold at a layer may take; None for half of what is free.
        seed: of the positions that are looked at.
        progress: called with how far it is.
    """
    check_choice("method", method, METHODS)
    stays = graph.stays(kept)
    readers, left = _readers(graph, stays, small)
    if not readers and method in ("least_squares", "fold"):
        raise RecoveryError(f"no layer that reads neurons can be refitted: {_listed(left)}")
    allowed = allowed_bytes(memory, device_of(graph.model))
    with undisturbed(graph.model):
        gathered = data if isinstance(data, Samples) else gather(data, graph.model, graph.inputs, samples, progress)
        written = graph.written()
        numbers = graph.metric("peak_activations").value(graph.everything)
        subject = Subject(
            model=for_inference(graph.model, written),
            small=for_inference(small, written),
            stays=stays,
            readers=readers,
            left=left,
            samples=gathered,
            at_once=most_at_once(gathered, graph.inputs, numbers, dtype_of(graph.model).itemsize),
            memory=allowed,
            seed=seed,
            progress=progress,
        )
        as_cut = Made("none", subject.small)
        made = [as_cut, *(_all_that_may_help(subject) if method == "auto" else [MAKERS[method](subject)])]
        found = distances(subject.model, [each.model for each in made], gathered.cut(subject.at_once).held)
        tried = {each.method: far for each, far in zip(made, found, strict=True)}
        best = min(made, key=lambda each: tried[each.method]) if method == "auto" else made[-1]
        return _finish(small, best, subject, tried)


def _all_that_may_help(subject: Subject) -> list[Made]:
    """Statistics, least squares, and statistics after these; no statistics where a norm meets a single number."""
    made = []
    with contextlib.suppress(DataError):
        made.append(_batch_norm(subject))
    if subject.readers:
        fitted = _least_squares(subject)
        made.append(fitted)
        with contextlib.suppress(DataError):
            again = _batch_norm(replace(subject, small=fitted.model))
            tensors = list(dict.fromkeys([*fitted.tensors, *again.tensors]))
            made.append(Made(f"{fitted.method} + {again.method}", again.model, tensors, fitted.layers))
    return made


def _least_squares(subject: Subject, *, weights: bool = True) -> Made:
    small = _with_own(subject.small, {name for reader in subject.readers.values() for name in reader.tensors})
    layers = fit(
        subject.model,
        small,
        subject.stays,
        subject.readers,
        subject.samples.cut(subject.at_once),
        weights=weights,
        memory=subject.memory,
        seed=subject.seed,
        progress=subject.progress,
    )
    changed = [name for layer in layers if layer.step for name in subject.readers[layer.name].tensors]
    return Made("least_squares" if weights else "fold", small, changed, layers)


def _fold(subject: Subject) -> Made:
    return _least_squares(subject, weights=False)


def _batch_norm(subject: Subject) -> Made:
    small = _with_own(subject.small)
    return Made("batch_norm", small, take_statistics(small, subject.samples.cut(max(subject.at_once, LEAST))))


def _distil(subject: Subject) -> Made:
    """After what the closed form gives."""
    fitted = _least_squares(subject) if subject.readers else Made("distil", subject.small)
    small = skeleton(fitted.model, _copied)
    changed = distil(subject.model, small, subject.samples, subject.progress)
    return Made("distil", small, list(dict.fromkeys([*fitted.tensors, *changed])), fitted.layers)


MAKERS: dict[str, Callable[[Subject], Made]] = {
    "least_squares": _least_squares,
    "batch_norm": _batch_norm,
    "fold": _fold,
    "distil": _distil,
}
"""What there is beside "auto", which tries several and keeps the best."""


def _readers(graph: ChannelGraph, stays: np.ndarray, small: nn.Module) -> tuple[dict[str, Reader], dict[str, str]]:
    """Those that are left in the smaller network; and of those that can't be refitted, the ones that lost neurons."""
    readers, left = readers_of(graph)
    there = tensor_names(small)
    present = {name: reader for name, reader in readers.items() if name in there and there[name].numel()}
    narrowed = {}
    for name, why in left.items():
        lost = any(not stays[label].all() for label in graph.slots.labels(name))
        if lost and name in there:
            narrowed[name] = why
    return present, narrowed


def _finish(small: nn.Module, best: Made, subject: Subject, tried: dict[str, float]) -> tuple[nn.Module, Recovery]:
    """The model on its own, which is as it came but for what the record names, and the record."""
    made, earlier = tensor_names(best.model), recovery_of(small)
    model = skeleton(small, lambda name, tensor: made[name].detach() if name in best.tensors else _copied(name, tensor))
    recovery = Recovery(
        method=best.method,
        inputs=subject.samples.count,
        held=subject.samples.held_count,
        before=tried["none"],
        after=tried[best.method],
        tried=tried,
        layers=tuple(best.layers),
        left=subject.left,
        tensors=tuple(dict.fromkeys([*(earlier.tensors if earlier else ()), *best.tensors])),
    )
    remember_recovery(model, recovery)
    return model, recovery


def _listed(left: dict[str, str]) -> str:
    return "; ".join(f"{name} ({why})" for name, why in left.items()) or "no call multiplies by a parameter"


def _with_own(model: nn.Module, names: Collection[str] = ()) -> nn.Module:
    """A copy that shares all parameters but those of these names."""

    def own(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, nn.Parameter) and name not in names else _copied(name, tensor)

    return skeleton(model, own)


def _copied(_: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()
