"""Images for training and test: which there are, how they are read, and in what order.

Everything random about an image (its place in the order, its augmentation) follows from the random seed, the
epoch and the image's index, so that a run goes on in the middle of an epoch as if it had not stopped, with
any number of processes and workers.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from allocator.errors import DataError, InputError, MissingPackageError, did_you_mean
from allocator.recipes.sections import Data

Image = Any
Key = tuple[int, int]
"""Epoch and index of an image."""


class Source(Protocol):
    """A data set as torchvision's are: an image, (C, H, W) or PIL's, and its class (or what is in it)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image, Any]: ...


class Batch(NamedTuple):
    """Images, what is in them, and the names of those that could not be read.

    For classifiers, `images` is a tensor (N, C, H, W) and `labels` one of classes (N,). For detectors they are
    lists: images (3, H, W) of any sizes, and a `detection.Target` each.
    """

    images: Any
    labels: Any
    corrupt: tuple[str, ...] = ()


class Tensors:
    """Images that are tensors already, (N, C, H, W), with their classes (N,)."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


@dataclass
class Samples(Dataset[Any]):
    """A source's images, augmented, by epoch and index.

    Attributes:
        source: what is read.
        transform: makes a (C, H, W) tensor; may draw from torch's random state.
        seed: of what it draws.
        corrupt: what becomes of an image that cannot be read: "stop" ends the run, "replace" takes the next
            one that can be read, "drop" leaves it out.
    """

    source: Source
    transform: Callable[[Image], Tensor] | None = None
    seed: int = 0
    corrupt: str = "stop"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> tuple[Tensor | None, Any, tuple[str, ...]]:
        """Image (None for a gap), class, and what could not be read, with the reason."""
        epoch, index = key
        unread: tuple[str, ...] = ()
        # In training the next one that can be read takes the place, so that batches are as large as ever. In the test
        # an image that counts twice would falsify the figures, so there it is a gap.
        for candidate in range(index, index + len(self.source)):
            place = candidate % len(self.source)
            try:
                image, label = self.read(place, number(self.seed, epoch, place))
                return image, label, unread
            except (OSError, SyntaxError, ValueError) as error:  # what PIL raises
                unread = (*unread, f"{self.name(place)} ({' '.join(str(error).split())})")
            if self.corrupt != "replace":
                break
        # Not raised here: from a worker, the message would come wrapped in the worker's whole traceback.
        return None, -1, unread

    def read(self, index: int, seed: int) -> tuple[Tensor, Any]:
        """One image, augmented as the seed says, and its class."""
        if self.transform is None:
            return self.source[index]
        # torchvision's transforms draw from torch's own random state and take no generator.
        torch.default_generator.manual_seed(seed)
        image, label = self.source[index]
        return self.transform(image), label

    def collate(self, samples: Sequence[tuple[Tensor | None, Any, tuple[str, ...]]]) -> Batch:
        """One batch of images of one shape; gaps are left out."""
        images, labels, unread = without_gaps(samples)
        if not images:
            return Batch(torch.empty(0), torch.tensor(labels), unread)
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise DataError(f"images differ in shape ({', '.join(map(str, sorted(shapes)))}): set data.side")
        return Batch(torch.stack(images), torch.tensor(labels), unread)

    def name(self, index: int) -> str:
        """What an image is called: its file, or its number."""
        files = getattr(self.source, "samples", None)
        if not files:
            return f"image {index}"
        return str(files[index][0])

    def checked(self, batch: Batch) -> Batch:
        """The batch, unless an image in it ends the run.

        Raises:
            DataError: an image cannot be read, and `corrupt` is "stop"; or none of the batch can be.
        """
        if batch.corrupt and self.corrupt == "stop":
            raise DataError(
                f"cannot read {batch.corrupt[0]}; set data.check=true to have all such images listed, or "
                "data.corrupt=skip to go on without them"
            )
        if not len(batch.labels) and self.corrupt == "replace":
            raise DataError(f"none of the {len(self)} images can be read, such as {batch.corrupt[0]}")
        return batch


def number(*parts: int) -> int:
    """A seed in 0..2**32 that depends on all the parts, so that close parts give unlike ones."""
    # Not Python's hash, which is another in every process, nor a sum, which epoch 1, image 2 would share with 2 and 1.
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def without_gaps(
    samples: Sequence[tuple[Tensor | None, Any, tuple[str, ...]]],
) -> tuple[list[Tensor], list[Any], tuple[str, ...]]:
    """The images and the labels that could be read, and the names of what could not."""
    images, labels = [], []
    unread: list[str] = []
    for image, label, names in samples:
        # Also beside an image that was read: it may stand in the place of these.
        unread += names
        if image is not None:
            images.append(image)
            labels.append(label)
    return images, labels, tuple(unread)


class Chunks:
    """Lists of keys, cut from an order."""

    def __init__(self, epoch: int, order: Sequence[int] | np.ndarray, starts: Sequence[int], size: int):
        self.epoch, self.order, self.starts, self.size = epoch, order, starts, size

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in self.starts:
            # The epoch goes along: a worker has a copy of the samples, and sees nothing that is set on them later.
            yield [(self.epoch, int(index)) for index in self.order[start : start + self.size]]


@dataclass
class Batches:
    """What one process reads in an epoch of training.

    Batch `i` of an epoch is the same images whatever the number of processes. It is cut into chunks of
    `device_batch`; chunk `k` goes to process `k % world`. The last, incomplete batch of an epoch is left out
    where there is another.

    Attributes:
        samples: what is read.
        batch_size: images per update, over all processes.
        device_batch: images per forward; None for an equal share of the batch.
        seed: of the order.
        workers: processes that read.
        rank, world: this process, and how many there are.
        limit: updates per epoch at most.
    """

    samples: Samples
    batch_size: int
    device_batch: int | None = None
    seed: int = 0
    workers: int = 0
    rank: int = 0
    world: int = 1
    limit: int | None = None

    def __post_init__(self) -> None:
        self._generator, self._drawn = torch.Generator().manual_seed(self.seed), 0
        count = len(self.samples)
        # Few images are one small batch, where nothing else has been said of how a batch is to be cut.
        if count < self.batch_size and self.world == 1 and self.device_batch is None:
            self.batch_size = max(1, count)
        self.chunk = self.device_batch or self.batch_size // self.world
        if count < self.batch_size:
            raise InputError(f"{count} training images are fewer than one batch of {self.batch_size}")
        if self.chunk < 1 or self.batch_size % (self.chunk * self.world):
            raise InputError(
                f"a batch of {self.batch_size} images does not divide into equal shares of {self.chunk} images "
                f"on {self.world} processes: change batch_size or device_batch"
            )

    def __len__(self) -> int:
        """Updates per epoch."""
        whole = len(self.samples) // self.batch_size
        if self.limit is None:
            return whole
        return min(whole, self.limit)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[list[Batch]]:
        """The batches of an epoch from update `first` on; each as the chunks that fall to this process."""
        order = self._order(epoch)
        # Every process draws the whole order, and takes each `world`-th chunk of it: nothing has to be sent around.
        starts = range(first * self.batch_size, len(self) * self.batch_size, self.chunk)[self.rank :: self.world]
        loader = _loader(self.samples, Chunks(epoch, order, starts, self.chunk), self.workers)
        per_update = self.batch_size // (self.chunk * self.world)
        chunks = map(self.samples.checked, loader)
        for _ in range(first, len(self)):
            yield [next(chunks) for _ in range(per_update)]

    def _order(self, epoch: int) -> np.ndarray:
        """The epoch's permutation: of those that a generator with this seed gives, one after the other."""
        # A run that goes on at epoch 7 draws the seven orders before it, so that it gets that of a run in one go.
        if epoch < self._drawn:
            self._generator, self._drawn = torch.Generator().manual_seed(self.seed), 0
        while True:
            order = torch.randperm(len(self.samples), generator=self._generator)
            self._drawn += 1
            if self._drawn > epoch:
                return np.asarray(order)


