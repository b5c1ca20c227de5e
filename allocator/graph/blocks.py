"""Aggregation blocks: where branches meet, where they come from, and what each branch is like.

A block runs from the call that dominates all its branches to the aggregation. A branch is what lies between
that entry, or the end of another branch that it builds on, and the aggregation. Where blocks lie in one another without
end, as in a mesh, a branch is what follows the aggregation before it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import mul, truediv
from typing import Any

import networkx as nx
import numpy as np
import torch

from allocator.cost.metric import Metric
from allocator.flow.facts import Gamma
from allocator.flow.flow import Flow, Join
from allocator.flow.labels import FROZEN
from allocator.shown import Shown
from allocator.tracing.calls import Op

INPUT = -1
LOOP = 16  # calls alike from which on they are taken to be rounds of a loop
DEEPEST = 128
"""Times as many calls as there are that branches may hold together; NASNet's hold 91 times as many, HRNet's 43."""
Axes = tuple[float, ...]  # a number per spatial axis


@dataclass(frozen=True)
class Branch:
    """One of the paths that meet in a block.

    Attributes:
        name: the layer that writes its channels, relative to the block; "identity" where none does.
        channels: how many channels it brings to the aggregation.
        kernels: kernel sizes of its convolutions, in order.
        dilation: largest dilation of its convolutions.
        stride: how much smaller its features are at its end than at its start; below 1 where they grow.
        scale: how much coarser its coarsest features are than the block's output (4: works at a quarter).
        receptive_field: pixels of its start that one pixel of its end sees, per axis.
        flops: FLOPs of its own calls, as fvcore counts them.
        gamma: (mean, smallest, largest) |gamma| over its channels, or None without batch norm or its values.
        inner: channels of layers inside the branch that do not reach the aggregation.
        calls: its own calls, as indices into the trace's ops.
    """

    name: str
    channels: int
    kernels: tuple[tuple[int, ...], ...]
    dilation: int
    stride: float
    scale: float
    receptive_field: tuple[int, ...]
    flops: int
    gamma: tuple[float, float, float] | None
    inner: int
    label: np.ndarray = field(repr=False, compare=False)
    inner_labels: tuple[np.ndarray, ...] = field(repr=False, compare=False, default=())
    calls: tuple[int, ...] = field(repr=False, compare=False, default=())

    @property
    def kernel(self) -> tuple[int, ...]:
        """The largest kernel, () without a convolution."""
        return max(self.kernels, key=math.prod, default=())


@dataclass(frozen=True, repr=False)
class Block(Shown):
    """A place where branches meet.

    Attributes:
        name: path of the module in which they meet.
        kind: "concat", "split" (parts of one tensor, transformed and concatenated), "sum", "product",
            "stack" or "groups" (of a convolution).
        channels: channels of the aggregated tensor.
        branches: the paths.
        entry: the call that all of them come from, as text.
        call: the aggregation, as an index into the trace's ops.
    """

    name: str
    kind: str
    channels: int
    branches: tuple[Branch, ...]
    entry: str
    call: int = field(repr=False, compare=False, default=INPUT)

    def __repr__(self) -> str:
        made = f"{self.kind} of {len(self.branches)} branches"
        return f"Block({self.name or 'model'}: {made}, {self.channels:,} channels)"


def call_graph(flow: Flow) -> nx.DiGraph:
    """Calls as nodes (their index, with the `Op` as attribute `op`), tensors as edges; node -1 is the input.

    What was made of nothing, as zeros are, comes from the last call that wrote into its memory.
    """
    graph, root = nx.DiGraph(), flow.trace.root
    graph.add_node(INPUT)
    writer: dict[int, int] = {}
    wrote: dict[int, int] = {}
    for op in flow.trace.ops:
        inputs = [i for i in op.inputs() if i in flow.active]
        if inputs:
            graph.add_node(op.index, op=op)
            for value in inputs:
                source = writer.get(value, INPUT)
                if source not in graph or root(value) in flow.uniform:
                    source = wrote.get(root(value), source)
                if source in graph:
                    graph.add_edge(source, op.index, value=value, shape=flow.shape(value))
            if op.writes():
                wrote.update((root(value), op.index) for value in op.outputs)
        for value in op.outputs:
            writer[value] = op.index
    return graph


def find_blocks(flow: Flow, flops: Metric, gamma: np.ndarray) -> list[Block]:
    """All aggregation blocks of a traced model, in the order of their aggregation.

    Args:
        flow: labels of its forward.
        flops: what its calls cost.
        gamma: (slots,) mean |gamma| of the batch norms that scale a slot's channel, NaN where there is none.
    """
    return _Finder(flow, flops, gamma).blocks()


def describe_blocks(blocks: Sequence[Block], stays: np.ndarray) -> list[dict[str, Any]]:
    """Blocks with channels before and after, as plain data.

    Args:
        blocks: of the original.
        stays: (slots,) bool.
    """
    described = []
    for block in blocks:
        rows = []
        for branch in block.branches:
            inner = [int(stays[label].sum()) for label in branch.inner_labels]
            row = {"name": branch.name, "before": branch.channels, "after": int(stays[branch.label].sum())}
            row |= {"kernel": list(branch.kernel), "scale": branch.scale, "stride": branch.stride}
            rows.append(row | {"inner_before": branch.inner, "inner_after": sum(inner)})
        described.append({"name": block.name, "kind": block.kind, "branches": rows})
    return described


def mean_gamma(component: np.ndarray, gammas: Sequence[Gamma], tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Mean |gamma| per slot over the batch norms of its component; NaN where there is none, or it has no values.

    Args:
        component: (slots,) the connected component of each slot.
        gammas: what scales channels.
        tensors: parameters and buffers by name.
    """
    numbers, values = [np.zeros(0, int)], [np.zeros(0)]
    for gamma in gammas:
        tensor = tensors[gamma.name]
        if not tensor.is_meta:
            numbers.append(component[gamma.label])
            values.append(tensor.detach().abs().to("cpu", torch.float64).numpy())
    where, size = np.concatenate(numbers), int(component.max()) + 1
    count = np.bincount(where, minlength=size)
    total = np.bincount(where, weights=np.concatenate(values), minlength=size)
    mean = np.divide(total, count, out=np.full(size, np.nan), where=count > 0)
    mean[component[FROZEN]] = np.nan
    return np.asarray(mean[component])


