"""Zip archives that models lie in, whoever wrote them: what is inside, and whether they are whole."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from allocator.errors import AllocatorError, FileError, first_line

# What an archive may unpack to: no model's file comes near, and a bomb goes far beyond.
_TIMES_OWN_SIZE, _FREE_BYTES = 4, 16 * 2**20
# A byte of a pickle may be a list of sixty. `torch.save` compresses none, so that pickles are within the file's size;
# what other tools compressed again fits into the free bytes.
_FREE_PICKLE_BYTES = 4 * 2**20


def most_unpacked(path: Path) -> int:
    """How many bytes the contents of a file of this size may take, all together."""
    return _TIMES_OWN_SIZE * path.stat().st_size + _FREE_BYTES


def is_zip(path: Path) -> bool:
    """Whether a file begins as a zip archive does."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def inner_names(path: Path) -> set[str]:
    """Names of the entries, with and without the folder that all of them lie in; none where it is no whole archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.namelist()
    except Exception:  # zipfile raises a dozen kinds, up to NotImplementedError
        return set()
    return {*entries, *(entry.partition("/")[2] for entry in entries)}


def check_archive(path: Path) -> None:
    """Raise FileError where a zip archive unpacks to far more than it is, or fails its own checksums.

    ``torch.save`` compresses nothing, and exported programs little; torch itself compares no checksums.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            unpacked = sum(entry.file_size for entry in entries)
            if unpacked > most_unpacked(path):
                raise FileError(f"{path} unpacks to {unpacked:,} bytes, more than a model's file of its size can hold")
            pickled = sum(entry.file_size for entry in entries if entry.filename.lower().endswith(".pkl"))
            if pickled > path.stat().st_size + _FREE_PICKLE_BYTES:
                raise FileError(f"{path} holds pickles of {pickled:,} bytes, more than a file of its size can hold")
            if len({entry.filename for entry in entries}) < len(entries):
                raise FileError(f"{path} is damaged: it holds two entries of one name")
            broken = archive.testzip()
    except FileError:
        raise
    except Exception as error:  # zipfile raises a dozen kinds, up to NotImplementedError
        raise FileError(f"{damaged(path)} ({first_line(error)})") from error
    if broken is not None:
        raise FileError(
            f"{damaged(path)} (the checksum of {broken} does not fit; if it was saved without checksums, open it with "
            "--trust and save it again)"
        )


@contextmanager
def reading(path: Path) -> Iterator[zipfile.ZipFile]:
    """An archive that was found whole; whatever its contents make a reader trip over is told as damage.

    Raises:
        FileError: it is not whole, or what is in it is of another shape than the reader expects.
    """
    check_archive(path)
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except AllocatorError:
        raise
    except Exception as error:  # JSON, pickles and source of another shape than expected raise nearly anything
        raise FileError(f"{path} is truncated or damaged: {type(error).__name__}: {error!s:.200}") from error


def damaged(path: Path) -> str:
    """What to say of a file that is not whole."""
    return f"{path} is truncated or damaged, or was not written by torch.save"
