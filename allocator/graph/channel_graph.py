"""The channel graph: which slots make up a neuron, what each costs, and where branches meet."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn

from allocator import adapters
from allocator.cost.flops import CostModel, cost_terms
from allocator.flow.flow import FROZEN, Facts, Flow, Place, Slots
from allocator.flow.follow import run_rules
from allocator.graph.blocks import Block, call_graph, find_blocks
from allocator.modules import modules_of, tensor_names
from allocator.tracing.inputs import Inputs
from allocator.tracing.record import ForwardError, record, trace_forward
from allocator.tracing.value_sized import downstream, value_sized

BRANCHES, INNER, ALL = 0, 1, 2
SCOPES = {"branches": BRANCHES, "inner": INNER, "all": ALL}


@dataclass(frozen=True)
class Options:
    """How channels are followed.

    Attributes:
        groups: "whole" removes whole groups of a grouped convolution, "width" the same places of every group.
        norms: "exact" keeps channels under a norm over channels (of a group norm, whole groups may go), "loose" lets
            them go.
        exclude: module or parameter name patterns, or module classes, that stay as they are.
        tied_parts: modules whose split parts must stay equal (found by tracing).
        frozen_ops: (module, operator name, which of its calls there, or None for all) whose neurons stay (found
            by tracing).
        heads: views that split a dim into heads of an attention, which go whole (found by following channels).
    """

    groups: str = "whole"
    norms: str = "exact"
    exclude: tuple[str | type, ...] = ()
    tied_parts: frozenset[str] = frozenset()
    frozen_ops: frozenset[tuple[str, str, int | None]] = frozenset()
    heads: Mapping[Place, int] | None = None

    def rules(self) -> dict[str, Any]:
        """What `Flow` takes of these."""
        return {"groups": self.groups, "norms": self.norms, "tied_parts": self.tied_parts, "heads": self.heads}


@dataclass(frozen=True)
class Neuron:
    """Everything that has to go together.

    Attributes:
        index: position in `ChannelGraph.neurons`.
        members: (parameter or buffer name, dim, index).
        scope: "branches", "inner" or "all": the narrowest scope that may remove it.
    """

    index: int
    members: tuple[tuple[str, int, int], ...]
    scope: str


@dataclass
class ChannelGraph:
    """Neurons of one model, with all that planning needs; holds no weights of its own.

    Attributes:
        model: the model it was made for, by reference.
        flow: labels of the eval-mode forward.
        training_flow: labels of the train-mode forward, where parts of the model run only there.
        slots: numbers of all parameters' indices.
        facts: what the operator rules noted.
        inputs: the inputs it was traced with.
        options: how channels were followed.
        optional: layers that the forward can do without, each with all that goes with it.
        component: connected component of each slot.
        unit_of_slot: neuron of each slot, or -1 where it must stay.
        size: number of neurons.
        notes: what was assumed.
    """

    model: nn.Module = field(repr=False)
    flow: Flow
    training_flow: Flow | None
    slots: Slots
    facts: Facts
    inputs: Inputs
    options: Options
    optional: dict[str, tuple[str, ...]]
    component: np.ndarray = field(repr=False)
    unit_of_slot: np.ndarray = field(repr=False)
    size: int
    notes: list[str]

    @property
    def example_inputs(self) -> Inputs:
        """What the model was traced with."""
        return self.inputs

    @property
    def assumptions(self) -> list[str]:
        """What was inferred because the caller left it out."""
        return self.notes

    @property
    def unsupported(self) -> dict[str, list[str]]:
        """Operators without a rule, each with the modules that call it; what they touch stays."""
        return self.facts.refused

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The model's modules by their paths."""
        return modules_of(self.model)

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The model's parameters and buffers by their names."""
        return tensor_names(self.model, self.modules)

    @cached_property
    def cost(self) -> CostModel:
        """FLOPs as a function of the kept neurons."""
        return CostModel(cost_terms(self.flow), self.unit_of_slot, self.size)

    @cached_property
    def blocks(self) -> list[Block]:
        """Aggregation blocks, in the order of their aggregation."""
        return find_blocks(self)

    def to_networkx(self) -> nx.DiGraph:
        """Calls as nodes with an `op` attribute, tensors as edges with `value` and `shape`; -1 is the input."""
        return call_graph(self.flow)

    @cached_property
    def flops(self) -> int:
        """The model's own FLOPs for the example inputs, as fvcore counts them."""
        return self.cost.flops(np.ones(self.size, dtype=bool))

    def certain_flops(self, kept: np.ndarray) -> int:
        """FLOPs that do not depend on values when the neurons with `kept` true are kept; all, in most models."""
        uncertain = downstream(self.flow.trace)
        per_term = self.cost.per_term(kept)
        return int(
            sum(n for n, term in zip(per_term.tolist(), self.cost.terms, strict=True) if term.op not in uncertain)
        )

    @cached_property
    def branch_of(self) -> np.ndarray:
        """Per neuron, the index of the branch (the first parameter dim) that writes it."""
        branch = np.full(self.size, -1)
        for i, (label, _) in enumerate(self.facts.produced):
            units = self.units(label)
            branch[units[branch[units] < 0]] = i
        return branch

    @cached_property
    def scope_of(self) -> np.ndarray:
        """Per neuron, the narrowest scope that may remove it: BRANCHES, INNER or ALL.

        A group is a branch with what it reads and what it gives, which are neurons of their own where all
        groups narrow alike.
        """
        scope = np.full(self.size, INNER)
        for kinds, level in ((("sum",), ALL), (("concat", "groups"), BRANCHES)):
            for join in self.flow.joins:
                if join.kind in kinds:
                    groups_width = self.flow.trace.ops[join.op].outputs if join.kind == "groups" else ()
                    for value in (*join.inputs, *groups_width):
                        scope[self.units(self.flow.labels(value)[join.dim])] = level
        return scope

    @cached_property
    def pool_of(self) -> np.ndarray:
        """Per neuron, the pool it competes in: its aggregation block, else its own layer.

        The last concatenation comes first, so that one that grows step by step (DenseNet) is one pool.
        """
        pool = np.full(self.size, -1)
        following = 0
        for kind in ("concat", "groups"):
            for join in reversed(self.flow.joins):
                if join.kind == kind:
                    units = np.concatenate([self.units(self.flow.labels(v)[join.dim]) for v in join.inputs])
                    free = units[pool[units] < 0]
                    pool[free] = following
                    following += len(free) > 0
        rest = pool < 0
        pool[rest] = following + self.branch_of[rest]
        return pool

    def units(self, label: np.ndarray | None) -> np.ndarray:
        """Neurons among these slots, in order."""
        if label is None:
            return np.zeros(0, dtype=np.int64)
        units = self.unit_of_slot[label]
        return units[units >= 0]

    @cached_property
    def neurons(self) -> list[Neuron]:
        """All neurons that can be removed, with every parameter index they hold."""
        order = np.argsort(self.unit_of_slot, kind="stable")
        order = order[self.unit_of_slot[order] >= 0]
        table = self.slots.names
        where = np.searchsorted(self.slots.starts, order, side="right") - 1
        members: list[list[tuple[str, int, int]]] = [[] for _ in range(self.size)]
        for slot, row in zip(order.tolist(), where.tolist(), strict=True):
            start, name, dim = table[row]
            members[self.unit_of_slot[slot]].append((name, dim, slot - start))
        names = {level: name for name, level in SCOPES.items()}
        scope = self.scope_of
        return [Neuron(i, tuple(m), names[int(scope[i])]) for i, m in enumerate(members)]

    def reasons(self) -> list[tuple[str, int]]:
        """Why channels must stay, with the number of channels per reason, most first."""
        count: Counter[str] = Counter()
        for label, module, reason in self.facts.frozen:
            count[f"{reason} in {module}" if module else reason] += len(label)
        return count.most_common()

    def share(self) -> float:
        """Share of all written channels that can be removed."""
        written = np.unique(np.concatenate([np.zeros(0, int), *(label for label, _ in self.facts.produced)]))
        return float((self.unit_of_slot[written] >= 0).mean()) if len(written) else 0.0


