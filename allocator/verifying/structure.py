"""The structural check: the rewritten forward is the image of the original one, index by index.

The rewritten model is traced and its labels are computed by the same rules. Every call must be the same
call on the images of the same tensors, with the same numbers; every dim must hold exactly the kept indices,
in their order. Shapes alone would not notice a shuffle that kept the wrong order, nor a scale 1/sqrt(d)
that changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from allocator.errors import in_words
from allocator.flow.facts import Facts
from allocator.flow.flow import Flow
from allocator.flow.follow import RuleError, run_rules
from allocator.flow.labels import Slots
from allocator.graph.channel_graph import ChannelGraph
from allocator.modules import numbers_of, shapes_of
from allocator.rewriting.index_map import Maps, renumbered
from allocator.tracing.calls import Op, Ref, Trace
from allocator.tracing.isolation import looked_at_once
from allocator.tracing.record import ForwardError, record_again
from allocator.verifying.image import Image


@dataclass(frozen=True)
class Mismatch:
    """Where the rewritten forward stops being the image of the original.

    Attributes:
        op: the original call; None where the original makes none.
        what: what differs, with got and expected.
        module: path of the module whose forward raised; None where it is something else that does not fit.
        forward: which of the graph's flows it is in.
        misplaced: slots of the original that are there, in other places than they should be.
        dims: where the call gives a tensor of other sizes, which these are: (which tensor, dim).
        also: where it is a number in the call, what differs after it, up to the first that is none.
    """

    op: Op | None
    what: str
    module: str | None = None
    forward: int = 0
    misplaced: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64), repr=False, compare=False)
    dims: tuple[tuple[int, int], ...] = field(default=(), repr=False, compare=False)
    also: tuple[Mismatch, ...] = field(default=(), repr=False, compare=False)

    @property
    def is_number(self) -> bool:
        """Whether it is a number in the call, or beside what is returned."""
        return self.what.startswith((_NUMBER, _SAYS))

    def __str__(self) -> str:
        return f"{self.op or 'a forward without calls'}: {self.what}"


_NUMBER = "has the number"
_SAYS = "the model returns"
_SHAPE = "shape"
_RAISED = "the rewritten forward raised"


def find_mismatch(graph: ChannelGraph, maps: Maps, small: nn.Module, *, copied: bool = False) -> Mismatch | None:
    """Trace a rewritten model and compare it with the original, with all inputs and in all modes of the graph's flows.

    Args:
        graph: of the original.
        maps: where each index of the rewritten model's tensors should come from.
        small: the rewritten model.
        copied: `small` is a copy on meta tensors, to be used up.
    """
    slots = Slots.of(shapes_of(small), {**_numbers_left(graph, maps), **numbers_of(small)})
    image = Image(graph, maps, slots)
    torn = image.keep_together(graph.facts.ties)
    if torn is not None:
        what = "what meets here is put into different orders"
        return Mismatch(graph.flow.trace.ops[torn.op], what, misplaced=image.misplaced)
    with looked_at_once(small):
        for which, flow in enumerate(graph.flows):
            mismatch = _mismatch_in(flow, small, slots, image, copied=copied and flow is graph.flows[-1])
            if mismatch is not None:
                return replace(mismatch, forward=which)
    return None


def _mismatch_in(flow: Flow, small: nn.Module, slots: Slots, image: Image, *, copied: bool) -> Mismatch | None:
    """As `find_mismatch`, with the inputs and in the mode of one flow."""
    error: Exception | None = None
    where: str | None = None
    try:
        trace = record_again(small, flow.trace, copied=copied)
    except ForwardError as raised:
        trace, error, where = raised.partial, raised.cause, raised.module
    try:
        new = run_rules(trace, slots, Facts(), flow.options)
    except RuleError as failed:
        new, error = failed.flow, failed
    mismatch = compare(flow, new, image, error)
    if mismatch is None:
        return _says_otherwise(flow, trace, image)
    return replace(mismatch, module=where) if mismatch.what.startswith(_RAISED) else mismatch


def _says_otherwise(old: Flow, trace: Trace, image: Image) -> Mismatch | None:
    """Whether numbers or words that the model returns beside tensors differ, of those that it says every time.

    Those that were computed from values are compared where outputs are.
    """
    said = old.trace.said
    if old.trace.mode == "real" or old.trace.unfinished or _alike(said, trace.said):
        return None
    try:
        again = record_again(old.trace.modules[""], old.trace).said
    except ForwardError:  # it does not repeat itself at all
        return None
    same = len(said) == len(trace.said)
    for i, (first, second) in enumerate(zip(said, again, strict=False)):
        if not same and _alike(first, second):
            what = f"{_SAYS} {len(trace.said)} numbers and words beside tensors, expected {len(said)}"
            return Mismatch(_maker_of(len(said), old, image), what)
        if _alike(first, second) and not _alike(first, trace.said[i]):
            what = f"{_SAYS} {_shortly(trace.said[i])} beside tensors, expected {_shortly(first)}"
            return Mismatch(_maker_of(first, old, image), what)
    return None


def _alike(a: Any, b: Any) -> bool:
    return repr(a) == repr(b)  # not a number is like itself


def _shortly(said: Any) -> str:
    text = repr(said)
    return text if len(text) <= 40 else f"{text[:40]} ..."


def _maker_of(number: Any, old: Flow, image: Image) -> Op | None:
    """The last call on so many channels of which some are gone; where there is none, the last call."""
    for op in reversed(old.trace.ops):
        for value in (*op.outputs, *op.inputs()):
            for label in old.labels(value):
                if label is not None and len(label) == number and image.size(label) < number:
                    return op
    return _last_of(old, [])


def _numbers_left(graph: ChannelGraph, maps: Maps) -> dict[str, np.ndarray]:
    """What buffers that name channels should hold, for a model without values."""
    numbers = dict(graph.slots.numbers)
    for name in graph.facts.picks:
        dims = maps.get(name)
        if dims is not None and dims[0] is not None:
            numbers[name] = renumbered(numbers[name], dims[0].source)
    return numbers


def compare(old: Flow, new: Flow, image: Image, raised: Exception | None = None) -> Mismatch | None:
    """The first place where two flows differ beyond the removed neurons, or None where there is none.

    Args:
        old: labels of the original.
        new: labels of the rewritten model.
        image: how their slots correspond.
        raised: what ended the rewritten forward early, so that there is only its beginning.
    """
    gone = _gone(old, image)
    whole = raised is None and not old.trace.unfinished
    before, returned = _without_copies(old.trace, gone, whole)
    after, returned_now = _without_copies(new.trace, set(), whole)
    values = _Pairs()
    found: list[Mismatch] = []
    for a, b in zip(before, after, strict=False):
        for what in _compare_call(old, new, a, b, values, gone, image):
            dims = _other_sizes(old, new, a, b, image) if what.startswith(_SHAPE) else ()
            found.append(Mismatch(old.trace.ops[a.index], what, misplaced=image.misplaced, dims=dims))
            if not found[-1].is_number:
                return replace(found[0], also=tuple(found[1:]))
    if found:
        return replace(found[0], also=tuple(found[1:]))
    if raised is not None and not (old.trace.unfinished and len(before) == len(after)):
        return _first_not_made(old, before, len(after), raised)
    if len(before) != len(after):
        nearest = _last_of(old, before[: len(after)] or before)
        return Mismatch(nearest, f"{len(after)} calls follow, expected {len(before)}")
    # No call need have read what is returned: an input, a buffer.
    names = [[flow.trace.values[i].name for i in indices] for flow, indices in ((old, returned), (new, returned_now))]
    if names[0] != names[1] or not all(map(values.agree, returned, returned_now)):
        return Mismatch(_last_of(old, before), "the model returns other tensors")
    return None


class _Pairs:
    """Which values of the two forwards stand for one another, one for one."""

    def __init__(self) -> None:
        self.new: dict[int, int] = {}
        self.old: dict[int, int] = {}

    def add(self, old: int, new: int) -> None:
        self.new[old], self.old[new] = new, old

    def agree(self, old: int, new: int) -> bool:
        """Whether these two go together; values that were not seen before do from now on."""
        return self.new.setdefault(old, new) == new and self.old.setdefault(new, old) == old


def _last_of(old: Flow, calls: list[Op]) -> Op | None:
    """The original of the last of these calls, whose tensors may be read as others; any where there are none."""
    if calls:
        return old.trace.ops[calls[-1].index]
    return old.trace.ops[-1] if old.trace.ops else None


def _first_not_made(old: Flow, before: list[Op], done: int, raised: Exception) -> Mismatch:
    """The original call on channels that comes next after `done` calls that were right."""
    what = f"{_RAISED} {in_words(raised)}"
    for op in before[done:]:
        if any(label is not None for i in (*op.inputs(), *op.outputs) for label in old.labels(i)):
            return Mismatch(old.trace.ops[op.index], what)
    return Mismatch(_last_of(old, []), what)


def _without_copies(trace: Trace, gone: set[int], whole: bool) -> tuple[list[Op], list[int]]:
    """Live calls other than plain copies, which are read as what they copy, and the values that are returned.

    Which calls are live is known at the end only; before that, all of them count.
    """
    origin: dict[int, int] = {}
    calls = []
    for op in trace.live(gone) if whole else [op for op in trace.ops if gone.isdisjoint(op.outputs)]:
        reads = tuple(origin.get(i, i) for i in op.reads)
        if op.declared.copies or _restrides(trace, op):
            origin[op.outputs[0]] = reads[0]
        else:
            calls.append(op if reads == op.reads else replace(op, reads=reads))
    return calls, [origin.get(i, i) for i in trace.outputs]


def _restrides(trace: Trace, op: Op) -> bool:
    """Whether a call gives its input's values other strides, as pooling does to mark a memory format."""
    if not op.declared.restrides:
        return False
    return trace.values[op.outputs[0]].shape == trace.values[op.reads[0]].shape