class _Finder:
    """Finds the blocks of one forward; holds what all of them need."""

    def __init__(self, flow: Flow, flops: Metric, gamma: np.ndarray) -> None:
        self.flow, self.gamma = flow, gamma
        self.calls = call_graph(flow)
        self.dominator = nx.immediate_dominators(self.calls, INPUT)
        self.flops: dict[int, int] = {}
        whole = flops.per_term(np.ones(flops.size, dtype=bool))
        for term, cost in zip(flops.terms, whole.tolist(), strict=True):
            self.flops[term.op] = self.flops.get(term.op, 0) + cost
        self.rank = 2  # images, unless the first convolution tells otherwise
        for op in flow.trace.ops:
            if is_convolution(op):
                self.rank = len(op.arg("stride"))
                break
        self.windows: dict[int, tuple[Axes, Axes, Axes]] = {}
        self.written: dict[int, np.ndarray] = {}
        for op in flow.trace.ops:
            dim = op.declared.written_dim
            label = None if dim is None else flow.labels(op.outputs[0])[dim]
            if label is not None:
                self.written[op.index] = label

        self.rounds = _rounds(flow)

    def blocks(self) -> list[Block]:
        names: dict[str, int] = {}
        result = []
        joins = sorted(_merged(self.flow, self.calls), key=lambda item: item[0].op)
        for (join, inputs), ways in zip(joins, self._ways(joins), strict=True):
            block = self._groups(join) if join.kind == "groups" else self._block(join, inputs, ways)
            seen = names[block.name] = names.get(block.name, 0) + 1
            if seen > 1:
                block = replace(block, name=f"{block.name}#{seen}")
            result.append(block)
        return result

    def _ways(self, joins: Sequence[tuple[Join, list[Input]]]) -> list[list[list[int]]]:
        """Per block and input the calls of the branch; to the aggregation before it where these would be too many."""
        most = DEEPEST * len(self.calls)
        for walls in (frozenset[int](), frozenset(join.op for join, _ in joins)):
            ways: list[list[list[int]]] = []
            held = 0
            for join, inputs in joins:
                entry = self.dominator.get(join.op, INPUT)
                ends = {writer for _, writer in inputs} | {entry, INPUT}
                ways.append([])
                for _, writer in inputs:
                    ways[-1].append([] if writer == entry else self._between(writer, ends - {writer}, walls))
                    held += len(ways[-1][-1])
                if held > most and not walls:
                    break
            else:
                break
        return ways

    def _block(self, join: Join, inputs: Sequence[Input], ways: Sequence[Sequence[int]]) -> Block:
        op = self.flow.trace.ops[join.op]
        entry = self.dominator.get(join.op, INPUT)
        branches = []
        for (value, _), way in zip(inputs, ways, strict=True):
            label = self.flow.labels(value)[join.dim]
            if label is None:
                label = np.zeros(self.flow.shape(value)[join.dim], dtype=np.int64)
            branches.append(self._branch(op, label, [self.flow.trace.ops[index] for index in way]))
        kind = join.kind
        if kind == "concat" and entry != INPUT and self.flow.trace.ops[entry].declared.splits:
            kind = "split"
        channels = sum(len(b.label) for b in branches) if join.kind == "concat" else len(branches[0].label)
        return Block(op.module or "model", kind, channels, tuple(branches), self._text(entry), join.op)

    def _branch(self, join: Op, label: np.ndarray, ops: Sequence[Op]) -> Branch:
        convs = [op for op in ops if is_convolution(op)]
        writers = [op for op in ops if op.index in self.written]
        start, out = self._start(ops), self._pixels(self.flow.shape(join.outputs[0]))
        field_, jump, coarsest = self._geometry(ops, start)
        inner = tuple(self.written[op.index] for op in writers[:-1])
        return Branch(
            name=_relative(writers[-1].module, join.module) if writers else "identity",
            channels=len(label),
            kernels=tuple(self.flow.shape(op.inputs()[1])[2:] for op in convs),
            dilation=max((max(op.arg("dilation")) for op in convs), default=1),
            stride=_mean(jump),
            scale=_mean(tuple(map(truediv, coarsest, _stride(start, out)))) if ops and len(out) else 1.0,
            receptive_field=tuple(int(n) for n in field_),
            flops=sum(self.flops.get(op.index, 0) for op in ops),
            gamma=self._gamma(label),
            inner=sum(len(lab) for lab in inner),
            label=label,
            inner_labels=inner,
            calls=tuple(op.index for op in ops),
        )

    def _between(self, end: int, stops: set[int], walls: frozenset[int]) -> list[int]:
        """Calls from `end` backwards until `stops` and `walls`, in order; of a loop, its last round."""
        if end == INPUT:
            return []
        seen = {end}
        queue = [] if end in walls else [end]
        in_loops = {self.rounds.get(end)}
        while queue:
            for before in self.calls.predecessors(queue.pop()):
                same = self.rounds.get(before)
                if (
                    before not in seen
                    and before not in stops
                    and before not in walls
                    and (same is None or same not in in_loops)
                ):
                    seen.add(before)
                    in_loops.add(same)
                    queue.append(before)
        return sorted(seen - {INPUT})

    def _geometry(self, ops: Sequence[Op], start: Axes) -> tuple[Axes, Axes, Axes]:
        """Per axis: the receptive field of the branch's end, its stride, and the largest stride on the way."""
        one = (1.0,) * self.rank
        known: dict[int, tuple[Axes, Axes]] = {}
        coarsest = one
        for op in ops:
            before = [known[i] for i in self.calls.predecessors(op.index) if i in known] or [(one, one)]
            size, jump = before[0]
            for other_size, other_jump in before[1:]:
                size, jump = tuple(map(max, size, other_size)), tuple(map(min, jump, other_jump))
            if op.declared.window is not None:
                kernel, stride, dilation = self._window(op)
                size = tuple(n + (k - 1) * d * j for n, k, d, j in zip(size, kernel, dilation, jump, strict=True))
                jump = tuple(map(mul, jump, stride))
            else:
                given, made = (self._pixels(self.flow.shape(v)) for v in (op.inputs()[0], op.outputs[0]))
                jump = _stride(start, made) if len(given) == len(made) and given != made else jump
            known[op.index] = (size, jump)
            coarsest = tuple(map(max, coarsest, jump))
        size, jump = known[ops[-1].index] if ops else (one, one)
        return size, jump, coarsest

    def _window(self, op: Op) -> tuple[Axes, Axes, Axes]:
        if op.index not in self.windows:
            self.windows[op.index] = _window(self.flow, op, self.rank)
        return self.windows[op.index]

    def _pixels(self, shape: Sequence[int]) -> Axes:
        """The spatial sizes of a tensor, none where it has too few dims."""
        return tuple(shape[-self.rank :]) if len(shape) >= self.rank + 2 else ()

    def _start(self, ops: Sequence[Op]) -> Axes:
        """Spatial sizes of what the branch reads."""
        inside = {op.index for op in ops}
        for op in ops:
            for before in self.calls.predecessors(op.index):
                pixels = self._pixels(self.calls.edges[before, op.index]["shape"])
                if before not in inside and len(pixels):
                    return pixels
        return (1.0,) * self.rank

    def _gamma(self, label: np.ndarray) -> tuple[float, float, float] | None:
        values = self.gamma[label]
        values = values[~np.isnan(values)]
        if not len(values):
            return None
        return float(values.mean()), float(values.min()), float(values.max())

    def _groups(self, join: Join) -> Block:
        op = self.flow.trace.ops[join.op]
        groups = int(op.arg("groups"))
        label = self.flow.labels(op.outputs[0])[1]
        assert label is not None
        kernel, stride, dilation = self._window(op)
        kernels = (tuple(int(k) for k in kernel),)
        field_ = tuple(int(1 + (k - 1) * d) for k, d in zip(kernel, dilation, strict=True))
        branches = tuple(
            Branch(
                name=f"group{i}", channels=len(part), kernels=kernels,
                dilation=int(max(dilation)), stride=_mean(stride),
                scale=1.0, receptive_field=field_, flops=self.flops.get(op.index, 0) // groups, gamma=self._gamma(part),
                inner=0, label=part, calls=(join.op,),
            )
            for i, part in enumerate(np.split(label, groups))
        )  # fmt: skip
        entry = next(iter(self.calls.predecessors(op.index)), INPUT)
        return Block(op.module, "groups", len(label), branches, self._text(entry), join.op)

    def _text(self, index: int) -> str:
        return "the input" if index == INPUT else str(self.flow.trace.ops[index])


