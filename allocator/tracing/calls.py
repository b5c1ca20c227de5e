"""What a recorded forward is made of: tensors, calls, and the trace that holds them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from allocator.tracing.exchange import Exchange
from allocator.tracing.inputs import Inputs
from allocator.tracing.operators import FUNCTIONS, Declaration, Operator, operator_of


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor in a recorded call: an index into `Trace.values`."""

    index: int


@dataclass(slots=True)
class Value:
    """A tensor that was seen.

    Attributes:
        shape: its sizes.
        dtype: its dtype.
        name: the name of the parameter or buffer it is, or None for an activation.
        base: the value whose memory it is a view of, or None.
        literal: its numbers, where the forward wrote them down (`torch.tensor(8)`).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str | None = None
    base: int | None = None
    literal: tuple[Any, ...] = ()


@dataclass(slots=True)
class Call:
    """A call seen above the dispatcher, kept because it counts or flows as one."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...] = ()


@dataclass(slots=True)
class Op:
    """One ATen call.

    Attributes:
        index: position in `Trace.ops`.
        target: the overload, such as `aten.convolution.default`.
        args, kwargs: as called, with a `Ref` in place of every tensor.
        reads: indices into `Trace.values` of all tensors among them, in order.
        outputs: indices into `Trace.values`.
        module: path of the innermost module that was running, "" for the model itself.
        call: the composite call it is part of, or None.
        seeded: it drew from a generator that the forward made, holds or seeded.
        operator: what torch says of `target`.
        declared: what this package knows of it beside that.
        name: operator name without overload, such as `convolution`; of an operator of one's own with its namespace.
    """

    index: int
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[int, ...]
    outputs: tuple[int, ...]
    module: str
    call: Call | None
    seeded: bool = False
    operator: Operator = field(init=False, repr=False)
    declared: Declaration = field(init=False, repr=False)
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.operator = operator_of(self.target)
        self.declared, self.name = self.operator.declared, self.operator.name

    def arg(self, name: str) -> Any:
        """An argument by its name in the schema, or its default."""
        if name in self.kwargs:
            return self.kwargs[name]
        position, default = self.operator.arguments.get(name, (len(self.args), None))
        return self.args[position] if position < len(self.args) else default

    def inputs(self) -> tuple[int, ...]:
        """Indices of all tensors it read, in order."""
        return self.reads

    def writes(self) -> bool:
        """Whether it changes one of its inputs in place."""
        return self.operator.writes

    def takes_apart(self) -> bool:
        """Whether it gives views of its input in a list."""
        inside = self.call is not None and FUNCTIONS[self.call.name].takes_apart and bool(self.reads)
        return inside or self.operator.lists_views

    def takes_range(self) -> bool:
        """Whether it takes or writes a range of one dim, between numbers that it is given."""
        return {"dim", "start", "end", "step"} <= self.operator.arguments.keys()

    def draws(self) -> bool:
        """Whether it draws random numbers; what drops or leaks in train mode alone does not in eval mode."""
        idle = any(self.arg(name) is False for name in ("train", "training")) or self.arg("dropout_p") == 0
        return self.operator.draws and not idle

    def lays_out(self) -> bool:
        """Whether it only gives its input another shape, or another place in memory."""
        placed = self.declared.copies and self.arg("memory_format") is not None
        return bool(self.reads) and (placed or self.declared.reshapes)

    def __str__(self) -> str:
        return f"{self.target} in {self.module or 'the model'}"


@dataclass(slots=True)
class Trace:
    """A recorded forward.

    Attributes:
        ops: all ATen calls in order.
        values: all tensors; `outputs` and `Op.outputs` index into it.
        outputs: tensors that the model returned.
        calls: composite calls in order.
        modules: by path those of the model that was given; a copy of them ran, and is gone.
        mode: "meta", "fake" or "real": what the tensors were.
        training: whether the model was in train mode.
        inputs: what it was given.
        unfinished: the forward raised after these calls.
        left: tensors whose numbers the forward gave to what is not torch (numpy, lists).
        said: numbers and words that the model returned beside tensors, in order.
        by_value: names of parameters that a forward on values wrote into, though none of these calls does.
        exchanged: members of modules that stood in each other's place.
    """

    ops: list[Op]
    values: list[Value]
    outputs: list[int]
    calls: list[Call]
    modules: dict[str, nn.Module] = field(repr=False)
    mode: str
    training: bool = False
    inputs: Inputs = field(default_factory=lambda: Inputs(()), repr=False)
    unfinished: bool = False
    left: list[int] = field(default_factory=list)
    said: tuple[Any, ...] = ()
    by_value: set[str] = field(default_factory=set, repr=False)
    exchanged: tuple[Exchange, ...] = ()

    def live(self, gone: Collection[int] = frozenset(), also: Collection[int] = frozenset()) -> list[Op]:
        """Calls that the outputs, and the values in `also`, depend on, in order; not those that serve `gone` alone.

        As torch's own tracer has it, whose graphs fvcore counts: a write into what the model was given, or into
        a tensor that a live call takes apart into a list, is never lost.
        """
        owners = self._owners()
        lists = [op for op in self.ops if op.takes_apart()]
        shared = set(range(len(self.values))).difference(*(set(op.outputs) - set(op.reads) for op in self.ops))
        while True:
            live = self._needed(gone, also, shared | {owners[op.reads[0]] for op in lists}, owners)
            indices = {op.index for op in live}
            still = [op for op in lists if op.index in indices]
            if len(still) == len(lists):
                return live
            lists = still

    def _needed(
        self, gone: Collection[int], also: Collection[int], shared: set[int], owners: Sequence[int]
    ) -> list[Op]:
        wanted = {*self.outputs, *also}
        memory = shared | {owners[i] for i in wanted}
        live = []
        for op in reversed(self.ops):
            written = op.writes() and any(owners[i] in memory for i in op.outputs)
            if (written or not wanted.isdisjoint(op.outputs)) and not any(i in gone for i in op.outputs):
                live.append(op)
                wanted.update(i for i in op.inputs() if i not in gone)
                memory.update(owners[i] for i in op.inputs() if i not in gone)
        return live[::-1]

    def _owners(self) -> list[int]:
        """Of each value the one that owns its memory, as torch's tracer takes it.

        There `reshape` and `contiguous` are one call, which may give a view: what they copied counts as one.
        """
        owners = list(range(len(self.values)))
        for op in self.ops:
            for i in op.outputs:
                owners[i] = owners[op.reads[0]] if op.lays_out() else owners[self.root(i)]
        return owners

    def root(self, index: int) -> int:
        """The value that owns a value's memory, so that a write into a view is a write into what it views."""
        base = self.values[index].base
        return index if base is None else base

    def drawn(self, *, seeded: bool) -> list[str]:
        """Names of the calls that draw, from a generator that the forward seeds or holds or from others, in order."""
        return sorted({op.name for op in self.ops if op.draws() and op.seeded is seeded})

    def written(self) -> set[str]:
        """Names of the parameters and buffers that some call may write into."""
        names = set(self.by_value)
        for op in self.ops:
            for value in op.reads if op.writes() else ():
                name = self.values[self.root(value)].name
                if name is not None:
                    names.add(name)
        return names

    def __str__(self) -> str:
        lines = [f"{op.index:5d} {op.target} {[self.values[i].shape for i in op.outputs]}" for op in self.ops]
        return "\n".join(lines)
