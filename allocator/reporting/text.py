"""A summary for a terminal of any width."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from allocator.errors import plural
from allocator.reporting.facts import BlockFacts, BranchFacts, Budget, Fixed, Histogram, Summary
from allocator.reporting.rows import LIMIT, condensed, select
from allocator.reporting.terminal import bar, heading, table_without_lines
from allocator.reporting.words import change, counted, percent, printable, share_of, short, size, spread, timed

NARROW = 60
_LONGEST_NAME = 44
_GAP = 2
_MOST_MODULES = 3
_LEVELS = " ▁▂▃▄▅▆▇█"


class SummaryText:
    """Print it with rich: a table of as many columns as there is room for; a list where there are under 60.

    Args:
        summary: what to show.
        limit: how many blocks at most; None for all.
    """

    def __init__(self, summary: Summary, limit: int | None = LIMIT) -> None:
        self.summary = summary
        self.selection = select(summary, limit)
        self.rows = [(block, condensed(block)) for block in self.selection.blocks]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        is_narrow = options.max_width < NARROW
        yield from self._head()
        yield self._totals_list() if is_narrow else self._totals_table()
        yield from self._remarks_above()
        if self.summary.blocks:
            yield Text()
            if is_narrow:
                yield from self._block_list()
            else:
                yield self._block_table(options.max_width)
        yield from self._foot()

    def _head(self) -> Iterator[Text]:
        summary = self.summary
        inputs = ", ".join(size(shape) for shape in summary.inputs)
        yield Text.assemble((printable(summary.model), "bold"), f": {summary.kind}, input {inputs}")

    # Totals ---------------------------------------------------------------------------------------

    def _totals_list(self) -> Text:
        lines = []
        for cost in self.summary.costs():
            line = f"{cost.name} {short(cost.before)}"
            if cost.after is not None:
                line += f" → {short(cost.after)}"
            lines.append(line)
        return Text("\n".join(lines))

    def _totals_table(self) -> Table:
        is_planned = self.summary.budget is not None
        table = table_without_lines(header=is_planned)
        table.add_column("")
        table.add_column("now", justify="right")
        table.add_column("", no_wrap=True)
        if is_planned:
            table.add_column("kept", justify="right")
            table.add_column("", justify="right")
        for cost in self.summary.costs():
            cells = [cost.name, f"{cost.before:,}", short(cost.before)]
            if cost.after is not None:
                cells += [f"{cost.after:,}", percent(share_of(cost.after, cost.before))]
            elif cost.name == "FLOPs":
                cells[-1] += " (one is one multiply-add)"
            table.add_row(*cells)
        return table

    def _remarks_above(self) -> Iterator[Text]:
        summary, budget = self.summary, self.summary.budget
        branches = sum(len(block.branches) for block in summary.blocks)
        counts = [plural(summary.neurons, "neuron"), plural(len(summary.blocks), "block"), plural(branches, "branch")]
        ranked = f"; ranked by {summary.criterion}" if summary.criterion else ""
        yield Text(", ".join(counts) + ranked)
        if summary.latency is not None:
            yield Text(f"latency {timed(summary.latency, summary.latency_kept)}")
        if budget is not None:
            yield from _budget(budget)
        elif summary.reachable:
            yield Text(f"a budget can go down to {self._reachable()} of its FLOPs, by scope")

    def _reachable(self) -> str:
        """The smallest shares of FLOPs that a budget can leave, where they are less than all."""
        whole = max(self.summary.totals.flops, 1)
        shares = [f"{percent(n / whole)} ({scope})" for scope, n in self.summary.reachable.items() if n < whole]
        return ", ".join(shares) or "nothing less than all"

    # Blocks ---------------------------------------------------------------------------------------

    def _block_table(self, width: int) -> Table:
        columns = self._columns(width)
        has_kinds = any(column.title == "kind" for column in columns)
        table = table_without_lines()
        table.add_column("block / branch", overflow="fold", ratio=1)
        for column in columns:
            table.add_column(column.title, justify="right" if column.is_right else "left", no_wrap=True)
        for block, branches in self.rows:
            kind = "" if has_kinds else f" ({block.kind})"
            table.add_row(heading(block.name, kind), *(column.block(block) for column in columns))
            for branch in branches:
                name = Padding(Text(printable(branch.name)), (0, 0, 0, 2))
                table.add_row(name, *(column.branch(branch) for column in columns))
        for title, share, flops in self._closing_rows():
            style = "bold" if title == "total" else "dim"
            cells = {"FLOPs": f"{flops:,}", "share": percent(share)}
            table.add_row(Text(title, style=style), *(cells.get(column.title, "") for column in columns))
        return table

    def _columns(self, width: int) -> list[_Column]:
        """Those that have something to say, taken by priority as long as there is room, in the order shown."""
        room = width - min(self._longest_name(), _LONGEST_NAME)
        chosen = []
        for column in sorted(_COLUMNS, key=lambda column: column.priority):
            if column.is_planned and self.summary.budget is None:
                continue
            needed = self._width(column)
            if 0 < needed <= room:
                chosen.append(column)
                room -= needed
        return [column for column in _COLUMNS if column in chosen]

    def _longest_name(self) -> int:
        longest = max(len(title) for title, _, _ in self._closing_rows())
        for block, branches in self.rows:
            longest = max(longest, len(block.name) + len(block.kind) + 3, *(len(row.name) + 2 for row in branches))
        return longest

    def _width(self, column: _Column) -> int:
        """What a column needs, with the gap before it; 0 where none of its cells says anything."""
        widest = 0
        for block, branches in self.rows:
            widest = max(widest, len(column.block(block)), *(len(column.branch(row)) for row in branches))
        if not widest:
            return 0
        if column.title == "share":
            widest = max(widest, len("100.0%"))
        elif column.title == "FLOPs":
            widest = max(widest, len(f"{self.summary.totals.flops:,}"))
        return max(widest, len(column.title)) + _GAP

    def _closing_rows(self) -> Iterator[tuple[str, float, int]]:
        """The rows that make the shares add up: (title, share, FLOPs)."""
        summary, selection = self.summary, self.selection
        if selection.hidden:
            flops = sum(block.flops for block in summary.blocks) - sum(block.flops for block in selection.blocks)
            yield f"{plural(selection.hidden, 'lighter block')}, not shown", selection.share, flops
        yield "outside blocks", summary.outside_share, summary.outside
        yield "total", 1.0 if summary.totals.flops else 0.0, summary.totals.flops

    def _block_list(self) -> Iterator[Text]:
        """For terminals too narrow for a table."""
        for block, branches in self.rows:
            yield Text.assemble((printable(block.name), "bold"), f" {block.kind}", overflow="fold")
            for branch in branches:
                facts = []
                if branch.scale != 1:
                    facts.append(f"scale {branch.scale:g}")
                if branch.kernel:
                    facts.append(size(branch.kernel))
                facts += [f"{change(branch.channels, branch.kept)} ch", percent(branch.share)]
                yield Text(f" {printable(branch.name)}", overflow="fold")
                yield Text(f"  {' '.join(facts)}", overflow="fold")
        for title, share, _ in self._closing_rows():
            yield Text(f"{title}: {percent(share)}")

    # Below ----------------------------------------------------------------------------------------

    def _foot(self) -> Iterator[Text]:
        summary = self.summary
        if summary.fixed:
            fixed = summary.written - summary.free
            yield Text(f"{fixed:,} of {plural(summary.written, 'written channel')} must stay:")
            for reason in summary.fixed:
                yield Text(f"  {reason.channels:,}: {reason.reason}{_where(reason)}")
        for operator, modules in summary.unsupported.items():
            yield Text(f"not followed: {operator} in {', '.join(map(printable, modules))}; what it touches stays")
        if summary.uncounted:
            yield Text(f"not counted by fvcore: {counted(summary.uncounted)}")
        for assumption in summary.assumptions:
            yield Text(f"assumed: {assumption}")
        for note in summary.notes:
            yield Text(f"note: {printable(note)}")


def _budget(budget: Budget) -> Iterator[Text]:
    line = (
        f"kept under a budget of {budget.asked:,.0f} FLOPs ({share_of(budget.totals.flops, budget.asked):.3%} used): "
        f"policy {budget.policy}, criterion {budget.criterion}, scope {budget.scope}; "
        f"{plural(budget.neurons, 'neuron')} stay"
    )
    if budget.importance is not None:
        line += f", with {percent(budget.importance)} of all scores"
    yield Text(line)
    if budget.importance is not None:
        bound = "no bound is known for other plans"
        if budget.bound is not None and budget.gap is not None:
            bound = f"no plan keeps more than {budget.bound:.3%} of all scores: gap {budget.gap:.2%}"
        yield Text(bound)
    if budget.certificate:
        yield Text(f"certificate: {budget.certificate}")
    if budget.recovery:
        yield Text(f"recovered: {budget.recovery}")


def _where(fixed: Fixed) -> str:
    """The modules that channels are fixed at, such as " (at conv1, conv2, conv3 and 5 more)"."""
    if not fixed.modules:
        return ""
    named = ", ".join(map(printable, fixed.modules[:_MOST_MODULES]))
    more = len(fixed.modules) - _MOST_MODULES
    return f" (at {named} and {more} more)" if more > 0 else f" (at {named})"


# Columns ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """A column: what a branch's and a block's cell say.

    Attributes:
        title: its heading.
        priority: the higher, the sooner it is left out where there is little room.
        branch, block: what its cells say.
        is_right: aligned to the right.
        is_planned: shown with a budget alone.
    """

    title: str
    priority: int
    branch: Callable[[BranchFacts], str | Text]
    block: Callable[[BlockFacts], str | Text] = lambda _: ""
    is_right: bool = False
    is_planned: bool = False


def sparkline(histogram: Histogram | None) -> str:
    """Twelve bars, from the lowest score to the highest."""
    if histogram is None:
        return ""
    counts = [kept + dropped for kept, dropped in zip(histogram.kept, histogram.dropped, strict=True)]
    pairs = [sum(counts[i : i + 2]) for i in range(0, len(counts), 2)]
    highest = max(*pairs, 1)
    steps = len(_LEVELS) - 1
    return "".join(_LEVELS[-(-count * steps // highest)] for count in pairs)  # rounded up: one neuron shows


def _was(branch: BranchFacts) -> str:
    return "" if branch.before is None else str(branch.before)


def _inside(branch: BranchFacts) -> str:
    return change(branch.inner, branch.inner_kept) if branch.inner else ""


def _mean_gamma(branch: BranchFacts) -> str:
    return "" if branch.gamma is None else f"{branch.gamma[0]:.2g}"


def _share_kept(facts: BranchFacts | BlockFacts) -> str:
    return percent(share_of(facts.kept or 0, facts.channels), 0)


def _channels(facts: BranchFacts | BlockFacts) -> str:
    return change(facts.channels, facts.kept)


def _share(facts: BranchFacts | BlockFacts) -> str:
    return percent(facts.share)


_COLUMNS = (
    _Column("kind", 8, lambda _: "", lambda block: block.kind),
    _Column("scale", 3, lambda branch: f"{branch.scale:g}"),
    _Column("kernel", 4, lambda branch: size(branch.kernel)),
    _Column("stride", 11, lambda branch: f"{branch.stride:g}"),
    _Column("field", 12, lambda branch: size(branch.receptive_field)),
    _Column("was", 2, _was, is_right=True),
    _Column("channels", 0, _channels, _channels, is_right=True),
    _Column("inside", 6, _inside, is_right=True),
    _Column("FLOPs", 7, lambda branch: f"{branch.own_flops:,}", lambda block: f"{block.flops:,}", is_right=True),
    _Column("share", 1, _share, _share, is_right=True),
    _Column("|γ|", 5, lambda branch: spread(branch.gamma), is_right=True),
    _Column("mean", 10, _mean_gamma, is_right=True),
    _Column("spread", 13, lambda _: "", lambda block: sparkline(block.scores)),
    _Column("kept", 2, _share_kept, _share_kept, is_right=True, is_planned=True),
    _Column("", 9, lambda branch: bar(branch.kept or 0, branch.channels), is_planned=True),
)
