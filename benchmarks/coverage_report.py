"""The coverage page: one line per network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .common import ROOT, table, where
from .coverage_reasons import REASONS, WHY_HEADS_STAY

Row = dict[str, Any]
EARLIER = "Of networks with a star, no more than the floor was measured anew; all else is by the defaults of 0.1."


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
        "Made by `python -m benchmarks.coverage`. Random weights; each network in a process of its own; detectors "
        "at 320 pixels, and where a second stage looks at objects at most 10 of them. "
        "Asked for, by the default criterion: 60 % of the FLOPs; where that is out of reach, the smallest that is not "
        "(marked ≥). Torch-Pruning: "
        "`BNScalePruner`, global, one pass at a ratio of 0.35, then a forward and a train step. Seconds are of the "
        "CPU, one thread; MiB are the peak above the model itself. Can go: the share of channels that can be removed; "
        "floor: the lowest FLOPs that a plan was seen to reach.",
        "",
        *([EARLIER, ""] if any(row.get("earlier") for row in ours) else []),
        f"{len(rows)} networks: {sum('traced' in row for row in ours)} traced, {len(done)} allocated, certified and "
        f"trained a step, {len(reached)} of them at 60 %; largest certificate error {worst:.1e}. "
        f"Torch-Pruning: {len(peer)} of {len(tried)} that it was run on.",
        "",
        _table(rows),
        "",
        *left(rows),
        *high(rows),
        *_kept(rows),
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
        "floor",
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
    name = row["model"].replace("torchvision:", "tv:") + (" *" if ours.get("earlier") else "")
    theirs = "yes" if peer.get("train_step") else f"no: {_short(peer.get('failed', 'train step'))}"
    if "peer" not in row:
        theirs = "not run"
    if "failed" in ours:
        return [name, "", "", "", "", "", "", f"no: {_short(ours['failed'])}", "", "", theirs]
    blocks = ", ".join(f"{count} {kind}" for kind, count in ours["blocks"].items()) or "none"
    flops = f"{'≥ ' if 'smallest' in ours else ''}{100 * ours['achieved']:.1f} %"
    error = "" if ours["error"] is None else f"{ours['error']:.0e}"
    trained = "yes" if ours["train_step"] else f"no: {_short(ours.get('train_error', ''))}"
    floor = f"{100 * ours['floor']:.1f} %" if "floor" in ours else ""
    figures = [f"{100 * ours['share']:.0f} %", floor, ours["criterion"], flops, error, trained]
    return [name, blocks, *figures, f"{ours['seconds']:.1f}", f"{ours['memory'] / 2**20:.0f}", theirs]


def left(rows: Sequence[Row]) -> list[str]:
    """Networks that did not come down to the budget, each with the reason."""
    left = [row for row in rows if "ours" in row and ("failed" in row["ours"] or "smallest" in row["ours"])]
    if not left:
        return []
    lines = [f"- {row['model']}: {REASONS.get(row['model']) or _own_reason(row['ours'])}." for row in left]
    return ["## Not at 60 %", "", *lines, ""]


def _own_reason(ours: Row) -> str:
    if "failed" in ours:
        return str(ours["failed"])
    listed = "; ".join(f"{reason} ({count} channels)" for reason, count in ours["reasons"][:3])
    return f"not looked into yet; channels that stay: {listed}"


MANY, HIGH = 0.8, 0.4
"""Where more channels than this can go, the floor is below so much of the FLOPs, or the page says why."""


def high(rows: Sequence[Row]) -> list[str]:
    """Networks of which many channels can go and few FLOPs, each with the reason."""
    both = [(row["model"], row["ours"]) for row in rows if "floor" in row.get("ours", {})]
    found = [(name, ours) for name, ours in both if ours["share"] > MANY and ours["floor"] >= HIGH]
    if not found:
        return []
    lines = [
        f"- {name} ({100 * ours['share']:.0f} % can go, floor {100 * ours['floor']:.1f} %): {_own_reason(ours)}."
        for name, ours in found
    ]
    return [f"## Over {100 * MANY:.0f} % can go, and {100 * HIGH:.0f} % of the FLOPs or more stay", "", *lines, ""]


FEW = 0.7


def few(rows: Sequence[Row], most: float) -> list[str]:
    """Networks that came down to the budget, of which fewer channels can go than this share, each with the reason."""
    both = [(row["model"], row["ours"]) for row in rows if row.get("ours", {}).get("train_step")]
    found = [(name, ours) for name, ours in both if ours["share"] < most and "smallest" not in ours]
    if not found:
        return []
    lines = [
        f"- {name} ({100 * ours['share']:.0f} %): {REASONS.get(name) or _own_reason(ours)}." for name, ours in found
    ]
    return [f"## Under {100 * most:.0f} % can go, at 60 % of the FLOPs", "", *lines, ""]


def fell(known: Row, row: Row) -> list[str]:
    """What of a network got worse than in an earlier row, in words."""
    before, now = known.get("ours", {}), row.get("ours", {})
    if not before.get("train_step"):
        return []
    if not now.get("train_step"):
        return [f"went all the way before, and now: {now.get('failed', now.get('train_error'))}"]
    said = []
    for key, sign in (("share", 1), ("floor", -1), ("smallest", -1)):
        if sign * before.get(key, now.get(key, 0)) > sign * now.get(key, before.get(key, 0)) + ROUNDING:
            said.append(f"{key} was {100 * before[key]:.1f} %, and is {100 * now[key]:.1f} %")
    if "smallest" in now and "smallest" not in before:
        said.append(f"{100 * now['asked']:.1f} % is the smallest budget that can be met, and 60 % could")
    return said


ROUNDING = 5e-4
"""By how much a share may fall that is the same on the page."""


def _kept(rows: Sequence[Row]) -> list[str]:
    """Networks of which a part was found to need its neurons by tracing the result."""
    found = [(row["model"], row["ours"]["frozen"]) for row in rows if row.get("ours", {}).get("frozen")]
    if not found:
        return []
    lines = [[name, len(notes), _short(notes[0], 110)] for name, notes in found]
    header = ["network", "places", "the first, and what its forward would have met"]
    return ["## Found to need their neurons", "", WHY_HEADS_STAY, "", table(header, lines), ""]


def _short(text: str, most: int = 60) -> str:
    """An error in a cell."""
    return text.replace("|", "/").replace("the neurons at ", "")[:most]
