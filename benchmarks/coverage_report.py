"""The coverage page: one line per network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .common import ROOT, table, where

Row = dict[str, Any]


def markdown(data: dict[str, Any]) -> str:
    """The page, which is written to docs/coverage.md too."""
    rows = data["rows"]
    ours = [row["ours"] for row in rows if "ours" in row]
    done = [row for row in ours if row.get("train_step")]
    tried = [row["peer"] for row in rows if "peer" in row]
    peer = [row for row in tried if row.get("train_step")]
    reached = [row for row in done if "smallest" not in row]
    worst = max((row["error"] or 0.0 for row in done), default=0.0)
    text = [
        "# Coverage",
        "",
        "Made by `python -m benchmarks.coverage`. Random weights; each network in a process of its own. "
        "Asked for: 60 % of the FLOPs; where that is out of reach, the smallest that is not (marked ≥). Torch-Pruning: "
        "`BNScalePruner`, global, one pass at a ratio of 0.35, then a forward and a train step.",
        "",
        f"{len(rows)} networks: {sum('traced' in row for row in ours)} traced, {len(done)} allocated, certified and "
        f"trained a step, {len(reached)} of them at 60 %; largest certificate error {worst:.1e}. "
        f"Torch-Pruning: {len(peer)} of {len(tried)} that it was run on.",
        "",
        _table(rows),
        "",
        where(data["environment"]),
        "",
    ]
    page = "\n".join(text)
    (ROOT / "docs" / "coverage.md").write_text(page, encoding="utf-8")
    return page


def _table(rows: Sequence[Row]) -> str:
    header = [
        "network",
        "blocks",
        "can go",
        "criterion",
        "FLOPs",
        "error",
        "train step",
        "s",
        "MiB",
        "Torch-Pruning",
    ]
    return table(header, [_line(row) for row in rows])


def _line(row: Row) -> list[str]:
    ours, peer = row.get("ours", {"failed": "not run"}), row.get("peer", {"failed": "not run"})
    name = row["model"].replace("torchvision:", "tv:")
    theirs = "yes" if peer.get("train_step") else f"no: {_short(peer.get('failed', 'train step'))}"
    if "failed" in ours:
        return [name, "", "", "", "", "", f"no: {_short(ours['failed'])}", "", "", theirs]
    blocks = ", ".join(f"{count} {kind}" for kind, count in ours["blocks"].items()) or "none"
    flops = f"{'≥ ' if 'smallest' in ours else ''}{100 * ours['achieved']:.1f} %"
    error = "" if ours["error"] is None else f"{ours['error']:.0e}"
    trained = "yes" if ours["train_step"] else f"no: {_short(ours.get('train_error', ''))}"
    figures = [f"{100 * ours['share']:.0f} %", ours["criterion"], flops, error, trained]
    return [name, blocks, *figures, f"{ours['seconds']:.1f}", f"{ours['memory'] / 2**20:.0f}", theirs]


def _short(text: str) -> str:
    """An error in a cell."""
    return text.replace("|", "/")[:60]