def _rounds(flow: Flow) -> dict[int, int]:
    """Of calls in a loop, as recurrent layers make them, a number that is the same for one call in every round.

    Without it, what leads to a round would be all rounds before it.
    """
    alike: dict[tuple[str, Any], list[Op]] = defaultdict(list)
    for op in flow.trace.ops:
        alike[op.module, op.target].append(op)
    numbers: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for (module, target), ops in alike.items():
        if len(ops) <= LOOP:
            continue
        for op in ops:
            labels = [label if label is None else label.tobytes() for i in op.outputs for label in flow.labels(i)]
            numbers[(module, target, *labels)].append(op.index)
    rounds = {}
    for number, same in enumerate(numbers.values()):
        if len(same) > LOOP:
            rounds.update(dict.fromkeys(same, number))
    return rounds


Input = tuple[int, int]
"""(value, the call that wrote it)."""


def _merged(flow: Flow, calls: nx.DiGraph) -> Iterator[tuple[Join, list[Input]]]:
    """Joins with their inputs; one that only feeds another of its kind is part of it."""
    writers = {(data["value"], target): source for source, target, data in calls.edges(data=True)}
    joins = {}
    for join in flow.joins:
        one_stream = join.kind == "sum" and flow.is_one_stream(join)
        if join.kind != "groups" and not one_stream:
            joins[join.op] = join
    inputs: dict[int, list[Input]] = {}
    for index, join in joins.items():
        inputs[index] = [(value, writers[value, index]) for value in join.inputs if (value, index) in writers]
    part_of_others = _take_in(joins, inputs, calls) | _repeated_concatenations(joins, inputs)
    for index, join in joins.items():
        if index not in part_of_others and len(inputs[index]) > 1:
            yield join, inputs[index]
    for join in flow.joins:
        if join.kind == "groups":
            yield join, []