def _gone(flow: Flow, image: Image) -> set[int]:
    """Values of the original with a dim that lost all its indices, and counters of layers that are gone with theirs."""
    values = range(len(flow.trace.values))
    emptied = [any(lab is not None and len(lab) and not image.size(lab) for lab in flow.labels(i)) for i in values]
    return {i for i, value in enumerate(flow.trace.values) if emptied[i] or value.name in image.absent}


def _compare_call(
    old: Flow,
    new: Flow,
    a: Op,
    b: Op,
    values: _Pairs,
    gone: set[int],
    image: Image,
) -> Iterator[str]:
    """What differs in a call: a number, and then the first of all else; what would follow that says nothing."""
    family = a.declared.stands_for
    alike = a.target is b.target or (family != "" and family == b.declared.stands_for)
    if not alike or a.module != b.module:
        yield f"became {b}"
    if len(a.outputs) != len(b.outputs):
        yield f"gives {len(b.outputs)} tensors, expected {len(a.outputs)}"
    yield from _said(_compare_arguments(old, new, a, b, values, gone))
    yield from _said(_compare_groups(old, a, b, image))
    for i, j in zip(a.outputs, b.outputs, strict=True):
        values.add(i, j)
        yield from _said(_compare_value(old, new, i, j, image))
    yield from _said(_compare_ranges(old, a, b, image))


