"""What a model is for, from the shell: pictures in a folder, tensors in a file, or a function of the user's own."""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import pickle
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.cli.arguments import UsageError
from allocator.cli.opening import find_local_modules
from allocator.disk import existing
from allocator.errors import DataError, FileError, MissingPackageError, UnknownNameError, a_kind

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BATCH = 16
_VIEWS = 8
"""Crops of one picture, at most."""
_SCALE = (0.15, 1.0)
"""Share of the picture that a crop shows."""


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Options that say what criteria may look at."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        metavar="DATA",
        help="what the model is for: a folder of pictures (normalised as for ImageNet; in a folder per class, they "
        "have labels), a file of a tensor of inputs (.pt, .npy), or package.module:function that gives a loader or a "
        "tensor",
    )
    group.add_argument(
        "--samples",
        type=int,
        default=256,
        metavar="N",
        help=f"look at no more of them; of pictures, so many are drawn, and of fewer up to {_VIEWS} crops each "
        "(default: 256)",
    )
    group.add_argument(
        "--loss",
        metavar="NAME",
        help="package.module:function of outputs and targets, such as torch.nn.functional:cross_entropy; left out: "
        "the model's own answers stand in for labels; without --loss, none are needed",
    )


def data_options(args: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """`data` and `loss` for `allocator.allocate`."""
    if args.data is None:
        if args.loss is not None:
            raise UsageError("--loss goes with --data")
        return {}
    if args.samples < 1:
        raise UsageError(f"--samples {args.samples} is not above zero")
    find_local_modules(args, args.data, args.loss)
    return {"data": _opened(args, model), "loss": None if args.loss is None else _named(args.loss)}


def _opened(args: argparse.Namespace, model: nn.Module) -> Any:
    if os.path.isdir(args.data):
        return list(_pictures(Path(args.data), args, model))
    if os.path.exists(args.data):
        return _tensor(existing(args.data))[: args.samples]
    if ":" in args.data:
        return _from_function(args.data, args.samples)
    raise FileError(f"{args.data} does not exist")


def _from_function(name: str, samples: int) -> Tensor | list[Any]:
    """The first batches of what a function gives, or of a loader that lies there ready; of a tensor its first rows."""
    import torch

    found = _named(name)
    loader = found() if callable(found) else found
    if isinstance(loader, torch.Tensor):
        return loader[:samples]
    if not isinstance(loader, Iterable):
        gave = f"gave {a_kind(loader)}" if callable(found) else f"is {a_kind(loader)}"
        raise DataError(f"{name} {gave}, and not a loader: a list of batches is one, or a DataLoader")
    return list(itertools.islice(loader, max(1, samples // _BATCH)))


def _named(name: str) -> Any:
    """What `package.module:name` stands for."""
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UsageError(f"{name!r} is not of the form package.module:function")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UnknownNameError(f"{name!r} cannot be found: {error}") from error


def _tensor(path: Path) -> Tensor:
    import numpy as np
    import torch

    if path.suffix == ".py":
        raise UsageError(f"--data {path} is code: for a function in it, write --data {path.stem}:FUNCTION")
    try:
        if path.suffix == ".npy":
            found = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's and numpy's own words advise to let the file run code.
        other = isinstance(error, pickle.UnpicklingError) or "allow_pickle" in str(error)
        said = "neither .npy nor a tensor alone that torch.save wrote" if other else f"{error!s:.200}"
        raise FileError(f"{path} cannot be read as a tensor: {said}") from error
    if not isinstance(found, torch.Tensor) or found.dim() == 0:
        what = "a number" if isinstance(found, torch.Tensor) else a_kind(found)
        raise FileError(f"{path} holds {what}, not a tensor of inputs")
    return found


def _pictures(folder: Path, args: argparse.Namespace, model: nn.Module) -> Iterator[Any]:
    """Batches of pictures below a folder, cropped to the model's own input size and normalised.

    Fewer than --samples are shown in several crops, those of one picture side by side: what is held back to judge by
    shows pictures of its own then. With --loss, pairs with labels: the number of the folder that a picture lies in, in
    the order of their names, as torchvision's ImageFolder numbers them.
    """
    import torch

    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    if not files:
        raise DataError(f"{folder} holds no pictures ({', '.join(_SUFFIXES)})")
    # Drawn, since the first of them may all be of one class; the same ones every time.
    files = random.Random(0).sample(files, min(args.samples, len(files)))
    labels = None if args.loss is None else _labels(folder, files)
    views = min(args.samples // len(files), _VIEWS)
    prepare = _preparation(folder, args, model, views)
    together = max(1, _BATCH // views)
    for start in range(0, len(files), together):
        pictures = torch.cat([prepare(file) for file in files[start : start + together]])
        if labels is None:
            yield pictures
        else:
            yield pictures, torch.tensor(labels[start : start + together]).repeat_interleave(views)


def _preparation(folder: Path, args: argparse.Namespace, model: nn.Module, views: int) -> Callable[[Path], Tensor]:
    """What makes (views, channels, height, width) of a picture: its middle, and crops that are the same every time."""
    import torch
    from PIL import Image

    from allocator.cli.opening import example_inputs
    from allocator.tracing.inputs import as_inputs

    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise MissingPackageError("pictures need torchvision: pip install 'neuron-allocator[zoo]'") from error
    (side, *_) = as_inputs(example_inputs(args, model), model).tensors()[0].shape[-2:]
    middle = v2.Compose([v2.Resize(side), v2.CenterCrop(side)])
    crop = v2.Compose([v2.RandomResizedCrop(side, _SCALE), v2.RandomHorizontalFlip()])
    finish = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD)])

    def prepare(file: Path) -> Tensor:
        try:
            picture = in_colour(Image.open(file))
        except Exception as error:  # Pillow raises many kinds, of no class of their own
            raise DataError(f"{file} cannot be read: {error}") from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(file.relative_to(folder).as_posix().encode()))
            seen = [middle(picture), *(crop(picture) for _ in range(views - 1))]
        return torch.stack([finish(each) for each in seen])

    return prepare


_OF_16_BITS = 65535


def in_colour(picture: Image) -> Image:
    """A picture in 8 bits of red, green and blue; Pillow itself takes grey of more bits for white.

    Raises:
        ValueError: its numbers are of no range that is known.
    """
    if not picture.mode.startswith(("I", "F")):
        return picture.convert("RGB")
    import numpy as np
    from PIL.Image import fromarray

    grey = np.asarray(picture).astype(np.float64)
    low, high = grey.min(), grey.max()
    most = _OF_16_BITS if picture.mode.startswith("I") else 1 if high <= 1 else 255
    if not 0 <= low <= high <= most:
        raise ValueError(f"its grey is from {low:g} to {high:g}, of a range that is not known: save it in 8 or 16 bits")
    return fromarray(np.rint(grey * (255 / most)).astype(np.uint8)).convert("RGB")


def _labels(folder: Path, files: Sequence[Path]) -> list[int]:
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    named = [file.relative_to(folder).parts for file in files]
    alone = next((parts[0] for parts in named if len(parts) == 1), None)
    if alone is not None:
        raise DataError(
            f"--loss needs labels, and {folder / alone} lies in no class: make it {folder}/CLASS/{alone}, or leave "
            "--loss out"
        )
    return [classes.index(parts[0]) for parts in named]
