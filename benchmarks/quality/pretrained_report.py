"""Networks with published weights, narrowed, as a page: `python -m benchmarks.quality.pretrained_report`.

Of rows that `python -m benchmarks.quality.pretrained` and `.pitch` wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.common import RESULTS, table

from . import pitch, pretrained
from .report import WORDS
from .rows import read_rows

PAGE = RESULTS / "quality_pretrained.md"
FIGURES = ("agreement", "right")
"""What is shown of a row, whichever of them it has."""
Row = dict[str, Any]


def markdown(rows: Sequence[Row]) -> str:
    """A table for every network and share."""
    parts = [
        "# Networks with published weights",
        "",
        "Made by `python -m benchmarks.quality.pretrained`, `.pitch` and `.pretrained_report`: see their first lines. "
        "Networks with the weights that packages ship are narrowed to the same FLOPs by fvcore. Of networks with "
        "ImageNet weights, on how many of 240 crops of photographs that calibration has not seen (128 pixels) the top "
        "class is the full network's (standard error about 3 points, more as crops of one picture are alike); of the "
        "pitch network, how many of 1,000 synthesised tones it hears within a quarter tone (standard error under 1 "
        "point). Nothing is trained, and no label is seen, but by Torch-Pruning's Taylor: the full network's answers, "
        "and the true pitch. Torch-Pruning is told to leave the pitch network's last convolution as it is, as what it "
        "returns does not run otherwise.",
    ]
    for name in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == name]
        full = [_figure(row, "cut") for row in own if row["arm"] == "full"]
        for share in sorted({row["asked"] for row in own if row["arm"] != "full"}, reverse=True):
            before = f" (before: {full[0]})" if full else ""
            parts += ["", f"## {name}, {share:.0%} of the FLOPs{before}", "", _arms(own, share)]
    return "\n".join([*parts, ""])


def _arms(rows: Sequence[Row], share: float) -> str:
    """Best right after the cut first."""
    some = [row for row in rows if row["asked"] == share and row["arm"] != "full"]
    some.sort(key=lambda row: -max(row.get("cut", {}).get(figure, -1.0) for figure in FIGURES))
    lines = [
        [
            row["arm"],
            row["crops"],
            *([f"{row['share']:.1%}"] if "share" in row else [f"no: {row['failed'][:80]}".replace("|", "/")]),
            *(_figure(row, state) for state in pretrained.STATES),
        ]
        for row in some
    ]
    return table(["choice", "calibration", "FLOPs", *(WORDS[state] for state in pretrained.STATES)], lines)


def _figure(row: Row, state: str) -> str:
    found = row.get(state, {})
    return next((f"{found[figure]:.1%}" for figure in FIGURES if figure in found), "–")


def main() -> None:
    """Write the page."""
    PAGE.write_text(markdown([*read_rows(pretrained.ROWS), *read_rows(pitch.ROWS)]), encoding="utf-8")


if __name__ == "__main__":
    main()
