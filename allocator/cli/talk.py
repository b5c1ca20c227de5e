"""Talking to people and machines: progress, times and notes on stderr, results on stdout."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from allocator.cli.words import in_shell
from allocator.errors import AllocatorWarning

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 120
_PATIENCE = 2.0


class Talk:
    """Progress, times and notes on stderr; results on stdout.

    Attributes:
        timings: seconds per stage, in order.
    """

    def __init__(self, args: argparse.Namespace, patience: float = _PATIENCE):
        self.patience = patience
        self.json: bool = args.json
        self.verbose: bool = args.verbose
        self.quiet: bool = args.quiet
        self.timings: dict[str, float] = {}
        self.notes: list[str] = []

    @contextlib.contextmanager
    def stage(self, title: str) -> Iterator[Callable[[str], None]]:
        """Show a spinner while a stage runs, collect its warnings as notes, and time it.

        Yields:
            A function that changes the spinner's text.
        """
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught, self._spinner(title) as update:
            warnings.simplefilter("always")
            yield update
        self.timings[title] = time.perf_counter() - start
        if self.verbose:
            print(f"{self.timings[title]:8.3f} s  {title}", file=sys.stderr)
        for warning in caught:
            self._take_warning(warning)

    def _take_warning(self, warning: warnings.WarningMessage) -> None:
        if issubclass(warning.category, AllocatorWarning):
            self.note(str(warning.message))
        elif self.verbose:
            print(f"warning: {warning.message}", file=sys.stderr)

    def shows(self, notes: Sequence[str]) -> list[str]:
        """Notes that a result will show, in the shell's words; warnings of a stage that say the same are not shown."""
        said = list(map(in_shell, notes))
        if not self.json:  # else stdout is for machines
            self.notes += said
        return said

    def note(self, text: str) -> None:
        """Something worth knowing, once, on stderr."""
        text = in_shell(text)
        if text in self.notes:
            return
        self.notes.append(text)
        if not self.quiet:
            print(f"note: {text}", file=sys.stderr)

    def times(self, timings: dict[str, float]) -> None:
        """With -v, the times of the parts of a stage."""
        if self.verbose:
            for name, seconds in timings.items():
                print(f"{seconds:8.3f} s    {name}", file=sys.stderr)

    def announce(self, text: str) -> None:
        """What was done, for people: on stderr, so that stdout holds results alone."""
        if not self.quiet:
            print(text, file=sys.stderr)

    def result(self, renderable: Any, facts: dict[str, Any]) -> None:
        """Print a result: ``facts`` as JSON for machines, else ``renderable`` for people."""
        if self.json:
            print(json.dumps(facts, indent=2, default=str))
        else:
            stdout_console().print(renderable)

    @contextlib.contextmanager
    def _announced(self, title: str) -> Iterator[None]:
        """In a log or a pipe, one plain line about a stage that takes long."""
        timer = threading.Timer(self.patience, lambda: print(f"{title} ...", file=sys.stderr, flush=True))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    @contextlib.contextmanager
    def _spinner(self, title: str) -> Iterator[Callable[[str], None]]:
        if self.quiet:
            yield lambda _: None
            return
        if not sys.stderr.isatty():
            with self._announced(title):
                yield lambda _: None
            return
        from rich.console import Console
        from rich.markup import escape

        with Console(stderr=True).status(escape(f"{title} ...")) as status:
            yield lambda part: status.update(escape(f"{title}: {part} ..."))


def stdout_console() -> Console:
    """A console for stdout: colour only on a terminal, and wide enough for tables when piped."""
    from rich.console import Console

    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=_PIPE_WIDTH if piped else None, soft_wrap=False, highlight=False)
