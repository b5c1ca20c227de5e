"""Files of safetensors, whoever wrote them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from allocator.disk import PathLike, shorten
from allocator.errors import FileError


@contextlib.contextmanager
def open_safetensors(path: PathLike) -> Iterator[Any]:
    """A file to read tensors of, one by one.

    Raises:
        FileError: truncated or damaged.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} is truncated or damaged: {shorten(str(error))}") from error


def read_safetensors(path: PathLike, *, tensors: bool = True) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and, unless it is enough, all tensors.

    Raises:
        FileError: truncated or damaged.
    """
    with open_safetensors(path) as opened:
        names = opened.keys() if tensors else ()
        # copies, because torch's kernels round differently where memory is not aligned
        return dict(opened.metadata() or {}), {name: opened.get_tensor(name).clone() for name in names}


def write_safetensors(tensors: Mapping[str, torch.Tensor], path: PathLike, metadata: Mapping[str, str]) -> None:
    """Write a file; use it within `write_atomically`, which names the file that was meant.

    Raises:
        OSError: the disk is full.
    """
    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:
        raise OSError(str(error)) from error  # as others tell it
