"""Channel flow: one label per index of every dim that holds channels, carried through a trace.

A label is the number of a *slot*, one index of one dim of one parameter or buffer; slot 0 stands for
"must stay". A tensor has one array of labels per dim, or None for a dim without channels (batch, pixels,
tokens). Rules pass labels on and note which slots must go together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import nn
from torch.utils._pytree import tree_flatten

from allocator import adapters
from allocator.tracing.record import Op, Ref, Trace, Value

Label = np.ndarray | None
Labels = tuple[Label, ...]

FROZEN = 0


@dataclass(frozen=True)
class Slots:
    """Numbers for every index of every dim of every parameter and buffer.

    Attributes:
        base: per tensor name, the first slot of each dim.
        shapes: per tensor name, its sizes.
        total: number of slots, with the frozen one.
    """

    base: dict[str, tuple[int, ...]]
    shapes: dict[str, tuple[int, ...]]
    total: int

    @classmethod
    def of(cls, shapes: dict[str, tuple[int, ...]]) -> Slots:
        """Number the dims of tensors with these sizes."""
        base, following = {}, 1
        for name, shape in shapes.items():
            starts = []
            for size in shape:
                starts.append(following)
                following += size
            base[name] = tuple(starts)
        return cls(base, dict(shapes), following)

    def labels(self, name: str) -> Labels:
        """Labels of a parameter or buffer: its own slots."""
        sizes = self.shapes[name]
        return tuple(np.arange(start, start + n) for start, n in zip(self.base[name], sizes, strict=True))

    @cached_property
    def names(self) -> list[tuple[int, str, int]]:
        """(first slot, tensor name, dim) in ascending order, for looking a slot up by bisection."""
        return [(start, name, dim) for name, starts in self.base.items() for dim, start in enumerate(starts)]

    @cached_property
    def starts(self) -> np.ndarray:
        """The first slots of `names`."""
        return np.array([start for start, _, _ in self.names], dtype=np.int64)


@dataclass(frozen=True)
class Join:
    """A place where activations meet, or where groups run side by side.

    Attributes:
        kind: "concat", "sum", "product", "stack" or "groups".
        op: index into the trace's ops.
        dim: dim of the joined labels in the inputs.
        inputs: values that meet.
    """

    kind: str
    op: int
    dim: int
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Attribute:
    """A module attribute that a forward reads as the size of tensors.

    Attributes:
        module: path of the module.
        name: attribute name.
        pieces: label arrays whose kept counts are the attribute's new value; one piece, or one per part.
    """

    module: str
    name: str
    pieces: tuple[np.ndarray, ...]


@dataclass
class Facts:
    """What the rules noted, over one or several traces of a model.

    `computed` are those of the ties that lie in weights which the forward computes from others; `fixed` says, by
    module class, which channels stay because of sizes that the forward reads, and what can be done about it.
    """

    ties: list[tuple[np.ndarray, np.ndarray, int]] = field(default_factory=list)
    computed: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    frozen: list[tuple[np.ndarray, str, str]] = field(default_factory=list)
    produced: list[tuple[np.ndarray, str]] = field(default_factory=list)
    read: list[np.ndarray] = field(default_factory=list)
    mixed: list[np.ndarray] = field(default_factory=list)
    gammas: list[tuple[np.ndarray, str]] = field(default_factory=list)
    floors: list[tuple[np.ndarray, str]] = field(default_factory=list)
    heads: list[np.ndarray] = field(default_factory=list)
    attributes: list[Attribute] = field(default_factory=list)
    groups: dict[str, np.ndarray] = field(default_factory=dict)
    refused: dict[str, list[str]] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)


Place = tuple[str, str, int]
"""A call by its module, its operator's name, and which of its calls there it is."""


