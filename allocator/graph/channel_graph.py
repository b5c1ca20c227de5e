"""The channel graph: neurons, what they cost, and where branches meet."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import networkx as nx
import numpy as np
import torch
from torch import nn

from allocator.cost.flops import flops_terms
from allocator.cost.metric import Metric
from allocator.cost.peak import PeakMetric, live_terms
from allocator.cost.size import activation_terms, parameter_terms
from allocator.cost.speed import LatencyMetric, Speed, speed_terms
from allocator.errors import UnknownNameError, none_of, plural
from allocator.flow.facts import JOINT, NO_RULE, Facts
from allocator.flow.flow import Flow
from allocator.flow.follow import value_dependent
from allocator.flow.labels import FROZEN, Slots
from allocator.flow.options import Options
from allocator.graph.blocks import Block, call_graph, find_blocks, mean_gamma
from allocator.graph.neurons import components
from allocator.model_checks import undone_by
from allocator.modules import modules_of, tensor_names
from allocator.shown import Shown
from allocator.tracing.forwards import Forwards
from allocator.tracing.inputs import Inputs
from allocator.tracing.sharing import writes_on_values

BRANCHES, INNER, ALL = 0, 1, 2
SCOPES = {"branches": BRANCHES, "inner": INNER, "all": ALL}
METRICS = {
    "flops": "FLOPs",
    "params": "parameters",
    "activations": "activations",
    "peak_activations": "activations at once",
    "latency": "ns",
}
"""What can be counted as a function of the kept neurons, and its unit."""


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


@dataclass(repr=False)
class ChannelGraph(Shown):
    """Neurons of one model, with all that planning needs; holds no weights of its own.

    Attributes:
        model: the model it was made for, by reference.
        flow: labels of the eval-mode forward.
        others: labels of the forwards in other modes, batches and sizes.
        slots: numbers of all parameters' indices.
        facts: what the operator rules noted.
        inputs: the inputs it was traced with.
        options: how channels were followed.
        optional: layers that the forward can do without, each with all that goes with it.
        component: connected component of each slot.
        unit_of_slot: neuron of each slot, or -1 where it must stay.
        size: number of neurons.
        notes: what was assumed.
        forwards: what was recorded.
        speed: how long the model's modules take, where that was measured.
        wider: the graph with forwards in other modes and sizes too, once it was made.
        counted: by call (forward, index) what fits of its results showed it to hang on: a slot per layer.
    """

    model: nn.Module = field(repr=False)
    flow: Flow
    others: tuple[Flow, ...]
    slots: Slots
    facts: Facts
    inputs: Inputs
    options: Options
    optional: dict[str, tuple[str, ...]]
    component: np.ndarray = field(repr=False)
    unit_of_slot: np.ndarray = field(repr=False)
    size: int
    notes: list[str]
    forwards: Forwards = field(repr=False)
    speed: Speed | None = None
    wider: ChannelGraph | None = field(default=None, repr=False)
    counted: dict[tuple[int, int], set[int]] = field(default_factory=dict, repr=False)
    _metrics: dict[str, Metric] = field(default_factory=dict, repr=False)
    _ran: bool = field(default=False, repr=False)

    def __repr__(self) -> str:
        return f"ChannelGraph({type(self.model).__name__}: {self.size:,} neurons, {self.flops:,} FLOPs)"

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

    @property
    def exact(self) -> bool:
        """Whether the smaller network computes exactly what the original does without the dropped neurons."""
        return self.options.norms != "loose"

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The model's modules by their paths."""
        return modules_of(self.model)

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The model's parameters and buffers by their names."""
        return tensor_names(self.model, self.modules)

    @cached_property
    def flows(self) -> list[Flow]:
        """The labels of every forward that was traced, in eval mode with the example inputs first."""
        return [self.flow, *self.others]

    def written(self) -> set[str]:
        """Names of the parameters and buffers that some forward may write into; asks for one on numbers."""
        trace, known = self.flow.trace, set().union(*(flow.trace.written() for flow in self.flows))
        if not self._ran and not trace.by_value and writes_on_values(self.model, self.inputs, known):
            trace.by_value.update(self.tensors)
        self._ran = True
        return known | trace.by_value

    @property
    def training_flow(self) -> Flow | None:
        """Labels of a train-mode forward, where one was traced to its end."""
        return next((flow for flow in self.others if flow.trace.training and not flow.trace.unfinished), None)

    # Cost ---------------------------------------------------------------------------------------

    def metric(self, name: str) -> Metric:
        """A cost as a function of the kept neurons.

        Args:
            name: "flops" (as fvcore counts them), "params", "activations", "peak_activations", or "latency", where
                `speed` was measured.

        Raises:
            UnknownNameError: no such metric.
        """
        if name not in self._metrics:
            self._metrics[name] = self._make_metric(name)
        return self._metrics[name]

    def _make_metric(self, name: str) -> Metric:
        if name == "flops":
            terms = flops_terms(self.flow)
        elif name == "params":
            terms = parameter_terms(self.slots, self.tensors)
        elif name == "activations":
            terms = activation_terms(self.flow, self.metric("flops").terms)
        elif name == "peak_activations":
            alive, instants = live_terms(self.flow)
            return PeakMetric(name, METRICS[name], alive, self.unit_of_slot, self.size, instants)
        elif name == "latency" and self.speed is not None:
            terms = speed_terms(self.flow, self.metric("flops").terms, self.speed)
            return LatencyMetric(name, METRICS[name], terms, self.unit_of_slot, self.size)
        elif name == "latency":
            raise UnknownNameError("latency is not known before it is measured, as allocate(model, latency=...) does")
        else:
            raise UnknownNameError(none_of("metric", name, METRICS))
        return Metric(name, METRICS[name], terms, self.unit_of_slot, self.size)

    @cached_property
    def flops(self) -> int:
        """The model's own FLOPs for the example inputs, as fvcore counts them."""
        return self.metric("flops").whole

    def certain_flops(self, kept: np.ndarray) -> int:
        """FLOPs that do not depend on values when the neurons with `kept` true are kept; all, in most models."""
        uncertain = value_dependent(self.flow.trace)
        metric = self.metric("flops")
        certain = np.array([term.op not in uncertain for term in metric.terms], dtype=bool)
        return int(metric.per_term(kept)[certain].sum())

    # Blocks -------------------------------------------------------------------------------------

    @cached_property
    def blocks(self) -> list[Block]:
        """Aggregation blocks, in the order of their aggregation."""
        gamma = mean_gamma(self.component, self.facts.gammas, self.tensors)
        return find_blocks(self.flow, self.metric("flops"), gamma)

    def to_networkx(self) -> nx.DiGraph:
        """Calls as nodes with an `op` attribute, tensors as edges with `value` and `shape`; -1 is the input."""
        return call_graph(self.flow)

    # Neurons ------------------------------------------------------------------------------------

    def units(self, label: np.ndarray | None) -> np.ndarray:
        """Neurons among these slots, in order."""
        if label is None:
            return np.zeros(0, dtype=np.int64)
        units = self.unit_of_slot[label]
        return units[units >= 0]

    def stays(self, kept: np.ndarray) -> np.ndarray:
        """(slots,) bool: which slots stay when the neurons with `kept` true, (neurons,) bool, are kept.

        Of a wider network, where `kept` is (neurons,) int: how many there are of each slot.
        """
        # A slot that is no neuron's has -1 for one, and so takes the last entry.
        return np.append(kept, True)[self.unit_of_slot]

    @cached_property
    def reads(self) -> np.ndarray:
        """(slots,) bool: those along which a weight is contracted with an activation, and so reads a neuron.

        Of a weight that the forward adds up from several (W + B @ A), those of all of them.
        """
        slots = np.zeros(self.slots.total, dtype=bool)
        for label in self.facts.read:
            slots[label] = True
        if self.facts.computed_ties:
            together = components(self.slots.total, [(tie.a, tie.b) for tie in self.facts.computed_ties])
            slots = np.isin(together, np.unique(together[slots]))
        slots[FROZEN] = False
        return slots

    @property
    def everything(self) -> np.ndarray:
        """(neurons,) bool: the choice that keeps all."""
        return np.ones(self.size, dtype=bool)

    @cached_property
    def branch_of(self) -> np.ndarray:
        """Per neuron, the index of the branch (the first parameter dim) that writes it."""
        branch = np.full(self.size, -1)
        for i, written in enumerate(self.facts.written):
            units = self.units(written.label)
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
                if join.kind not in kinds or (join.kind == "sum" and self.flow.is_one_stream(join)):
                    continue
                given = self.flow.trace.ops[join.op].outputs if join.kind == "groups" else ()
                for value in (*join.inputs, *given):
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

    # Why ----------------------------------------------------------------------------------------

    def reasons(self) -> list[tuple[str, int]]:
        """Why channels must stay, with the number of channels per reason, most first."""
        found = self._frozen().most_common()
        return [(f"{reason} in {module}" if module else reason, count) for (reason, module), count in found]

    def why(self) -> list[str]:
        """The reasons as lines; the first that a call or an option would undo says which."""
        lines: list[str] = []
        said: set[str] = set()
        for (reason, module), count in self._frozen().most_common():
            undone = undone_by(module, self.modules)
            undone = f"; {undone} undoes it" if undone else self._let_go(reason)
            hint = "" if undone in said else undone
            said.add(undone)
            lines.append(f"{reason}{f' in {module}' if module else ''} ({plural(count, 'channel')}{hint})")
        return lines

    def _let_go(self, reason: str) -> str:
        """What lets channels go that stay because of a norm, or of an operator of which nothing is known."""
        if NO_RULE in reason:
            return "; a rule of a few lines lets them go, as docs/extending.md shows"
        return "; norms='loose' lets them go" if self.options.norms == "exact" and JOINT in reason else ""

    def _frozen(self) -> Counter[tuple[str, str]]:
        """Channels per reason and module: those among its slots that are written; where none is, those of one dim."""
        written = np.zeros(self.slots.total, dtype=bool)
        for each in self.facts.written:
            written[each.label] = True
        labels: dict[tuple[str, str], list[np.ndarray]] = {}
        for label, module, reason in self.facts.frozen:
            labels.setdefault((reason, module), []).append(label)
        count: Counter[tuple[str, str]] = Counter()
        for key, found in labels.items():
            slots = np.unique(np.concatenate([label.reshape(-1) for label in found]))
            count[key] = int(written[slots].sum()) or max(len(np.unique(label)) for label in found)
        return count

    def share(self) -> float:
        """Share of all written channels that can be removed."""
        written = np.unique(np.concatenate([np.zeros(0, int), *(each.label for each in self.facts.written)]))
        return float((self.unit_of_slot[written] >= 0).mean()) if len(written) else 0.0
