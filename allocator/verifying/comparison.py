"""Two models' outputs side by side, on inputs that are drawn until the outputs show what was dropped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from allocator.errors import AllocatorError, CertificateError, first_line
from allocator.flow.labels import FROZEN
from allocator.graph.channel_graph import ChannelGraph
from allocator.rewriting.index_map import Maps
from allocator.tracing.inputs import Inputs, device_of, dtype_of
from allocator.tracing.isolation import looked_at_once
from allocator.tracing.outputs import as_data
from allocator.tracing.sharing import SharedWrite
from allocator.tracing.variations import batch_of, with_batch
from allocator.verifying.alike import Alike
from allocator.verifying.difference import Difference, difference, noise_floors
from allocator.verifying.float64 import Draw, Rows, run_float64

TOLERANCE = 1e-9
TOLERANCES = {"float64": TOLERANCE, "float32": 1e-4}
"""The largest relative error that passes, by what was computed in."""
# Below this effect of the dropped neurons, agreement of the outputs to `TOLERANCE` shows little.
MEASURABLE = 1e-6
# What an effect has to be of the tolerance, for agreement to show anything at all.
SHOWS = 10
# The share of an output that has to be compared on some input: of the others NaN is all that is known.
ENOUGH = 0.01
# An effect that float32 tells from rounding, so that the network as it is need not run in float64.
PLAIN = 0.01
NUDGES = 3
_IN_WORDS = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")
# By how much the largest inputs that are tried exceed standard normal ones: biases then count for little.
LOUD = 16.0


@dataclass(frozen=True)
class Comparison:
    """Outputs of two models side by side.

    Attributes:
        error: largest difference over all outputs and inputs, relative to the largest number of its kind in the
            original's; infinite where an output is missing, or finite in one model alone.
        effect: how much cutting the dropped neurons changes the original's outputs, in the same measure.
        outputs: number of output tensors compared.
        drawn: whether weights drawn from the seed were compared too; then `effect` is theirs.
        shares: per output, the share of its numbers that were compared on the input that most could be compared on.
        compared: numbers that were compared, over all inputs.
        dtype: what was computed in.
        like: the inputs that those compared on first were drawn like.
        unread: no output reads the dropped neurons, so that there is no effect to see.
    """

    error: float
    effect: float
    outputs: int
    drawn: bool = False
    shares: tuple[float, ...] = ()
    compared: int = 0
    dtype: str = "float64"
    like: Inputs | None = None
    unread: bool = False

    @property
    def shows(self) -> bool:
        """Whether a mistake would have been seen."""
        seen = self.unread or self.effect >= SHOWS * TOLERANCES[self.dtype]
        return seen and min(self.shares, default=0.0) >= ENOUGH

    def on_another_input(self, other: Comparison, effect: float) -> Comparison:
        """Both together, with the effect that counts."""
        shares = other.shares
        if len(shares) == len(self.shares):
            shares = tuple(map(max, self.shares, shares))
        drawn, compared = self.drawn or other.drawn, self.compared + other.compared
        error = max(self.error, other.error)
        return replace(self, error=error, effect=effect, shares=shares, drawn=drawn, compared=compared)


def compare_outputs(
    graph: ChannelGraph,
    kept: np.ndarray,
    maps: Maps,
    small: nn.Module,
    seed: int,
    like: Sequence[Inputs] = (),
    *,
    uncut: bool = False,
    copies: Maps | None = None,
) -> Comparison:
    """Compare the two models on inputs drawn from the seed, in float64 or, where the forward refuses that, in float32.

    Where neurons do not reach the outputs with the model's own weights, weights drawn from the seed are
    compared as well, and then other inputs, each with other weights. A model that needs values is compared on its
    example inputs first, since others may take another path.

    Args:
        graph: the original's neurons; of its weights, every one that reads a dropped neuron counts as zero.
        kept: (neurons,) bool.
        maps: where each index of the rewritten model's tensors comes from.
        small: the rewritten model.
        seed: of the input, and of the weights where they are drawn.
        like: what inputs are drawn like, the next where those like the first show too little, or the original does not
            run on them; the graph's own where there are none.
        uncut: with its own weights the original computes what the rewritten model does, though it has more neurons; it
            is compared as it is.
        copies: per tensor of the original, which index holds what each holds, for weights that are drawn.

    Raises:
        CertificateError: the forward runs in neither dtype.
    """
    said = []
    for dtype in (torch.float64, torch.float32):
        try:
            pair = _Pair(graph, kept, maps, small, seed, like or (graph.inputs,), dtype, uncut, copies or {})
            with looked_at_once(graph.model):
                return _compare_where_random(pair)
        except AllocatorError:
            raise
        except Exception as error:  # whatever the model's own code raises
            said.append(f"{type(error).__name__} in {_name(dtype)}: {first_line(error)}")
            cause = error
    raise CertificateError(
        f"the outputs cannot be compared: the forward raised {' and '.join(said)}; pass certify=False for the "
        "structural check alone"
    ) from cause


def _compare_where_random(pair: _Pair) -> Comparison:
    """As `_compare`; where a forward that draws does not agree, with one number in place of all that a call draws.

    What it draws from a generator that it seeded itself is the network's own, and stays.
    """
    found = _compare(pair)
    agree = not pair.graph.exact or found.error <= TOLERANCES[_name(pair.dtype)]
    if agree and found.shows:
        return found
    alike = Alike()
    pair.run(pair.graph.model, pair.graph.inputs, dtype=pair.dtype, alike=alike)
    return _compare(replace(pair, alike=alike)) if alike.stood_in else found


def _compare(pair: _Pair) -> Comparison:
    others = pair.inputs()
    inputs = next(others)
    own = pair.tried(inputs)
    if own is None and len(pair.like) > 1:  # not seen by a trace on sizes alone, as indices beyond a smaller image
        return _compare(replace(pair, like=pair.like[1:]))
    if own is None:
        inputs, own = _first_that_runs(pair, others)
    found, by_value = own, pair.graph.flow.trace.mode == "real"
    if pair.kept.all():
        return own
    if not (own.effect >= MEASURABLE and not _silenced(pair.graph)) and not by_value:
        drawn = pair.compare(inputs, pair.seed)
        if np.isfinite(drawn.effect):
            found = own.on_another_input(drawn, drawn.effect)
    for number, other in enumerate(others, 1):
        for weights in (None, pair.seed + number):
            if found.shows:
                return found
            again = pair.tried(other, weights) if weights is None or not by_value else pair.agreed(other, weights)
            if again is not None:
                found = found.on_another_input(again, max(found.effect, again.effect))
    return found if found.shows else replace(found, unread=pair.is_unread())


def _first_that_runs(pair: _Pair, others: Iterator[Inputs]) -> tuple[Inputs, Comparison]:
    """Of further inputs: a forward may check its numbers, or read them as ids. Raises what it raises on its own."""
    for inputs in others:
        found = pair.tried(inputs)
        if found is not None:
            return inputs, found
    return pair.like[0], pair.compare(pair.like[0])


@dataclass
class _Pair:
    """The original and the rewritten model, and what they are compared in."""

    graph: ChannelGraph
    kept: np.ndarray
    maps: Maps
    small: nn.Module
    seed: int
    like: Sequence[Inputs]
    dtype: torch.dtype
    uncut: bool
    copies: Maps
    alike: Alike | None = None

    def inputs(self) -> Iterator[Inputs]:
        """Those to compare on, the ones that say most first."""
        device = device_of(self.graph.model)
        for own in self.like:
            if self.graph.flow.trace.mode == "real":
                yield own
            yield own.noise(self.seed, device, torch.float64)
            yield own.noise(self.seed, device, torch.float64, positive=True)
            yield own.noise(self.seed + 1, device, torch.float64)
            yield own
            yield own.noise(self.seed + 2, device, torch.float64, scale=LOUD)
            yield own.noise(self.seed + 3, device, torch.float64, scale=LOUD)
            batch = batch_of(own)
            # A mean over what a batch norm made of one sample is the norm's shift. Other samples hold no whole numbers.
            if batch is not None and all(t.is_floating_point() for t in own.tensors()):
                yield with_batch(own, batch + 1).noise(self.seed + 4, device, torch.float64)

    def compare(self, inputs: Inputs, weights: int | None = None) -> Comparison:
        """The two models on one input, with their own weights or with those of a seed."""
        return self._beside(self._original(inputs, self._draw(weights)), inputs, weights)

    def tried(self, inputs: Inputs, weights: int | None = None) -> Comparison | None:
        """As `compare`; None where the original itself does not take this input."""
        try:
            given = self._original(inputs, self._draw(weights))
        except Exception:  # whatever the model's own code raises
            return None
        return self._beside(given, inputs, weights)

    def agreed(self, inputs: Inputs, weights: int) -> Comparison | None:
        """As `tried`; None where the two do not agree: a forward that needs values may take another path with these."""
        try:
            found = self.compare(inputs, weights)
        except Exception:  # whatever the model's own code raises
            return None
        return found if found.error <= TOLERANCES[found.dtype] else None

    def _draw(self, weights: int | None) -> Draw | None:
        return None if weights is None else Draw(self.graph, weights, self.copies)

    def _original(self, inputs: Inputs, draw: Draw | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Outputs of the original with the dropped neurons cut, and without that."""
        cut = self._cut(inputs, draw)
        if self.kept.all() or not any(t.numel() for t in cut):  # a detector may find nothing
            return cut, cut
        only_for_the_effect = draw is not None or not self.uncut
        draws = any(op.draws() for op in self.graph.flow.trace.ops)  # in another dtype other numbers
        if only_for_the_effect and dtype_of(self.graph.model) is torch.float32 and not draws:
            whole = self._whole(inputs, draw, torch.float32)
            if PLAIN <= difference(whole, cut, patterns=False).worst < float("inf"):
                return cut, whole
        return cut, self._whole(inputs, draw, self.dtype)

    def _run(self, model: nn.Module, inputs: Inputs, **how: Any) -> list[torch.Tensor]:
        said: list[Any] = []
        return self.run(model, inputs, alike=self.alike, said=said, **how) + self._numbers(said)

    def run(self, model: nn.Module, inputs: Inputs, **how: Any) -> list[torch.Tensor]:
        """`run_float64`; on weights of its own, once a forward was seen to give them to others than torch."""
        by_value = self.graph.flow.trace.by_value
        try:
            return run_float64(model, inputs, by_value=by_value, **how)
        except SharedWrite:
            by_value.update(self.graph.tensors)
            return run_float64(model, inputs, by_value=by_value, **{**how, "written": None})

    def _numbers(self, said: list[Any]) -> list[torch.Tensor]:
        """What a forward that needs values returns beside tensors, of words the numbers in them.

        Of any other, the structure tells all of it.
        """
        if self.graph.flow.trace.mode != "real" or not self.graph.flow.trace.said:
            return []
        steady = said if len(said) != len(self.steady) else [each for each, same in zip(said, self.steady) if same]
        loose = [each for each in steady if isinstance(each, (int, float))]
        loose += [float(number) for each in steady if isinstance(each, str) for number in _IN_WORDS.findall(each)]
        arrays = [each for each in steady if isinstance(each, (np.ndarray, np.generic)) and each.dtype.kind in "biuf"]
        found = [torch.from_numpy(np.array(each, dtype=np.float64)) for each in arrays]
        return [*found, torch.tensor(loose, dtype=torch.float64)] if loose else found

    @cached_property
    def steady(self) -> list[bool]:
        """Of what the original returns beside tensors, what it gives twice alike: the time that it took is not."""
        twice: list[list[Any]] = [[], []]
        for said in twice:
            self.run(self.graph.model, self.graph.inputs, dtype=self.dtype, said=said)
        return [repr(as_data(a)) == repr(as_data(b)) for a, b in zip(*twice)]

    def _whole(self, inputs: Inputs, draw: Draw | None, dtype: torch.dtype) -> list[torch.Tensor]:
        written = self.graph.flow.trace.written()
        return self._run(self.graph.model, inputs, draw=draw, dtype=dtype, written=written)

    def is_unread(self) -> bool:
        """Whether the original gives the same outputs where every weight of a dropped neuron is no number.

        That passes through all arithmetic, where a zero may be lost in a layer that is off. What compares numbers takes
        none for small, and is asked with the largest and the smallest too.
        """
        rows, found = _dropped_rows(self.graph, self.kept), []
        for number, inputs in enumerate(self.inputs()):
            for weights in (None, self.seed + number):
                found.append(self._same_outputs(inputs, rows, self._draw(weights)))
                if found[-1] is False:
                    return False
        return True in found

    def _same_outputs(self, inputs: Inputs, rows: Rows, draw: Draw | None) -> bool | None:
        """Whether no output reads these rows; None where there is none to see that of."""
        try:
            usual = self._run(self.graph.model, inputs, draw=draw, dtype=self.dtype)
        except Exception:  # whatever the model's own code raises
            return None
        if not all(t.numel() for t in usual):
            return None
        for fill in (float("nan"), float("inf"), -float("inf")):
            try:
                spoilt = self._run(self.graph.model, inputs, zeroed=rows, draw=draw, dtype=self.dtype, fill=fill)
            except Exception:  # the forward asks for numbers, or chooses between them
                return False
            if difference(usual, spoilt).worst:
                return False
        return True

    def _cut(self, inputs: Inputs, draw: Draw | None, nudge: int = 0) -> list[torch.Tensor]:
        zeroed = _zeroed_rows(self.graph, self.kept)
        return self._run(self.graph.model, inputs, zeroed=zeroed, draw=draw, dtype=self.dtype, nudge=nudge)

    def _beside(
        self, original: tuple[list[torch.Tensor], list[torch.Tensor]], inputs: Inputs, weights: int | None
    ) -> Comparison:
        cut, whole = original
        reference = whole if self.uncut and weights is None else cut
        draw = None if weights is None else Draw(self.graph, weights, self.maps)
        result = self._run(self.small, inputs, draw=draw, dtype=self.dtype)
        found, floors = difference(reference, result), None
        tolerance = TOLERANCES[_name(self.dtype)]
        if tolerance < found.worst < float("inf") and self.graph.exact:
            nudged = [self._cut(inputs, self._draw(weights), nudge) for nudge in range(1, NUDGES + 1)]
            floors = noise_floors(cut, nudged, tolerance)
            found = difference(reference, result, floors)
        effect = difference(whole, cut, floors, patterns=False).worst if whole is not cut else 0.0
        return self._comparison(found, effect, len(cut), weights is not None)

    def _comparison(self, found: Difference, effect: float, outputs: int, drawn: bool) -> Comparison:
        numbers = found.shares, found.compared, _name(self.dtype)
        return Comparison(found.worst, effect, outputs, drawn, *numbers, self.like[0])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _silenced(graph: ChannelGraph) -> bool:
    """Whether a norm's scale or a layer's weight is zero throughout: what it multiplies reaches no output."""
    scales = {gamma.name for gamma in graph.facts.gammas}
    for name, parameter in graph.model.named_parameters():
        multiplies = parameter.dim() > 1 or name in scales
        if multiplies and parameter.numel() and not (parameter.dim() and parameter[0].any()) and not parameter.any():
            return True
    return False


