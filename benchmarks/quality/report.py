"""The comparison of choices as a page and a picture: `python -m benchmarks.quality.report`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.common import RESULTS, table, write

from .contrasts import STATES, Row, errors, primary
from .rows import read_rows
from .run import ROWS

WORDS = {
    "cut": "right after the cut",
    "statistics": "after batch-norm statistics",
    "recovered": "after recovery without labels",
    "tuned": "after half an epoch of fine-tuning",
}


def markdown(rows: Sequence[Row]) -> str:
    """Errors by arm, and the primary contrasts."""
    networks = sorted({row["network"] for row in rows})
    parts = ["# How good is the network that comes back?", ""]
    parts.append(
        "Made by `python -m benchmarks.quality.run` and `python -m benchmarks.quality.report`. Small networks of "
        "several families, trained on digits of many sizes among pieces of others, are narrowed in different ways to "
        "the same FLOPs by fvcore. Points of test error above the full network's, in the mean. Torch-Pruning's ratio "
        "is bisected to within 1 % below the same FLOPs, or as near as whole channels come to it. Training, "
        "calibration and test draw from digits of their own. Where choices were tried on different numbers of "
        "networks (in brackets where a state was seen on fewer), their means do not compare; what can be told apart "
        "is paired. With `recover=True` the default with data is `surgeon`: recovery.md shows what comes back then."
    )
    full = errors(rows, "full", 1.0, "cut", "test")
    for name in networks:
        of = [value for (network, _), value in full.items() if network == name]
        parts += ["", f"- {name}: {len(of)} seeds, the full networks err {np.mean(of):.1f} %"]
    for share in sorted({row["asked"] for row in rows if row["arm"] != "full"}, reverse=True):
        parts += ["", f"## {share:.0%} of the FLOPs", "", _arms(rows, share, full)]
    parts += ["", "## What can be told apart", "", _contrasts(rows), ""]
    return "\n".join(parts)


def _arms(rows: Sequence[Row], share: float, full: dict[tuple[str, int], float]) -> str:
    """Mean excess of every arm in every state, best after the cheapest treatment first."""
    arms = list(dict.fromkeys(row["arm"] for row in rows if row["arm"] != "full" and row["asked"] == share))
    states = [state for state in STATES if any(errors(rows, arm, share, state, "test") for arm in arms)]
    lines = []
    for arm in arms:
        cells: list[object] = []
        pairs = len(errors(rows, arm, share, states[0], "test"))
        for state in states:
            of = errors(rows, arm, share, state, "test")
            fewer = f" ({len(of)})" if len(of) < pairs else ""
            cells.append(f"{np.mean([value - full[key] for key, value in of.items()]):+.1f}{fewer}" if of else "–")
        landed = [row["share"] for row in rows if (row["arm"], row["asked"]) == (arm, share) and "share" in row]
        lines.append([arm, pairs, f"{np.mean(landed):.1%}", *cells])
    lines.sort(key=lambda line: float(str(line[4]).split()[0]) if line[4] != "–" else np.inf)
    return table(["choice", "networks", "FLOPs", *(WORDS[state] for state in states)], lines)


def _contrasts(rows: Sequence[Row]) -> str:
    """The primary contrasts as a table."""
    lines = []
    for each in primary(rows):
        chance = "< 0.001" if each.chance < 0.001 else f"{each.chance:.3f}"
        difference = f"{each.difference:+.1f} ({each.low:+.1f} to {each.high:+.1f})"
        lines.append([each.ours, each.peer, f"{each.share:.0%}", WORDS[each.state], each.pairs, difference, chance])
    header = ["ours", "Torch-Pruning's best", "FLOPs", "state", "pairs", "points it errs more (95 %)", "p, corrected"]
    return table(header, lines)


def draw(rows: Sequence[Row]) -> None:
    """Excess error by arm and state, one panel per share, as `results/quality.png`."""
    import matplotlib.pyplot as plt

    full = errors(rows, "full", 1.0, "cut", "test")
    shares = sorted({row["asked"] for row in rows if row["arm"] != "full"}, reverse=True)
    figure, axes = plt.subplots(1, len(shares), figsize=(6 * len(shares), 6), squeeze=False, sharey=True)
    for axis, share in zip(axes[0], shares, strict=True):
        arms = sorted({row["arm"] for row in rows if row["asked"] == share and row["arm"] != "full"}, reverse=True)
        for state, marker in zip(STATES, "xos^", strict=True):
            points = []
            for place, arm in enumerate(arms):
                of = errors(rows, arm, share, state, "test")
                if of:
                    points.append((float(np.mean([value - full[key] for key, value in of.items()])), place))
            if points:
                axis.plot(*zip(*points, strict=True), marker, label=WORDS[state])
        axis.set_yticks(range(len(arms)), arms)
        axis.set_xscale("symlog", linthresh=5)
        axis.set_title(f"{share:.0%} of the FLOPs")
        axis.set_xlabel("points of test error above the full network's")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "quality.png", dpi=110)


def main() -> None:
    """Write the page, its figures and the picture."""
    rows = read_rows(ROWS)
    contrasts = [vars(each) for each in primary(rows)]
    write("quality", {"contrasts": contrasts}, markdown(rows))
    draw(rows)


if __name__ == "__main__":
    main()
