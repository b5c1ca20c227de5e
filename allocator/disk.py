"""Writing that is all or nothing, and reading with clear errors."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from allocator.errors import FileError

PathLike = str | os.PathLike[str]


@contextlib.contextmanager
def write_atomically(path: PathLike) -> Iterator[Path]:
    """A temporary file beside ``path``: put in its place if the block ends well, removed if it does not.

    Yields:
        The temporary file's path; write to it.

    Raises:
        FileError: the folder is missing or cannot be written to, the disk is full, or ``path`` is a folder or no path.
    """
    check_writable(path)
    target = Path(os.path.realpath(path))  # a link stays a link: what it points to is replaced
    # Its own short name, because the target's may be as long as a file system allows.
    temporary = target.with_name(f".{target.name[:40]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)  # some writers put a file of their own in place of this one
        os.replace(temporary, target)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def write_folder_atomically(path: PathLike) -> Iterator[Path]:
    """A temporary folder beside ``path``: put in its place if the block ends well, removed if it does not.

    Yields:
        The temporary folder's path; write files to it.

    Raises:
        FileError: there is something at ``path`` already, the folder around it is missing or cannot be written to, or
            the disk is full.
    """
    check_new_folder(path)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:40]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        os.rename(temporary, target)  # of an empty folder it takes the place, of one with files it does not
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new_folder(path: PathLike) -> None:
    """Raise FileError where a folder clearly cannot be made at ``path``; an empty one may be there."""
    there = _status(path, "write")
    if there is not None and not (stat.S_ISDIR(there.st_mode) and not any(Path(path).iterdir())):
        raise FileError(f"cannot write {path}: it exists, and is not an empty folder; choose another name")
    _check_around(path)


def make_folder(path: PathLike) -> None:
    """Make a folder, and those around it, where they are not there.

    Raises:
        FileError: it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the folder {path}: {error.strerror or error}") from error
    except ValueError as error:  # as in `_status`
        raise FileError(f"cannot make the folder {str(path)!r:.200}: {error}") from error


def check_writable(path: PathLike) -> None:
    """Raise FileError where ``path`` clearly cannot be written, so that long work does not end in that."""
    there = _status(path, "write")
    if there is not None and not stat.S_ISREG(there.st_mode):
        raise FileError(f"cannot write {path}: it is a folder or a device, not a file")
    _check_around(path)


def _check_around(path: PathLike) -> None:
    """Raise FileError where nothing can be written beside ``path``."""
    # Where links lead, and where the path says: "absent/../file" would else be written beside the absent folder.
    for folder in (Path(os.path.realpath(path)).parent, Path(path).parent):
        if not folder.is_dir():
            raise FileError(f"cannot write {path}: there is no folder {folder}")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise FileError(f"cannot write {path}: no permission to write in {folder}")


def write_text(path: PathLike, text: str) -> None:
    """Write a text file in one piece, in UTF-8.

    What UTF-8 cannot say (pieces of file names that are none) is written as ``\\udcXX``.
    """
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def existing(path: PathLike) -> Path:
    """The path of a file that can be read and is not empty.

    Raises:
        FileError: it is missing, empty, a folder or a device, no path at all, or may not be read.
    """
    there = _status(path, "read")
    if there is None:
        raise FileError(f"there is no file {path}")
    if not stat.S_ISDIR(there.st_mode) and not stat.S_ISREG(there.st_mode):
        raise FileError(f"{path} is a device, a pipe or a socket, not a file: save what it gives, and read that")
    if not stat.S_ISREG(there.st_mode):
        hint = f"; for one that transformers wrote, say hf:{path}" if Path(path, "config.json").is_file() else ""
        raise FileError(f"{path} is a folder, not a model file{hint}")
    if not os.access(path, os.R_OK):
        raise FileError(f"no permission to read {path}")
    if there.st_size == 0:
        raise FileError(f"{path} is empty")
    return Path(path)


MOST_TEXT = 2**30
"""Bytes of a text file: several times what an allocation of the largest networks takes."""


def read_text(path: PathLike) -> str:
    """The text of a file in UTF-8.

    Raises:
        FileError: as of `existing`, or it is larger than any text that there is a use for.
        UnicodeDecodeError: it is no text.
    """
    file = existing(path)
    size = file.stat().st_size
    if size > MOST_TEXT:
        raise FileError(f"{path} is {size:,} bytes, more than the {MOST_TEXT:,} that are read of a text file")
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error


def parse_json(text: str) -> Any:
    """What this JSON says.

    Raises:
        ValueError: it is none, lists lie too deep in lists, or a mapping has a key twice, of which readers would forget
            the first.
    """
    try:
        return json.loads(text, object_pairs_hook=_mapping)
    except RecursionError:
        raise ValueError("lists or mappings lie too deep within one another") from None


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.60} comes twice in one mapping")
    return found


def _status(path: PathLike, verb: str) -> os.stat_result | None:
    """What the file system says of a path, None where nothing is there.

    Raises:
        FileError: it cannot be a path: too long, or with characters that no path can hold.
    """
    if not os.fspath(path):
        raise FileError(f"cannot {verb} a file without a name: the path is empty")
    try:
        return Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise FileError(f"cannot {verb} {shorten(str(path), 200)}: {error.strerror or error}") from error
    except ValueError as error:  # NUL bytes, and half characters that UTF-8 cannot say
        raise FileError(f"cannot {verb} {str(path)!r:.200}: {error}") from error


def shorten(text: str, limit: int = 600) -> str:
    """The text on one line, cut to ``limit`` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 4] + " ..."
