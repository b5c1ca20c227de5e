"""What each layer is, gives and costs, before and after; also of layers that lie in no branch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from allocator.flow.flow import Flow
from allocator.graph.blocks import is_convolution
from allocator.graph.channel_graph import ChannelGraph
from allocator.reporting.facts import Layer
from allocator.reporting.terminal import table_without_lines
from allocator.reporting.words import change, percent, printable, share_of, size
from allocator.shown import Shown
from allocator.tracing.calls import Op


def layers_of(graph: ChannelGraph, kept: np.ndarray) -> Iterator[tuple[int, Layer]]:
    """The calls that are worth drawing, by their index, as they run.

    Args:
        graph: from `trace`.
        kept: (neurons,) bool, which of them stay.
    """
    stays = graph.stays(kept)
    before, after = (_flops_by_call(graph, choice) for choice in (graph.everything, kept))
    for op in graph.flow.trace.ops:
        what = _what(graph.flow, op)
        if what is not None:
            channels = _channels(graph.flow, op, stays)
            yield op.index, Layer(op.module, what, *channels, before.get(op.index, 0), after.get(op.index, 0))


def _flops_by_call(graph: ChannelGraph, kept: np.ndarray) -> dict[int, int]:
    sums: dict[int, int] = {}
    metric = graph.metric("flops")
    for term, flops in zip(metric.terms, metric.per_term(kept).tolist(), strict=True):
        sums[term.op] = sums.get(term.op, 0) + flops
    return sums


def _what(flow: Flow, op: Op) -> str | None:
    """A few words for calls that are worth drawing; None for the others."""
    drawn = op.declared.drawn_as
    if not is_convolution(op):
        return drawn or None
    said = f"{drawn} {size(flow.shape(op.inputs()[1])[2:])}"
    if op.arg("transposed"):
        said = f"transposed {said}"
    stride = max(op.arg("stride"), default=1)
    if stride > 1:
        said += f" / {stride}"
    if op.arg("groups") > 1:
        said += f", {op.arg('groups')} groups"
    return said


def _channels(flow: Flow, op: Op, stays: np.ndarray) -> tuple[int, int]:
    """Channels that a call gives, before and after."""
    value = op.outputs[0]
    shape, labels = flow.shape(value), flow.labels(value)
    dim = 1 if len(shape) >= 4 or (len(shape) == 3 and is_convolution(op)) else len(shape) - 1
    label = labels[dim]
    before = int(shape[dim])
    return before, before if label is None else int(stays[label].sum())


class LayersText(Shown):
    """Print them with rich: a row for each that costs something or changes, and what all other calls cost.

    Args:
        layers: as they run.
        before, after: FLOPs of the whole network; the same number twice where there is no budget.
    """

    def __init__(self, layers: Sequence[Layer], before: int, after: int) -> None:
        self.layers = [layer for layer in layers if layer.flops or layer.channels != layer.kept]
        self.before, self.after = before, after

    def __repr__(self) -> str:
        return f"<LayersText: {len(self.layers)} layers, {self.before:,} FLOPs before, {self.after:,} after>"

    def to_dict(self) -> list[dict[str, Any]]:
        """JSON-ready form: one entry per layer, as they run."""
        return [asdict(layer) for layer in self.layers]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = table_without_lines()
        table.add_column("layer", overflow="fold", ratio=1)
        table.add_column("", no_wrap=True)
        for title in ("channels", "FLOPs", "after", "share"):
            table.add_column(title, justify="right", no_wrap=True)
        for layer in self.layers:
            channels = change(layer.channels, layer.kept)
            table.add_row(Text(printable(layer.name)), layer.what, channels, *_cost(layer.flops, layer.flops_kept))
        shown = (sum(layer.flops for layer in self.layers), sum(layer.flops_kept for layer in self.layers))
        others = (self.before - shown[0], self.after - shown[1])
        table.add_row(Text("norms and other calls", style="dim"), "", "", *_cost(*others))
        table.add_row(Text("total", style="bold"), "", "", *_cost(self.before, self.after))
        yield table


def _cost(before: int, after: int) -> tuple[str, str, str]:
    if before == after:
        return f"{before:,}", "", ""
    return f"{before:,}", f"{after:,}", percent(share_of(after, before))
