"""Charts as files: png, svg or pdf."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from allocator.disk import PathLike, write_atomically
from allocator.errors import InputError, MissingPackageError, UnknownNameError, did_you_mean
from allocator.reporting.charts import Parts, Spec, part_names, parts_of, share_rows, shares, side_by_side
from allocator.reporting.facts import Summary

SUFFIXES = (".png", ".svg", ".pdf")
_HEIGHT = 300
_STEP = 26
_NARROWEST = 220
_WIDEST = 1600
_CONFIG: Spec = {
    "background": "white",
    "font": "sans-serif",
    "axis": {"grid": False, "domainColor": "#888888", "tickColor": "#888888"},
    "view": {"stroke": None},
}
_INK = "#e0e0e6"
_DARK: Spec = {
    **_CONFIG,
    "background": None,
    "axis": {**_CONFIG["axis"], "labelColor": _INK, "titleColor": _INK},
    "legend": {"labelColor": _INK, "titleColor": _INK},
    "title": {"color": _INK},
}


@dataclass(frozen=True)
class Panel:
    """One row of bars.

    Attributes:
        title: what is written above.
        parts: neurons per block and part, as the recipes' networks give them with `parts()`.
        seed: the same for the network that it was allocated from. With it a bar is as high as the share of
            the seed's neurons that its block keeps; without it all bars are filled.
    """

    title: str
    parts: Parts
    seed: Parts | None = None


def library() -> ModuleType:
    """The package that draws.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise MissingPackageError(
            "charts need the package vl-convert-python: pip install 'neuron-allocator[report]'"
        ) from error
    return vl_convert


def picture_format(path: PathLike) -> str:
    """The format "png", "svg" or "pdf", by the suffix.

    Raises:
        UnknownNameError: another suffix; names a near one.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        near = did_you_mean(suffix, SUFFIXES, cutoff=0.4)
        hint = f"; {near}" if near else ";"
        raise UnknownNameError(f"cannot draw {Path(path).name!r}{hint} a picture ends in {', '.join(SUFFIXES)}")
    return suffix[1:]


def draw_shares(panels: Sequence[Panel], path: PathLike, *, dark: bool = False) -> None:
    """Draw stacked bars, one per block: the share of its neurons that each part has.

    Args:
        panels: they are put side by side.
        path: the file to write; its suffix decides the format (png, svg, pdf).
        dark: light letters on no background, for a dark page, in place of dark ones on white.

    Raises:
        InputError: there is nothing to draw, more than 8 parts, or a seed with other blocks.
        UnknownNameError: the suffix stands for no format.
        MissingPackageError: the package that draws is not installed.
        FileError: the path cannot be written.
    """
    picture_format(path)
    _check(panels)
    names = part_names([panel.parts for panel in panels])
    whose = "seed's" if all(panel.seed for panel in panels) else "block's"
    specs = []
    for panel in panels:
        rows = share_rows(panel.parts, panel.seed)
        spec = shares(rows, names, title=panel.title, axis=f"share of the {whose} neurons")
        bars = len({row["block"] for row in rows})
        specs.append(spec | {"width": min(max(_STEP * bars, _NARROWEST), _WIDEST), "height": _HEIGHT})
    save(side_by_side(specs), path, dark=dark)


def _check(panels: Sequence[Panel]) -> None:
    """Raise InputError where there is nothing to draw, or a seed is that of another network."""
    if not panels or not all(any(panel.parts.values()) for panel in panels):
        raise InputError("there is nothing to draw: a panel without blocks, or blocks without parts")
    for panel in panels:
        if panel.seed is not None and list(panel.seed) != list(panel.parts):
            raise InputError(f"the seed of panel {panel.title!r} has other blocks than its network")


def draw_summary(summary: Summary, path: PathLike) -> None:
    """Draw a network's neurons per block and scale and, with a budget, what it leaves beside it.

    Raises:
        InputError: the network has no blocks to draw.
        UnknownNameError, MissingPackageError, FileError: as for `draw_shares`.
    """
    now = parts_of(summary, kept=False)
    if not now:
        raise InputError(f"{summary.model} has no blocks whose neurons could be drawn")
    panels = [Panel(f"{summary.model}: {summary.totals.flops:,} FLOPs", now)]
    if summary.budget is not None:
        title = f"kept: {summary.budget.totals.flops:,} FLOPs"
        panels.append(Panel(title, parts_of(summary, kept=True), now))
    draw_shares(panels, path)


def save(spec: Spec, path: PathLike, *, dark: bool = False) -> None:
    """Write a Vega-Lite specification as a picture, in one piece."""
    vl_convert = library()
    format = picture_format(path)
    options: dict[str, Any] = {"config": _DARK if dark else _CONFIG}
    if format == "png":
        options["scale"] = 2  # sharp on dense screens too; the other formats have no pixels
    picture: str | bytes = getattr(vl_convert, f"vegalite_to_{format}")(spec, **options)
    if isinstance(picture, str):
        picture = picture.encode()
    with write_atomically(path) as temporary:
        temporary.write_bytes(picture)
