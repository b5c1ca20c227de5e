"""An oracle for operator rules: run the real operator on sliced tensors and compare.

A rule claims which indices of an operator's inputs, weights and outputs go together. The oracle shares no
code with the rules. It takes the claim as data, then runs the operator itself, in float64, on tensors with
indices cut out:

- *sound*: for every choice that the claim allows, `op(cut(x)) == cut(op(x))`. Where the operator sums over
  what was cut, the original reads zeros there, as in the certificate.
- *tight*: a choice that the claim forbids must fail, or the claim forbids too much: cutting a part of what
  it ties together, or what it says must stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import networkx as nx
import numpy as np
import torch
from torch import nn

import allocator.operators  # noqa: F401  (declares the operators)
from allocator.flow import follow as analysis
from allocator.flow.facts import Attribute, Facts
from allocator.flow.flow import Flow, Join
from allocator.flow.labels import FROZEN, Labels, Slots
from allocator.flow.options import Options
from allocator.tracing.calls import Trace
from allocator.tracing.inputs import Inputs
from allocator.tracing.outputs import tensors_in
from allocator.tracing.record import record

Make = Callable[[tuple[int, ...]], torch.Tensor]
Stays = np.ndarray
# What an operator raises when sizes do not fit.
_RAISED = (RuntimeError, IndexError, ValueError, AssertionError)


def normal(shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal values."""
    return torch.randn(shape, dtype=torch.float64)


