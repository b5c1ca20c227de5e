"""Whether a smaller network is the original minus what its allocation drops: of one cut, several, or one refitted."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from torch import nn

from allocator.errors import AllocationMismatchError
from allocator.graph.build import elsewhere, with_shapes
from allocator.model_checks import check_model
from allocator.modules import shapes_of
from allocator.pipeline.model import trace_model
from allocator.recovering.proof import as_it_was_cut
from allocator.recovering.record import recovery_of
from allocator.rewriting.allocation import Allocation, architecture_hash
from allocator.rewriting.index_map import maps_of
from allocator.rewriting.kept import kept_by
from allocator.rewriting.materialise import check_fits
from allocator.rewriting.rewrite import rewrite
from allocator.settings import Certify, Settings
from allocator.tracing.inputs import inputs_like
from allocator.verifying.certificate import Certificate, certify, names_and_shapes_match, no_certificate
from allocator.verifying.growth import verify_growth
from allocator.verifying.structure import find_mismatch


def verify_model(
    model: nn.Module, small: nn.Module, allocation: Allocation, example_inputs: Any, *, numeric: Certify, seed: int
) -> Certificate:
    """As `allocator.verify`, whose arguments these are."""
    values = bool(numeric) and not allocation.parts
    model, small = check_model(model, values=values), check_model(small, values=values, name="small")
    _check_order(model, small, allocation)
    recovery = recovery_of(small)
    if recovery is not None and recovery.tensors and not allocation.parts:
        cut = as_it_was_cut(model, small, allocation, recovery)
        proven = verify_model(model, cut, allocation, example_inputs, numeric=numeric, seed=seed)
        return replace(proven, refitted=recovery.inputs)
    if allocation.parts:
        return _verify_parts(model, small, allocation, example_inputs, numeric, seed)
    if example_inputs is None:
        example_inputs = inputs_like(allocation.input_shapes, model)
    settings = Settings(groups=allocation.groups)  # type: ignore[arg-type]
    if allocation.added:
        graph = elsewhere(trace_model(model, example_inputs, settings, growing=True))
        return verify_growth(graph, allocation, small, seed=seed, numeric=numeric)
    settings = replace(settings, norms=allocation.norms)  # type: ignore[arg-type]
    graph = elsewhere(trace_model(model, example_inputs, settings))
    kept = kept_by(graph, allocation)
    if kept is None:  # inputs of other shapes may leave unread what was dropped from
        graph = with_shapes(graph, allocation.input_shapes)
        kept = kept_by(graph, allocation)
    if kept is None:
        return no_certificate(graph, seed)
    maps = maps_of(graph, kept)
    if not names_and_shapes_match(graph, maps, small) or find_mismatch(graph, maps, small) is not None:
        return no_certificate(graph, seed)
    return certify(graph, kept, maps, small, seed=seed, numeric=numeric)


def _check_order(model: nn.Module, small: nn.Module, allocation: Allocation) -> None:
    try:
        check_fits(model, allocation)
    except AllocationMismatchError:
        if architecture_hash(shapes_of(small)) != allocation.architecture:
            raise
        said = "the allocation was made for `small`: model and small are the wrong way round"
        raise AllocationMismatchError(said) from None


def _verify_parts(
    model: nn.Module, small: nn.Module, whole: Allocation, example_inputs: Any, numeric: Certify, seed: int
) -> Certificate:
    """One allocation after the other, since what a neuron is may change on the way (groups that became one)."""
    parts = [Allocation.from_dict(part) for part in whole.parts]
    composed = functools.reduce(Allocation.compose, parts)
    certificates = []
    for i, part in enumerate(parts):
        following = rewrite(model, part, "keep") if i < len(parts) - 1 else small
        made = verify_model(model, following, part, example_inputs, numeric=numeric, seed=seed)
        certificates.append(made)
        model = following
    same = all(
        getattr(composed, name) == getattr(whole, name) for name in ("kept", "attributes", "absent", "renumbered")
    )
    worst = max(certificates, key=lambda made: (not made.ok, made.relative_error or 0.0))
    structural = same and all(made.structural for made in certificates)
    return replace(worst, structural=structural, exact=all(made.exact for made in certificates))