def build_graph(model: nn.Module, inputs: Inputs, options: Options | None = None) -> ChannelGraph:
    """Trace `model` and follow its channels.

    Args:
        model: any module that can be traced; it is not changed.
        inputs: example inputs.
        options: how channels are followed.

    Raises:
        TraceError: the forward raised.
    """
    options = options or Options()
    trace = trace_forward(model, inputs)
    tensors = tensor_names(model)
    slots = Slots.of({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    facts, notes = Facts(), [inputs.assumed] if inputs.assumed else []
    flow = run_rules(trace, slots, facts, **options.rules())
    if options.heads is None:
        options = replace(options, heads=flow.found_heads())
        if options.heads:
            facts = Facts()
            flow = run_rules(trace, slots, facts, **options.rules())
    training_flow = None
    parameters = {name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
    unused = parameters - {value.name for value in trace.values}
    if unused and trace.mode == "meta":
        try:
            training = record(model, inputs, training=True)
            training_flow = run_rules(training, slots, facts, **options.rules())
        except ForwardError as error:
            notes.append(f"parameters used in train mode only stay as they are: {error}")
    by_value = sorted({op.name for op in value_sized(trace)})
    if by_value:
        notes.append(f"results whose size depends on values count at their largest ({', '.join(by_value)})")
    notes += facts.fixed.values()
    scales = [(slots.labels(name)[0], name) for name in adapters.norm_scales(trace.modules)]
    facts.gammas += [(label, name) for label, name in scales if label is not None]
    _freeze_excluded(model, options, slots, facts)
    _freeze_answers(trace.modules, slots, facts)
    _freeze_found(options, flow, training_flow)
    component, unit_of_slot, size = _components(slots, facts)
    optional = adapters.optional_branches(trace.modules)
    return ChannelGraph(
        model,
        flow,
        training_flow,
        slots,
        facts,
        inputs,
        options,
        optional,
        component,
        unit_of_slot,
        size,
        notes,
    )


def _freeze_excluded(model: nn.Module, options: Options, slots: Slots, facts: Facts) -> None:
    classes = tuple(item for item in options.exclude if isinstance(item, type))
    patterns = [item for item in options.exclude if isinstance(item, str)]
    modules = [path for path, module in model.named_modules() if classes and isinstance(module, classes)]
    for name in slots.shapes:
        owner = name.rpartition(".")[0]
        if owner in modules or any(_matches(name, owner, pattern) for pattern in patterns):
            for label in slots.labels(name):
                if label is not None:
                    facts.frozen.append((label, "", "excluded by the caller"))


def _freeze_answers(modules: Mapping[str, nn.Module], slots: Slots, facts: Facts) -> None:
    """Layers that make the model's answer keep their outputs, whatever is done with them afterwards."""
    for path in adapters.output_layers(modules):
        name = f"{path}.weight"
        if name in slots.shapes:
            facts.frozen.append((slots.labels(name)[0], path, "a head of the model"))  # type: ignore[arg-type]


def _matches(name: str, owner: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(text, p) for text in (name, owner) for p in (pattern, f"{pattern}.*"))


def _freeze_found(options: Options, *flows: Flow | None) -> None:
    for flow in flows:
        if flow is None or not options.frozen_ops:
            continue
        for op, (path, name, which) in zip(flow.trace.ops, flow.places, strict=True):
            if not options.frozen_ops.isdisjoint([(path, name, which), (path, name, None)]):
                for value in (*op.inputs(), *op.outputs):
                    for label in flow.labels(value):
                        flow.freeze(label, op, "the rewritten forward did not fit here")


def components(total: int, ties: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """(total,) the number of each slot's connected component, where slots in the same place of a tie are linked."""
    pairs = [(a.reshape(-1), b.reshape(-1)) for a, b in ties]
    rows, cols = (np.concatenate([np.zeros(0, int), *(pair[i] for pair in pairs)]) for i in range(2))
    links = coo_matrix((np.ones(len(rows), dtype=np.int8), (rows, cols)), shape=(total, total)).tocsr()
    return np.asarray(connected_components(links, directed=False)[1])


def _components(slots: Slots, facts: Facts) -> tuple[np.ndarray, np.ndarray, int]:
    """Number the connected components that hold a written slot and nothing that must stay."""
    frozen = [np.unique(label) for label, _, _ in facts.frozen]
    a = [*(t[0] for t in facts.ties), *frozen]
    b = [*(t[1] for t in facts.ties), *(np.full(len(label), FROZEN) for label in frozen)]
    component = components(slots.total, zip(a, b, strict=True))
    written = np.concatenate([np.zeros(0, int), *(label for label, _ in facts.produced)])
    first = component[written]
    first = first[first != component[FROZEN]]
    unique, position = np.unique(first, return_index=True)
    number = np.full(component.max() + 1, -1, dtype=component.dtype)
    number[unique[np.argsort(position)]] = np.arange(len(unique))
    return component, number[component], len(unique)


def kept_of(graph: ChannelGraph, kept: np.ndarray) -> dict[str, list[np.ndarray | None]]:
    """Per parameter and dim, the indices that stay, or None where all do.

    Args:
        graph: the model's neurons.
        kept: (graph.size,) bool, which neurons stay.
    """
    stays = np.append(kept, True)[graph.unit_of_slot]
    starts, left = graph.slots.starts, np.flatnonzero(stays)
    losing = np.unique(np.searchsorted(starts, np.flatnonzero(~stays), side="right") - 1).tolist()
    ends = np.searchsorted(left, [*starts.tolist(), len(stays)]).tolist()
    result: dict[str, list[np.ndarray | None]] = {}
    for i in losing:
        start, name, dim = graph.slots.names[i]
        dims = result.setdefault(name, [None] * len(graph.slots.shapes[name]))
        dims[dim] = left[ends[i] : ends[i + 1]] - start
    return result
