"""The training loop: stochastic gradient descent, on one process or on many; what is learned is up to its task.

What a run does depends on nothing but its options, its random seed and the number of the update: the order
of the images, dropout and the learning rate are all computed from these, and `Fit.state_dict` holds the rest.
So a run that is stopped and goes on gives the weights of one that was never stopped, bit for bit on the CPU.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from allocator.errors import AllocatorError, InputError
from allocator.recipes.data import Batch, Batches, Samples, Tensors, TestBatches, number
from allocator.recipes.engine import Engine, OneProcess, average_buffers, seed_torch, summed
from allocator.recipes.sections import Training
from allocator.recipes.tasks import Classification, Task, accuracy_on

WARMUP_SHARE = 0.05


class NonFiniteLossError(AllocatorError, ArithmeticError):
    """The loss or a weight became NaN or infinite, so training stopped."""


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
        accuracy: share of the training images, as they were met, that were classified right; of classifiers.
        test: figures of the test images by name, where they were looked at.
        seconds: wall time of the whole training.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    test: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Tally:
    """Sums over the images of an epoch that were met so far."""

    loss: float = 0.0
    right: int = 0
    seen: int = 0

    def means(self) -> tuple[float, float]:
        """Loss and accuracy."""
        return self.loss / max(1, self.seen), self.right / max(1, self.seen)


class Fit:
    """The training of one network: `run` takes it from where it is to its end.

    Attributes:
        module: the network, trained in place.
        step: updates done.
        history: of the epochs done.
        tally: of the epoch that is under way.
        corrupt: images that could not be read.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Batches,
        options: Training,
        engine: Engine,
        seed: int = 0,
        name: str = "",
        task: Task | None = None,
    ):
        self.module, self.batches, self.options, self.engine = module, batches, options, engine
        self.seed, self.name, self.task = seed, name, task or Classification()
        # Made ahead of `prepare`, whose wrappers a copy of the module would have inside.
        self.average: AveragedModel | None = None
        if options.average is not None:
            ema = get_ema_multi_avg_fn(options.average)
            self.average = AveragedModel(module, engine.device, multi_avg_fn=ema, use_buffers=True)
        optimiser = torch.optim.SGD(
            module.parameters(),
            options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            nesterov=options.nesterov and options.momentum > 0,
        )
        self.model, self.optimiser = engine.prepare(module, optimiser)
        self.scales = []
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.affine:
                self.scales.append(layer.weight)
        self.step, self.tally, self.history = 0, Tally(), History()
        self.corrupt: set[str] = set()

    @property
    def total(self) -> int:
        """Updates from the beginning to the end."""
        return self.options.epochs * len(self.batches)

    @property
    def rate(self) -> float:
        """Learning rate of the next update."""
        return self.options.lr * rate_share(self.options, self.step, len(self.batches))

    def run(self, after_update: Callable[[Fit], None], after_epoch: Callable[[Fit], None]) -> None:
        """Train from the update that it stands at to the end.

        Args:
            after_update: called after each update but the last one of an epoch.
            after_epoch: called after each epoch, when `history` has its entry.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; the weights are those before that update.
            DataError: an image cannot be read, and the samples say to stop.
        """
        # As if it had never stopped: the seconds of earlier sittings count.
        start = time.perf_counter() - self.history.seconds
        per_epoch = len(self.batches)
        self.model.train()
        while self.step < self.total:
            epoch, position = divmod(self.step, per_epoch)
            for chunks in self.batches.epoch(epoch, position):
                self._update(chunks)
                self.history.seconds = time.perf_counter() - start
                if self.step % per_epoch:
                    after_update(self)
            self._end_epoch()
            after_epoch(self)
            self.model.train()
        self.model.eval()

    def _update(self, chunks: list[Batch]) -> None:
        """One step of the optimiser, on the gradients of all chunks."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate
        self.optimiser.zero_grad(set_to_none=True)
        for i, chunk in enumerate(chunks):
            last = i == len(chunks) - 1
            # By the chunk's place in the whole batch, so that dropout is the same on however many processes.
            place = i * self.engine.num_processes + self.engine.process_index
            seed_torch(number(self.seed, self.step, place), self.engine.device)
            # Gradients are exchanged once per update, with those of the last chunk.
            with contextlib.nullcontext() if last else self.engine.no_sync(self.model):
                self.engine.backward(self._loss(chunk) / len(chunks))
        if self.options.clip is not None:
            self.engine.clip_grad_norm_(self.module.parameters(), self.options.clip)
        self.optimiser.step()
        if self.average is not None:
            self.average.update_parameters(self.module)
        self.step += 1

    def _loss(self, chunk: Batch) -> Tensor:
        met = self.task.loss(self.model, chunk, self.engine.device, self.options)
        loss = met.loss
        if self.options.l1:
            loss = loss + self.options.l1 * torch.stack([scale.abs().sum() for scale in self.scales]).sum()
        value = loss.item()
        # Ahead of the backward pass: the weights are still those of the last good update.
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"the loss became {value} at learning rate {self.rate:.3g}, update {self.step + 1} of {self.total}; "
                "try a lower one, and check the images for values that are not finite"
            )
        self.tally.loss += value * met.images
        self.tally.right += met.right
        self.tally.seen += met.images
        self.corrupt |= set(chunk.corrupt)
        return loss

    def _end_epoch(self) -> None:
        loss, right, seen = summed([self.tally.loss, self.tally.right, self.tally.seen], self.engine)
        self.history.loss.append(loss / seen)
        if self.task.rated:
            self.history.accuracy.append(right / seen)
        self.tally = Tally()

    def figures(self) -> dict[str, float]:
        """Loss, and accuracy where there is one, of the epoch that is under way, or of the last one."""
        loss, accuracy = self.tally.means()
        if not self.tally.seen:
            # At the start of a run there is neither, and the bar wants figures.
            loss = self.history.loss[-1] if self.history.loss else math.nan
            accuracy = self.history.accuracy[-1] if self.history.accuracy else 0.0
        if not self.task.rated:
            return {"loss": loss}
        return {"loss": loss, "accuracy": accuracy}

    def result(self) -> nn.Module:
        """The network as it is now: the average of its weights where one is kept."""
        if self.average is None:
            return self.module
        return self.average.module

    def recalibrate(self) -> None:
        """Compute batch norm's statistics anew from `options.recalibrate` batches; their mean over processes."""
        # The epoch after the last: an order of its own, and images augmented in other ways than were learned from.
        batches = itertools.islice(self.batches.epoch(self.options.epochs), self.options.recalibrate)
        images = (chunk.images for chunks in batches for chunk in chunks)
        module = self.result()
        update_bn(images, module, self.engine.device)
        average_buffers(module, self.engine)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how it goes on, as tensors and plain data.

        Raises:
            NonFiniteLossError: a weight is NaN or infinite.
        """
        # Each process has seen other images; going on from one file, all have the same statistics.
        average_buffers(self.module, self.engine)
        scaler = getattr(self.engine, "scaler", None)  # accelerate's, for gradients in fp16
        weights = self.module.state_dict()
        for name, tensor in weights.items():
            if not torch.isfinite(tensor).all():
                raise NonFiniteLossError(f"{name} became NaN or infinite by update {self.step}; try a lower rate")
        return {
            "step": self.step,
            "tally": asdict(self.tally),
            "history": asdict(self.history),
            "corrupt": sorted(self.corrupt),
            "model": weights,
            "optimiser": self.optimiser.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.module.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        scaler = getattr(self.engine, "scaler", None)
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])
        self.step, self.corrupt = state["step"], set(state["corrupt"])
        self.tally, self.history = Tally(**state["tally"]), History(**state["history"])


def rate_share(options: Training, step: int, per_epoch: int) -> float:
    """Share of the highest learning rate at update `step`: a linear rise, then the schedule."""
    warmup, total = round(options.warmup * per_epoch), options.epochs * per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if options.schedule == "steps":
        passed = sum(step >= round(epoch * per_epoch) for epoch in options.milestones)
        return options.gamma**passed
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@contextlib.contextmanager
def training_bar(
    fit: Fit, description: str, shown: bool = True, console: Console | None = None
) -> Iterator[Callable[[Fit], None]]:
    """Show a bar with the fit's figures and time left; yields what brings it up to date."""
    bar = Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[figures]}  left"),
        TimeRemainingColumn(),
        console=console,
        disable=not shown,
    )
    with bar:
        task = bar.add_task(description, total=fit.total, completed=fit.step, figures=as_text(fit.figures()))

        def update(current: Fit) -> None:
            bar.update(task, completed=current.step, figures=as_text(current.figures()))

        yield update


