"""Tables that set this project beside others, from the results that the benchmarks left and from published figures.

The documentation's page on other tools is made of them whenever it is built.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .common import RESULTS, read, short, table, where

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))


def speed() -> str:
    """Time to a model at 60 % of the FLOPs, beside Torch-Pruning."""
    found = read("speed")["compare"]
    lines = []
    for row in found["rows"]:
        ours = [f"{1000 * row['ours'][key]:,.0f}" for key in ("core", "total")]
        if "failed" in row["peer"]:
            lines.append((short(row["model"]), *ours, "fails", "", "", ""))
            continue
        theirs = [
            cell
            for key in ("bisected", "once")
            for cell in (f"{1000 * row[key]['wall']:,.0f}", f"{row[key]['wall'] / row['ours']['core']:.1f}×")
        ]
        lines.append((short(row["model"]), *ours, *theirs))
    header = (
        "network", "allocated, ms", "proven too, ms", "Torch-Pruning, to the budget, ms", "ratio",
        "one pass of it, ms", "ratio",
    )  # fmt: skip
    return f"{table(header, lines)}\n\nMedians of {found['repeats']} calls. {where(found['environment'])}"


def failures() -> str:
    """What the peer could not do among the same networks."""
    rows = read("speed")["compare"]["rows"]
    lines = []
    for row in rows:
        why = row["peer"].get("failed")
        what = "raises" if why else "the result fails in train mode"
        why = why or row["peer"].get("training")
        if why:
            lines.append((short(row["model"]), what, f"`{why}`"))
    return table(("network", "Torch-Pruning", ""), lines).replace("---:", "---")


def evidence() -> str:
    """Test error at the same FLOPs, one table per budget, as the page on it has them."""
    page = (RESULTS / "evidence.md").read_text(encoding="utf-8")
    return page[page.index("## ") : page.index("## What was learned")].replace("## ", "### ").strip()


def coverage() -> str:
    """How many networks each tool gets through, in one paragraph."""
    rows = [row for row in read("coverage").get("rows", []) if {"ours", "peer"} <= row.keys()]
    if not rows:
        return "The coverage benchmark (`python -m benchmarks.coverage`) has left no results yet."
    ours = sum(bool(row["ours"].get("train_step")) for row in rows)
    peer = sum(bool(row["peer"].get("train_step")) for row in rows)
    return (
        f"Of {len(rows)} networks that both were run on, each in a process of its own, {ours} "
        "are allocated, certified and train a step here; Torch-Pruning returns a network that runs and trains for "
        f"{peer}."
    )


def imagenet() -> str:
    """Published ImageNet errors."""
    lines = [
        (
            row["network"],
            row["gflops"],
            _error(row["top1_error"]),
            _error(row.get("released_top1_error")),
        )
        for row in PUBLISHED["imagenet"]
    ]
    return table(("published, not reproduced here", "GFLOPs", "top-1 error, paper", "top-1 error, released"), lines)


def coco() -> str:
    """Published COCO precision."""
    lines = [(row["backbone"], row["map"]) for row in PUBLISHED["coco"]]
    return table(("published, not reproduced here: Faster R-CNN on", "mAP@0.5:0.95, COCO"), lines)


def source() -> str:
    """Where the published figures come from."""
    return f"Source: {PUBLISHED['source']}."


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} %"


TABLES: dict[str, Callable[[], Any]] = {
    function.__name__: function for function in (speed, failures, evidence, coverage, imagenet, coco, source)
}
"""By the name that a page asks for."""
