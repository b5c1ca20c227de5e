"""Training, statistics and errors: everything done to a network, the same for all arms."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from .task import Part, shifted

BATCH = 64


def train(model: nn.Module, part: Part, epochs: float, lr: float, seed: int, warm_up: float = 0.0) -> None:
    """Stochastic gradient descent with momentum, or AdamW for transformers; parts of an epoch are allowed.

    The rate falls along one cosine, after it has risen along another for `warm_up`, a share of the steps.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = max(round(epochs * len(part) / BATCH), 1)
    transformer = any(isinstance(module, nn.LayerNorm) for module in model.modules())
    optimiser: torch.optim.Optimizer
    if transformer:
        optimiser = torch.optim.AdamW(model.parameters(), lr=lr / 50, weight_decay=0.05)
    else:
        optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule: torch.optim.lr_scheduler.LRScheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    if warm_up:
        rate = optimiser.param_groups[0]["lr"]
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, rate, total_steps=steps, pct_start=warm_up, cycle_momentum=False
        )
    model.train()
    order = torch.randperm(len(part), generator=generator)
    place = 0
    for _ in range(steps):
        if place + BATCH > len(order):
            order, place = torch.randperm(len(part), generator=generator), 0
        chosen = order[place : place + BATCH]
        place += BATCH
        loss = F.cross_entropy(model(shifted(part.images[chosen], generator)), part.labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def errors(model: nn.Module, part: Part) -> dict[str, float]:
    """Share of wrong classes, and cross-entropy."""
    model.eval()
    wrong, loss = 0, 0.0
    for start in range(0, len(part), 500):
        logits = model(part.images[start : start + 500])
        labels = part.labels[start : start + 500]
        wrong += int((logits.argmax(1) != labels).sum())
        loss += float(F.cross_entropy(logits.clamp(-1e4, 1e4), labels, reduction="sum"))
    return {"error": wrong / len(part), "loss": loss / len(part)}


@torch.no_grad()
def with_batch_norm_statistics(model: nn.Module, part: Part) -> nn.Module:
    """A copy whose batch norms hold the statistics of the calibration images."""
    model = copy.deepcopy(model)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.eval()
    for norm in norms:
        norm.train()
    for start in range(0, len(part), 125):
        model(part.images[start : start + 125])
    return model.eval()
