"""The tables of `benchmarks.speed`, from what it measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .common import short, table, where

COMMAND = "python -m benchmarks.speed"
REPEATS = {
    "compare": "Medians of {0} calls.",
    "scaling": "Medians of {0} calls.",
    "memory": "One call per process.",
    "stages": "Medians of {0} calls.",
}

Data = dict[str, Any]


def markdown(data: Data) -> str:
    """All parts that were measured, as Markdown."""
    parts = ["# Speed and memory", f"Made by `{COMMAND}`. Each part says what it ran on."]
    writers = {"compare": _compare, "scaling": _scaling, "memory": _memory, "stages": _stages}
    for part, writer in writers.items():
        if part in data:
            found = data[part]
            parts += [*writer(found["rows"]), f"{REPEATS[part].format(found['repeats'])} {where(found['environment'])}"]
    return "\n\n".join(parts)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.0f}"


def _compare(rows: Sequence[Data]) -> list[str]:
    """Ours beside the peer."""
    header = (
        "network", "ours", "and fvcore", "and certificate", "bisected", "tries", "its FLOPs", "/ ours", "/ ours in all",
        "single pass", "/ ours", "/ ours in all",
    )  # fmt: skip
    survived = [row for row in rows if "bisected" in row]
    lines, ratios = [], []
    for row in survived:
        mine, whole = row["ours"]["core"], row["ours"]["total"]
        bisected, once = row["bisected"]["wall"], row["once"]["wall"]
        ratios.append((bisected / mine, bisected / whole, once / mine, once / whole))
        four = [f"{value:.1f}×" for value in ratios[-1]]
        flops = f"{100 * row['peer']['ratio']:.1f} %" + ("" if row["peer"]["within"] else " (not within 1 %)")
        apart = (_ms(row["ours"]["fvcore"]), _ms(row["ours"]["certificate"]))
        lines.append(
            (short(row["model"]), _ms(mine), *apart, _ms(bisected), row["peer"]["tries"], flops, *four[:2],
             _ms(once), *four[2:])
        )  # fmt: skip
    text = [
        "## Beside Torch-Pruning: 60 % of the FLOPs",
        "Milliseconds by the wall clock, one thread, one process; ours and the single pass in turn, then the "
        "bisection. *Ours* is the time to the "
        "finished model, structural check included; fvcore's count of the result and the float64 certificate come "
        "on top. *Bisected* is `BNScalePruner`, global, its ratio bisected until fvcore's FLOPs are within 1 % under "
        "the budget. *Single pass* is one step at a ratio of 0.35, counting and checking nothing, on a copy that was "
        "made beforehand. Ratios above 1 say that ours is faster.",
        table(header, lines),
    ]
    if ratios:
        lowest = [min(column) for column in zip(*ratios)]
        text.append(
            f"Smallest ratios: bisected {lowest[0]:.1f}× ({lowest[1]:.1f}× in all), single pass {lowest[2]:.2f}× "
            f"({lowest[3]:.2f}× in all)."
        )
    return text + _failures(rows)


def _failures(rows: Sequence[Data]) -> list[str]:
    failed = [(row, row["peer"]["failed"]) for row in rows if "failed" in row["peer"]]
    lines = [
        (short(row["model"]), _ms(row["ours"]["core"]), _ms(row["ours"]["fvcore"]), _ms(row["ours"]["certificate"]),
         f"{100 * row['ratio']:.2f} %")
        for row, _ in failed
    ]  # fmt: skip
    text = []
    if failed:
        header = ("Torch-Pruning fails on", "ours", "and fvcore", "and certificate", "our FLOPs")
        text += [table(header, lines), "\n".join(f"- {short(row['model'])}: {why}" for row, why in failed)]
    broken = [f"- {short(row['model'])}: {why}" for row in rows if (why := row["peer"].get("training"))]
    if broken:
        text.append("Its result runs in eval mode but not in train mode:\n" + "\n".join(broken))
    return text


def _scaling(rows: Sequence[Data]) -> list[str]:
    """Time per operator with depth."""
    header = (
        "network", "operators", "ours", "per operator", "in all", "per operator", "single pass", "per operator",
    )  # fmt: skip
    lines = []
    for row in rows:
        count = row["operators"]
        times = (row["ours"]["core"], row["ours"]["total"], row["once"]["wall"])
        cells = [cell for t in times for cell in (_ms(t), f"{1000 * t / count:.2f}")]
        lines.append((short(row["model"]), count, *cells))
    growth = []
    for family in dict.fromkeys(row["family"] for row in rows):
        some = [row for row in rows if row["family"] == family]
        mine = [row["ours"]["core"] / row["operators"] for row in some]
        theirs = [row["once"]["wall"] / row["operators"] for row in some]
        growth.append(
            f"- {short(some[0]['model'])} to {short(some[-1]['model'])}, time per operator: ours "
            f"×{mine[-1] / mine[0]:.2f}, Torch-Pruning's single pass ×{theirs[-1] / theirs[0]:.2f}"
        )
    return [
        "## Time per operator with depth",
        "Milliseconds; operators are the ATen calls of one forward. *In all* includes fvcore's count and the "
        "certificate, which run the network and so grow with its FLOPs.",
        table(header, lines),
        "\n".join(growth),
    ]


_FLOW = ("trace", "score and plan", "rewrite")
_STAGES = {"to the finished model": _FLOW, "certificate": ("certificate",), "fvcore": ("fvcore",)}


def _memory(rows: Sequence[Data]) -> list[str]:
    """Peak memory as multiples of the weights."""
    lines, worst = [], dict.fromkeys(_STAGES, 0.0)
    for row in rows:
        found = row["allocate"]
        cells = [_times(row["forward"]), _times(row["trace"])]
        for column, stages in _STAGES.items():
            peak = {**found, "peak": max(found["stages"][stage] for stage in stages)}
            worst[column] = max(worst[column], peak["peak"] / found["weights"])
            cells.append(_times(peak))
        lines.append((short(row["model"]), f"{found['weights'] / 1e6:.0f}", *cells, _times(row["peer_once"])))
    largest = ", ".join(f"{column} {multiple:.2f}" for column, multiple in worst.items())
    header = ("network", "weights", "one forward", "trace", *_STAGES, "Torch-Pruning, single pass")
    return [
        "## Peak memory above the model",
        "Megabytes, and in brackets as a multiple of the model's weights (first column, MB). Each figure is from a "
        "process of its own: the kernel's high-water mark of resident memory during the call, less what was resident "
        "before it, with the model already in memory. It holds the result too. *One forward* is the model's own "
        "eval-mode run on one image. The columns from *to the finished model* on are of one call of `allocate`, "
        "with a mark per stage: trace, plan and rewrite together, the float64 certificate, and fvcore's own count, "
        "whose graph of torch.jit takes about 3 kB per node.",
        table(header, lines),
        f"Largest multiples of the weights: {largest}.",
    ]


def _times(found: Data | str) -> str:
    if isinstance(found, str):
        return "fails"
    return f"{found['peak'] / 1e6:.0f} ({found['peak'] / found['weights']:.2f}×)"


def _stages(rows: Sequence[Data]) -> list[str]:
    """Share of CPU time by stage."""
    names = list(rows[0]["seconds"]) if rows else []
    lines = []
    for row in rows:
        total = sum(row["seconds"].values())
        cells = [f"{1000 * row['seconds'][n]:.0f} ({100 * row['seconds'][n] / total:.0f} %)" for n in names]
        lines.append((short(row["model"]), f"{1000 * total:.0f}", *cells))
    return [
        "## Where the time goes",
        'Milliseconds of CPU time and share of `allocate(model, "60%")`, sampled every millisecond. *Structural '
        "check* traces the rewritten model and compares it with the original, index by index.",
        table(("network", "all", *names), lines),
    ]