def _take_in(joins: Mapping[int, Join], inputs: dict[int, list[Input]], calls: nx.DiGraph) -> set[int]:
    """Give a join the inputs of those that only feed it; returns the calls of these."""
    taken: set[int] = set()
    for index, join in joins.items():
        merged: list[Input] = []
        for value, writer in inputs[index]:
            inner = joins.get(writer)
            if inner is not None and inner.kind == join.kind and list(calls.successors(writer)) == [index]:
                taken.add(writer)
                merged += inputs[writer]
            else:
                merged.append((value, writer))
        inputs[index] = merged
    return taken


def _repeated_concatenations(joins: Mapping[int, Join], inputs: Mapping[int, list[Input]]) -> set[int]:
    """Concatenations of what a later one concatenates again, and more (DenseNet's layers read all before them)."""
    concats = [index for index, join in joins.items() if join.kind == "concat" and inputs[index]]
    latest = {pair: index for index in concats for pair in inputs[index]}
    repeated: set[int] = set()
    for index in concats:
        later = latest[inputs[index][0]]
        if later != index and set(inputs[index]) <= set(inputs[later]):
            repeated.add(index)
    return repeated


def is_convolution(op: Op) -> bool:
    """Whether a call multiplies windows of pixels by a weight."""
    return op.declared.window is not None and bool(op.declared.multiplies)


