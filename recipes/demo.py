"""The main job on real data: train a seed, allocate its neurons, fine-tune, compare.

Run as `python -m allocator.recipes.demo [--out DIR] [--quick]`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import allocator
from allocator.disk import make_folder
from allocator.recipes import digits
from allocator.recipes.scalenet import scalenet_seed, scalenet_small_seed
from allocator.recipes.training import evaluate, train_network
from allocator.reporting.pictures import Panel, draw_shares

FULL_SIZE_BUDGET = 3.84e9
EXPECTED = "about two minutes of computing (100 s where it was measured, on one thread)"
RULE: dict[str, Any] = {"criterion": "bn_scale", "scope": "narrowest"}
"""ScaleNet's rule for a seed: what its batch norms have learned, where the branches of its blocks meet."""


@dataclass(frozen=True)
class Effort:
    """How much is trained on.

    Attributes:
        copies: how often each source digit is drawn, in training and in test.
        seed_epochs: epochs for the seed network.
        tuning_epochs: epochs for each allocated network.
        test_share: share of the source digits held out for the test.
    """

    copies: tuple[int, int] = (4, 4)
    seed_epochs: int = 4
    tuning_epochs: int = 2
    test_share: float = 0.2


QUICK = Effort(copies=(1, 1), seed_epochs=3, tuning_epochs=1, test_share=0.7)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m allocator.recipes.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="train for seconds: shows the flow, learns little")
    options = parser.parse_args(arguments)
    console = Console()
    start = time.perf_counter()
    make_folder(options.out)
    expected = "about half a minute" if options.quick else EXPECTED
    console.print(f"Training, allocating and comparing take {expected}; nothing is downloaded.")
    run_digits(options.out, QUICK if options.quick else Effort(), console)
    run_full_size(console)
    console.print(f"\nThe whole demo took {time.perf_counter() - start:.0f} s.")
    return 0


def run_digits(out: Path, effort: Effort, console: Console) -> None:
    """Train a small seed on digits, allocate it to half its FLOPs, fine-tune, compare and save."""
    console.rule("1. A seed network, trained on digits of varying size and place")
    training_data, test_data = digits.load(side=48, sizes=(8, 40), copies=effort.copies, test_share=effort.test_share)
    console.print(
        f"{len(training_data)} images for training, {len(test_data)} for the test, 48x48 pixels, digits 8 to "
        "40 pixels high; no handwritten digit is in both."
    )
    torch.manual_seed(0)
    seed = scalenet_small_seed(image_side=48, blocks=(2, 2, 2))
    train_network(seed, training_data, effort.seed_epochs, 0.1, description="seed network", console=console)

    console.rule("2. The same network with half the FLOPs")
    example = test_data.images[:1]
    learned = allocator.allocate(seed, flops="50%", example_inputs=example, policy="per_block", **RULE)
    even = allocator.allocate(seed, flops="50%", example_inputs=example, policy="uniform", **RULE)
    before_tuning = evaluate(learned.model, test_data)  # now, as the model itself is tuned below
    for name, result in (("learned allocation", learned), ("even allocation", even)):
        train_network(result.model, training_data, effort.tuning_epochs, 0.05, description=name, console=console)
    console.print(learned.report())

    accuracies = [evaluate(model, test_data) for model in (seed, learned.model, even.model)]
    _print_comparison(console, seed, learned, even, accuracies, before_tuning)
    distinct = len(test_data.sources.unique())
    console.print(f"One run on {distinct} distinct test digits: differences of a point or two are noise.", style="dim")
    _save(console, out, learned, even, accuracies)


def _print_comparison(
    console: Console, seed: nn.Module, learned: Any, even: Any, accuracies: list[float], before: float
) -> None:
    table = Table(title="Test accuracy")
    for header in ("network", "FLOPs", "parameters", "accuracy"):
        table.add_column(header, justify="left" if header == "network" else "right")
    rows = [
        ("seed", learned.flops_before, seed, accuracies[0]),
        ("learned, before fine-tuning", learned.flops_after, learned.model, before),
        ("learned, fine-tuned", learned.flops_after, learned.model, accuracies[1]),
        ("even, fine-tuned", even.flops_after, even.model, accuracies[2]),
    ]
    for name, flops, model, accuracy in rows:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        table.add_row(name, f"{flops:,}", f"{parameters:,}", f"{accuracy:.1%}")
    console.print(table)


def _save(console: Console, out: Path, learned: Any, even: Any, accuracies: list[float]) -> None:
    files = [out / "scalenet-digits.safetensors", out / "allocation.json", out / "shares.png"]
    allocator.save(learned, files[0])
    learned.allocation.save(files[1])
    panels = []
    for name, result, accuracy in (("Learned", learned, accuracies[1]), ("Even", even, accuracies[2])):
        title = f"{name}: {result.flops_after / 1e6:.2f} MFLOPs, {accuracy:.1%} right"
        panels.append(Panel(title, result.model.parts()))
    draw_shares(panels, files[2])
    console.print("\nLeft on disk:")
    for path, what in zip(files, ("the fine-tuned model", "its allocation", "shares per block"), strict=True):
        console.print(f"  {path}  ({what})", soft_wrap=True, highlight=False)


def run_full_size(console: Console) -> None:
    """Allocate a full-size ScaleNet-50 seed to the released network's FLOPs and print the report."""
    console.rule("3. The same call on a full-size ScaleNet-50 seed")
    console.print(
        "This seed is not trained, so all its batch-norm scales are 1 and rank nothing. To have something to "
        "rank, they are drawn at random here (fixed seed): the figures show the flow and its speed, and "
        "nothing learned."
    )
    torch.manual_seed(0)
    seed = randomise_norms(scalenet_seed(50), seed=0)
    start = time.perf_counter()
    result = allocator.allocate(seed, flops=FULL_SIZE_BUDGET, policy="per_block", **RULE)
    seconds = time.perf_counter() - start
    console.print(result.report())
    console.print(
        f"{result.flops_before:,} -> {result.flops_after:,} FLOPs "
        f"({FULL_SIZE_BUDGET - result.flops_after:,.0f} under the budget) in {seconds:.1f} s."
    )


def randomise_norms(model: nn.Module, seed: int) -> nn.Module:
    """Draw the scale of every batch norm from 0.2 to 1.5, in place; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 1.5, generator=generator)
    return model


if __name__ == "__main__":
    raise SystemExit(main())
