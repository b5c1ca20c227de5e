"""What is shown of the values that stages return, wherever they are printed: registered for their classes."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from allocator.errors import plural
from allocator.graph.blocks import Block
from allocator.graph.channel_graph import ChannelGraph
from allocator.reporting.collect import summarise
from allocator.reporting.facts import BlockChange, BranchChange
from allocator.reporting.outcome_text import changes_table
from allocator.reporting.terminal import heading, table_without_lines
from allocator.reporting.text import SummaryText
from allocator.reporting.words import cost_of, percent, printable, share_of, size, spread
from allocator.rewriting.allocation import Allocation
from allocator.shown import form

_UNKNOWN = {"scale": 1.0, "stride": 1.0, "inner_before": 0, "inner_after": 0}


@form.register
def _(graph: ChannelGraph) -> RenderableType:
    """The report of the network, without a budget."""
    return SummaryText(summarise(graph, type(graph.model).__name__))


@form.register
def _(block: Block) -> RenderableType:
    """Its branches side by side."""
    table = table_without_lines()
    table.add_column(heading(block.name, f" ({block.kind}, {plural(block.channels, 'channel')})"))
    columns = ("scale", "kernel", "stride", "field", "channels", "inside", "FLOPs", "|γ|")
    for title in columns:
        table.add_column(title, justify="left" if title in ("kernel", "field") else "right", no_wrap=True)
    for branch in block.branches:
        kernel, seen = size(branch.kernel), size(branch.receptive_field)
        counts = (f"{branch.channels:,}", f"{branch.inner:,}" if branch.inner else "", f"{branch.flops:,}")
        numbers = (f"{branch.scale:g}", kernel, f"{branch.stride:g}", seen, *counts, spread(branch.gamma))
        table.add_row(f"  {printable(branch.name)}", *numbers)
    return Group(table, Text(f"from {printable(block.entry)}", style="dim"))


@form.register
def _(allocation: Allocation) -> RenderableType:
    """What it costs and how it was made, and what it leaves of each block's branches."""
    lines: list[RenderableType] = [Text(_cost(name, cost)) for name, cost in allocation.costs.items()]
    how = f"policy {allocation.policy}, criterion {allocation.criterion}, scope {allocation.scope}"
    lines.append(Text(f"{how}; {plural(len(allocation.kept), 'tensor')} change"))
    table = _blocks(allocation)
    return Group(*lines, table) if table is not None else Group(*lines)


def _cost(metric: str, cost: dict[str, Any]) -> str:
    before, after = cost["before"], cost["after"]
    line = f"{cost_of(metric, before)} before, {cost_of(metric, after)} after ({percent(share_of(after, before))})"
    return line if cost.get("asked") is None else f"{line}, {cost_of(metric, cost['asked'])} asked"


def _blocks(allocation: Allocation) -> Table | None:
    """The blocks of which anything went; a file of an earlier format says less of a branch."""
    blocks = []
    for block in allocation.blocks:
        branches = []
        for row in block["branches"]:
            known = {**_UNKNOWN, **row, "kernel": tuple(row.get("kernel", ()))}
            branches.append(BranchChange(**known))
        if any(branch.is_changed for branch in branches):
            blocks.append(BlockChange(block["name"], block["kind"], tuple(branches)))
    return changes_table(blocks) if blocks else None
