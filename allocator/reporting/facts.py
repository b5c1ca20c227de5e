"""What a report says, as plain data: every renderer reads this and nothing else."""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass, field
from typing import Any

from allocator.cost.latency import Latency
from allocator.planning.optimality import Optimality
from allocator.verifying.certificate import Certificate

FORMAT = 1
"""Version of the JSON form; `report.schema.json` describes it."""

SHARED = ("sum", "product", "stack")
"""Kinds of blocks whose branches bring the same channels, so that they don't add up."""


@dataclass(frozen=True)
class Totals:
    """What a network costs for its inputs.

    Attributes:
        flops: as fvcore counts them; one FLOP is one multiply-add.
        parameters: numbers in its parameters.
        activations: numbers that its convolutions and products write, as fvcore counts them.
    """

    flops: int
    parameters: int
    activations: int


@dataclass(frozen=True)
class Cost:
    """One of a network's totals, and what a budget leaves of it; None without a budget."""

    name: str
    before: int
    after: int | None


@dataclass(frozen=True)
class BranchFacts:
    """One branch; see `allocator.Branch` for what is not explained here.

    Attributes:
        kept, inner_kept: channels and inside channels that a budget leaves; None without a budget.
        own_flops, own_flops_kept: FLOPs of its calls that are in no block within it, before and after.
        share: of the network's FLOPs, that `own_flops` are.
        before: channels in the network that this one was allocated from, where that is known.
    """

    name: str
    channels: int
    kept: int | None
    inner: int
    inner_kept: int | None
    scale: float
    stride: float
    kernel: tuple[int, ...]
    kernels: tuple[tuple[int, ...], ...]
    dilation: int
    receptive_field: tuple[int, ...]
    flops: int
    own_flops: int
    own_flops_kept: int | None
    share: float
    gamma: tuple[float, float, float] | None
    before: int | None = None


@dataclass(frozen=True)
class Histogram:
    """Scores of a block's neurons in bins of equal width.

    Attributes:
        low, high: where the first bin begins and the last one ends.
        kept, dropped: neurons per bin.
        cut: all neurons that score more than this are kept; None where none is dropped.
    """

    low: float
    high: float
    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    cut: float | None


@dataclass(frozen=True)
class BlockFacts:
    """One aggregation block.

    Attributes:
        name, kind, channels, entry: as in `allocator.Block`.
        kept: channels of the aggregated tensor that a budget leaves; None without a budget.
        flops, flops_kept: of its branches' own calls, before and after.
        share: of the network's FLOPs, that `flops` are.
        parent: (block, branch) that it lies in, as indices; None at the top.
        branches: its paths.
        scores: of its neurons, None where nothing in it has one.
    """

    name: str
    kind: str
    channels: int
    kept: int | None
    entry: str
    flops: int
    flops_kept: int | None
    share: float
    parent: tuple[int, int] | None
    branches: tuple[BranchFacts, ...]
    scores: Histogram | None


@dataclass(frozen=True)
class Layer:
    """A call worth drawing: what it is, where, the channels it gives and its FLOPs, before and after."""

    name: str
    what: str
    channels: int
    kept: int
    flops: int = 0
    flops_kept: int = 0


@dataclass(frozen=True)
class Fixed:
    """Channels that must stay, for one reason."""

    reason: str
    channels: int
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Budget:
    """What a budget would leave, or left.

    Attributes:
        asked: the budget in FLOPs.
        totals: of what is left.
        policy, criterion, scope: how it was chosen.
        neurons: how many stay.
        importance: share of all scores that the kept neurons have; None without scores.
        bound: share of all scores that no plan under this budget exceeds; None where none is known.
        gap: by how much a better plan could exceed this one, as a share of the bound.
        certificate: verdict on the rewritten model; None where there is only a plan.
        recovery: what was done to make it accurate again, in words; None where nothing was.
        latency: of the rewritten model, where it was measured.
    """

    asked: float
    totals: Totals
    policy: str
    criterion: str
    scope: str
    neurons: int
    importance: float | None
    bound: float | None = None
    gap: float | None = None
    certificate: str | None = None
    recovery: str | None = None
    latency: Latency | None = None


@dataclass(frozen=True)
class Point:
    """One plan on the curve of budget against importance kept; shares are of the whole network."""

    policy: str
    flops: float
    importance: float


