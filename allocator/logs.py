"""Keeping what other libraries log to oneself while one uses them, in this thread alone."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar

_hidden: ContextVar[dict[str, int]] = ContextVar("hidden", default={})  # noqa: B039  (never written into)


def _is_said(record: logging.LogRecord) -> bool:
    """Whether a message is worse than what is hidden of its logger, or another thread's."""
    return record.levelno > _hidden.get().get(record.name, -1)


@contextlib.contextmanager
def hidden(logger: str, worst: int = logging.ERROR) -> Iterator[None]:
    """Hide what this logger says within, up to a level; in other threads it says what it always does."""
    logging.getLogger(logger).addFilter(_is_said)  # once, however often it is added
    token = _hidden.set({**_hidden.get(), logger: worst})
    try:
        yield
    finally:
        _hidden.reset(token)
