"""What an allocation gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from rich.console import Console, ConsoleOptions, RenderResult
from torch import nn

from allocator.graph.channel_graph import ChannelGraph
from allocator.planning.optimality import Optimality
from allocator.planning.plan import Plan
from allocator.recovering.record import Recovery
from allocator.reporting.result_report import Report
from allocator.rewriting.allocation import Allocation
from allocator.shown import Shown
from allocator.verifying.certificate import Certificate


@dataclass(repr=False)
class Result(Shown):
    """What `allocate` gives.

    Attributes:
        model: the smaller network; same classes, same parameter names. Where a wrapper was given (Ultralytics' `YOLO`),
            one like it around the smaller network.
        allocation: which neurons it kept, as data.
        certificate: proof that it is the original minus the others.
        graph: the original's neurons and blocks.
        plan: the choice among them.
        flops_asked, flops_before, flops_after: FLOPs as fvcore counts them.
        next_cost: what the cheapest further neuron costs of the first budget, None if none could be added.
        uncounted: operators that fvcore does not count, with the number of their calls.
        notes: what was assumed, set or frozen on the way.
        timings: seconds per stage.
        recovery: what `recover` did to the model's weights; None where they are the original's.
    """

    model: nn.Module
    allocation: Allocation
    certificate: Certificate
    graph: ChannelGraph
    plan: Plan
    flops_asked: float
    flops_before: int
    flops_after: int
    next_cost: int | None
    uncounted: dict[str, int]
    notes: list[str]
    timings: dict[str, float] = field(default_factory=dict)
    recovery: Recovery | None = None

    def __repr__(self) -> str:
        name, left = type(self.graph.model).__name__, self.flops_after / self.flops_before
        proof = "certificate passed" if self.certificate.ok else "certificate failed"
        return f"<Result: {name}, {self.flops_before:,} FLOPs before, {self.flops_after:,} after ({left:.1%}), {proof}>"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.report()

    @cached_property
    def optimality(self) -> Optimality | None:
        """The importance that is kept, and what no plan under these budgets and in this scope exceeds.

        None where nothing had to be chosen, or the scores have no positive sum. Takes up to a second on first use.
        """
        return self.plan.optimality()

    def report(self) -> Report:
        """A table of blocks and branches before and after: printable with rich, `to_dict()` for machines."""
        return Report(self)