@dataclass
class TestBatches:
    """What one process reads of the test images: every image falls to one process, in batches of its own.

    Attributes:
        samples, workers, rank, world: as for `Batches`.
        batch_size: images per forward.
        limit: batches at most.
    """

    __test__ = False  # pytest would take it for a test, by its name

    samples: Samples
    batch_size: int = 256
    workers: int = 0
    rank: int = 0
    world: int = 1
    limit: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        mine = range(self.rank, len(self.samples), self.world)
        starts = range(0, len(mine), self.batch_size)[: self.limit]
        return map(self.samples.checked, _loader(self.samples, Chunks(0, mine, starts, self.batch_size), self.workers))


def _loader(samples: Samples, chunks: Chunks, workers: int) -> DataLoader[Any]:
    return DataLoader(
        samples,
        batch_sampler=chunks,
        num_workers=workers,
        collate_fn=samples.collate,
        pin_memory=torch.cuda.is_available(),
    )


# ------------------------------------------------------------------------------------------------ from a config


@dataclass
class DataSets:
    """Training and test images of a run, and the names of their classes where they are known."""

    train: Samples
    test: Samples
    classes: int | None


def open_data(data: Data, seed: int) -> DataSets:
    """Open the data sets that a configuration names.

    Raises:
        DataError: missing or empty folders, or classes that differ between training and test; says which.
        MissingPackageError: scikit-learn or torchvision is needed and not installed.
    """
    if data.dataset == "folder":
        train, test, classes = _folders(data)
    elif data.dataset == "digits":
        train, test, classes = _digits(data)
    elif data.dataset.startswith("torchvision:"):
        train, test, classes = _torchvision(data)
    else:
        raise DataError(f"data.dataset: expected folder, digits or torchvision:NAME, got {data.dataset!r}")
    for what, source in (("training", train), ("test", test)):
        if len(source) == 0:
            raise DataError(f"there are no {what} images in {data.dataset}, root={data.root}")
    in_training, in_test = what_of_corrupt(data)
    return DataSets(
        Samples(train, transform(data, train=True), seed, in_training),
        Samples(test, transform(data, train=False), seed, in_test),
        classes,
    )


