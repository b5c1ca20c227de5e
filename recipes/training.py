"""Train and evaluate a classifier on tensors: SGD, cosine schedule, label smoothing."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from allocator.errors import AllocatorError, InputError


class NonFiniteLossError(AllocatorError, ArithmeticError):
    """The loss became NaN or infinite, so training stopped."""


class Data(Protocol):
    """What training needs of a data set: `images` (N, C, H, W) float and `labels` (N,) int64."""

    @property
    def images(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...


@dataclass
class History:
    """What happened in training, one entry per epoch.

    Attributes:
        loss: mean training loss.
        accuracy: share of the training images, as they were met, that were classified right.
        seconds: wall time of the whole training.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: float = 0.0


def train(
    model: nn.Module,
    data: Data,
    epochs: int,
    lr: float = 0.1,
    *,
    batch_size: int = 64,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    label_smoothing: float = 0.1,
    seed: int = 0,
    progress: bool = True,
    description: str = "training",
    console: Console | None = None,
) -> History:
    """Train `model` in place, on the device its parameters are on, and leave it in eval mode.

    Stochastic gradient descent with Nesterov momentum; the learning rate rises over the first twentieth of
    the steps and then falls to zero along a half cosine. The last, incomplete batch of an epoch is left out
    where there is another. The same seed, model and data give the same weights on the CPU.

    Args:
        model: takes (B, C, H, W), gives (B, classes).
        data: images and labels.
        epochs: passes over the data.
        lr: highest learning rate.
        batch_size: images per step.
        momentum: of the gradient.
        weight_decay: of every parameter, as in the usual ResNet recipe.
        label_smoothing: probability spread over all classes.
        seed: decides the order of the images, and dropout.
        progress: show a bar with loss, accuracy and time left.
        description: what the bar says in front.
        console: where the bar goes; the terminal by default.

    Raises:
        InputError: no images, or as many labels as images are not given, or epochs is below 1.
        NonFiniteLossError: the loss is NaN or infinite; the weights are those before that step's update.
    """
    count = len(data.images)
    if count == 0 or count != len(data.labels) or epochs < 1 or batch_size < 1:
        raise InputError(
            f"expected images with a label each, and epochs and batch_size above 0, got {count} images, "
            f"{len(data.labels)} labels, epochs={epochs}, batch_size={batch_size}"
        )
    device = next(model.parameters()).device
    images, labels = data.images.to(device), data.labels.to(device)
    steps = max(1, count // batch_size)
    optimiser = torch.optim.SGD(
        model.parameters(), lr, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: cosine(step, epochs * steps))
    history, start = History(), time.perf_counter()
    torch.manual_seed(seed)
    order_generator = torch.Generator().manual_seed(seed)
    model.train()
    with _bar(progress, console) as bar:
        task = bar.add_task(description, total=epochs * steps, loss=math.nan, accuracy=0.0)
        for _ in range(epochs):
            order = torch.randperm(count, generator=order_generator).to(device)
            loss_sum, right, seen = 0.0, 0, 0
            for batch in order[: steps * batch_size].split(batch_size):
                loss, hits = _step(model, optimiser, images[batch], labels[batch], label_smoothing)
                schedule.step()
                loss_sum, right, seen = loss_sum + loss * len(batch), right + hits, seen + len(batch)
                bar.update(task, advance=1, loss=loss_sum / seen, accuracy=right / seen)
            history.loss.append(loss_sum / seen)
            history.accuracy.append(right / seen)
    model.eval()
    history.seconds = time.perf_counter() - start
    return history


def _step(
    model: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor, smoothing: float
) -> tuple[float, int]:
    """One update; returns the loss and how many of the batch were classified right."""
    logits = model(images)
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    value = loss.item()
    if not math.isfinite(value):
        rate = optimiser.param_groups[0]["lr"]
        raise NonFiniteLossError(
            f"the loss became {value} at learning rate {rate:.3g}; try a lower one, and check the images "
            "for values that are not finite"
        )
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return value, int((logits.argmax(1) == labels).sum())


def cosine(step: int, total: int, warmup_share: float = 0.05) -> float:
    """Share of the highest learning rate at `step` of `total`: a linear rise, then a half cosine to zero."""
    warmup = round(warmup_share * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, batch_size: int = 256) -> float:
    """Share of the images classified right, in 0..1; the model's train or eval mode is left as it was."""
    if len(data.images) == 0:
        raise InputError("expected images to evaluate on, got none")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        right = sum(
            int((model(images.to(device)).argmax(1).cpu() == labels.cpu()).sum())
            for images, labels in zip(data.images.split(batch_size), data.labels.split(batch_size), strict=True)
        )
    finally:
        model.train(was_training)
    return right / len(data.images)


def _bar(shown: bool, console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]:.1%}  left"),
        TimeRemainingColumn(),
        console=console,
        disable=not shown,
    )