class Flow:
    """The labels of every tensor of one trace; `analysis.run_rules` fills it.

    Attributes:
        trace: what was recorded.
        groups: "whole" or "width": what a grouped convolution may lose.
        norms: "exact" or "loose": whether channels under a norm over channels must stay.
        heads: per view that splits a dim into heads of an attention, which dim of its output counts the heads.
        active: values that depend on the model's inputs.
        uniform: values that are the same everywhere, so that they fit any channels.
        joins: where branches meet, in order.
        facts: what must stay or go together.
    """

    def __init__(
        self,
        trace: Trace,
        slots: Slots,
        facts: Facts,
        *,
        groups: str = "whole",
        norms: str = "exact",
        tied_parts: frozenset[str] = frozenset(),
        heads: Mapping[Place, int] | None = None,
    ) -> None:
        self.trace, self.slots, self.facts = trace, slots, facts
        self.groups, self.norms, self.tied_parts, self.heads = groups, norms, tied_parts, heads or {}
        produced = {v for op in trace.ops for v in op.outputs if v not in op.reads}
        self.active = {i for i, v in enumerate(trace.values) if v.name is None and i not in produced}
        self.uniform: set[int] = set()
        self.joins: list[Join] = []
        self._labels: list[Labels | None] = [None] * len(trace.values)
        self._used = np.zeros(slots.total, dtype=bool)
        self._summed_alone: list[tuple[np.ndarray, Op]] = []
        self._divided: list[tuple[Op, int, np.ndarray]] = []
        self._multiplied = np.zeros(slots.total, dtype=bool)
        self._counts_heads = np.zeros(slots.total, dtype=bool)

    # Reading ------------------------------------------------------------------------------------

    def shape(self, index: int) -> tuple[int, ...]:
        """Sizes of a value, as traced."""
        return self.trace.values[index].shape

    def labels(self, index: int) -> Labels:
        """Labels of a value, one entry per dim."""
        known = self._labels[index]
        if known is None:
            value: Value = self.trace.values[index]
            known = self.slots.labels(value.name) if value.name else (None,) * len(value.shape)
            self._labels[index] = known
        return known

    def statistics_from_batch(self, op: Op) -> bool:
        """Whether a batch norm runs in training mode outside a model in train mode (weight standardisation)."""
        return bool(op.arg("training")) and not self.trace.training

    @cached_property
    def places(self) -> list[Place]:
        """Per call of the trace, its place, by which the same call of a rewritten model is found."""
        seen: Counter[tuple[str, str]] = Counter()
        found = []
        for op in self.trace.ops:
            found.append((op.module, op.name, seen[op.module, op.name]))
            seen[op.module, op.name] += 1
        return found

    def found_heads(self) -> dict[Place, int]:
        """Views that split a dim into (heads, width) whose width is multiplied by another activation's (q·k, a·v)."""
        found = [(op, dim) for op, dim, label in self._divided if self._multiplied[label].all()]
        return {self.places[op.index]: dim for op, dim in found}

    def counts_heads(self, label: np.ndarray) -> bool:
        """Whether each of these labels stands for one head of an attention."""
        return bool(self._counts_heads[label].all())

    # Writing ------------------------------------------------------------------------------------

    def set(self, index: int, labels: Sequence[Label]) -> None:
        """Set the labels of a value, one entry per dim."""
        shape = self.shape(index)
        sizes = [n if label is None else len(label) for label, n in zip(labels, shape, strict=False)]
        if tuple(sizes) != shape or len(labels) != len(shape):
            raise AssertionError(f"a rule gave labels of sizes {sizes} for a tensor of shape {shape}")
        self._labels[index] = tuple(labels)
        self.uniform.discard(index)

    def tie(self, a: np.ndarray, b: np.ndarray, op: Op) -> None:
        """Slots in the same place of `a` and `b` (broadcast) go together."""
        if a is b:
            return
        b = b if b.shape == a.shape else np.broadcast_to(b, a.shape)
        self.facts.ties.append((a, b, op.index))
        if self.active.isdisjoint(op.inputs()):
            self.facts.computed.append((a, b))

    def unify(self, a: Label, b: Label, op: Op) -> Label:
        """Two dims that must keep the same indices; where one has no channels, the other stays whole."""
        if a is None or b is None:
            self.freeze(b if a is None else a, op, "meets a dim that must keep its size")
            return b if a is None else a
        self.tie(a, b, op)
        return a

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
            (self.facts.mixed if weight_value in self.active else self.facts.read).append(weight)

    def multiply(self, *values: int) -> None:
        """A matrix product of two activations."""
        if self.active.issuperset(values):
            for label in (label for value in values for label in self.labels(value)):
                if label is not None:
                    self._multiplied[label] = True

    def divide(self, op: Op, varying: Sequence[int], label: np.ndarray) -> None:
        """A view split a dim into several that tell channels apart; `label` is of the last of them."""
        self._divided.append((op, varying[-2], label))

    def note_heads(self, label: np.ndarray) -> None:
        """Each of these labels stands for one head of an attention.

        Two of them stay: views and einsum take a dim of one head to be no dim, and merge it with others.
        """
        self._counts_heads[label] = True
        self.facts.heads.append(label)

    def produce(self, label: Label, op: Op, weight_value: int) -> None:
        """Labels of neurons that a parameter writes; they are what can be removed."""
        if not self.active.isdisjoint(op.inputs()):
            self._note_use(label, op)
        if label is not None and weight_value not in self.active:
            self.facts.produced.append((label, op.module))
            self.facts.floors.append((label, op.module))

    def _note_use(self, label: Label, op: Op) -> None:
        """Channels that a layer reads or writes, or that are summed over among parameters alone."""
        if label is not None and self.active.isdisjoint(op.inputs()):
            self._summed_alone.append((label, op))
        elif label is not None:
            self._used[label] = True

    def freeze_computed_weights(self) -> None:
        """Channels of a layer that a number computed from its weights depends on (spectral norm) must stay.

        Dropping one would change that number, and with it the weights of all others. A small network that
        makes weights out of constants has channels of its own, which may go.
        """
        for label, op in self._summed_alone:
            if self._used[label].any():
                self.freeze(label, op, "a weight is computed from all of these channels")

    def group(self, op: Op, weight: Ref | None, representatives: np.ndarray) -> None:
        """A grouped convolution or norm whose groups come and go whole; one slot per group.

        Torch's own layers are told by their weight how many there are; other modules hold the number as an attribute.
        """
        name = None if weight is None else self.trace.values[weight.index].name
        if name is not None:
            self.facts.groups[name] = representatives
        module = self.trace.modules.get(op.module)
        told = isinstance(module, nn.modules.conv._ConvNd) or (name is not None and isinstance(module, nn.GroupNorm))
        if module is not None and not told:
            count = len(representatives)
            held = [n for n, value in vars(module).items() if "groups" in n and type(value) is int and value == count]
            self.facts.attributes.extend(Attribute(op.module, n, (representatives,)) for n in held)

    def freeze(self, label: Label, op: Op, reason: str) -> None:
        """These slots must stay."""
        self._freeze(label, op.module, f"{reason} ({op.name})")

    def freeze_output(self, index: int) -> None:
        """What the model returns keeps its channels."""
        for label in self.labels(index):
            self._freeze(label, "", "an output of the model")

    def _freeze(self, label: Label, module: str, reason: str) -> None:
        if label is not None:
            self.facts.frozen.append((label, module, reason))

    def refuse(self, op: Op, reason: str) -> None:
        """Freeze everything that a call touches, and list it."""
        touched = [label for i in op.inputs() for label in self.labels(i) if label is not None]
        for label in touched:
            self.freeze(label, op, reason)
        if touched:
            self.facts.refused.setdefault(op.name, []).append(op.module)
        for index in op.outputs:
            self.set(index, [None] * len(self.shape(index)))

    def floor(self, label: np.ndarray, op: Op) -> None:
        """At least one of these slots must be kept."""
        self.facts.floors.append((label, op.module))

    def note_gamma(self, label: Label, weight_value: int) -> None:
        """A batch norm scales these channels."""
        name = self.trace.values[weight_value].name
        if name is not None and self.labels(weight_value)[0] is not None:
            self.facts.gammas.append((self.labels(weight_value)[0], name))  # type: ignore[arg-type]

    def join(self, kind: str, op: Op, dim: int, inputs: Sequence[int]) -> None:
        """Note a place where branches meet."""
        self.joins.append(Join(kind, op.index, dim, tuple(inputs)))

    def sized_by_attribute(self, op: Op, literal: object, pieces: Sequence[np.ndarray]) -> bool:
        """Whether the running module holds the sizes of a split as attributes; notes them if so."""
        if op.module in self.tied_parts:
            return False
        module = self.trace.modules.get(op.module)
        fields = vars(module) if module is not None else {}
        if module is not None and self._declared(module, literal):
            return True
        whole = [n for n, value in fields.items() if _same_sizes(value, literal)]
        if whole:
            self.facts.attributes.extend(Attribute(op.module, n, tuple(pieces)) for n in whole)
            return True
        if isinstance(literal, int) or not fields:
            return False
        singles = [
            next((n for n, value in fields.items() if type(value) is int and value == len(piece)), None)
            for piece in pieces
        ]
        if None in singles or len(set(singles)) < len(singles):
            return False
        self.facts.attributes.extend(
            Attribute(op.module, str(n), (piece,)) for n, piece in zip(singles, pieces, strict=True)
        )
        return True

    def fix_sizes(self, label: np.ndarray, op: Op, sizes: Sequence[int]) -> None:
        """These slots stay, because the running module takes their sizes from where nothing tells what they follow."""
        self.freeze(label, op, f"a split into fixed sizes {list(sizes)}")
        module = self.trace.modules[op.module]
        said = f"the neurons at {op} stay: a split into fixed sizes {list(sizes)}; {adapters.how_to(module)}"
        self.facts.fixed.setdefault(f"{type(module).__module__}.{type(module).__qualname__}", said)

    def _declared(self, module: nn.Module, literal: object) -> bool:
        """Whether the module's adapter says how these sizes follow the channels."""
        adapter = adapters.find(module)
        if adapter is None or adapter.sizes is None:
            return False
        known = set(tree_flatten(adapters.sizes_of("", module, adapter))[0])
        return known.issuperset(literal if isinstance(literal, (list, tuple)) else [literal])


def _same_sizes(value: object, literal: object) -> bool:
    if isinstance(literal, int):
        return type(value) is int and value == literal
    return isinstance(value, (list, tuple)) and isinstance(literal, (list, tuple)) and list(value) == list(literal)
