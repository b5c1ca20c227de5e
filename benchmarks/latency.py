"""Does a budget of time hold? Plans for a share of the measured time, and what a fresh measurement says of them.

After `allocate` has ended, original and result take turns again, so that the figure is not that which chose the plan.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch

import allocator
from allocator.cost.latency import latencies

from .common import environment, short, table, timed, where, write

NETWORKS = ("torchvision:resnet50", "torchvision:mobilenet_v2", "torchvision:densenet121")
ROW = ("network", "predicted", "measured by the plan", "measured afresh", "ms before", "ms after", "seconds to plan")


def measure(name: str, share: float) -> dict[str, Any]:
    """One network at one share of its own time, on one image of 224 pixels."""
    torch.manual_seed(0)
    model = allocator.build(name).eval()
    result, seconds = timed(lambda: allocator.allocate(model, latency=f"{100 * share}%", criterion="magnitude"))
    cost = result.allocation.costs["latency"]
    before, after = latencies([model, result.model], result.graph.inputs)
    return {
        "network": name,
        "asked": share,
        "predicted": cost["predicted"] / cost["before"],
        "planned": cost["measured_after"] / cost["measured_before"],
        "measured": after.seconds / before.seconds,
        "before": before.seconds,
        "after": after.seconds,
        "seconds": seconds.wall,
    }


def main() -> None:
    """See --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(NETWORKS))
    parser.add_argument("--share", type=float, default=0.7)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    place = environment()
    rows = [measure(name, args.share) for name in args.models]
    lines = [
        [
            short(row["network"]),
            *(f"{row[key]:.1%}" for key in ("predicted", "planned", "measured")),
            f"{1e3 * row['before']:.1f}",
            f"{1e3 * row['after']:.1f}",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    page = [
        f"# {args.share:.0%} of the time",
        "",
        "Made by `python -m benchmarks.latency`: medians, original and result taking turns, as shares.",
        where(place),
        "",
        table(ROW, lines),
    ]
    write("latency", {"environment": place, "rows": rows}, "\n".join(page))


if __name__ == "__main__":
    main()
