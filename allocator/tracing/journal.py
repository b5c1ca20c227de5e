"""Who set what: what a model's code set is told from what other threads set meanwhile."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from allocator.tracing.switches import SWITCHES, Switch, switches

P = ParamSpec("P")
R = TypeVar("R")

_BY_CODE: dict[int, tuple[Switch, ...]] = {}
_IN_C: dict[Any, tuple[Switch, ...]] = {}
_BY_NAME: dict[str, tuple[Switch, ...]] = {}
for _each in SWITCHES:
    for _function in _each.set_by:
        _code = getattr(getattr(_function, "__func__", _function), "__code__", None)
        if _code is None:
            _IN_C[_function] = (*_IN_C.get(_function, ()), _each)
        else:
            _BY_CODE[id(_code)] = (*_BY_CODE.get(id(_code), ()), _each)
    for _name in _each.named:
        _BY_NAME[_name] = (*_BY_NAME.get(_name, ()), _each)
_MOST_QUIET = 20_000
_quiet: dict[int, Any] = {}
"""Code that sets nothing, by its id, which it keeps."""


def _set_by(code: Any) -> tuple[Switch, ...]:
    """What a function of Python may set."""
    names = {*code.co_names, *(each for each in code.co_consts if type(each) is str)}
    named = (_BY_NAME[name] for name in _BY_NAME.keys() & names)
    found = tuple(dict.fromkeys(itertools.chain(_BY_CODE.get(id(code), ()), *named)))
    if not found:
        if len(_quiet) >= _MOST_QUIET:
            _quiet.clear()
        _quiet[id(code)] = code
    return found


class Journal:
    """What the threads that ran a model's code set: each switch before and after a call of what sets it.

    Another thread may set the same one within that call: it then counts as this one's. So does what a function of the
    model's, in which an attribute such as `stdout` is named, finds changed once it is over.
    """

    def __init__(self) -> None:
        self._entries: list[list[tuple[Switch, Any, Any]]] = []  # per call: what it set, before and after

    def undo(self) -> None:
        """Put back what was set, the last first."""
        while self._entries:
            found = self._entries.pop()
            still = [each.read() == after for each, _, after in found]  # to undo one may set another
            for (each, before, after), as_set in zip(found, still, strict=True):
                each.undo(before, each.read() if as_set else after)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Within, what this thread sets is noted; not so where a profiler is on, which stays."""
        if sys.getprofile() is not None:
            yield
            return
        sys.setprofile(self._notes())
        try:
            yield
        finally:
            sys.setprofile(None)

    def _notes(self) -> Callable[[Any, str, Any], None]:
        quiet, in_c, add = _quiet, _IN_C, self._add
        waiting: list[tuple[Any, list[tuple[Switch, Any]]]] = []  # calls that are not over, and the states before

        def note(frame: Any, event: str, arg: Any) -> None:  # there are half a million calls of it in an allocation
            if event == "c_call":
                if arg in in_c:
                    waiting.append((arg, [(each, each.read()) for each in in_c[arg]]))
            elif event == "call":
                if id(frame.f_code) not in quiet and (found := _set_by(frame.f_code)):
                    waiting.append((frame, [(each, each.read()) for each in found]))
            elif waiting and waiting[-1][0] is (frame if event == "return" else arg):
                add(waiting.pop()[1])

        return note

    def _add(self, before: list[tuple[Switch, Any]]) -> None:
        found = [(each, state, now) for each, state in before if (now := each.read()) != state]
        if found and self._entries and [entry[::2] for entry in self._entries[-1]] == [entry[:2] for entry in found]:
            last = self._entries.pop()  # it goes on from there
            found = [(each, first, now) for (each, first, _), (_, _, now) in zip(last, found, strict=True)]
        if found:
            self._entries.append(found)


def unnoted(function: Callable[P, R]) -> Callable[P, R]:
    """Of one's own code that is called from within a model's, and is most of all calls then: nothing is noted in it."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        profiler = sys.getprofile()
        if getattr(profiler, "__module__", "") != __name__:
            return function(*args, **kwargs)
        sys.setprofile(None)
        try:
            return function(*args, **kwargs)
        finally:
            sys.setprofile(profiler)

    return run


_JOURNAL: contextvars.ContextVar[Journal | None] = contextvars.ContextVar("journal", default=None)


@contextlib.contextmanager
def put_back() -> Iterator[None]:
    """What a model's code sets within, where it is run by `noted`, is as it was afterwards."""
    restore, journal = switches(), None if threading.active_count() == 1 else Journal()
    token = _JOURNAL.set(journal)
    try:
        yield
    finally:
        _JOURNAL.reset(token)
        if journal is not None:
            journal.undo()
        restore()


def noted() -> contextlib.AbstractContextManager[None]:
    """Within, a model's code runs in this thread, and what it sets is to be told from what others set."""
    journal = _JOURNAL.get()
    return contextlib.nullcontext() if journal is None else journal.kept()
