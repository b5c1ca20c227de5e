"""Keeping what other libraries log and warn of to oneself while one uses them, in this thread alone."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from contextvars import ContextVar

ANY = ""
_hidden: ContextVar[dict[str, int]] = ContextVar("hidden", default={})  # noqa: B039  (never written into)


def _is_said(record: logging.LogRecord) -> bool:
    """Whether a message is worse than what is hidden of its logger, or another thread's."""
    worst = _hidden.get()
    return record.levelno > max(worst.get(record.name, -1), worst.get(ANY, -1))


def _handlers() -> list[logging.Handler]:
    """Of all loggers that there are, and what says the messages of those without any."""
    loggers = [logging.root, *list(logging.root.manager.loggerDict.values())]
    last = [] if logging.lastResort is None else [logging.lastResort]
    return last + [each for logger in loggers if isinstance(logger, logging.Logger) for each in logger.handlers]


@contextlib.contextmanager
def hidden(logger: str, worst: int = logging.ERROR) -> Iterator[None]:
    """Hide what a logger, or any, says within, up to a level; in other threads it says what it always does."""
    for each in _handlers() if logger == ANY else [logging.getLogger(logger)]:
        each.addFilter(_is_said)  # once, however often it is added
    token = _hidden.set({**_hidden.get(), logger: worst})
    try:
        yield
    finally:
        _hidden.reset(token)


class _Here:
    """Stands where a filter of warnings has a pattern for their text, and matches in the context that asks for it."""

    pattern = ""

    def match(self, text: str) -> bool:
        """Whether warnings are hidden here."""
        return self in _unwarned.get()


_unwarned: ContextVar[tuple[_Here, ...]] = ContextVar("unwarned", default=())


@contextlib.contextmanager
def unwarned(category: type[Warning] = Warning) -> Iterator[None]:
    """Hide warnings of this category within; in other threads they are said as always.

    `warnings.catch_warnings` would hide theirs too, and leave other filters behind where two threads use it at a time.
    """
    here, filters = _Here(), warnings.filters
    hides = ("ignore", here, category, None, 0)
    filters.insert(0, hides)  # type: ignore[attr-defined]
    token = _unwarned.set((here, *_unwarned.get()))
    try:
        yield
    finally:
        _unwarned.reset(token)
        with contextlib.suppress(ValueError):  # somebody cleared the list
            filters.remove(hides)  # type: ignore[attr-defined]