def single(shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal values in single precision."""
    return torch.randn(shape)


def positive(shape: tuple[int, ...]) -> torch.Tensor:
    """Values between 0.2 and 0.8."""
    return torch.rand(shape, dtype=torch.float64) * 0.6 + 0.2


def levelled(shape: tuple[int, ...]) -> torch.Tensor:
    """Every channel holds the same values in another order, so that any of them have the same mean and variance."""
    values = torch.linspace(-1, 2, shape[2], dtype=torch.float64)
    rows = [values[torch.randperm(shape[2])] for _ in range(shape[0] * shape[1])]
    return torch.stack(rows).view(shape)


def truth(shape: tuple[int, ...]) -> torch.Tensor:
    """Booleans."""
    return torch.rand(shape) > 0.5


def below(limit: int, dtype: torch.dtype = torch.int64) -> Make:
    """Integers from 0 to `limit`, exclusive."""
    return lambda shape: torch.randint(limit, shape).to(dtype)


@dataclass(frozen=True)
class Data:
    """An activation.

    Attributes:
        shape: its sizes.
        channels: dims that carry channels.
        make: draws its values.
    """

    shape: tuple[int, ...]
    channels: tuple[int, ...] = ()
    make: Make = normal


@dataclass(frozen=True)
class Case:
    """One use of an operator.

    Attributes:
        run: (module with weights and attributes, *activations) -> tensor or tuple of tensors.
        data: activations.
        weights: sizes of the parameters.
        attributes: what the module knows of itself, such as `groups`.
        counts: attributes that follow channels: name -> (activation, dim, first index, last index + 1).
        make: draws the weights.
        contracts: the operator sums over channels, so the original reads zeros where they were dropped.
        refused: no rule: everything stays and the operator is listed.
        cautious: why the rule forbids more than it has to; empty where it is tight.
        twin: the same computation by a function that runs on a CPU, where the operator itself does not.
        mode: what the tensors of the trace are.
        options: `groups` and `norms` of the flow.
        tolerance: relative to the largest output.
        least: how many indices of a dim are kept; two where torch treats a single one as none.
    """

    run: Callable[..., Any]
    data: Sequence[Data]
    weights: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, tuple[int, int, int, int]] = field(default_factory=dict)
    make: Make = normal
    contracts: bool = False
    refused: bool = False
    cautious: str = ""
    twin: Callable[..., Any] | None = None
    mode: str = "meta"
    options: Mapping[str, str] = field(default_factory=dict)
    tolerance: float = 1e-11
    least: int = 1


class Holder(nn.Module):
    """The module around one operator."""

    def __init__(self, run: Callable[..., Any], weights: Mapping[str, torch.Tensor], attributes: Mapping[str, Any]):
        super().__init__()
        self.run = run
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *data: torch.Tensor) -> Any:
        return self.run(self, *(torch.ops.aten.alias(x) for x in data))


class _Seeded(Flow):
    """A flow whose inputs carry channels from the start."""

    seeds: Sequence[Labels] = ()

    def __init__(self, trace: Trace, *args: Any, **kwargs: Any) -> None:
        super().__init__(trace, *args, **kwargs)
        for op, labels in zip(trace.ops, self.seeds, strict=False):
            self.set(op.inputs()[0], labels)


@dataclass
class Claim:
    """What the rules say of one case.

    Attributes:
        operators: names of the recorded calls.
        tensors: labels of every activation ("x0" ...) and weight.
        outputs: labels of every output.
        classes: slots that go together and may go, one array each.
        stuck: the same for slots that must stay.
        facts: what the rules noted.
        joins: where branches meet.
        total: number of slots.
    """

    operators: set[str]
    tensors: dict[str, Labels]
    outputs: list[Labels]
    classes: list[np.ndarray]
    stuck: list[np.ndarray]
    facts: Facts
    joins: list[Join]
    total: int

    def floors(self) -> list[np.ndarray]:
        """Labels of which one must stay: those that the rules noted, and every dim as a whole."""
        dims = [label for labels in self.tensors.values() for label in labels if label is not None]
        return [*(floor.label for floor in self.facts.at_least if floor.minimum == 1), *dims]


def claim(case: Case, *, inference: bool = False, training: bool = False) -> Claim:
    """Trace a case, run the rules, and read off what they say."""
    data, weights = _values(case)
    with torch.inference_mode(inference):
        trace = record(Holder(case.run, weights, case.attributes), Inputs(tuple(data)), case.mode, training=training)
    shapes = {f"x{i}": tuple(x.shape) for i, x in enumerate(data)}
    slots = Slots.of({**shapes, **{name: tuple(w.shape) for name, w in weights.items()}})
    seeds = [
        tuple(label if d in item.channels else None for d, label in enumerate(slots.labels(f"x{i}")))
        for i, item in enumerate(case.data)
    ]
    outputs, trace.outputs = trace.outputs, []
    facts = Facts()
    with mock.patch.object(analysis, "Flow", type("Seeded", (_Seeded,), {"seeds": seeds})):
        options = Options(**case.options)  # type: ignore[arg-type]
        flow = analysis.run_rules(trace, slots, facts, options)
    classes, stuck = _classes(facts, seeds)
    return Claim(
        operators={_plain(op.target) for op in trace.ops[len(data) :]},
        tensors={
            **{f"x{i}": labels for i, labels in enumerate(seeds)},
            **{w: slots.labels(w) for w in weights},
        },
        outputs=[flow.labels(i) for i in outputs],
        classes=classes,
        stuck=stuck,
        facts=facts,
        joins=flow.joins,
        total=slots.total,
    )


def _plain(target: Any) -> str:
    namespace, _, name = target._schema.name.partition("::")
    return name if namespace == "aten" else target._schema.name


def _classes(facts: Facts, seeds: Sequence[Labels]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Slots that go together: those that may go, and those that must stay."""
    frozen = {slot for label, _, _ in facts.frozen for slot in label.tolist()}
    graph = nx.Graph()
    for a, b, _ in facts.ties:
        graph.add_edges_from(zip(a.ravel().tolist(), b.ravel().tolist(), strict=True))
    if FROZEN in graph:
        frozen |= set(graph.neighbors(FROZEN))
        graph.remove_node(FROZEN)
    written = [label for label, _ in facts.written]
    carried = [label for labels in seeds for label in labels if label is not None]
    starts = {slot for label in (*written, *carried) for slot in label.tolist()} - {FROZEN}
    graph.add_nodes_from(starts)
    parts = sorted((set(part) for part in nx.connected_components(graph)), key=min)
    parts = [part for part in parts if part & starts]
    free = [np.array(sorted(part)) for part in parts if not part & frozen]
    return free, [np.array(sorted(part)) for part in parts if part & frozen]


def _values(case: Case) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Activations and weights, the same ones on every call."""
    torch.default_generator.manual_seed(1)
    return [d.make(d.shape) for d in case.data], {n: case.make(s) for n, s in case.weights.items()}


class Bench:
    """Runs the operator of a case on whole and on cut tensors."""

    def __init__(self, case: Case, claimed: Claim) -> None:
        self.case, self.claim = case, claimed
        data, self.weights = _values(case)
        self.data = {f"x{i}": x for i, x in enumerate(data)}
        self.plain = self._run(self.data, self.weights, case.attributes)

    def cut(self, stays: Stays) -> list[torch.Tensor]:
        """Outputs for tensors without the slots that go."""
        data = {name: self._sliced(x, name, stays) for name, x in self.data.items()}
        weights = {name: self._sliced(w, name, stays) for name, w in self.weights.items()}
        return self._run(data, weights, self._attributes(stays))

    def whole(self, stays: Stays, zeros: np.ndarray, everywhere: np.ndarray) -> list[torch.Tensor]:
        """Outputs of the original; weights read zero at `zeros`, all tensors at `everywhere`."""
        if not (zeros & ~stays).any() and not (everywhere & ~stays).any():
            return self.plain
        data = {name: self._zeroed(x, name, everywhere & ~stays) for name, x in self.data.items()}
        rows = (zeros | everywhere) & ~stays
        weights = {name: self._zeroed(w, name, rows) for name, w in self.weights.items()}
        return self._run(data, weights, self.case.attributes)

    def _run(
        self, data: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], attributes: Any
    ) -> list[torch.Tensor]:
        torch.default_generator.manual_seed(2)
        copies = {name: w.clone() for name, w in weights.items()}
        holder = Holder(self.case.twin or self.case.run, copies, attributes).eval()
        with torch.no_grad():
            return tensors_in(holder(*(x.clone() for x in data.values())))

    def _sliced(self, tensor: torch.Tensor, name: str, stays: Stays) -> torch.Tensor:
        for dim, label in enumerate(self.claim.tensors[name]):
            if label is not None:
                tensor = tensor.index_select(dim, torch.from_numpy(np.flatnonzero(stays[label])))
        return tensor

    def _zeroed(self, tensor: torch.Tensor, name: str, zeros: np.ndarray) -> torch.Tensor:
        tensor = tensor.clone()
        for dim, label in enumerate(self.claim.tensors[name]):
            if label is not None:
                tensor.index_fill_(dim, torch.from_numpy(np.flatnonzero(zeros[label])), 0)
        return tensor

    def _attributes(self, stays: Stays) -> dict[str, Any]:
        values = dict(self.case.attributes)
        for name, (which, dim, first, last) in self.case.counts.items():
            label = self.claim.tensors[f"x{which}"][dim]
            assert label is not None
            values[name] = int(stays[label[first:last]].sum())
        for attribute in self.claim.facts.attributes:
            values[attribute.name] = _attribute(attribute, values[attribute.name], stays)
        for slots in self.claim.facts.groups.values():
            values["groups"] = int(stays[slots].sum())
        return values


def _attribute(attribute: Attribute, current: Any, stays: Stays) -> Any:
    sizes = [int(stays[piece].sum()) for piece in attribute.pieces]
    return sizes[0] if isinstance(current, int) and len(set(sizes)) == 1 else sizes


def violations(case: Case, claimed: Claim) -> list[str]:
    """What is wrong with a claim; empty where it is right."""
    bench = Bench(case, claimed)
    found = [*_unsound(bench), *_ill_noted(case, claimed)]
    if found or case.refused:
        return found
    loose = list(_too_strict(bench))
    if case.cautious:
        return [] if loose else [f"the rule is tight, though it is said to be cautious: {case.cautious}"]
    return loose


def _ill_noted(case: Case, claimed: Claim) -> Iterator[str]:
    """Whether operators were refused, or said to sum over channels, without need."""
    facts = claimed.facts
    if bool(facts.refused) != case.refused:
        yield f"refused operators: {sorted(facts.refused)}"
    if case.refused and claimed.classes:
        yield f"{len(claimed.classes)} neurons of a refused operator may go"
    if bool(facts.read or facts.multiplied) != case.contracts:
        yield f"summed-over channels were {'not ' if case.contracts else ''}noted"


def _unsound(bench: Bench) -> Iterator[str]:
    """Allowed choices for which the real operator disagrees."""
    claimed = bench.claim
    read, mixed = _mask(claimed, claimed.facts.read), _mask(claimed, claimed.facts.multiplied)
    for gone in _choices(claimed, bench.case.least):
        stays = _without(claimed, [claimed.classes[k] for k in gone])
        everywhere = np.zeros(claimed.total, dtype=bool)
        for k in gone:
            everywhere[claimed.classes[k]] = mixed[claimed.classes[k]].any()
        try:
            small = bench.cut(stays)
        except _RAISED as error:
            yield f"without neurons {gone} it raises {type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        large = [_image(t, lab, stays) for t, lab in _with_labels(bench.whole(stays, read, everywhere), claimed)]
        for i, (a, b) in enumerate(zip(large, small, strict=True)):
            if not _equal(a, b, bench.case.tolerance):
                yield f"without neurons {gone} output {i} differs: {_difference(a, b)}"


def _with_labels(outputs: list[torch.Tensor], claimed: Claim) -> list[tuple[torch.Tensor, Labels]]:
    return list(zip(outputs, claimed.outputs, strict=True))


def _image(tensor: torch.Tensor, labels: Labels, stays: Stays) -> torch.Tensor:
    for dim, label in enumerate(labels):
        if label is not None:
            tensor = tensor.index_select(dim, torch.from_numpy(np.flatnonzero(stays[label])))
    return tensor


def _choices(claimed: Claim, least: int) -> Iterator[list[int]]:
    """Neurons to drop: each alone, a few random sets, and as many as the floors allow."""
    count = len(claimed.classes)
    random = np.random.default_rng(0)
    floors = [set(floor.tolist()) for floor in claimed.floors()]
    members = [set(part.tolist()) for part in claimed.classes]

    def allowed(order: Sequence[int]) -> list[int]:
        gone: set[int] = set()
        chosen = []
        for k in order:
            if all(len(floor - gone - members[k]) >= min(least, len(floor)) for floor in floors):
                gone |= members[k]
                chosen.append(k)
        return sorted(chosen)

    seen: set[tuple[int, ...]] = set()
    orders = [[k] for k in range(count)]
    orders += [random.permutation(count)[: random.integers(2, count)].tolist() for _ in range(6) if count > 2]
    orders += [random.permutation(count).tolist() for _ in range(2)]
    for order in orders:
        chosen = allowed(order)
        if chosen and tuple(chosen) not in seen:
            seen.add(tuple(chosen))
            yield chosen


def _too_strict(bench: Bench) -> Iterator[str]:
    """Forbidden choices for which the real operator would have agreed."""
    claimed = bench.claim
    for part in claimed.classes:
        for piece, rest in _halves(part):
            if _survives(bench, [piece]) and _survives(bench, [rest]):
                yield f"{piece.tolist()} and {rest.tolist()} are tied, but either can go alone"
    for name, labels in claimed.tensors.items():
        for dim, label in enumerate(labels):
            if label is None:
                continue
            stuck = [p for p in claimed.stuck if 0 < np.isin(label, p).sum() < len(label)]
            if stuck and all(_survives(bench, [p]) for p in stuck):
                yield f"dim {dim} of {name} must stay, but each of its indices can go"


def _halves(part: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ways to split a set of slots in two: all of them for a few slots, else one slot against the others."""
    few = len(part) <= 5
    masks = range(1, 2 ** (len(part) - 1)) if few else (1 << k for k in range(len(part)))
    for mask in masks:
        chosen = np.array([bool(mask >> k & 1) for k in range(len(part))])
        yield part[chosen], part[~chosen]


def _survives(bench: Bench, gone: Sequence[np.ndarray]) -> bool:
    """Whether the operator without these slots still gives a part of the original's output."""
    stays = _without(bench.claim, gone)
    zeros = ~stays if bench.case.contracts else np.zeros_like(stays)
    try:
        small = bench.cut(stays)
    except _RAISED:
        return False
    large = bench.whole(stays, zeros, zeros)
    return len(small) == len(large) and all(
        is_part(a, b, bench.case.tolerance) for a, b in zip(large, small, strict=True)
    )


def is_part(whole: torch.Tensor, part: torch.Tensor, tolerance: float = 1e-11) -> bool:
    """Whether `part` is `whole` with indices of at most one dim left out, the others in their order."""
    if whole.dim() != part.dim():
        return False
    shrunk = [d for d in range(whole.dim()) if whole.shape[d] != part.shape[d]]
    if not shrunk:
        return _equal(whole, part, tolerance)
    if len(shrunk) > 1:
        return False
    rows = iter(whole.unbind(shrunk[0]))
    return all(any(_equal(a, b, tolerance) for a in rows) for b in part.unbind(shrunk[0]))


def _without(claimed: Claim, gone: Sequence[np.ndarray]) -> Stays:
    stays = np.ones(claimed.total, dtype=bool)
    for slots in gone:
        stays[slots] = False
    return stays


def _mask(claimed: Claim, labels: Sequence[np.ndarray]) -> np.ndarray:
    mask = np.zeros(claimed.total, dtype=bool)
    for label in labels:
        mask[label] = True
    mask[FROZEN] = False
    return mask


def _equal(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = float(a.nan_to_num().abs().max()) if a.numel() else 1.0
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * scale, equal_nan=True)


def _difference(a: torch.Tensor, b: torch.Tensor) -> str:
    if a.shape != b.shape:
        return f"shape {tuple(b.shape)}, expected {tuple(a.shape)}"
    return f"largest difference {float((a.to(torch.float64) - b.to(torch.float64)).abs().max()):.2g}"
