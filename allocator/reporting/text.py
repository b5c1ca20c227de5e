"""A summary for a terminal of any width."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from allocator.reporting.facts import BlockFacts, BranchFacts, Histogram, Summary
from allocator.reporting.rows import LIMIT, condensed, select
from allocator.reporting.words import change, percent, plural, printable, short, size, spread, timed

NARROW = 60
_LONGEST_NAME = 44
_GAP = 2
_BAR = 12
_LEVELS = " ▁▂▃▄▅▆▇█"


def bar(after: int, before: int) -> Text:
    """How much of something stays, drawn."""
    share = after / before if before else 0.0
    filled = round(share * _BAR)
    return Text.assemble(("━" * filled, "cyan"), ("─" * (_BAR - filled), "dim"))


class SummaryText:
    """Print it with rich: a table of as many columns as there is room for; a list where there are under 60.

    Args:
        summary: what to show.
        limit: how many blocks at most; None for all.
    """

    def __init__(self, summary: Summary, limit: int | None = LIMIT) -> None:
        self.summary = summary
        self.selection = select(summary, limit)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        yield from self._head()
        yield self._totals(width)
        yield from self._remarks_above()
        if self.summary.blocks:
            yield Text()
            yield from self._list() if width < NARROW else (self._table(width),)
        yield from self._foot()

    def _head(self) -> Iterator[Text]:
        summary = self.summary
        inputs = ", ".join(size(shape) for shape in summary.inputs)
        yield Text.assemble((printable(summary.model), "bold"), f": {summary.kind}, input {inputs}")

    def _totals(self, width: int) -> Table | Text:
        before = self.summary.totals
        after = self.summary.budget.totals if self.summary.budget else None
        unit = " (one is one multiply-add)" if width >= NARROW else ""
        rows = [
            ("FLOPs", before.flops, after.flops if after else None, unit),
            ("parameters", before.parameters, after.parameters if after else None, ""),
            ("activations", before.activations, after.activations if after else None, ""),
        ]
        if width < NARROW:
            lines = [f"{what} {short(n)}{'' if left is None else f' → {short(left)}'}" for what, n, left, _ in rows]
            return Text("\n".join(lines))
        table = Table(box=None, pad_edge=False, show_header=after is not None, header_style="bold", padding=(0, 1))
        table.add_column("")
        table.add_column("now", justify="right")
        table.add_column("", no_wrap=True)
        if after is not None:
            table.add_column("kept", justify="right")
            table.add_column("", justify="right")
        for what, n, left, said in rows:
            cells = [what, f"{n:,}", f"{short(n)}{said if after is None else ''}"]
            if left is not None:
                cells += [f"{left:,}", percent(left / n if n else 0.0)]
            table.add_row(*cells)
        return table

    def _remarks_above(self) -> Iterator[Text]:
        summary = self.summary
        branches = sum(len(block.branches) for block in summary.blocks)
        counts = [plural(summary.neurons, "neuron"), plural(len(summary.blocks), "block"), plural(branches, "branch")]
        yield Text(", ".join(counts) + (f"; ranked by {summary.criterion}" if summary.criterion else ""))
        budget = summary.budget
        if summary.latency is not None:
            yield Text(f"latency {timed(summary.latency, budget.latency if budget else None)}")
        if budget is not None:
            share = budget.totals.flops / budget.asked if budget.asked else 0.0
            yield Text(
                f"kept under a budget of {budget.asked:,.0f} FLOPs ({share:.3%} used): policy {budget.policy}, "
                f"criterion {budget.criterion}, scope {budget.scope}; {plural(budget.neurons, 'neuron')} stay"
                + ("" if budget.importance is None else f", with {percent(budget.importance)} of all scores")
            )
            if budget.certificate:
                yield Text(f"certificate: {budget.certificate}")
        elif summary.reachable:
            own = max(summary.totals.flops, 1)
            least = ", ".join(f"{percent(n / own)} ({scope})" for scope, n in summary.reachable.items() if n < own)
            yield Text(f"a budget can go down to {least or 'nothing less than all'} of its FLOPs, by scope")

    def _columns(self, width: int) -> list[_Column]:
        """Those that have something to say, taken by priority as long as there is room, in the order shown."""
        blocks = self.selection.blocks
        rows = [row for block in blocks for row in condensed(block)]
        planned = self.summary.budget is not None
        names = [len(block.name) + len(block.kind) + 3 for block in blocks] + [len(row.name) + 2 for row in rows]
        names += [len(what) for what, _, _ in self._rest()]
        whole = {"share": len("100.0%"), "FLOPs": len(f"{self.summary.totals.flops:,}")}
        left = width - min(max(names), _LONGEST_NAME)
        chosen = []
        for column in sorted(_COLUMNS, key=lambda column: column.priority):
            said = [len(column.block(block)) for block in blocks] + [len(column.branch(row)) for row in rows]
            needed = max(*said, len(column.title), whole.get(column.title, 0)) + _GAP
            if any(said) and (planned or not column.planned) and needed <= left:
                chosen.append(column)
                left -= needed
        return [column for column in _COLUMNS if column in chosen]

    def _table(self, width: int) -> Table:
        columns = self._columns(width)
        kinds = any(column.title == "kind" for column in columns)
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
        table.add_column("block / branch", overflow="fold", ratio=1)
        for column in columns:
            table.add_column(column.title, justify="right" if column.right else "left", no_wrap=True)
        for block in self.selection.blocks:
            kind = "" if kinds else f" ({block.kind})"
            heading = Text.assemble((printable(block.name), "bold"), kind)
            table.add_row(heading, *(column.block(block) for column in columns))
            for row in condensed(block):
                table.add_row(Padding(Text(printable(row.name)), (0, 0, 0, 2)), *(c.branch(row) for c in columns))
        for what, share, flops in self._rest():
            cells = {"FLOPs": f"{flops:,}" if flops is not None else "", "share": percent(share)}
            table.add_row(
                Text(what, style="bold" if what == "total" else "dim"), *(cells.get(c.title, "") for c in columns)
            )
        return table

    def _rest(self) -> Iterator[tuple[str, float, int | None]]:
        """The rows that make the shares add up: (what, share, FLOPs)."""
        summary, selection = self.summary, self.selection
        if selection.hidden:
            flops = sum(block.flops for block in summary.blocks) - sum(block.flops for block in selection.blocks)
            yield f"{plural(selection.hidden, 'lighter block')}, not shown", selection.share, flops
        whole = max(summary.totals.flops, 1)
        yield "outside blocks", summary.outside / whole, summary.outside
        yield "total", 1.0 if summary.totals.flops else 0.0, summary.totals.flops

    def _list(self) -> Iterator[Text]:
        """For terminals too narrow for a table."""
        for block in self.selection.blocks:
            yield Text.assemble((printable(block.name), "bold"), f" {block.kind}", overflow="fold")
            for row in condensed(block):
                facts = [f"{change(row.channels, row.kept)} ch", percent(row.share)]
                if row.kernel:
                    facts.insert(0, size(row.kernel))
                if row.scale != 1:
                    facts.insert(0, f"scale {row.scale:g}")
                yield Text(f" {printable(row.name)}", overflow="fold")
                yield Text(f"  {' '.join(facts)}", overflow="fold")
        for what, share, _ in self._rest():
            yield Text(f"{what}: {percent(share)}")

    def _foot(self) -> Iterator[Text]:
        summary = self.summary
        if summary.fixed:
            stay = summary.written - summary.free
            yield Text(f"{stay:,} of {plural(summary.written, 'written channel')} must stay:")
            for each in summary.fixed:
                where = ", ".join(map(printable, each.modules[:3]))
                more = f" and {len(each.modules) - 3} more" if len(each.modules) > 3 else ""
                yield Text(f"  {each.channels:,}: {each.reason}{f' (at {where}{more})' if where else ''}")
        for operator, modules in summary.unsupported.items():
            yield Text(f"not followed: {operator} in {', '.join(map(printable, modules))}; what it touches stays")
        if summary.uncounted:
            listed = ", ".join(f"{name.removeprefix('aten::')} ({n})" for name, n in summary.uncounted.items())
            yield Text(f"not counted by fvcore: {listed}")
        for assumption in summary.assumptions:
            yield Text(f"assumed: {assumption}")
        for note in summary.notes:
            yield Text(f"note: {printable(note)}")


def sparkline(histogram: Histogram | None) -> str:
    """Twelve bars, from the lowest score to the highest."""
    if histogram is None:
        return ""
    counts = [a + b for a, b in zip(histogram.kept, histogram.dropped, strict=True)]
    pairs = [sum(counts[i : i + 2]) for i in range(0, len(counts), 2)]
    most = max(max(pairs), 1)
    return "".join(_LEVELS[-(-n * (len(_LEVELS) - 1) // most)] for n in pairs)


@dataclass(frozen=True)
class _Column:
    """A column: what a branch's and a block's cell say; the lower its priority, the later it is left out."""

    title: str
    priority: int
    branch: Callable[[BranchFacts], str | Text]
    block: Callable[[BlockFacts], str | Text] = lambda _: ""
    right: bool = False
    planned: bool = False


def _kept(after: int | None, before: int) -> str:
    return percent((after or 0) / before if before else 0.0, 0)


def _branch_gamma(branch: BranchFacts) -> str:
    return "" if branch.gamma is None else f"{branch.gamma[0]:.2g}"


_COLUMNS = (
    _Column("kind", 8, lambda _: "", lambda block: block.kind),
    _Column("scale", 3, lambda row: f"{row.scale:g}"),
    _Column("kernel", 4, lambda row: size(row.kernel)),
    _Column("stride", 11, lambda row: f"{row.stride:g}"),
    _Column("field", 12, lambda row: size(row.receptive_field)),
    _Column("was", 2, lambda row: "" if row.before is None else str(row.before), right=True),
    _Column(
        "channels", 0, lambda row: change(row.channels, row.kept), lambda b: change(b.channels, b.kept), right=True
    ),
    _Column("inside", 6, lambda row: change(row.inner, row.inner_kept) if row.inner else "", right=True),
    _Column("FLOPs", 7, lambda row: f"{row.own_flops:,}", lambda block: f"{block.flops:,}", right=True),
    _Column("share", 1, lambda row: percent(row.share), lambda block: percent(block.share), right=True),
    _Column("|γ|", 5, lambda row: spread(row.gamma), right=True),
    _Column("mean", 10, _branch_gamma, right=True),
    _Column("spread", 13, lambda _: "", lambda block: sparkline(block.scores)),
    _Column("kept", 2, lambda row: _kept(row.kept, row.channels), lambda b: _kept(b.kept, b.channels), True, True),
    _Column("", 9, lambda row: bar(row.kept or 0, row.channels), planned=True),
)