@dataclass(frozen=True)
class Summary:
    """A network as a report shows it.

    Attributes:
        model: what it is called.
        kind: name of its class.
        inputs: shapes that all figures hold for.
        totals: of the network as it is.
        neurons: how many can be removed.
        written: channels that its layers write.
        free: how many of those can be removed.
        fixed: why the others stay; the counts add up to `written - free`.
        criterion: what `reachable`, `scores` and the curve rank by; None where nothing can be ranked.
        reachable: per scope the smallest FLOPs that a plan can have.
        blocks: in the order of their aggregation.
        outside, outside_kept: FLOPs of calls in no block, before and after.
        budget: what a budget leaves; None where none was given.
        curve: plans over the range of budgets, where they were asked for.
        unsupported: operators without a rule, with the modules that call them.
        uncounted: operators that fvcore does not count, where that is known.
        assumptions: what was inferred because the caller left it out.
        notes: further remarks.
        latency: where it was measured.
        layers: calls worth drawing, as they run.
        lanes: per (block, branch), and (-1, -1) for what is in no block: layers (as `Layer`) and the indices
            of the blocks within, in the order that they run.
    """

    model: str
    kind: str
    inputs: tuple[tuple[int, ...], ...]
    totals: Totals
    neurons: int
    written: int
    free: int
    fixed: tuple[Fixed, ...]
    criterion: str | None
    reachable: dict[str, int]
    blocks: tuple[BlockFacts, ...]
    outside: int
    outside_kept: int | None
    budget: Budget | None
    curve: tuple[Point, ...]
    unsupported: dict[str, list[str]]
    uncounted: dict[str, int]
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]
    latency: Latency | None = None
    layers: tuple[Layer, ...] = ()
    lanes: dict[tuple[int, int], list[Layer | int]] = field(repr=False, compare=False, default_factory=dict)

    @property
    def latency_kept(self) -> Latency | None:
        """Of what the budget leaves, where it was measured."""
        return None if self.budget is None else self.budget.latency

    @property
    def outside_share(self) -> float:
        """Of the network's FLOPs, that calls in no block have."""
        return self.outside / max(self.totals.flops, 1)

    def costs(self) -> tuple[Cost, ...]:
        """Its FLOPs, parameters and activations."""
        after: tuple[int | None, ...] = (None, None, None)
        if self.budget is not None:
            after = astuple(self.budget.totals)
        return tuple(map(Cost, ("FLOPs", "parameters", "activations"), astuple(self.totals), after))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, that `allocator/reporting/report.schema.json` describes.

        FLOPs are fvcore's, shares are of the network's FLOPs, γ is (mean, min, max).
        """
        facts = asdict(self)
        del facts["lanes"], facts["outside"], facts["outside_kept"], facts["totals"]
        facts["blocks"] = [self._block(block) for block in self.blocks]
        facts |= asdict(self.totals)
        facts["outside_blocks"] = {
            "flops": self.outside,
            "flops_kept": self.outside_kept,
            "share": self.outside_share,
        }
        return plain({"format": FORMAT, **facts})

    def _block(self, block: BlockFacts) -> dict[str, Any]:
        facts = asdict(block)
        if block.parent is not None:
            outer = self.blocks[block.parent[0]]
            facts["parent"] = {"block": outer.name, "branch": outer.branches[block.parent[1]].name}
        return facts


@dataclass(frozen=True)
class BranchChange:
    """One branch before and after an allocation: its channels, and those of the layers inside it."""

    name: str
    before: int
    after: int
    kernel: tuple[int, ...]
    scale: float
    stride: float
    inner_before: int
    inner_after: int

    @property
    def is_changed(self) -> bool:
        """Whether any of its channels went."""
        return self.before != self.after or self.inner_before != self.inner_after


@dataclass(frozen=True)
class BlockChange:
    """One aggregation block before and after an allocation."""

    name: str
    kind: str
    branches: tuple[BranchChange, ...]


@dataclass(frozen=True)
class Limited:
    """A metric that a budget limited.

    Attributes:
        metric: its name.
        asked: the budget, in the metric's own unit.
        before, after: the metric of the network and of what is left of it.
        next_cost: what the cheapest further neuron costs of it; None where none could be added.
    """

    metric: str
    asked: float
    before: int
    after: int
    next_cost: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What an allocation did to a network.

    Attributes:
        model: name of the network's class.
        budgets: what was asked, and what it limits before and after, the first named first.
        flops_before, flops_after: as fvcore counts.
        next_cost: of the first budget, what the cheapest further neuron costs; None where none could be added.
        parameters_before, parameters_after: numbers in the parameters.
        policy, criterion, scope: how the neurons were chosen.
        optimality: the importance that is kept, and what no plan exceeds; None where nothing was chosen by scores.
        blocks: in the order of their aggregation.
        certificate: what was checked.
        recovery: what was done to make it accurate again, in words; None where nothing was.
        uncounted: operators that fvcore does not count, with the number of their calls.
        unsupported: operators without a rule, with the modules that call them.
        free_share: of the channels that layers write, those that can go.
        notes: what was assumed, set or frozen on the way.
        seconds: per stage.
    """

    model: str
    budgets: tuple[Limited, ...]
    flops_before: int
    flops_after: int
    next_cost: int | None
    parameters_before: int
    parameters_after: int
    policy: str
    criterion: str
    scope: str
    optimality: Optimality | None
    blocks: tuple[BlockChange, ...]
    certificate: Certificate
    recovery: str | None
    uncounted: dict[str, int]
    unsupported: dict[str, list[str]]
    free_share: float
    notes: tuple[str, ...]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, that `allocator/reporting/allocate.schema.json` describes."""
        return {
            "flops": {"before": self.flops_before, "after": self.flops_after},
            "budgets": [asdict(budget) for budget in self.budgets],
            "next_neuron_costs": self.next_cost,
            "parameters": {"before": self.parameters_before, "after": self.parameters_after},
            "policy": self.policy,
            "criterion": self.criterion,
            "scope": self.scope,
            "importance": None if self.optimality is None else self.optimality.importance,
            "bound": None if self.optimality is None else self.optimality.bound,
            "gap": None if self.optimality is None else self.optimality.gap,
            "blocks": plain([asdict(block) for block in self.blocks]),
            "certificate": self.certificate.to_dict(),
            "not_counted_by_fvcore": dict(self.uncounted),
            "operators_without_a_rule": plain(self.unsupported),
            "share_of_channels_that_can_go": self.free_share,
            "notes": list(self.notes),
            "seconds": dict(self.seconds),
        }


def plain(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
