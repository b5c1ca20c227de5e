"""The report of an allocation: FLOPs, certificate, blocks and branches, channels before and after."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import nn

from allocator.disk import PathLike
from allocator.errors import AllocatorWarning
from allocator.graph.channel_graph import ChannelGraph
from allocator.reporting.collect import summarise
from allocator.reporting.curve import pareto
from allocator.reporting.facts import Summary
from allocator.reporting.render import format_of, write
from allocator.reporting.text import bar
from allocator.reporting.words import change, printable
from allocator.rewriting.allocation import Allocation
from allocator.rewriting.kept import kept_by
from allocator.scoring.registry import score
from allocator.verifying.certificate import Certificate


class Allocated(Protocol):
    """What a report needs of `allocator.Result`."""

    model: nn.Module
    allocation: Allocation
    certificate: Certificate
    graph: ChannelGraph
    flops_asked: float
    flops_before: int
    flops_after: int
    next_cost: int | None
    uncounted: dict[str, int]
    notes: list[str]
    timings: dict[str, float]


_SUMS = ("sum", "product")


class Report:
    """What an allocation did: print it with rich, take `to_dict()`, or write it to a file.

    Args:
        result: from `allocate`.
    """

    def __init__(self, result: Allocated) -> None:
        self.result = result

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form: FLOPs (fvcore's), parameters, blocks, certificate, notes, seconds per stage."""
        result, allocation = self.result, self.result.allocation
        before, after = self._parameters()
        return {
            "flops": {
                "asked": result.flops_asked,
                "before": result.flops_before,
                "after": result.flops_after,
                "next_neuron_costs": result.next_cost,
            },
            "parameters": {"before": before, "after": after},
            "policy": allocation.policy,
            "criterion": allocation.criterion,
            "scope": allocation.scope,
            "blocks": allocation.blocks,
            "certificate": result.certificate.to_dict(),
            "not_counted_by_fvcore": result.uncounted,
            "operators_without_a_rule": result.graph.unsupported,
            "share_of_channels_that_can_go": result.graph.share(),
            "notes": result.notes,
            "seconds": result.timings,
        }

    def summary(self, name: str | None = None, *, curve: bool = False) -> Summary:
        """The original network with what was kept of it, as the reports of `allocator-cli report` show it.

        Args:
            name: what to call the network; its class if left out.
            curve: also plan over the range of budgets, for the curve of budget against importance.
        """
        result = self.result
        graph, allocation = result.graph, result.allocation
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AllocatorWarning)  # said when it was allocated
            scores = score(graph, allocation.criterion)
        return summarise(
            graph,
            name or type(graph.model).__name__,
            scores=scores,
            allocation=allocation,
            kept=kept_by(graph, allocation),
            certificate=str(result.certificate),
            curve=pareto(graph, scores) if curve else (),
            uncounted=result.uncounted,
            notes=[note for note in result.notes if note not in graph.notes],
        )

    def save(self, path: PathLike, *, name: str | None = None) -> None:
        """Write the report in the format of the suffix: .html, .md, .csv, .json or .txt.

        Raises:
            UnknownNameError: the suffix stands for no format; names a near one.
            FileError: the path cannot be written.
            MissingPackageError: HTML needs the extra `report`.
        """
        format = format_of(path)
        write(self.summary(name, curve=format == "html"), path, format)

    def to_html(self, path: PathLike, *, name: str | None = None) -> None:
        """Write the report as one HTML page that opens offline, whatever the suffix; raises like `save`."""
        write(self.summary(name, curve=True), path, "html")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._head()
        shown = [block for block in self.result.allocation.blocks if self._shown(block)]
        if shown:
            yield _table(shown)
        hidden = len(self.result.allocation.blocks) - len(shown)
        if hidden:
            yield Text(f"{hidden} blocks without a change of their own are not shown", style="dim")
        yield from self._foot()

    def _parameters(self) -> tuple[int, int]:
        models = (self.result.graph.model, self.result.model)
        before, after = (sum(p.numel() for p in model.parameters()) for model in models)
        return before, after

    def _head(self) -> Iterator[Text]:
        result, allocation = self.result, self.result.allocation
        share = result.flops_after / result.flops_asked
        before, after = self._parameters()
        yield Text(
            f"{type(result.model).__name__}: {result.flops_before:,} FLOPs before, {result.flops_after:,} after "
            f"({result.flops_after / result.flops_before:.1%})",
            style="bold",
        )
        asked = f"asked {result.flops_asked:,.0f} FLOPs, achieved {share:.3%}"
        if result.next_cost is not None and share < 1:
            asked += f" (the cheapest further neuron costs {result.next_cost:,})"
        yield Text(asked)
        yield Text(f"{before:,} parameters before, {after:,} after")
        how = f"policy {allocation.policy}, criterion {allocation.criterion}, scope {allocation.scope}"
        yield Text(f"{how}; one FLOP is one multiply-add, as fvcore counts")
        ok = result.certificate.ok
        yield Text(f"certificate: {result.certificate}", style="green" if ok else "bold red")

    def _foot(self) -> Iterator[Text]:
        result = self.result
        if result.uncounted:
            listed = ", ".join(f"{name.removeprefix('aten::')} ({n})" for name, n in result.uncounted.items())
            yield Text(f"not counted by fvcore: {listed}")
        for operator, modules in result.graph.unsupported.items():
            yield Text(f"no rule for {operator}: what it touches stays, in {', '.join(modules[:4])}")
        for note in result.notes:
            yield Text(f"note: {note}")

    def _shown(self, block: dict[str, Any]) -> bool:
        changed = any(
            row["before"] != row["after"] or row["inner_before"] != row["inner_after"] for row in block["branches"]
        )
        if self.result.allocation.scope == "branches":
            return changed and block["kind"] not in _SUMS
        return changed


def _table(blocks: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column("block / branch", overflow="fold", ratio=1)
    for title in ("scale", "kernel"):
        table.add_column(title, no_wrap=True)
    for title in ("channels", "inside"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("kept", no_wrap=True)
    for block in blocks:
        rows = block["branches"]
        before, after = sum(r["before"] for r in rows), sum(r["after"] for r in rows)
        if block["kind"] in ("sum", "product", "stack"):
            before, after = rows[0]["before"], rows[0]["after"]
        heading = Text.assemble((printable(block["name"]), "bold"), f" ({block['kind']})")
        table.add_row(heading, "", "", change(before, after), "", "")
        for row in _condensed(block):
            name, size = Text(f"  {printable(row['name'])}"), "x".join(map(str, row["kernel"]))
            share = row["after"] / max(row["before"], 1)
            inner = change(row["inner_before"], row["inner_after"]) if row["inner_before"] else ""
            table.add_row(
                name, f"{row['scale']:g}", size, change(row["before"], row["after"]), inner,
                Text.assemble(bar(row["after"], row["before"]), f" {share:4.0%}"),
            )  # fmt: skip
    return table


def _condensed(block: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups of a convolution in one row."""
    rows = block["branches"]
    if block["kind"] != "groups":
        return list(rows)
    kept = [row for row in rows if row["after"]]
    first = rows[0]
    return [
        {
            **first,
            "name": f"{len(kept)} of {len(rows)} groups",
            "before": sum(row["before"] for row in rows),
            "after": sum(row["after"] for row in rows),
        }
    ]
