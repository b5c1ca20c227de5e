"""A plain network on scikit-learn's digits, narrowed alike in every layer and recovered on 256 of its images.

Prints the share of right answers as cut, after each way to recover, and of the full network, in the mean over random
seeds: `python -m benchmarks.quality.digits`.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import allocator
from allocator.settings import METHODS
from benchmarks.common import table  # sets one thread before torch is imported

from .networks import conv

WIDTHS = (32, 32, 64, 64, 64)
EPOCHS, BATCH, IMAGES, SEEDS = 20, 64, 256, 5
SHARES = (0.5, 0.35)


def network() -> nn.Module:
    """Five convolutions of 3x3 with batch norms, and a classifier."""
    layers, width = [], 1
    for place, wide in enumerate(WIDTHS):
        layers.append(conv(width, wide, 3, 2 if place == 2 else 1))
        width = wide
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 8, 8) and classes to train on, and to test on: a fifth, drawn from the seed."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    classes = torch.from_numpy(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return images[train], classes[train], images[test], classes[test]


def train(model: nn.Module, images: Tensor, classes: Tensor, optimiser: torch.optim.Optimizer | None = None) -> None:
    """Stochastic gradient descent with momentum, or by another optimiser; one cosine."""
    steps = EPOCHS * (len(images) // BATCH)
    if optimiser is None:
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        loss = F.cross_entropy(model(images[chosen]), classes[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def right(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """Percent of right answers."""
    return 100 * float((model(images).argmax(1) == classes).float().mean())


def narrowed(model: nn.Module, image: Tensor, share: float) -> allocator.Result:
    """Every layer with this share of its channels, those of the largest weights."""
    graph = allocator.trace(model, image)
    kept = np.zeros(graph.size, dtype=bool)
    for branch in np.unique(graph.branch_of):
        (members,) = np.nonzero(graph.branch_of == branch)
        kept[members[: round(share * len(members))]] = True
    flops = graph.metric("flops").value(kept)
    return allocator.allocate(model, flops, policy="uniform", criterion="group_norm", example_inputs=image)


def measure(seed: int) -> dict[str, float]:
    """Percent right of one network, by share and method."""
    torch.manual_seed(seed)
    images, classes, *test = digits(seed)
    model = network()
    train(model, images, classes)
    found = {"full": right(model, *test)}
    for share in SHARES:
        result = narrowed(model, images[:1], share)
        found[f"{share:.0%} as cut"] = right(result.model, *test)
        for method in METHODS:
            recovered = allocator.recover(result, images[:IMAGES], method)  # type: ignore[arg-type]
            found[f"{share:.0%} {method}"] = right(recovered.model, *test)
    return found


def main() -> None:
    """Measure all seeds and print the table."""
    warnings.simplefilter("ignore")
    rows = [measure(seed) for seed in range(SEEDS)]
    of = {name: [row[name] for row in rows] for name in rows[0]}
    lines = [[name, f"{np.mean(each):.1f}", f"{min(each):.1f}"] for name, each in of.items()]
    print(table(["network", "right (%)", "least of the seeds"], lines))


if __name__ == "__main__":
    main()
