"""Channel flow: the labels of every tensor of a trace, and the words in which rules speak of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from allocator.adapters import how_to, narrows_heads
from allocator.flow.attributes import attributes_of_groups, attributes_of_sizes, not_told_apart, stored_in
from allocator.flow.facts import AtLeast, Even, Facts, Frozen, Gamma, Tie, Written
from allocator.flow.labels import Label, Labels, Slots
from allocator.flow.options import Options, Place, places_of
from allocator.flow.repeats import Dim, Repeats
from allocator.tracing.calls import Op, Ref, Trace, Value

SEEDED = (
    "numbers of a generator that the forward seeds or holds are others where they are fewer: draw them into a buffer"
)

_FEWEST_HEADS = 2  # views and einsum take a dim of one head to be no dim, and merge it with others


@dataclass(frozen=True)
class Join:
    """A place where activations meet, or where groups run side by side.

    Attributes:
        kind: "concat", "sum", "product", "stack" or "groups".
        op: index into the trace's ops.
        dim: dim of the joined labels in the inputs; from the last where these may have fewer dims than the output.
        inputs: values that meet.
    """

    kind: str
    op: int
    dim: int
    inputs: tuple[int, ...]


class Flow:
    """The labels of every tensor of one trace; `follow.run_rules` fills it.

    Attributes:
        trace: what was recorded.
        slots: numbers of the model's parameters and buffers.
        facts: what must stay or go together.
        options: how channels are followed.
        active: values that depend on the model's inputs.
        picked: those of them that are parts of parameters, where only which of them depends on the inputs (the matrices
            of a token's experts).
        seeded: values drawn from a generator that the forward made, holds or seeded.
        derived: values that layers computed, of the model's inputs or of parameters alone as an object query is.
        uniform: values that are the same everywhere, so that they fit any channels.
        zeros: tensors that were made as zeros.
        repeats: dims along which a value is one number.
        numbered: dims of values of which one index is written into by its number.
        joins: where branches meet, in order.
        grouped: per call of a grouped convolution or norm whose groups come and go whole, one slot per group.
    """

    def __init__(self, trace: Trace, slots: Slots, facts: Facts, options: Options) -> None:
        self.trace, self.slots, self.facts, self.options = trace, slots, facts, options
        produced = {value for op in trace.ops for value in op.outputs if value not in op.reads}
        written_down = {i for i, value in enumerate(trace.values) if value.literal}
        for op in trace.ops:  # numbers are lifted into the tensor that the forward sees
            if not (op.writes() or written_down.isdisjoint(op.outputs)):
                written_down.update(op.reads)
        unnamed = {i for i, value in enumerate(trace.values) if value.name is None}
        self.active = unnamed - produced - written_down
        self.picked: set[int] = set()
        self.derived: set[int] = set()
        self.uniform: set[int] = set()
        self.zeros: set[int] = set()
        self.repeats = Repeats(trace)
        self.numbered: set[Dim] = set()
        self.joins: list[Join] = []
        self.grouped: dict[int, np.ndarray] = {}
        self.seeded: set[int] = set()
        self._rewritten: set[int] = set()
        self._labels: list[Labels | None] = [None] * len(trace.values)
        self._used = np.zeros(slots.total, dtype=bool)
        self._summed_alone: list[tuple[np.ndarray, Op]] = []
        self._divided: list[tuple[Op, Sequence[int], np.ndarray]] = []
        self._heads: dict[Place, np.ndarray] = {}
        self._multiplied = np.zeros(slots.total, dtype=bool)
        self._counts_heads = np.zeros(slots.total, dtype=bool)
        self._stay = np.zeros(slots.total, dtype=bool)

    # Reading ------------------------------------------------------------------------------------

    def shape(self, index: int) -> tuple[int, ...]:
        """Sizes of a value, as traced."""
        return self.trace.values[index].shape

    def labels(self, index: int) -> Labels:
        """Labels of a value, one entry per dim."""
        labels = self._labels[index]
        if labels is None:
            value: Value = self.trace.values[index]
            labels = self.slots.labels(value.name) if value.name else (None,) * len(value.shape)
            self._labels[index] = labels
        return labels

    def is_activation(self, index: int) -> bool:
        """Whether a value's numbers depend on the model's inputs."""
        return index in self.active and index not in self.picked

    def activate(self, op: Op) -> None:
        """What a call gives depends on the model's inputs, and so does what is read later of memory it writes into."""
        self.active.update(op.outputs)
        for root in {self.trace.root(value) for value in op.outputs} - self._rewritten if op.writes() else ():
            self._rewritten.add(root)
            read_later = (i for i in self._sharing[root] if i in self.users and self.users[i][-1].index > op.index)
            self.active.update(read_later)

    @cached_property
    def _sharing(self) -> dict[int, list[int]]:
        """By value all that share its memory, itself among them."""
        sharing: dict[int, list[int]] = {}
        for index in range(len(self.trace.values)):
            sharing.setdefault(self.trace.root(index), []).append(index)
        return sharing

    def statistics_from_batch(self, op: Op) -> bool:
        """Whether a batch norm runs in training mode outside a model in train mode (weight standardisation)."""
        return bool(op.arg("training")) and not self.trace.training

    def is_one_stream(self, join: Join) -> bool:
        """Whether all that is summed is the same channels (a rotary embedding turns them): no branches meet there."""
        first, *others = (self.labels(value)[join.dim] for value in join.inputs)
        return all(first is not None and label is not None and np.array_equal(first, label) for label in others)

    @cached_property
    def places(self) -> list[Place]:
        """The place of every call of the trace."""
        return places_of(self.trace)

    @cached_property
    def users(self) -> dict[int, list[Op]]:
        """By value the calls that read it, in order."""
        users: dict[int, list[Op]] = {}
        for op in self.trace.ops:
            for value in dict.fromkeys(op.reads):
                users.setdefault(value, []).append(op)
        return users

    def heads_at(self, op: Op) -> int | None:
        """The dim of this view's result that counts the heads of an attention, where that is known."""
        return self.options.heads.get(self.places[op.index]) if self.options.heads else None

    def channels_at(self, op: Op) -> int | None:
        """The dim of this view's result that holds channels, where pixels follow them."""
        return self.options.channels.get(self.places[op.index]) if self.options.channels else None

    def found_heads(self) -> dict[Place, int]:
        """Views that split a dim into (heads, width) whose width is multiplied by another activation's (q·k, a·v)."""
        found = {}
        for op, dims, label in self._divided:
            if self._multiplied[label].all() and not narrows_heads(self.trace.modules.get(op.module)):
                found[self.places[op.index]] = dims[-2]
        return found

    def heads_that_stay(self, units: np.ndarray) -> set[Place]:
        """Views whose heads can't go, by the neuron of each slot (slots,), below 0 for none; of two that go, none can.

        Heads that share keys and values go with these, and are one.
        """
        free = {place: np.unique(units[label]) for place, label in self._heads.items()}
        return {place for place, found in free.items() if (found >= 0).sum() <= _FEWEST_HEADS}

    def widths_that_go(self, units: np.ndarray) -> set[Place]:
        """Views that split a dim into several, where what is left of it may get narrower; `units` as above."""
        return {self.places[op.index] for op, _, label in self._divided if (units[label] >= 0).any()}

    def found_channels(self) -> dict[Place, int]:
        """Views that split a dim into (channels, pixels), as a generator's first layer does: the last dim must stay."""
        frozen = np.zeros(self.slots.total, dtype=bool)
        for label, _, _ in self.facts.frozen:
            frozen[label] = True
        heads = self.found_heads()
        found = {self.places[op.index]: dims[0] for op, dims, label in self._divided if frozen[label].all()}
        return {place: dim for place, dim in found.items() if place not in heads}

    def counts_heads(self, label: np.ndarray) -> bool:
        """Whether each of these labels stands for one head of an attention."""
        return bool(self._counts_heads[label].all())

    # Writing ------------------------------------------------------------------------------------

    def set(self, index: int, labels: Sequence[Label]) -> None:
        """Set the labels of a value, one entry per dim."""
        shape = self.shape(index)
        sizes = [n if label is None else len(label) for label, n in zip(labels, shape, strict=False)]
        if tuple(sizes) != shape or len(labels) != len(shape):
            raise ValueError(f"a rule gave labels of sizes {sizes} for a tensor of shape {shape}")
        self._labels[index] = tuple(labels)
        self.uniform.discard(index)

    def same_everywhere(self, index: int) -> list[int]:
        """A value and what it was made from, as far as these are the same everywhere."""
        found: list[int] = []
        waiting = [index]
        while waiting:
            value = waiting.pop()
            if value in self.uniform and value not in found:
                found.append(value)
                waiting += [i for op in self.makers.get(value, ()) for i in op.reads]
        return found

    def is_repeated(self, index: int, dim: int) -> bool:
        """Whether a value is one number along this dim, which has no channels yet."""
        return (index, dim) in self.repeats and self.labels(index)[dim] is None

    def repeat(self, index: int, dim: int, label: Label, op: Op) -> None:
        """A dim along which a value is one number has these channels: as many as are left of them."""
        for value, own in self.repeats.chain((index, dim)) if label is not None else ():
            labels = list(self.labels(value))
            if labels[own] is None:
                labels[own] = label
                self.set(value, labels)
            else:  # it was written into since
                self.unify(label, labels[own], op)

    def is_zero(self, index: int) -> bool:
        """Whether a value is nothing but zeros, as the first state of a recurrent layer is."""
        root = self.trace.root(index)
        return root in self.zeros and root not in self._written_into

    @cached_property
    def _written_into(self) -> frozenset[int]:
        """Values whose memory some call writes into."""
        return frozenset(self.trace.root(value) for op in self.trace.ops if op.writes() for value in op.outputs)

    @cached_property
    def makers(self) -> dict[int, list[Op]]:
        """By value the calls that made it, or wrote into it, in order."""
        makers: dict[int, list[Op]] = {}
        for op in self.trace.ops:
            for value in op.outputs:
                makers.setdefault(value, []).append(op)
        return makers

    def copied_from(self, index: int) -> int:
        """The value that this one is a plain copy of, as `buffer.detach()` is; itself where it is none."""
        makers = self.makers.get(index, [])
        while len(makers) == 1 and makers[0].declared.copies:
            index = makers[0].inputs()[0]
            makers = self.makers.get(index, [])
        return index

    def pass_uniform(self, op: Op) -> None:
        """Results of a call whose first tensor is the same everywhere are so too."""
        if op.inputs()[0] in self.uniform:
            self.uniform.update(op.outputs)

    def tie(self, a: np.ndarray, b: np.ndarray, op: Op) -> None:
        """Slots in the same place of `a` and `b` (broadcast) go together."""
        if a is b:
            return
        if b.shape != a.shape:
            b = np.broadcast_to(b, a.shape)
        self._stay[a] = self._stay[b] = self._stay[a] | self._stay[b]
        tie = Tie(a, b, op.index)
        self.facts.ties.append(tie)
        if self.active.isdisjoint(op.inputs()):
            self.facts.computed_ties.append(tie)

    def unify(self, a: Label, b: Label, op: Op) -> Label:
        """Two dims that must keep the same indices; where one has no channels, the other stays whole."""
        if a is None or b is None:
            labelled = b if a is None else a
            self.freeze(labelled, op, "meets a dim that must keep its size")
            return labelled
        self.tie(a, b, op)
        return a

    def reads_channels(self, op: Op, value: int, dim: int) -> Label:
        """Labels of the dim of a weight that is summed over with this dim of a value, where a call reads it so."""
        declared, reads = op.declared, op.inputs()
        if declared.read_dim is None or len(declared.multiplies) < 2 or reads[declared.multiplies[0]] != value:
            return None
        weight = reads[declared.multiplies[1]]
        label = self.labels(weight)[declared.read_dim]
        summed = 1 if len(self.shape(weight)) > 2 else len(self.shape(value)) - 1
        return label if dim == summed and label is not None and len(label) == self.shape(value)[dim] else None

    def unify_all(self, labels: Sequence[Label], op: Op) -> Label:
        """`unify` over any number of dims; returns the first label there is."""
        result = next((label for label in labels if label is not None), None)
        if result is not None:
            for label in labels:
                if label is not result:
                    self.unify(result, label, op)
        return result

    def contract(self, x: Label, weight: Label, op: Op, weight_value: int) -> None:
        """Two dims that are summed over in a product."""
        self.unify(x, weight, op)
        self._note_use(x, op)
        self._note_use(weight, op)
        if weight is not None:
            (self.facts.multiplied if self.is_activation(weight_value) else self.facts.read).append(weight)

    def multiply(self, *values: int) -> None:
        """A matrix product of two activations; where it is batched, one may be derived of parameters alone."""
        batched = len(self.shape(values[0])) > 2
        if all(self.is_activation(i) or (batched and i in self.derived and i not in self.picked) for i in values):
            for value in values:
                for label in self.labels(value):
                    if label is not None:
                        self._multiplied[label] = True

    def divide(self, op: Op, varying: Sequence[int], label: np.ndarray) -> None:
        """A view split a dim into several that tell channels apart; `label` is of the last of them."""
        self._divided.append((op, varying, label))

    def note_heads(self, label: np.ndarray, op: Op) -> None:
        """Each of these labels stands for one head of an attention."""
        self._counts_heads[label] = True
        self._heads[self.places[op.index]] = label
        self.floor(label, op, minimum=_FEWEST_HEADS)

    def produce(self, label: Label, op: Op, weight_value: int) -> None:
        """Labels of neurons that a parameter writes; they are what can be removed."""
        if not self.active.isdisjoint(op.inputs()):
            self._note_use(label, op)
        if label is not None and label.size and not self.is_activation(weight_value):
            self.facts.written.append(Written(label, op.module))
            self.floor(label, op)

    def _note_use(self, label: Label, op: Op) -> None:
        """Channels that a layer reads or writes, or that are summed over among parameters alone."""
        if label is None:
            return
        if not self.active.isdisjoint(op.inputs()):
            self._used[label] = True
        elif not any(self.is_zero(op.inputs()[k]) for k in op.declared.multiplies):
            self._summed_alone.append((label, op))

    def freeze_computed_weights(self) -> None:
        """Channels of a layer that a number computed from its weights depends on (spectral norm) must stay.

        Dropping one would change that number, and with it the weights of all others. A small network that
        makes weights out of constants has channels of its own, which may go.
        """
        for label, op in self._summed_alone:
            if self._used[label].any() and self._goes_into_a_weight(op):
                self.freeze(label, op, "a weight is computed from all of these channels")

    def _goes_into_a_weight(self, op: Op) -> bool:
        """Whether a product of parameters alone makes a weight, or a number of no channel's own.

        Else it is a state that was learned (the first one of a recurrent layer), which activations are added to.
        Noise is none: what has fewer numbers is other noise.
        """
        if not self.uniform.isdisjoint(op.inputs()):
            return True
        seen: set[int] = set()
        waiting = list(op.outputs)
        while waiting:
            value = waiting.pop()
            if all(label is None for label in self.labels(value)):
                return True
            for user in self.users.get(value, ()) if value not in seen else ():
                if self.active.isdisjoint(user.inputs()):
                    waiting += user.outputs
                elif value in [user.inputs()[k] for k in user.declared.multiplies[1:]]:
                    return True  # else it is multiplied itself, as queries that were learned
            seen.add(value)
        return False

    def group(self, op: Op, weight: Ref | None, representatives: np.ndarray) -> None:
        """A grouped convolution or norm whose groups come and go whole; one slot per group."""
        self.grouped[op.index] = representatives
        name = None if weight is None else self._rows_of(weight.index)
        module = self.trace.modules.get(op.module)
        if module is not None:
            own = name is not None
            self.facts.attributes += attributes_of_groups(op.module, module, representatives, owns_weight=own)
        if name is None and weight is not None:
            name = stored_in(op.module, module, self.slots, self.labels(weight.index)[0])
        if name is not None:
            self.facts.groups[name] = representatives

    def _rows_of(self, value: int) -> str | None:
        """The parameter or buffer that this is, or that it views with all its rows."""
        root = self.trace.root(value)
        return self.trace.values[root].name if self.shape(root)[:1] == self.shape(value)[:1] else None

    def freeze(self, label: Label, op: Op, reason: str) -> None:
        """These slots must stay."""
        if label is not None and len(label):
            self._stay[label] = True
            self.facts.frozen.append(Frozen(label, op.module, f"{reason} ({op.name})"))

    def keep_size(self, op: Op) -> None:
        """What a call gives are numbers of the network's own, which are others where there are fewer of them."""
        for index in {*op.outputs, *map(self.trace.root, op.outputs)}:
            self.uniform.discard(index)
            self.seeded.add(index)
            self.freeze_all(self.labels(index), op, SEEDED)

    def freeze_all(self, labels: Iterable[Label], op: Op, reason: str) -> None:
        """Each of these labels' slots must stay."""
        for label in labels:
            self.freeze(label, op, reason)

    def stay(self, label: Label) -> bool:
        """Whether it is known already that all of these slots must stay."""
        return label is None or bool(self._stay[label].all())

    def average(self, label: Label, op: Op, reason: str) -> None:
        """An average over these slots is taken, which more of them leave as it is where there are equally many of each.

        Other choices would change it: unless norms are "loose", the slots stay.
        """
        if self.options.grows and label is not None:
            self.facts.even.append(Even(label, op.module, f"{reason} ({op.name})"))
        elif self.options.norms == "exact":
            self.freeze(label, op, reason)

    def freeze_output(self, index: int, reason: str = "an output of the model") -> None:
        """What the model returns keeps its channels, as does what its numbers are read of."""
        for label in self.labels(index):
            if label is not None:
                self.facts.frozen.append(Frozen(label, "", reason))

    def refuse(self, op: Op, reason: str) -> None:
        """Freeze everything that a call touches, and list it."""
        touched = [label for i in op.inputs() for label in self.labels(i) if label is not None]
        for label in touched:
            self.freeze(label, op, reason)
        if touched:
            self.facts.refused.setdefault(op.name, []).append(op.module)
        for index in op.outputs:
            self.set(index, [None] * len(self.shape(index)))

    def pick(self, source: np.ndarray, index: int, op: Op) -> np.ndarray | None:
        """Channels named by a buffer, whose numbers go with them; None where what it holds is not known.

        Those that it never names stay, so that its own numbers tell how many are gone before each.

        Args:
            source: labels of the dim that is picked from.
            index: the value that names them.
            op: the call.
        """
        name = self.trace.values[index].name
        numbers = self.slots.numbers.get(name or "")
        if name is None or numbers is None or not self.options.renumbers:
            return None
        if (
            len(numbers) != self.shape(index)[0]
            or not len(numbers)
            or numbers.min() < 0
            or numbers.max() >= len(source)
        ):
            return None
        picked = source[numbers]
        self.tie(self.labels(index)[0], picked, op)  # type: ignore[arg-type]  # a buffer has labels
        self.tie(source, self.facts.picks.setdefault(name, source), op)
        self.freeze(np.delete(source, numbers), op, "the index tensor never names them")
        return picked

    def floor(self, label: np.ndarray, op: Op, minimum: int = 1) -> None:
        """At least so many of these slots must be kept."""
        self.facts.at_least.append(AtLeast(label, op.module, minimum))

    def note_gamma(self, weight_value: int) -> None:
        """This vector scales the channels of a norm."""
        name = self.trace.values[weight_value].name
        label = self.labels(weight_value)[0]
        if name is not None and label is not None:
            self.facts.gammas.append(Gamma(label, name))

    def join(self, kind: str, op: Op, dim: int, inputs: Sequence[int]) -> None:
        """Note a place where branches meet."""
        self.joins.append(Join(kind, op.index, dim, tuple(inputs)))

    def sized_by_attribute(self, op: Op, literal: object, pieces: Sequence[np.ndarray]) -> bool:
        """Whether the running module holds the sizes of a split as attributes; notes them if so."""
        module = self.trace.modules.get(op.module)
        if module is None or op.module in self.options.equal_parts:
            return False
        attributes = attributes_of_sizes(op.module, module, literal, pieces)
        self.facts.attributes += attributes or ()
        for part, first in not_told_apart(module, literal, pieces, attributes or ()):
            self.tie(part, first, op)
        return attributes is not None

    def fix_sizes(self, label: np.ndarray, op: Op, sizes: Sequence[int]) -> None:
        """These slots stay, because the running module takes their sizes from where nothing tells what they follow."""
        reason = f"a split into fixed sizes {list(sizes)}"
        self.freeze(label, op, reason)
        module = self.trace.modules[op.module]
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        self.facts.advice.setdefault(kind, f"the neurons at {op} stay: {reason}; {how_to(module)}")