def _zeroed_rows(graph: ChannelGraph, kept: np.ndarray) -> Rows:
    """Per parameter, the (dim, indices) to read as zero: those that multiply a dropped neuron.

    Of a weight that the forward adds up from several (W + B @ A), all of them. Where two activations are
    multiplied and summed no weight reads the neuron; then its writers are zeroed.
    """
    dropped = ~graph.stays(kept)
    slots = graph.reads.copy()
    for label in graph.facts.multiplied:
        units = np.unique(graph.units(label))
        slots |= np.isin(graph.unit_of_slot, units)
    return _rows(graph, slots & dropped)


def _dropped_rows(graph: ChannelGraph, kept: np.ndarray) -> Rows:
    """Per floating-point tensor, the (dim, indices) that are dropped."""
    rows = _rows(graph, ~graph.stays(kept))
    return {name: found for name, found in rows.items() if graph.tensors[name].is_floating_point()}


def _rows(graph: ChannelGraph, slots: np.ndarray) -> Rows:
    slots[FROZEN] = False
    rows: Rows = {}
    for name, shape in graph.slots.shapes.items():
        for dim, (start, size) in enumerate(zip(graph.slots.base[name], shape, strict=True)):
            indices = np.flatnonzero(slots[start : start + size])
            if len(indices):
                rows.setdefault(name, []).append((dim, indices))
    return rows