def what_of_corrupt(data: Data) -> tuple[str, str]:
    """What becomes of an image that cannot be read, in training and in the test; see `Samples.corrupt`."""
    if data.corrupt == "stop":
        return "stop", "stop"
    return "replace", "drop"


def _digits(data: Data) -> tuple[Source, Source, int | None]:
    from allocator.recipes import digits

    arguments: dict[str, Any] = {}
    for key, value in data.arguments.items():
        # YAML has no tuples.
        arguments[key] = tuple(value) if isinstance(value, list) else value
    try:
        splits = digits.load(**arguments)
    except TypeError as error:
        raise DataError(f"data.arguments do not fit digits.load: {error}") from error
    train, test = splits
    return Tensors(train.images, train.labels), Tensors(test.images, test.labels), 10


def _folders(data: Data) -> tuple[Source, Source, int | None]:
    if data.root is None:
        raise DataError("data.root is missing: the folder that holds train/CLASS/IMAGE and val/CLASS/IMAGE")
    datasets = _torchvision_datasets()
    sources = []
    for part in (data.train, data.test):
        folder = Path(data.root) / part
        if not os.path.isdir(folder):
            raise DataError(
                f"there is no folder {folder}: expected {data.train}/CLASS/IMAGE and {data.test}/CLASS/IMAGE"
            )
        try:
            sources.append(datasets.ImageFolder(str(folder), **data.arguments))
        except FileNotFoundError as error:
            raise DataError(f"{folder} has no images in the form CLASS/IMAGE: {error}") from error
    train, test = sources
    # ImageFolder numbers the classes that it finds in each folder, so that unlike ones would be confused in silence.
    if train.classes != test.classes:
        only = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(
            f"{data.train} has {len(train.classes)} classes and {data.test} {len(test.classes)}; "
            f"not in both: {', '.join(only[:5])}{' ...' if len(only) > 5 else ''}"
        )
    return train, test, len(train.classes)


