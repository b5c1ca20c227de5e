"""A picture of how the neurons of each block are shared among its parts: scales, or layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allocator.errors import InputError

Parts = Mapping[str, Mapping[str, int]]
"""Neurons per block and part, as the recipes' networks give them with `parts()`."""

_COLOURS = ("#264653", "#2a9d8f", "#e9c46a", "#e76f51", "#6d597a", "#8ab17d", "#b56576", "#457b9d")
_DARK = frozenset({0, 1, 3, 4, 6, 7})
_SMALLEST_LABELLED = 0.05


@dataclass(frozen=True)
class Panel:
    """One row of bars.

    Attributes:
        title: what is written above.
        parts: neurons per block and part.
        seed: the same for the network that it was allocated from. With it a bar is as high as the share of
            the seed's neurons that its block keeps; without it all bars are filled.
    """

    title: str
    parts: Parts
    seed: Parts | None = None


def draw_shares(panels: Sequence[Panel], path: str | Path) -> None:
    """Draw stacked bars, one per block: the share of its neurons that each part has.

    Args:
        panels: they are put side by side on one axis of shares.
        path: the file to write; its suffix decides the format (png, svg, pdf).

    Raises:
        InputError: there is nothing to draw, more than 8 parts, or a seed with other blocks.
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install 'neuron-allocator[report]'") from error
    names = _part_names(panels)
    width = sum(1.2 + 0.62 * len(panel.parts) for panel in panels)
    figure = Figure(figsize=(max(6.0, width), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = {"width_ratios": [len(panel.parts) for panel in panels]}
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False, gridspec_kw=grid)[0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel, names)
    whose = "seed's" if all(panel.seed for panel in panels) else "block's"
    axes[0].set_ylabel(f"share of the {whose} neurons")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)


def _part_names(panels: Sequence[Panel]) -> list[str]:
    """The parts of all blocks, in the order that they first come up."""
    names = list(dict.fromkeys(name for panel in panels for row in panel.parts.values() for name in row))
    if not names or not all(panel.parts for panel in panels):
        raise InputError("there is nothing to draw: a panel without blocks, or blocks without parts")
    if len(names) > len(_COLOURS):
        raise InputError(f"{len(names)} parts are more than the {len(_COLOURS)} that can be told apart")
    for panel in panels:
        if panel.seed is not None and list(panel.seed) != list(panel.parts):
            raise InputError(f"the seed of panel {panel.title!r} has other blocks than its network")
    return names


def _draw_panel(axis: Any, panel: Panel, names: Sequence[str]) -> None:
    places = range(len(panel.parts))
    bottoms = [0.0] * len(panel.parts)
    wholes = [max(1, sum(row.values())) for row in (panel.seed or panel.parts).values()]
    for number, name in enumerate(names):
        counts = [row.get(name, 0) for row in panel.parts.values()]
        shares = [count / whole for count, whole in zip(counts, wholes, strict=True)]
        axis.bar(places, shares, 0.82, bottoms, color=_COLOURS[number], edgecolor="white", label=name)
        ink = "white" if number in _DARK else "#222222"
        for place, (count, share) in enumerate(zip(counts, shares, strict=True)):
            if share >= _SMALLEST_LABELLED:
                middle = bottoms[place] + share / 2
                axis.text(place, middle, count, ha="center", va="center", color=ink, fontsize=9)
            bottoms[place] += share
    axis.set_title(panel.title, fontsize=10.5, loc="left")
    axis.set_xticks(places, [name.removeprefix("layer") for name in panel.parts])
    axis.set_xlabel("block, from input to output")
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.tick_params(length=0)
    for side in ("top", "right", "left", "bottom"):
        axis.spines[side].set_visible(False)
