"""What a network is trained for: its data, its loss and its evaluation. The training loop does not know which."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import allocator
from allocator.cost.fvcore import fvcore_flops
from allocator.disk import shorten
from allocator.errors import ConfigurationError, DataError, FileError, InputError
from allocator.recipes.data import Batch, DataSets, TestBatches, number, open_data
from allocator.recipes.engine import Engine, summed
from allocator.recipes.sections import Config, Training
from allocator.tracing.inputs import as_inputs


@dataclass(frozen=True)
class Met:
    """What one batch gave: its mean loss, how many images it had, and how many of them were classified right."""

    loss: Tensor
    images: int
    right: int = 0


class Task(Protocol):
    """What a training run asks of a task.

    Attributes:
        rated: whether an image is either right or wrong, so that training has an accuracy.
        test_batch: images per forward of the evaluation.
        protected: patterns of modules that allocation leaves alone, as for `allocator.allocate(exclude=...)`.
    """

    rated: bool
    test_batch: int
    protected: tuple[str, ...]

    def open(self, config: Config) -> DataSets:
        """The data; raises DataError where they are missing or do not fit."""

    def build(self, config: Config) -> nn.Module:
        """The network that a run starts from; raises as `build_network`."""

    def example(self, network: nn.Module, data: DataSets) -> Any:
        """Example inputs for `allocator.allocate`; raises DataError where network and data do not fit."""

    def loss(self, model: nn.Module, batch: Batch, device: torch.device, options: Training) -> Met:
        """The loss of a batch."""

    def evaluate(self, model: nn.Module, batches: TestBatches, engine: Engine, corrupt: set[str]) -> dict[str, float]:
        """Figures by name, each from 0 to 1, over all processes; adds the images that cannot be read to `corrupt`."""

    def flops(self, network: nn.Module, example: Any) -> int:
        """FLOPs for one image, as fvcore counts."""


class Classification:
    """One class per image; the network gives a score per class."""

    rated = True
    test_batch = 256
    protected: tuple[str, ...] = ()

    def open(self, config: Config) -> DataSets:
        return open_data(config.data, config.random_seed)

    def build(self, config: Config) -> nn.Module:
        return build_network(config)

    def example(self, network: nn.Module, data: DataSets) -> Tensor:
        return check_network(network, data)

    def loss(self, model: nn.Module, batch: Batch, device: torch.device, options: Training) -> Met:
        labels = batch.labels.to(device, non_blocking=True)
        logits = logits_of(model(batch.images.to(device, non_blocking=True)))
        loss = F.cross_entropy(logits, labels, label_smoothing=options.label_smoothing)
        return Met(loss, len(labels), int((logits.argmax(1) == labels).sum()))

    def evaluate(self, model: nn.Module, batches: TestBatches, engine: Engine, corrupt: set[str]) -> dict[str, float]:
        return {"accuracy": accuracy_on(model, batches, engine, corrupt)}

    def flops(self, network: nn.Module, example: Any) -> int:
        return fvcore_flops(network, as_inputs(example, network))[0]


def logits_of(output: Any) -> Tensor:
    """The scores (N, classes) in what a classifier returned: the tensor, or its `logits`."""
    # GoogLeNet and Inception give their auxiliary scores beside them in training, transformers a record of their own.
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.dim() == 2:
        return logits
    got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
    raise InputError(f"expected the network to give scores of shape (images, classes), got {got}")


def classification_loss(output: Any, labels: Tensor) -> Tensor:
    """Mean cross-entropy of a classifier's scores, for criteria that look at images."""
    return F.cross_entropy(logits_of(output), labels)


@torch.no_grad()
def accuracy_on(model: nn.Module, batches: Iterable[Batch], engine: Engine, corrupt: set[str] | None = None) -> float:
    """Share of the images classified right, over all processes; the mode is left as it was.

    Images that cannot be read do not count; their names are added to `corrupt`.
    """
    was_training = model.training
    model.eval()
    try:
        right, seen = 0.0, 0.0
        for batch in batches:
            if corrupt is not None:
                corrupt.update(batch.corrupt)
            if len(batch.labels):
                logits = logits_of(model(batch.images.to(engine.device)))
                right += int((logits.argmax(1).cpu() == batch.labels.cpu()).sum())
                seen += len(batch.labels)
    finally:
        model.train(was_training)
    right, seen = summed([right, seen], engine)
    return right / max(1, seen)


def build_network(config: Config, allocation: allocator.Allocation | None = None) -> nn.Module:
    """The network that a run starts from, with the allocation and the weights it starts from.

    Raises:
        UnknownNameError: no such network, recipe or depth; near ones are named.
        ConfigurationError: its constructor does not take the arguments.
        AllocationMismatchError: the allocation is not one of this network.
        FileError: the weights cannot be read, or are of another network.
    """
    network = config.network
    torch.manual_seed(number(config.random_seed))
    try:
        model = allocator.build(network.name, **network.arguments)
    except TypeError as error:
        raise ConfigurationError(f"network.arguments do not fit {network.name}: {error}") from error
    if allocation is not None:
        model = allocator.apply(model, allocation, weights="reset")
    if network.weights is not None:
        # A saved result says itself what it was built from; other files hold weights and no network.
        arch = None if network.weights.endswith(".safetensors") else network.name
        weights = allocator.load_model(network.weights, arch=arch).state_dict()
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise FileError(
                f"{network.weights} holds weights of another network: {shorten(str(error), 400)}"
            ) from error
    return model


def check_network(network: nn.Module, data: DataSets) -> Tensor:
    """See that the network takes the images and gives a score per class; returns zeros like one image.

    Raises:
        DataError: it does not; says what is expected.
    """
    # A batch and not an image alone, which may be one that cannot be read.
    image = next(iter(TestBatches(data.test, batch_size=8))).images[:1]
    try:
        with torch.no_grad():
            scores = logits_of(network.eval()(image)).shape[1]
    except RuntimeError as error:
        raise DataError(f"the network does not take images of shape {tuple(image.shape)}: {error}") from error
    if data.classes is not None and scores != data.classes:
        raise DataError(
            f"the network gives {scores} scores, the data have {data.classes} classes: "
            f"set network.arguments.num_classes={data.classes}"
        )
    return torch.zeros_like(image)
