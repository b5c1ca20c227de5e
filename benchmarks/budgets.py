"""Budgets asked and achieved: every network of the reference set, every policy, 30, 40, 60 and 80 % of its FLOPs.

python -m benchmarks.budgets                 # everything, into benchmarks/results/budgets.{json,md}
python -m benchmarks.budgets --workers 2     # on two processes
python -m benchmarks.budgets --models torchvision:googlenet --print   # a part, shown but not written
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from .common import environment, short, table, where, write

from reference_set import REFERENCE_SET, fvcore_count, randomised  # isort: skip

import allocator
from allocator import BudgetError

SHARES = (30, 40, 60, 80)
POLICIES = ("per_block", "global", "uniform")

Row = dict[str, Any]


def measure(name: str) -> list[Row]:
    """All rows of one network.

    Args:
        name: as for `allocator.build`.

    Returns:
        One row per policy and budget. FLOPs are those that fvcore counts, run by itself on what came back.
    """
    warnings.simplefilter("ignore")
    model = randomised(name)
    own = fvcore_count(model, name).flops
    rows = []
    for policy in POLICIES:
        for share in SHARES:
            row: Row = {"model": name, "policy": policy, "share": share, "own": own}
            rows.append(row | _allocate(model, name, own * share / 100, policy))
    return rows


def _allocate(model: Any, name: str, asked: float, policy: str) -> Row:
    start = time.perf_counter()
    row: Row = {"asked": asked, "reachable": None}
    try:
        result = allocator.allocate(model, flops=asked, policy=policy)
    except BudgetError as error:
        row["reachable"] = error.reachable
        if error.reachable is None:
            raise
        result = allocator.allocate(model, flops=error.reachable, policy=policy)
    seconds = time.perf_counter() - start
    budget = row["reachable"] or asked
    achieved = fvcore_count(result.model, name).flops
    return row | {
        "achieved": achieved,
        "ratio": achieved / budget,
        "scope": result.allocation.scope,
        "next_cost": result.next_cost,
        "structural": result.certificate.structural,
        "relative_error": result.certificate.relative_error,
        "seconds": round(seconds, 2),
    }


def failures(rows: Iterable[Row]) -> list[str]:
    """Rows that break a promise, in words."""
    broken = []
    for row in rows:
        budget = row["reachable"] or row["asked"]
        fine = row["achieved"] + (row["next_cost"] or 0) > budget
        what = [
            (row["achieved"] > budget, "over the budget"),
            (row["ratio"] < 0.995 and not fine, "under 99.5 % though a further neuron fits"),
            (not row["structural"], "structural check failed"),
            (row["relative_error"] is None or row["relative_error"] > 1e-9, "certificate above 1e-9"),
        ]
        title = f"{row['model']} {row['policy']} {row['share']} %"
        broken += [f"{title}: {text}" for bad, text in what if bad]
    return broken


def markdown(rows: Sequence[Row], place: dict[str, str], command: str) -> str:
    """The committed table."""
    own = {row["model"]: row["own"] for row in rows}
    met = [row for row in rows if row["reachable"] is None]
    worst = min(rows, key=lambda row: row["ratio"])
    coarse = [row for row in rows if row["ratio"] < 0.995]
    errors = [row["relative_error"] for row in rows]
    parts = [
        "# Budgets: asked and achieved",
        f"Made by `{command}`. {where(place)}",
        "FLOPs are fvcore's (one multiply-add is one FLOP), counted by fvcore itself on the model that came back. "
        "*Further neuron* is what the cheapest neuron that was left out would have added. *Certificate* is the "
        "relative difference of the outputs in float64. Scope is what `auto` chose.",
        f"- {len(rows)} runs over {len(own)} networks; {len(met)} met the budget as asked, "
        f"{len(rows) - len(met)} had to be run at the smallest figure that `BudgetError` named.\n"
        f"- Furthest under its budget: {100 * worst['ratio']:.3f} % ({short(worst['model'])}, {worst['policy']}, "
        f"{worst['share']} %). Under 99.5 %: {len(coarse)}.\n"
        f"- Largest certificate error: {max(errors):.1e}. Promises broken: {len(failures(rows))}.",
    ]
    for name, flops in own.items():
        parts.append(f"## {short(name)}\n\n{flops:,} FLOPs.")
        parts.append(_network(row for row in rows if row["model"] == name))
    return "\n\n".join(parts)


def _network(rows: Iterable[Row]) -> str:
    header = ("policy", "budget", "asked", "achieved", "of it", "scope", "further neuron", "certificate", "note")
    lines = []
    for row in rows:
        note = f"budget out of reach; run at {row['reachable']:,}" if row["reachable"] else ""
        lines.append(
            (
                row["policy"],
                f"{row['share']} %",
                f"{row['asked']:,.0f}",
                f"{row['achieved']:,}",
                f"{100 * row['ratio']:.3f} %",
                row["scope"],
                "none left" if row["next_cost"] is None else f"{row['next_cost']:,}",
                f"{row['relative_error']:.0e}",
                note,
            )
        )
    return table(header, lines)


def run(models: Sequence[str], workers: int) -> list[Row]:
    """Rows of all models, in their order, on `workers` processes."""
    rows: list[Row] = []
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for name, some in zip(models, pool.imap(measure, models)):
            rows += some
            lowest = min(row["ratio"] for row in some)
            print(f"{name}: {len(some)} runs, at least {100 * lowest:.3f} % of the budget", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, and return 1 where a promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.budgets", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(REFERENCE_SET), help="names as for allocator.build")
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--print", action="store_true", help="show the table, write nothing")
    chosen = parser.parse_args(arguments)
    place = environment()
    rows = run(chosen.models, chosen.workers)
    text = markdown(rows, place, "python -m benchmarks.budgets")
    if chosen.print:
        print(text)
    else:
        write("budgets", {"environment": place, "rows": rows}, text)
    broken = failures(rows)
    print("\n".join(broken) or "all promises kept", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
