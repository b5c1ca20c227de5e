"""Where tensors lie until they are needed again: in memory up to a limit, beyond it in a temporary file.

The file has no name, or one that goes with it, so that nothing of it is left however the process ends.
"""

from __future__ import annotations

import bisect
import ctypes
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO

import torch

from allocator.errors import FileError
from allocator.torch_private import StorageReference, storage_of


class Gaps:
    """Which parts of a file are free."""

    def __init__(self) -> None:
        self.end = 0
        self._starts: list[int] = []  # of the gaps, in order
        self._sizes: dict[int, int] = {}

    def take(self, size: int) -> int:
        """Where so many bytes go: into the first gap that is wide enough, else at the end."""
        for place, start in enumerate(self._starts):
            wide = self._sizes[start]
            if wide >= size:
                del self._starts[place], self._sizes[start]
                if wide > size:
                    self._add(start + size, wide - size)
                return start
        self.end += size
        return self.end - size

    def give(self, start: int, size: int) -> None:
        """Make a part free; it becomes one with the gaps beside it."""
        place = bisect.bisect(self._starts, start)
        if place < len(self._starts) and self._starts[place] == start + size:
            size += self._sizes.pop(self._starts.pop(place))
        if place and self._starts[place - 1] + self._sizes[self._starts[place - 1]] == start:
            start = self._starts.pop(place - 1)
            size += self._sizes.pop(start)
        if start + size == self.end:
            self.end = start
        else:
            self._add(start, size)

    def _add(self, start: int, size: int) -> None:
        bisect.insort(self._starts, start)
        self._sizes[start] = size


@dataclass
class _Laid:
    """Bytes on the shelf: `inside` memory, and from `start` on in the file, None where they are not there."""

    size: int
    inside: bool = False
    start: int | None = None


class Shelf:
    """What lies there is found again as it was.

    Args:
        limit: bytes that may lie in memory.
    """

    def __init__(self, limit: int) -> None:
        self.left = limit
        self.written = 0
        self._file: IO[bytes] | None = None
        self._gaps = Gaps()
        self._laid: dict[StorageReference, _Laid] = {}

    def close(self) -> None:
        """Take up all that anybody still holds, and give back what the file takes."""
        self.take(list(self._laid))
        if self._file is not None:
            self._file.close()

    def lay(self, references: Iterable[StorageReference]) -> None:
        """Lay storages down; those for which there is no room in memory are empty until they are taken up again.

        Raises:
            FileError: there is no room for the file.
        """
        for reference in references:
            storage = storage_of(reference)
            if storage is None:
                self.forget(reference)
                continue
            laid = self._laid.setdefault(reference, _Laid(storage.nbytes()))
            if laid.inside or not storage.nbytes():
                continue
            laid.inside = self._fits(laid.size, needs_to=not storage.resizable())
            if not laid.inside:
                if laid.start is None:
                    laid.start = self.write(_bytes_of(storage))
                storage.resize_(0)

    def take(self, references: Iterable[StorageReference]) -> None:
        """Take storages up, as they were."""
        for reference in references:
            laid, storage = self._laid.get(reference), storage_of(reference)
            if laid is None or storage is None:
                self.forget(reference)
            elif laid.inside:
                self.left, laid.inside = self.left + laid.size, False
            elif laid.start is not None and not storage.nbytes():
                storage.resize_(laid.size)
                self.read(laid.start, _bytes_of(storage))

    def forget(self, reference: StorageReference) -> None:
        """What was laid down of a storage is of no use any more: it is gone, or was written to."""
        laid = self._laid.pop(reference, None)
        if laid is not None and laid.inside:
            self.left += laid.size
        if laid is not None and laid.start is not None:
            self._gaps.give(laid.start, laid.size)

    def keep(self, tensor: torch.Tensor) -> Kept:
        """Put a tensor there for many uses."""
        tensor = tensor.contiguous()
        size = tensor.numel() * tensor.element_size()
        if self._fits(size):
            return Kept(self, size, tensor, None)
        return Kept(self, size, torch.empty_like(tensor, device="meta"), tensor.device, self.write(_flat(tensor)))

    def _fits(self, size: int, *, needs_to: bool = False) -> bool:
        if size > self.left and not needs_to:
            return False
        self.left -= size
        return True

    def write(self, data: torch.Tensor) -> int:
        """Write bytes into the file; where they begin."""
        start = self._gaps.take(len(data))
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - `close` ends it
            self._file.seek(start)
            here = data.cpu()
            view = _view_of(here)
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise FileError(
                f"cannot write {self._gaps.end / 1e6:,.0f} MB of activations into a temporary file in "
                f"{_folder()}: {error.strerror or error}; set TMPDIR to a folder with more room, look at "
                "fewer samples, or let more of them lie in memory (memory=)"
            ) from error
        self.written += len(data)
        return start

    def read(self, start: int, data: torch.Tensor) -> None:
        """Fill a tensor of bytes with those from there on."""
        assert self._file is not None
        self._file.seek(start)
        here = data if data.device.type == "cpu" else torch.empty_like(data, device="cpu")
        view = _view_of(here)
        while view:
            count = self._file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise FileError(f"the temporary file in {_folder()} is shorter than what was written")
            view = view[count:]
        if here is not data:
            data.copy_(here)

    def give(self, start: int, size: int) -> None:
        """These bytes of the file are not needed any more."""
        self._gaps.give(start, size)


@dataclass
class Kept:
    """A tensor on a shelf.

    Attributes:
        size: in bytes.
        like: the tensor itself, or one of its size and dtype on meta where it lies in the file.
        device: it comes back on, from the file.
        start: where it is in the file.
    """

    shelf: Shelf
    size: int
    like: torch.Tensor
    device: torch.device | None
    start: int = 0

    def tensor(self) -> torch.Tensor:
        """It, as it was."""
        if self.device is None:
            return self.like
        found = torch.empty(self.like.shape, dtype=self.like.dtype, device=self.device)
        self.shelf.read(self.start, _flat(found))
        return found

    def drop(self) -> None:
        """It is not needed any more."""
        if self.device is None:
            self.shelf.left += self.size
        else:
            self.shelf.give(self.start, self.size)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


def _folder() -> str:
    """Where temporary files lie; asking for it raises where there is no such folder."""
    return tempfile.tempdir or "the folder for such files"


def _view_of(data: torch.Tensor) -> memoryview:
    """Bytes on the CPU themselves; an array of them would hold their storage at its size, which torch keeps to."""
    return memoryview((ctypes.c_ubyte * len(data)).from_address(data.data_ptr())).cast("B")
