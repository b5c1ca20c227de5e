"""What recovery leaves of the loss, as a page: `python -m benchmarks.quality.recovery`.

Of rows that `python -m benchmarks.quality.run` wrote, points of test error above the full network's in every state, in
the mean over the networks that every choice was measured on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.common import RESULTS, table

from .contrasts import Key, Row, errors
from .report import WORDS
from .rows import read_rows
from .run import ROWS

STATES = ("cut", "statistics", "recovered")
SHARES = (0.5, 0.4, 0.25)
CHOICES = ("surgeon", "fisher, priced, floor", "TP L2 isomorphic")
"""Ours with recovery, what that was before, and Torch-Pruning's best after batch-norm statistics."""
RECOVERED = RESULTS / "quality_recovered.jsonl"
"""Rows of `run --no-tuning --arms surgeon --shares 0.5 0.4 0.25 --rows FILE`."""


def markdown(rows: Sequence[Row]) -> str:
    """Means over networks and random seeds, then each network."""
    full = errors(rows, "full", 1.0, "cut", "test")
    parts = [
        "# How much of the loss is recovered",
        "",
        "Made by `python -m benchmarks.quality.run` and by `python -m benchmarks.quality.recovery`. Points of test "
        "error above the full network's, on cluttered digits, of networks that all choices were measured on. "
        "Statistics and recovery look at the same 1,000 calibration images, without labels, and nothing is trained; "
        "test images are of other digits.",
    ]
    for share in SHARES:
        measured = [set(errors(rows, arm, share, "cut", "test")) for arm in CHOICES]
        keys = sorted(set.intersection(*measured) & full.keys())
        networks = sorted({name for name, _ in keys})
        parts += ["", f"## {share:.0%} of the FLOPs", "", _means(rows, share, full, keys)]
        each = {name: [key for key in keys if key[0] == name] for name in networks}
        parts += ["", "Of each network, after recovery:", "", _each(rows, share, full, each)]
    return "\n".join([*parts, ""])


def _excess(
    rows: Sequence[Row], arm: str, share: float, state: str, full: dict[Key, float], keys: Sequence[Key]
) -> str:
    """The mean in points; nothing where there is a network without a figure."""
    found = errors(rows, arm, share, state, "test")
    if not keys or not set(keys) <= found.keys():
        return "–"
    return f"{np.mean([found[key] - full[key] for key in keys]):+.1f}"


def _means(rows: Sequence[Row], share: float, full: dict[Key, float], keys: Sequence[Key]) -> str:
    lines = [[arm, len(keys), *(_excess(rows, arm, share, state, full, keys) for state in STATES)] for arm in CHOICES]
    return table(["choice", "networks", *(WORDS[state] for state in STATES)], lines)


def _each(rows: Sequence[Row], share: float, full: dict[Key, float], each: dict[str, list[Key]]) -> str:
    ours = [arm for arm in CHOICES if not arm.startswith("TP")]
    lines = [
        [name, len(keys), *(_excess(rows, arm, share, "recovered", full, keys) for arm in ours)]
        for name, keys in each.items()
    ]
    return table(["network", "seeds", *ours], lines)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, nargs="+", default=[ROWS, RECOVERED])
    rows = [row for path in parser.parse_args().rows for row in read_rows(path)]
    (RESULTS / "recovery.md").write_text(markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