def _said(what: str | None) -> Iterator[str]:
    if what is not None:
        yield what


def _compare_value(old: Flow, new: Flow, i: int, j: int, image: Image) -> str | None:
    expected = _sizes_left(old, i, image)
    if new.shape(j) != expected:
        return f"{_SHAPE} {new.shape(j)}, expected {expected}"
    for dim, (a, b) in enumerate(zip(old.labels(i), new.labels(j), strict=True)):
        # What is the same everywhere is right in any order: one number does not say which channel it meets, nor do
        # zeros of a forward that raised before these met any.
        if not (b is None and j in new.uniform) and not image.holds(a, b):
            return f"dim {dim} holds other channels, or in another order"
    return None


def _sizes_left(old: Flow, value: int, image: Image) -> tuple[int, ...]:
    sizes = zip(old.shape(value), old.labels(value), strict=True)
    return tuple(n if label is None else image.size(label) for n, label in sizes)


def _other_sizes(old: Flow, new: Flow, a: Op, b: Op, image: Image) -> tuple[tuple[int, int], ...]:
    """Of what two calls give, (which tensor, dim) of the sizes that differ."""
    found = []
    for which, (i, j) in enumerate(zip(a.outputs, b.outputs, strict=True)):
        expected, given = _sizes_left(old, i, image), new.shape(j)
        if len(expected) == len(given):
            found += [(which, dim) for dim, sizes in enumerate(zip(expected, given, strict=True)) if len({*sizes}) > 1]
    return tuple(found)


