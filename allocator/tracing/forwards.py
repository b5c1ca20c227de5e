"""Which forwards of a model are recorded: with its example inputs, and in other modes, batches and sizes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from allocator.errors import TraceError, first_line, text_of
from allocator.modules import tensor_names
from allocator.tracing.calls import Trace
from allocator.tracing.exchange import rounds_of
from allocator.tracing.inputs import Inputs
from allocator.tracing.isolation import looked_at_once
from allocator.tracing.record import ForwardError, record, record_again, trace_forward
from allocator.tracing.value_sized import value_sized
from allocator.tracing.variations import (
    batch_of,
    dims_of_sides,
    larger,
    smaller,
    with_batch,
    with_shapes,
    with_sides,
)


@dataclass(frozen=True)
class Forwards:
    """Recorded forwards of one model.

    Attributes:
        traces: the one in eval mode with the example inputs first.
        notes: what was found on the way.
        refused: where the model does not run, in words.
    """

    traces: tuple[Trace, ...]
    notes: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    @property
    def unseen(self) -> set[str]:
        """Parameters and buffers that no forward read, where one in train mode raised, which may read them."""
        if not any(trace.unfinished for trace in self.traces):
            return set()
        return self.unread

    @property
    def unread(self) -> set[str]:
        """Parameters and buffers that no forward reads."""
        return _learned(self.traces[0]) - {value.name for trace in self.traces for value in trace.values}

    def holds(self) -> str:
        """With which inputs a result was held against the original, in words."""
        said = []
        for training in (False, True):
            sizes = [trace.inputs.sizes() for trace in self.traces if trace.training is training]
            if sizes:
                said.append(f"in {'train' if training else 'eval'} mode with {_listed(sizes)}")
        stood_in = [str(each) for trace in self.traces for each in trace.exchanged]
        said += [f"and with {_some(stood_in)}"] if stood_in else []
        not_run = f"; not so {'; '.join(self.refused)}" if self.refused else ""
        unread = sorted(name for name in self.unread if isinstance(self._tensors[name], nn.Parameter))
        left = f"; no forward reads {_some(unread)}, which stay as they are" if unread else ""
        return f"held against the original {', '.join(said)}{not_run}{left}"

    @property
    def _tensors(self) -> dict[str, torch.Tensor]:
        modules = self.traces[0].modules
        return tensor_names(modules[""], modules)

    def of(self, model: nn.Module) -> Forwards:
        """The same forwards of another model."""
        return replace(self, traces=tuple(_again(model, trace) for trace in self.traces))

    def without(self, trace: Trace, why: str) -> Forwards:
        """The others, where results do not fit this one."""
        traces = tuple(each for each in self.traces if each is not trace)
        mode = "in train mode " if trace.training else ""
        return replace(self, traces=traces, refused=(*self.refused, f"{mode}with {trace.inputs.sizes()} ({why})"))


def _again(model: nn.Module, trace: Trace) -> Trace:
    try:
        return record_again(model, trace)
    except ForwardError as error:
        return error.partial


def _listed(items: list[str]) -> str:
    *most, last = dict.fromkeys(items)
    return f"{', '.join(most)} and {last}" if most else last


def _some(items: list[str]) -> str:
    """The first few of them, and how many more there are."""
    return _listed(items) if len(items) <= _SAID else f"{', '.join(items[:_SAID])} and {len(items) - _SAID} more"


_SAID = 3


def usual_forwards(model: nn.Module, inputs: Inputs) -> Forwards:
    """In eval mode; in train mode too, where parts of the model run only there.

    Raises:
        TraceError: the forward raised.
    """
    trace = trace_forward(model, inputs)
    notes = [inputs.assumed] if inputs.assumed else []
    traces = [trace]
    used = {value.name for value in trace.values}
    if _learned(trace) - used and trace.mode != "real":
        training, error = _in_train_mode(model, trace, _another_batch(inputs, 1))
        if error is not None:
            notes.append(f"parameters and buffers used in train mode only stay as they are: {first_line(error)}")
        traces.append(training)
        if error is None:
            traces += _of_the_same_batch(model, inputs, traces)
    drawn, seeded = trace.drawn(seeded=False), trace.drawn(seeded=True)
    if seeded:
        notes.append(
            f"the forward draws from a generator that it seeds or holds ({', '.join(seeded)}): channels that meet "
            "these numbers stay"
        )
    if drawn:
        notes.append(
            f"the forward draws random numbers ({', '.join(drawn)}), fewer in a smaller network: outputs that "
            "differ are compared with one number in place of all that a call draws"
        )
    by_value = sorted({op.name for op in value_sized(trace)})
    if by_value:
        notes.append(f"results whose size depends on values count at their largest ({', '.join(by_value)})")
    return Forwards(tuple(traces), tuple(notes))


def more_forwards(model: nn.Module, first: Forwards) -> Forwards:
    """Those, and further ones: another batch with larger sides, and train mode with smaller ones.

    Where the model does not run so, the two are tried one by one. On values, which take time and memory, nothing is.
    """
    base = first.traces[0]
    if base.mode == "real":
        return replace(first, refused=("in other modes and sizes, since the forward needs values",))
    trials = _Trials(model, base.mode)
    with looked_at_once(model):
        trials.others(base, in_train_mode=any(trace.training for trace in first.traces))
        found = replace(first, traces=(*first.traces, *trials.traces), refused=tuple(trials.refused))
        return replace(found, traces=(*found.traces, *_with_others_in_place(model, found)))


def with_shapes_too(model: nn.Module, found: Forwards, shapes: Sequence[Sequence[int]]) -> Forwards:
    """Those, and all that there are for inputs of these shapes, where the model runs so without values."""
    inputs = None if found.traces[0].mode == "real" else with_shapes(found.traces[0].inputs, shapes)
    if inputs is None:
        return found
    try:
        others = more_forwards(model, usual_forwards(model, inputs))
    except TraceError:
        return found
    return replace(found, traces=(*found.traces, *others.traces))


def _with_others_in_place(model: nn.Module, found: Forwards) -> list[Trace]:
    """Forwards in which members of modules that no forward ran stand in the place of others, as far as they fit."""
    base, unread, traces = found.traces[0], found.unread, list[Trace]()
    read = {value.name for value in base.values if value.name is not None}
    for exchanges in rounds_of(base.modules, read, unread) if unread else ():
        together = [exchanges] if len(exchanges) == 1 else [exchanges, *((each,) for each in exchanges)]
        for some in together:
            with contextlib.suppress(ForwardError):
                traces.append(record(model, base.inputs, base.mode, exchanges=some))
                if some is exchanges:
                    break
    return traces


class _Trials:
    """Forwards that are tried one after the other; those that ran, and where none did."""

    def __init__(self, model: nn.Module, mode: str) -> None:
        self.model, self.mode = model, mode
        self.traces: list[Trace] = []
        self.refused: list[str] = []

    def others(self, base: Trace, *, in_train_mode: bool) -> None:
        """All of them; `in_train_mode`: there is one in that mode already."""
        inputs = base.inputs
        self.another_batch(inputs)
        shrunk = list(_resized(inputs, smaller))
        if in_train_mode:
            self.first_of(shrunk)
            return
        self.train_mode(base, [_another_batch(each, 1) for each in (*shrunk, inputs)])
        sizes = {_another_batch(each, 1).sizes() for each in shrunk}
        if sizes.isdisjoint(trace.inputs.sizes() for trace in self.traces):
            self.first_of(shrunk)

    def first_of(self, variations: list[Inputs]) -> bool:
        """Record the first of these that runs; whether one did."""
        raised: ForwardError | None = None
        for inputs in variations:
            try:
                self.traces.append(_recorded(self.model, inputs, self.mode))
            except ForwardError as error:
                raised = raised or error
            else:
                return True
        if raised is not None:
            self.refused.append(f"with {variations[0].sizes()} ({_said(raised.cause)})")
        return False

    def another_batch(self, inputs: Inputs) -> None:
        """In another batch with larger sides, or each of these alone."""
        grown, many = list(_resized(inputs, larger)), _another_batch(inputs, 2)
        try:
            self.traces.append(_recorded(self.model, _another_batch(grown[0], 2) if grown else many, self.mode))
        except ForwardError:
            batched = bool(grown) and self.first_of([many])
            self.first_of([_another_batch(each, 2) if batched else each for each in grown] or [many])

    def train_mode(self, base: Trace, variations: list[Inputs]) -> None:
        """In train mode, on the first of these on which it runs."""
        error: Exception | None = None
        for inputs in variations:
            trace, error = _in_train_mode(self.model, base, inputs)
            if error is None:
                self.traces.append(trace)
                return
        if error is not None:
            self.refused.append(f"in train mode ({_said(error)})")


def _recorded(model: nn.Module, inputs: Inputs, mode: str, *, training: bool = False) -> Trace:
    """A forward in the mode of the first; on fake tensors where that fails on meta tensors.

    What the forward makes on the CPU in this mode or size alone does not go together with these.
    """
    try:
        return record(model, inputs, mode, training=training)
    except ForwardError as error:
        if mode != "meta" or not any(word in text_of(error.cause) for word in ("device", "meta")):
            raise
        try:
            return record(model, inputs, "fake", training=training)
        except ForwardError:
            raise error from error.cause


def _said(error: Exception) -> str:
    return f"the original raises {type(error).__name__}: {first_line(error)}"


def _learned(trace: Trace) -> set[str]:
    """Parameters and buffers but for those without dims: a counter has no channels to lose."""
    tensors = tensor_names(trace.modules[""], trace.modules)
    return {name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter) or tensor.dim()}


def _another_batch(inputs: Inputs, more: int) -> Inputs:
    """With `more` samples more; of many with one, where two more are asked for."""
    batch = batch_of(inputs)
    if batch is None:
        return inputs
    return with_batch(inputs, 1 if batch > 1 and more > 1 else batch + more)


def _resized(inputs: Inputs, sizes: Callable[[int], Iterator[int]]) -> Iterator[Inputs]:
    """The inputs with all their sides larger or smaller, the likeliest to run first."""
    for dims in dims_of_sides(inputs):
        shape = inputs.tensors()[0].shape
        for changed in zip(*(sizes(int(shape[dim])) for dim in dims), strict=False):
            yield with_sides(inputs, dict(zip(dims, changed, strict=True)))


# Train mode -----------------------------------------------------------------------------------------


def _in_train_mode(model: nn.Module, base: Trace, inputs: Inputs) -> tuple[Trace, Exception | None]:
    """A forward in train mode; where it raises, with a target; else its beginning, and what it raised."""
    try:
        return _recorded(model, inputs, base.mode, training=True), None
    except ForwardError as error:
        raised = error
    for given in _with_targets(model, base, inputs):
        try:
            return _recorded(model, given, base.mode, training=True), None
        except ForwardError:
            continue
    return raised.partial, raised.cause


def _of_the_same_batch(model: nn.Module, inputs: Inputs, traces: Sequence[Trace]) -> list[Trace]:
    """A forward in train mode on the inputs themselves, where it reads what none did; else none.

    A module may hold what it computed for the batch that it saw last, and compute it anew for another.
    """
    unread = _learned(traces[0]).difference(*map(_names_read, traces))
    if not unread:
        return []
    try:
        trace = _recorded(model, inputs, traces[0].mode, training=True)
    except ForwardError:
        return []
    return [] if unread.isdisjoint(_names_read(trace)) else [trace]


def _names_read(trace: Trace) -> set[str | None]:
    """Parameters and buffers that it reads as they were; one that it computes has its name from then on."""
    made = {i for op in trace.ops for i in op.outputs if i not in op.reads}
    return {trace.values[i].name for op in trace.ops for i in op.reads if i not in made}


_TARGETS = ("target", "targets", "label", "labels", "y", "gt")
"""What forwards call the argument that they need in train mode."""


def _with_targets(model: nn.Module, base: Trace, inputs: Inputs) -> Iterator[Inputs]:
    """The inputs with a target of a usual sort: classes, classes per pixel or token, numbers like the output's."""
    names = list(inspect.signature(model.forward).parameters)[len(inputs.args) :]
    name = next((name for name in names if name in _TARGETS and name not in inputs.kwargs), None)
    batch = batch_of(inputs)
    if name is None or batch is None or not base.outputs:
        return
    like = base.values[base.outputs[0]]
    shape = (batch, *like.shape[1:])
    for sizes, dtype in {
        (shape[:1], torch.long): None,
        ((*shape[:1], *shape[2:]), torch.long): None,
        (shape[:-1], torch.long): None,
        (shape, like.dtype): None,
    }:
        target: Any = torch.empty(sizes, dtype=dtype, device="meta")
        yield Inputs(inputs.args, {**inputs.kwargs, name: target})