def _torchvision(data: Data) -> tuple[Source, Source, int | None]:
    """A data set of torchvision's by its class; `train=` or `split=` is set where its constructor has it."""
    datasets = _torchvision_datasets()
    name = data.dataset.partition(":")[2]
    if name not in datasets.__all__:
        near = did_you_mean(name, datasets.__all__, most=3, cutoff=0.4)
        raise DataError(f"torchvision has no data set {name!r}; {near or 'none has a name like it'}")
    cls = getattr(datasets, name)
    sources = []
    for train in (True, False):
        arguments = _torchvision_arguments(cls, data, train=train)
        try:
            sources.append(cls(**arguments))
        except (TypeError, ValueError, RuntimeError, OSError) as error:
            raise DataError(f"{data.dataset} does not open with {arguments}: {error}") from error
    train_source, test_source = sources
    classes = getattr(train_source, "classes", None)
    if classes is not None:
        return train_source, test_source, len(classes)
    return train_source, test_source, getattr(train_source, "num_classes", None)


def _torchvision_arguments(cls: type, data: Data, *, train: bool) -> dict[str, Any]:
    """What one of torchvision's data sets is made with: what its constructor takes, then what the caller says."""
    parameters = inspect.signature(cls).parameters
    arguments: dict[str, Any] = {}
    if data.root is not None and "root" in parameters:
        arguments["root"] = data.root
    # Older classes have a flag, later ones a word; of those with other words, the caller has to say which.
    if "train" in parameters:
        arguments["train"] = train
    elif "split" in parameters:
        arguments["split"] = "train" if train else "test"
    return arguments | data.arguments | (data.train_arguments if train else data.test_arguments)


def _torchvision_datasets() -> Any:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise MissingPackageError(
            "image data are read by torchvision: pip install 'neuron-allocator[train]'"
        ) from error
    return datasets


def transform(data: Data, *, train: bool) -> Callable[[Image], Tensor] | None:
    """Image to normalised (C, side, side) tensor; None for images that are tensors to be left as they are."""
    if data.dataset == "digits":
        return None
    from torchvision.transforms import v2

    steps: list[Any] = []
    if data.side is not None:
        augment = data.augment if train else "test"
        steps += _sizing(v2, data.side, data.resize, augment)
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    if data.mean:
        steps.append(v2.Normalize(data.mean, data.std))
    steps.append(v2.ToPureTensor())
    composed: Callable[[Image], Tensor] = v2.Compose(steps)
    return composed


def _sizing(v2: Any, side: int, resize: int | None, augment: str) -> list[Any]:
    if augment == "imagenet":
        return [v2.RandomResizedCrop(side, antialias=True), v2.RandomHorizontalFlip()]
    if augment == "shift":
        return [v2.Resize((side, side)), v2.RandomCrop(side, padding=side // 8), v2.RandomHorizontalFlip()]
    if augment == "test" and resize is not None:
        return [v2.Resize(resize, antialias=True), v2.CenterCrop(side)]
    return [v2.Resize((side, side), antialias=True)]


def unreadable(samples: Samples, workers: int = 0, rank: int = 0, world: int = 1) -> list[str]:
    """The images that cannot be read, with the reason, of those that fall to one process; reads each once."""
    # Whatever the run is to do about them: "stop" would end at the first, "replace" would read others twice.
    scan = replace(samples, corrupt="drop")
    mine = range(rank, len(scan), world)
    loader = _loader(scan, Chunks(0, mine, range(len(mine)), 1), workers)
    return [name for batch in loader for name in batch.corrupt]
