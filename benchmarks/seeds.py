"""What seeds of networks with branches learn: seed, train, allocate, train; beside the network as it was designed.

python -m benchmarks.seeds          # train, allocate, write results/seeds.{json,md} and the pictures in docs/img
python -m benchmarks.seeds --draw   # write and draw again from results/seeds.json, without training
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import allocator
from allocator.reporting.pictures import Panel, draw_shares

from .common import ROOT, environment, read, table, where, write
from .quality.measure import errors, train
from .quality.networks import inception
from .quality.task import Part, load

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "GoogLeNet-like": inception,
    "Res2Net": lambda: allocator.build("recipe:res2net-small"),
}
SEEDS, EPOCHS, RATE, IMAGES = 1, 4, 0.1, 2400
NEURONS = "150%"
RULE: dict[str, Any] = {"criterion": "bn_scale", "policy": "per_block", "scope": "branches"}
"""ScaleNet's (Li et al., CVPR 2019)."""
PICTURES = {"seeds.svg": False, "seeds-dark.svg": True}


def learn(name: str, random_seed: int, parts: dict[str, Part]) -> dict[str, Any]:
    """One network by every way, each from scratch: as designed, as designed with as many epochs in all, learned."""
    part, test = Part(parts["train"].images[:IMAGES], parts["train"].labels[:IMAGES]), parts["test"]
    example = test.images[:2]

    def trained(network: nn.Module, epochs: int) -> float:
        train(network, part, epochs, RATE, random_seed)
        return errors(network, test)["error"]

    torch.manual_seed(random_seed)
    designed = NETWORKS[name]()
    torch.manual_seed(random_seed)
    longer = NETWORKS[name]()
    seed = allocator.seed(designed, NEURONS, weights="reset", example_inputs=example, seed=random_seed)
    found = {"designed": trained(designed, EPOCHS), "designed, as long": trained(longer, 2 * EPOCHS)}
    found["seed"] = trained(seed.model, EPOCHS)
    learned = allocator.allocate(
        seed.model, flops=seed.flops_before, weights="reset", example_inputs=example, seed=random_seed, **RULE
    )
    found["learned"] = trained(learned.model, EPOCHS)
    blocks = [block for block in learned.allocation.blocks if block["kind"] == "concat"]
    return {
        "network": name,
        "random seed": random_seed,
        "flops": {"designed": seed.flops_before, "seed": seed.flops_after, "learned": learned.flops_after},
        "error": found,
        "seed": {block["name"]: {b["name"]: b["before"] for b in block["branches"]} for block in blocks},
        "learned": {block["name"]: {b["name"]: b["after"] for b in block["branches"]} for block in blocks},
    }


def measure() -> dict[str, Any]:
    """All networks and random seeds."""
    parts, rows = load(), []
    for name in NETWORKS:
        for random_seed in range(SEEDS):
            rows.append(learn(name, random_seed, parts))
            print(name, random_seed, rows[-1]["error"], flush=True)
    return {"epochs": EPOCHS, "neurons": NEURONS, "environment": environment(), "rows": rows}


def markdown(data: dict[str, Any]) -> str:
    """What came out, in words."""
    lines = []
    for name in NETWORKS:
        rows = [row for row in data["rows"] if row["network"] == name]
        for way in rows[0]["error"]:
            each = [100 * row["error"][way] for row in rows]
            flops = rows[0]["flops"].get(way, rows[0]["flops"]["designed"])
            lines.append([name, way, f"{flops:,}", f"{statistics.mean(each):.1f}", " ".join(f"{e:.1f}" for e in each)])
    return "\n\n".join(
        [
            "# What seeds learn",
            "Made by `python -m benchmarks.seeds`.",
            f"A seed gives every branch of a block {data['neurons']} of the widest one's neurons. It is trained, "
            "allocated to the FLOPs of the network as it was designed, by ScaleNet's rule (`bn_scale`, `per_block`), "
            f"and what is left is trained from scratch; {data['epochs']} epochs each time, on digits of many sizes "
            "among pieces of others (the task of [the comparison of choices](quality.md)). *As long* is the designed "
            "network with as many epochs as seed and result together. With so few random seeds, differences below a "
            "point or two are noise.",
            table(["network", "way", "FLOPs", "test error, %", "by random seed"], lines),
            "![Share of each branch, block by block, in the seed and as learned](../../docs/img/seeds.svg)",
            where(data["environment"]),
        ]
    )


def draw(data: dict[str, Any]) -> None:
    """Draw what the first random seed of each network learned, for light and for dark pages."""
    panels = []
    for name in NETWORKS:
        row = next(row for row in data["rows"] if row["network"] == name)
        for state in ("seed", "learned"):
            parts = {block: dict(zip("ABCD", row[state][block].values())) for block in row[state]}
            panels.append(Panel(f"{name}, {state}: {row['flops'][state] / 1e6:.1f} MFLOPs", parts))
    for name, dark in PICTURES.items():
        draw_shares(panels, ROOT / "docs" / "img" / name, dark=dark)
        print(f"wrote docs/img/{name}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, or draw again."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seeds", description=__doc__.split("\n")[0])
    parser.add_argument("--draw", action="store_true", help="draw from results/seeds.json, without training")
    data = read("seeds") if parser.parse_args(arguments).draw else measure()
    write("seeds", data, markdown(data))
    draw(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