def _compare_ranges(old: Flow, a: Op, b: Op, image: Image) -> str | None:
    """A slice takes the image of what it took, whatever numbers say so.

    Labels alone do not tell that: a flattened channel's pixels have one label.
    """
    if not a.takes_range():
        return None
    dim, source = int(a.arg("dim") or 0), a.inputs()[0]
    if dim != int(b.arg("dim") or 0):
        return f"slices dim {b.arg('dim')}, expected {dim}"
    label, places = old.labels(source)[dim], np.arange(old.shape(source)[dim])
    left = places if label is None else image.positions(label)
    expected = np.flatnonzero(np.isin(left, places[_range(a)]))
    if not np.array_equal(np.arange(len(left))[_range(b)], expected):
        return f"takes other places of dim {dim}, from {b.arg('start') or 0} on"
    return None


def _range(op: Op) -> slice:
    return slice(op.arg("start"), op.arg("end"), op.arg("step"))


def _compare_arguments(old: Flow, new: Flow, a: Op, b: Op, values: _Pairs, gone: set[int]) -> str | None:
    refs_a = [i for i in a.inputs() if i not in gone]
    refs_b = b.inputs()
    if len(refs_a) != len(refs_b):
        return f"reads {len(refs_b)} tensors, expected {len(refs_a)}"
    for i, j in zip(refs_a, refs_b, strict=True):
        name, other = old.trace.values[i].name, new.trace.values[j].name
        if not values.agree(i, j) or name != other:
            return f"reads {other or 'another tensor'}, expected {name or 'the same as before'}"
        what = _compare_numbers(old.trace.values[i].literal, new.trace.values[j].literal)
        if what:
            return what
    if a.target is not b.target or (a.args == b.args and a.kwargs == b.kwargs):
        return None
    # By their names, since torch leaves out an argument that has its default.
    numbers = [numbers_in(op.arg(name) for name in op.operator.arguments) for op in (a, b)]
    sized = a.declared.sized and all(a.arg(name) == b.arg(name) for name in _NO_SIZES)
    return _compare_numbers(*numbers, sized=sized)


_NO_SIZES = ("fill_value", "low", "high")
"""Whole numbers that an operator takes beside sizes."""


def _compare_numbers(old: Sequence[Any], new: Sequence[Any], *, sized: bool = False) -> str | None:
    """The first number that changed; whole ones may, where they are sizes."""
    for x, y in zip(old, new, strict=False):
        if x != y and not (sized and type(x) is int and type(y) is int) and not (x != x and y != y):
            return f"{_NUMBER} {y}, expected {x}"
    if len(new) != len(old):
        return f"has {len(new)} numbers, expected {len(old)}"
    return None


def numbers_in(tree: Iterable[Any]) -> list[Any]:
    """All that is no tensor in the arguments of a call, in order."""
    found: list[Any] = []
    for item in tree:
        if isinstance(item, (tuple, list)):
            found += numbers_in(item)
        elif isinstance(item, dict):
            found += numbers_in(item.values())
        elif not isinstance(item, Ref):
            found.append(item.initial_seed() if isinstance(item, torch.Generator) else item)
    return found


def _compare_groups(old: Flow, a: Op, b: Op, image: Image) -> str | None:
    """A convolution's integers other than its groups are the same; its groups are those that stay."""
    if "groups" not in a.operator.arguments or not a.declared.multiplies:
        return None
    for name in ("stride", "padding", "dilation", "output_padding", "transposed"):
        if a.arg(name) != b.arg(name):
            return f"has {name} {b.arg(name)}, expected {a.arg(name)}"
    expected = image.size(old.grouped[a.index]) if a.index in old.grouped else a.arg("groups")
    if b.arg("groups") != expected:
        return f"has {b.arg('groups')} groups, expected {expected}"
    return None
