"""Weights that lie in a folder as one file of safetensors or several with an index, read and written tensor by tensor.

The names are those of Hugging Face: `model-00001-of-00003.safetensors` and so on beside `model.safetensors.index.json`,
or `model.safetensors` alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from allocator.disk import PathLike, parse_json, read_text
from allocator.errors import FileError
from allocator.io.safetensors_files import open_safetensors, write_safetensors

SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
_METADATA = {"format": "pt"}


class Shards(Mapping[str, torch.Tensor]):
    """The tensors of a folder by name; each is read when it is asked for, and none is held.

    Attributes:
        folder: where they lie.
        stem: what the names of the files start with.
        shapes: of the tensors, by name, in the order of the files.

    Raises:
        FileError: there are no weights as safetensors, the index names what is not there, or a file is damaged.
    """

    def __init__(self, folder: PathLike) -> None:
        self.folder = Path(folder)
        self.stem, indexed = _index(self.folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for name in dict.fromkeys(indexed.values()) if indexed else (f"{self.stem}{SUFFIX}",):
            file = self.folder / name
            if not file.is_file():
                raise FileError(f"{self.folder} is not complete: its index names {name}, which is not there")
            with open_safetensors(file) as opened:
                for key in opened.keys():  # noqa: SIM118 - it is no mapping
                    self._files[key] = file
                    self.shapes[key] = tuple(opened.get_slice(key).get_shape())
        missing = sorted(indexed.keys() - self.shapes.keys())
        if missing:
            raise FileError(f"{self.folder} is not complete: its index names {missing[0]}, which no file holds")

    def __getitem__(self, name: str) -> torch.Tensor:
        # Opened for each, as a file stays mapped, and counts as memory, as far as it was read.
        with open_safetensors(self._files[name]) as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _index(folder: Path) -> tuple[str, dict[str, str]]:
    """What the names of a folder's weights start with, and the file of each tensor; none where there is one file."""
    if not os.path.isdir(folder):
        raise FileError(f"there is no folder {folder}")
    found = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    alone = sorted(folder.glob(f"*{SUFFIX}"))
    usual = [path for path in (*found, *alone) if path.name.partition(".")[0] in ("model", "diffusion_pytorch_model")]
    chosen = (usual or found or alone)[:1]
    if not chosen:
        raise FileError(f"{folder} holds no weights as {SUFFIX}: save them there with save_pretrained")
    if not found and len(alone) > 1 and not usual:
        names = ", ".join(path.name for path in alone[:4])
        raise FileError(f"{folder} holds several files of weights and no index: {names}; leave one of them there")
    if not chosen[0].name.endswith(INDEX_SUFFIX):
        return chosen[0].name.removesuffix(SUFFIX), {}
    return chosen[0].name.removesuffix(INDEX_SUFFIX), _weight_map(chosen[0])


def _weight_map(path: Path) -> dict[str, str]:
    """The file of each tensor; plain names alone, so that an index leads nowhere else."""
    try:
        found: Any = parse_json(read_text(path))["weight_map"]
        plain = all(
            isinstance(file, str) and file.endswith(SUFFIX) and Path(file).name == file for file in found.values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(
            f"{path} is damaged: its weight_map cannot be read ({type(error).__name__}: {error})"
        ) from error
    if not plain or not found:
        raise FileError(f"{path} is damaged: its weight_map does not name {SUFFIX} files of its folder")
    return dict(found)


def write_shards(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, stem: str, most: int) -> None:
    """Write tensors one after the other.

    Args:
        tensors: (name, tensor); asked for when the ones before are taken care of.
        folder: an empty one.
        stem: what the names of the files start with.
        most: bytes of a file, which are held in memory until it is written; a larger tensor has a file of its own.
    """
    placed: dict[str, int] = {}
    waiting: dict[str, torch.Tensor] = {}
    held = total = count = 0

    def write() -> None:
        nonlocal count, held
        count += 1
        write_safetensors(waiting, folder / f"{count}.part", _METADATA)
        waiting.clear()
        held = 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if waiting and held + size > most:
            write()
        waiting[name] = tensor.contiguous()
        placed[name] = count + 1
        held, total = held + size, total + size
        del tensor
    if waiting:
        write()
    # How many there are is known at the end, and stands in every name.
    names = {
        i: f"{stem}{SUFFIX}" if count == 1 else f"{stem}-{i:05}-of-{count:05}{SUFFIX}" for i in range(1, count + 1)
    }
    for i, name in names.items():
        (folder / f"{i}.part").rename(folder / name)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {key: names[i] for key, i in sorted(placed.items())}}
        (folder / f"{stem}{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class Renamed(Mapping[str, torch.Tensor]):
    """Tensors by other names, read when they are asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], stored_as: Mapping[str, str]) -> None:
        self.tensors, self.stored_as = tensors, dict(stored_as)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[self.stored_as[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored_as)

    def __len__(self) -> int:
        return len(self.stored_as)
