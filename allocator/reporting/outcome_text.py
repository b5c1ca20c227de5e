"""What an allocation did, for a terminal: FLOPs, certificate, blocks and branches, channels before and after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from allocator.errors import plural
from allocator.reporting.facts import SHARED, BlockChange, BranchChange, Limited, Outcome
from allocator.reporting.terminal import bar, heading, table_without_lines
from allocator.reporting.words import change, cost_of, counted, printable, share_of, size
from allocator.scoring.registry import CRITERIA

_RESIDUAL = ("sum", "product")
_MOST_MODULES = 4


class OutcomeText:
    """Print it with rich: the figures, and a table of the blocks that changed."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._head()
        changed = [block for block in self.outcome.blocks if self._is_shown(block)]
        if changed:
            yield changes_table(changed)
        hidden = len(self.outcome.blocks) - len(changed)
        if hidden:
            own, shown = ("its own", "is") if hidden == 1 else ("their own", "are")
            yield Text(f"{plural(hidden, 'block')} without a change of {own} {shown} not shown", style="dim")
        yield from self._foot()

    def _head(self) -> Iterator[Text]:
        outcome = self.outcome
        yield Text(
            f"{outcome.model}: {outcome.flops_before:,} FLOPs before, {outcome.flops_after:,} after "
            f"({outcome.flops_after / outcome.flops_before:.1%})",
            style="bold",
        )
        for budget in outcome.budgets:
            yield Text(_asked(budget))
        yield Text(f"{outcome.parameters_before:,} parameters before, {outcome.parameters_after:,} after")
        how = f"policy {outcome.policy}, criterion {outcome.criterion}, scope {outcome.scope}"
        yield Text(f"{how}; one FLOP is one multiply-add, as fvcore counts")
        if outcome.optimality is not None:
            yield Text(f"{outcome.optimality}{_about_gap(outcome) if outcome.optimality.gap else ''}")
        style = "green" if outcome.certificate.ok else "bold red"
        yield Text(f"certificate: {outcome.certificate}", style=style)
        if outcome.recovery is not None:
            yield Text(f"recovered: {outcome.recovery}")

    def _foot(self) -> Iterator[Text]:
        outcome = self.outcome
        if outcome.uncounted:
            yield Text(f"not counted by fvcore: {counted(outcome.uncounted)}")
        for operator, modules in outcome.unsupported.items():
            where = ", ".join(modules[:_MOST_MODULES])
            yield Text(f"no rule for {operator}: what it touches stays, in {where}")
        for note in outcome.notes:
            yield Text(f"note: {note}")

    def _is_shown(self, block: BlockChange) -> bool:
        # Under this scope residual streams stay whole. What changes in their branches belongs to the blocks within,
        # which have rows of their own.
        if self.outcome.scope == "branches" and block.kind in _RESIDUAL:
            return False
        return any(branch.is_changed for branch in block.branches)


def _about_gap(outcome: Outcome) -> str:
    """What a gap means: less than could be, or no more than another order of the same neurons."""
    if outcome.policy == "priced":
        return ""
    declared = CRITERIA.get(outcome.criterion)
    if declared is not None and not declared.additive:
        return f"; {outcome.criterion} ranks neurons, and its sum is no loss"
    return "; policy 'priced' keeps the most"


def _asked(budget: Limited) -> str:
    """What a budget asked for and how much of it is used."""
    used = budget.after / budget.asked
    line = f"asked {cost_of(budget.metric, budget.asked)}, achieved {used:.3%}"
    if budget.next_cost is not None and used < 1:
        is_time = budget.metric == "latency"
        cost = cost_of(budget.metric, budget.next_cost) if is_time else f"{budget.next_cost:,}"
        line += f" (the cheapest further neuron costs {cost})"
    return line


def changes_table(blocks: Sequence[BlockChange]) -> Table:
    """Blocks and branches, with their channels before and after."""
    table = table_without_lines()
    table.add_column("block / branch", overflow="fold", ratio=1)
    table.add_column("scale", no_wrap=True)
    table.add_column("kernel", no_wrap=True)
    table.add_column("channels", justify="right", no_wrap=True)
    table.add_column("inside", justify="right", no_wrap=True)
    # In a wider network bars are as long as its widest branch's.
    most = max(
        (branch.after / branch.before for block in blocks for branch in _rows(block) if branch.before), default=1
    )
    table.add_column("kept" if most <= 1 else "width", no_wrap=True)
    for block in blocks:
        table.add_row(heading(block.name, f" ({block.kind})"), "", "", _block_channels(block), "", "")
        for branch in _rows(block):
            table.add_row(*_cells(branch, max(most, 1)))
    return table


def _block_channels(block: BlockChange) -> str:
    """Channels of the aggregated tensor, before and after."""
    branches = block.branches[:1] if block.kind in SHARED else block.branches
    return change(sum(branch.before for branch in branches), sum(branch.after for branch in branches))


def _cells(branch: BranchChange, most: float) -> tuple[Text, str, str, str, str, Text]:
    inside = ""
    if branch.inner_before:
        inside = change(branch.inner_before, branch.inner_after)
    kept = Text.assemble(bar(branch.after, branch.before * most), f" {share_of(branch.after, branch.before):4.0%}")
    channels = change(branch.before, branch.after)
    return Text(f"  {printable(branch.name)}"), f"{branch.scale:g}", size(branch.kernel), channels, inside, kept


def _rows(block: BlockChange) -> Sequence[BranchChange]:
    """The branches; the groups of a convolution, which are alike, in one row."""
    if block.kind != "groups":
        return block.branches
    left = sum(1 for branch in block.branches if branch.after)
    together = replace(
        block.branches[0],
        name=f"{left} of {len(block.branches)} groups",
        before=sum(branch.before for branch in block.branches),
        after=sum(branch.after for branch in block.branches),
    )
    return (together,)
