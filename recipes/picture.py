"""A picture of how the neurons of each block are shared among its scales."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allocator.recipes.scalenet import RATES, Rows

_COLOURS = ("#264653", "#2a9d8f", "#e9c46a", "#e76f51")
_INK = ("white", "white", "#222222", "white")
_SMALLEST_LABELLED = 0.05


def draw_shares(
    panels: Sequence[tuple[str, Sequence[str], Rows]], path: str | Path, rates: Sequence[int] = RATES
) -> None:
    """Draw stacked bars, one per block: the share of its neurons that each scale has.

    Args:
        panels: title, names of the blocks, and a row per block (neurons per rate, then side); panels are put
            side by side on one axis of shares.
        path: the file to write; its suffix decides the format (png, svg, pdf).
        rates: the pooling rate of each scale, four at most.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install 'neuron-allocator[report]'") from error
    width = sum(1.2 + 0.62 * len(rows) for _, _, rows in panels)
    figure = Figure(figsize=(max(6.0, width), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = {"width_ratios": [len(rows) for _, _, rows in panels]}
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False, gridspec_kw=grid)[0]
    for axis, (title, names, rows) in zip(axes, panels, strict=True):
        _draw_panel(axis, title, names, rows, rates)
    axes[0].set_ylabel("share of the block's neurons")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside right upper", frameon=False, title="pooled by", alignment="left"
    )
    figure.savefig(path, dpi=150)


def _draw_panel(axis: Any, title: str, names: Sequence[str], rows: Rows, rates: Sequence[int]) -> None:
    places = range(len(rows))
    bottoms = [0.0] * len(rows)
    for scale, rate in enumerate(rates):
        counts = [row[scale] for row in rows]
        shares = [count / sum(row[:-1]) for count, row in zip(counts, rows, strict=True)]
        label = "1 (full size)" if rate == 1 else str(rate)
        axis.bar(places, shares, 0.82, bottoms, color=_COLOURS[scale], edgecolor="white", label=label)
        for place, (count, share) in enumerate(zip(counts, shares, strict=True)):
            if share >= _SMALLEST_LABELLED:
                middle = bottoms[place] + share / 2
                axis.text(place, middle, count, ha="center", va="center", color=_INK[scale], fontsize=9)
            bottoms[place] += share
    axis.set_title(title, fontsize=10.5, loc="left")
    axis.set_xticks(places, names)
    axis.set_xlabel("block, from input to output")
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.tick_params(length=0)
    for side in ("top", "right", "left", "bottom"):
        axis.spines[side].set_visible(False)