def _window(flow: Flow, op: Op, rank: int) -> tuple[Axes, Axes, Axes]:
    """Kernel, stride and dilation of a convolution or pooling; ones for any other call."""
    window = op.declared.window
    if window is None or len(flow.shape(op.inputs()[0])) != rank + 2:
        one = (1.0,) * rank
        return one, one, one
    kernel, stride, dilation = window(flow, op)
    return _axes(kernel, rank), _axes(stride, rank), _axes(dilation, rank)


def _axes(value: int | Sequence[int], rank: int) -> Axes:
    """A number per axis, where torch takes one for all."""
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes * rank if len(sizes) == 1 else sizes


def _stride(start: Axes, end: Axes) -> Axes:
    """How many pixels of `start` one of `end` stands for; whole above 1, whatever padding left of it; 1 where empty."""
    pairs = [(a, b) if a and b else (1.0, 1.0) for a, b in zip(start, end, strict=True)]
    return tuple(float(round(a / b)) if a > b else a / b for a, b in pairs)


def _mean(strides: Axes) -> float:
    """The stride of all axes together."""
    return round(float(math.prod(strides) ** (1 / max(len(strides), 1))), 2)


def _relative(path: str, module: str) -> str:
    """The path of a layer as seen from the block."""
    return path[len(module) + 1 :] if module and path.startswith(f"{module}.") else path
