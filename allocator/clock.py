"""How long each stage of a call takes, and how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[str], None]


class Clock:
    """Seconds per stage, and word of each to the caller."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if self.progress is not None:
            self.progress(stage)
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start


PATIENCE = 2.0
"""Seconds after which people want to see that something happens."""


@contextmanager
def bar(title: str, progress: Progress | None = None, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """Show how far something is that may take long: to the caller's function, else on a terminal, after a while.

    Args:
        title: what is done.
        progress: the caller's; None for a bar on stderr, where that is a terminal.
        total: how many steps there are, where that is known.

    Yields:
        A function to call after every step, with a few words on how far it is.
    """
    if progress is not None:
        yield lambda said: progress(f"{title}: {said}")
        return
    start = time.perf_counter()
    shown: list[Any] = []

    def advance(said: str) -> None:
        if not shown and time.perf_counter() - start > PATIENCE and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bar

            shown.append(Bar(console=Console(stderr=True), transient=True))
            shown.append(shown[0].add_task(title, total=total))
            shown[0].start()
        if shown:
            shown[0].update(shown[1], advance=1, description=f"{title}: {said}")

    try:
        yield advance
    finally:
        if shown:
            shown[0].stop()
