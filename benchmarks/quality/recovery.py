"""What recovery leaves of the loss, as a page: `python -m benchmarks.quality.recovery --rows FILE`.

Of rows that `python -m benchmarks.quality.run` wrote, points of test error above the full network's in every state.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.common import RESULTS, table

from .contrasts import Row, errors
from .report import WORDS
from .rows import read_rows
from .run import ROWS

STATES = ("cut", "statistics", "recovered")


def markdown(rows: Sequence[Row]) -> str:
    """Means over networks and random seeds, then each network."""
    full = errors(rows, "full", 1.0, "cut", "test")
    networks = sorted({name for name, _ in full})
    parts = [
        "# How much of the loss is recovered",
        "",
        "Made by `python -m benchmarks.quality.run` with `--shares 0.5 0.4 0.25` and by "
        "`python -m benchmarks.quality.recovery`. Points of test error above the full network's, on cluttered digits. "
        "Statistics and recovery look at the same 1,000 calibration images, without labels, and nothing is trained; "
        "test images are of other digits.",
    ]
    for share in sorted({row["asked"] for row in rows if row["arm"] != "full"}, reverse=True):
        parts += ["", f"## {share:.0%} of the FLOPs", "", _means(rows, share, full)]
        parts += ["", "Of each network, by the choice that was recovered:", "", _each(rows, share, full, networks)]
    return "\n".join([*parts, ""])


def _excess(rows: Sequence[Row], arm: str, share: float, state: str, full: dict[tuple[str, int], float]) -> list[float]:
    return [value - full[key] for key, value in errors(rows, arm, share, state, "test").items()]


def _means(rows: Sequence[Row], share: float, full: dict[tuple[str, int], float]) -> str:
    lines = []
    for arm in _arms(rows, share):
        of = {state: _excess(rows, arm, share, state, full) for state in STATES}
        lines.append([arm, len(of["cut"]), *(f"{np.mean(each):+.1f}" if each else "–" for each in of.values())])
    return table(["choice", "networks", *(WORDS[state] for state in STATES)], lines)


def _each(rows: Sequence[Row], share: float, full: dict[tuple[str, int], float], networks: Sequence[str]) -> str:
    lines = []
    for arm in _arms(rows, share):
        for name in networks:
            own = [row for row in rows if row["network"] == name]
            of = [_excess(own, arm, share, state, full) for state in STATES]
            if of[-1]:
                lines.append([arm, name, len(of[-1]), *(f"{np.mean(each):+.1f}" for each in of)])
    return table(["choice", "network", "seeds", *(WORDS[state] for state in STATES)], lines)


def _arms(rows: Sequence[Row], share: float) -> list[str]:
    """All that were measured as often as any."""
    arms = dict.fromkeys(row["arm"] for row in rows if row["arm"] != "full")
    count = {arm: len(errors(rows, arm, share, "cut", "test")) for arm in arms}
    return [arm for arm, seen in count.items() if seen == max(count.values())]


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=ROWS, help="from `python -m benchmarks.quality.run`")
    rows = read_rows(parser.parse_args().rows)
    (RESULTS / "recovery.md").write_text(markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
