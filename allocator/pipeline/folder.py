"""From a folder of weights to a folder of fewer, tensor by tensor, for networks that are larger than the memory."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allocator import adapters
from allocator.clock import Progress, bar
from allocator.disk import PathLike, check_new_folder, write_folder_atomically
from allocator.errors import FileError, InputError
from allocator.io.models import build_as_asked
from allocator.io.shards import SUFFIX, Renamed, Shards, write_shards
from allocator.modules import lies_within
from allocator.pipeline.run import run
from allocator.pipeline.verify import verify_model
from allocator.result import Result
from allocator.rewriting.allocation import Allocation
from allocator.rewriting.index_map import take_on_meta
from allocator.rewriting.materialise import check_fits, materialise, replacing
from allocator.settings import Limits, Settings
from allocator.verifying.certificate import Certificate, require

# Weights in other forms, and what a training keeps for the original's widths, do not fit the smaller network.
_LEFT = (SUFFIX, ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot")


class Source:
    """A network whose weights stay in their folder.

    Attributes:
        shards: the weights.
        model: of the meta device.
        first: per stored name the first that the model has for it, as a tied tensor has several.
        weights: the tensors by those first names.
    """

    def __init__(self, folder: PathLike, model: nn.Module | None = None) -> None:
        self.shards = Shards(folder)
        if model is None:
            with torch.device("meta"):
                model = build_as_asked(f"hf:{folder}", {}).eval()
        self.model = model
        self.first = _first_names(self.shards, model)
        self.weights = Renamed(self.shards, {first: stored for stored, first in self.first.items()})


def _first_names(shards: Shards, model: nn.Module) -> dict[str, str]:
    """Per stored name the first that the model has for it.

    Raises:
        FileError: the files hold tensors that the model lacks, lack some that it has, or have them in other sizes.
    """
    tensors = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    names = {name: first[id(tensors[name])] for name in shards.shapes if name in tensors}
    passed_over = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    others = [name for name in shards if name not in names and not any(re.search(key, name) for key in passed_over)]
    there = {*names.values()}
    others += [name for name in model.state_dict() if name in tensors and first[id(tensors[name])] not in there]
    if others:
        raise FileError(
            f"{shards.folder} does not hold the tensors of {type(model).__name__} under its names, as {others[0]}: the "
            "library converts them as it loads them. Load the model, allocate it, and save it with save_pretrained"
        )
    for name in names:
        if shards.shapes[name] != tuple(tensors[name].shape):
            was, has = shards.shapes[name], tuple(tensors[name].shape)
            raise FileError(f"{shards.folder} holds {name} in size {was}, and {type(model).__name__} has {has}")
    return names


def allocate_in_folder(
    folder: PathLike,
    output: PathLike,
    limits: Limits,
    example_inputs: Any,
    settings: Settings,
    *,
    model: nn.Module | None,
    most: int,
    progress: Progress | None,
) -> Result:
    """See `allocator.allocate_folder`."""
    if limits.latency is not None:
        raise InputError("a budget of time needs the network in memory, to measure it: pass one of FLOPs or parameters")
    _check_place(folder, output)
    source = Source(folder, model)
    result = run(
        source.model, limits, example_inputs, settings, numeric=False, stored=source.weights, progress=progress
    )
    _write(source, result.allocation, result.model, output, most, progress)
    return result


def apply_in_folder(
    folder: PathLike,
    allocation: Allocation,
    output: PathLike,
    example_inputs: Any,
    *,
    model: nn.Module | None,
    most: int,
    progress: Progress | None,
) -> Certificate:
    """See `allocator.apply_folder`."""
    if allocation.widens and allocation.parts:
        raise InputError("this allocation adds neurons in several steps: apply it to the model in memory")
    _check_place(folder, output)
    source = Source(folder, model)
    check_fits(source.model, allocation)
    small = materialise(source.model, allocation, take_on_meta)
    made = verify_model(source.model, small, allocation, example_inputs, numeric=False, seed=0)
    certificate = require(made, "the result")
    _write(source, allocation, small, output, most, progress)
    return certificate


def _check_place(folder: PathLike, output: PathLike) -> None:
    check_new_folder(output)
    if Path(output).resolve().is_relative_to(Path(folder).resolve()):
        raise FileError(f"cannot write {output}: it lies within {folder}, which is to stay as it is")


def _write(
    source: Source, allocation: Allocation, small: nn.Module, output: PathLike, most: int, progress: Progress | None
) -> None:
    """The smaller network's weights, its configuration, and what else the folder holds."""
    replace = replacing(allocation)
    parameters = dict(source.model.named_parameters())
    names = {old: new for old, new in source.first.items() if not lies_within(old, allocation.absent)}

    def cut() -> Iterator[tuple[str, torch.Tensor]]:
        for stored, name in names.items():
            tensor = source.shards[stored]
            if name in allocation.kept:  # what stays whole goes from file to file, and is not copied in between
                tensor = replace(name, nn.Parameter(tensor, False) if name in parameters else tensor)
            yield stored, tensor
            said(stored)

    title = f"writing {output}"
    with write_folder_atomically(output) as temporary, bar(title, progress, len(names)) as said:
        write_shards(cut(), temporary, source.shards.stem, most)
        for path in source.shards.folder.iterdir():
            if path.is_file() and not path.name.endswith(_LEFT):
                shutil.copyfile(path, temporary / path.name)
        adapters.write_configuration(small, temporary)
