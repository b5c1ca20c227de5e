"""One summary, several formats: the one place that knows them all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from allocator.disk import PathLike, write_text
from allocator.errors import UnknownNameError, did_you_mean
from allocator.reporting.facts import Summary
from allocator.reporting.page import to_html
from allocator.reporting.rows import LIMIT
from allocator.reporting.tables import to_csv, to_markdown
from allocator.reporting.text import SummaryText
from allocator.shown import as_plain_text


def _rich(summary: Summary, limit: int | None) -> str:
    return as_plain_text(SummaryText(summary, limit))


def _json(summary: Summary, limit: int | None) -> str:
    return json.dumps(summary.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _html(summary: Summary, limit: int | None) -> str:
    return to_html(summary)


FORMATS: dict[str, Callable[[Summary, int | None], str]] = {
    "rich": _rich,
    "json": _json,
    "csv": lambda summary, limit: to_csv(summary),
    "html": _html,
    "md": to_markdown,
}
SUFFIXES = {".txt": "rich", ".json": "json", ".csv": "csv", ".html": "html", ".htm": "html", ".md": "md"}


def as_text(summary: Summary, format: str, limit: int | None = LIMIT) -> str:
    """A summary in one of `FORMATS`; `limit` blocks at most in tables for people, None for all.

    Raises:
        UnknownNameError: there is no such format; names a near one.
        MissingPackageError: "html" needs a package that is not installed.
    """
    check_format(format)
    return FORMATS[format](summary, limit)


def check_format(format: str) -> str:
    """The name of a format, as it is.

    Raises:
        UnknownNameError: there is no such format; names a near one.
    """
    if format not in FORMATS:
        words = {"markdown": "md", "text": "rich"}  # what people call these formats
        near = did_you_mean(format, (*FORMATS, *words), cutoff=0.5, mark="'")
        for word, name in words.items():
            near = near.replace(f"'{word}'", f"'{name}'")
        raise UnknownNameError(f"no format {format!r}{near and '; ' + near} (there are {', '.join(FORMATS)})")
    return format


def format_of(path: PathLike) -> str:
    """The format that a file's suffix stands for.

    Raises:
        UnknownNameError: it stands for none; names a near one.
    """
    suffix = Path(path).suffix
    if suffix.lower() not in SUFFIXES:
        near = did_you_mean(suffix.lower(), SUFFIXES, cutoff=0.5)
        hint = f"; {near}" if near else "."
        raise UnknownNameError(
            f"{Path(path).name!r} does not say its format{hint} A report ends in {', '.join(SUFFIXES)}"
        )
    return SUFFIXES[suffix.lower()]


def write(summary: Summary, path: PathLike, format: str | None = None, limit: int | None = LIMIT) -> None:
    """Write a report in one piece, in the format given or that of the suffix.

    Raises:
        UnknownNameError: there is no such format.
        FileError: the path cannot be written.
        MissingPackageError: the format needs a package that is not installed.
    """
    write_text(path, as_text(summary, format_of(path) if format is None else format, limit))