@contextlib.contextmanager
def training_lines(fit: Fit, description: str, console: Console) -> Iterator[Callable[[Fit], None]]:
    """For a log: a line at the end of every epoch with figures, seconds, and how many are left at this pace."""
    per_epoch, start, began = len(fit.batches), time.perf_counter(), fit.step

    def update(current: Fit) -> None:
        if current.step % per_epoch:
            return
        passed = time.perf_counter() - start
        left = passed / max(1, current.step - began) * (current.total - current.step)
        said = f"{description}: epoch {current.step // per_epoch} of {current.options.epochs}, "
        said += f"{as_text(current.figures())}, {passed:.0f} s"
        if left:
            said += f", about {left:.0f} s left"
        console.print(said, highlight=False, soft_wrap=True)

    yield update


def as_text(figures: Mapping[str, float]) -> str:
    """`loss 0.123  accuracy 45.6%`: a loss as it is, all else as a share."""
    texts = []
    for key, value in figures.items():
        texts.append(f"{key} {value:.3f}" if key == "loss" else f"{key} {value:.1%}")
    return "  ".join(texts)


# ------------------------------------------------------------------------------------------------- on tensors


def train_network(
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
    """Train `model` in place on tensors, on the device its parameters are on, and leave it in eval mode.

    Stochastic gradient descent with Nesterov momentum; the learning rate rises over the first twentieth of
    the updates and then falls to zero along a half cosine. The last, incomplete batch of an epoch is left out
    where there is another. The same seed, model and data give the same weights on the CPU.
    Its short name is `training.train`.

    Args:
        model: takes (B, C, H, W), gives (B, classes).
        data: images and labels.
        epochs: passes over the data.
        lr: highest learning rate.
        batch_size: images per update.
        momentum: of the gradient.
        weight_decay: of every parameter, as in the usual ResNet recipe.
        label_smoothing: probability spread over all classes.
        seed: decides the order of the images, and dropout.
        progress: show a bar with loss, accuracy and time left.
        description: what the bar says in front.
        console: where the bar goes; the terminal by default. One that is no terminal gets a line per epoch instead.

    Raises:
        InputError: no images, or as many labels as images are not given, or epochs is below 1.
        NonFiniteLossError: the loss is NaN or infinite; the weights are those before that update.
    """
    _check_labelled(data, epochs, batch_size)
    options = Training(
        epochs,
        lr,
        batch_size,
        warmup=WARMUP_SHARE * epochs,
        momentum=momentum,
        weight_decay=weight_decay,
        label_smoothing=label_smoothing,
    )
    batches = Batches(Samples(Tensors(data.images, data.labels)), batch_size, seed=seed)
    fit = Fit(model, batches, options, OneProcess(next(model.parameters()).device), seed)
    shown = training_bar(fit, description, progress, console)
    if progress and console is not None and not console.is_terminal:
        shown = training_lines(fit, description, console)
    with shown as show:
        fit.run(show, show)
    return fit.history


def _check_labelled(data: Data, epochs: int, batch_size: int) -> None:
    count = len(data.images)
    if count == 0 or count != len(data.labels) or epochs < 1 or batch_size < 1:
        raise InputError(
            f"expected images with a label each, and epochs and batch_size above 0, got {count} images, "
            f"{len(data.labels)} labels, epochs={epochs}, batch_size={batch_size}"
        )


# A short name for `training.train(model, ...)`. `allocator.recipes.train(config)` is a whole run, from seed to result.
train = train_network


def evaluate(model: nn.Module, data: Data, batch_size: int = 256) -> float:
    """Share of the images classified right, in 0..1; the model's train or eval mode is left as it was."""
    if len(data.images) == 0:
        raise InputError("expected images to evaluate on, got none")
    batches = TestBatches(Samples(Tensors(data.images, data.labels)), batch_size)
    return accuracy_on(model, batches, OneProcess(next(model.parameters()).device))
