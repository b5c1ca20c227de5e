"""Functions that take the place of a library's own in a forward that is traced, and nowhere else.

A forward on tensors without values stops at a function that needs them, such as a loop over the classes that were
found. Such a function is a global of some module: nothing in the model leads to it, so it is the module's name that has
to mean another one. While at least one trace runs, that name is a switch: called from a trace it calls the stand-in,
and from everywhere else, other threads included, the library's own function. With the last trace to end, the library's
own function is back in its place.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

Function = Callable[..., Any]


@dataclass(frozen=True)
class _Switch:
    """What stands at a name of a module's, or of a class in it, while traces run."""

    module: Any
    name: str
    original: Function
    function: Function


class StandIns:
    """The functions that have a stand-in, by module and name."""

    def __init__(self) -> None:
        self._functions: dict[tuple[str, str], Function] = {}
        self._switches: dict[tuple[str, str], _Switch] = {}
        self._traces = 0
        self._lock = threading.Lock()
        # A context variable and no attribute: each thread, and each task of asyncio's, sees a value of its own.
        self._tracing: ContextVar[bool] = ContextVar("tracing", default=False)

    def add(self, module: str, name: str, stand_in: Function) -> None:
        """Let a function take the place of `module.name` in forwards that are traced.

        Args:
            module: its name.
            name: of the function, or of a class's (`Interface.get`).
            stand_in: takes its place.

        Raises:
            ValueError: that one has a stand-in already.
        """
        if (module, name) in self._functions:
            raise ValueError(f"{module}.{name} has a stand-in already")
        self._functions[module, name] = stand_in

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Call the stand-ins from this thread, as far as the modules are loaded; may be nested."""
        self._begin()
        token = self._tracing.set(True)
        try:
            yield
        finally:
            self._tracing.reset(token)
            self._end()

    def _begin(self) -> None:
        with self._lock:
            self._traces += 1
            for place, stand_in in self._functions.items():
                # Asked at every trace: another one that runs may have begun before the module was loaded.
                if place not in self._switches:
                    self._put(place, stand_in)

    def _put(self, place: tuple[str, str], stand_in: Function) -> None:
        owner, _, name = place[1].rpartition(".")
        module: Any = sys.modules.get(place[0])
        if owner:
            module = getattr(module, owner, None)
        # Private names, which a release of the library may lack: what it does instead is traced as it is.
        if module is None or not hasattr(module, name):
            return
        original = getattr(module, name)

        @functools.wraps(original)
        def switch(*args: Any, **kwargs: Any) -> Any:
            function = stand_in if self._tracing.get() else original
            return function(*args, **kwargs)

        self._switches[place] = _Switch(module, name, original, switch)
        setattr(module, name, switch)

    def _end(self) -> None:
        with self._lock:
            self._traces -= 1
            if self._traces:
                return
            for switch in self._switches.values():
                # What somebody else has put there in the meantime is not ours to take away.
                if getattr(switch.module, switch.name, None) is switch.function:
                    setattr(switch.module, switch.name, switch.original)
            self._switches.clear()


stand_ins = StandIns()
"""For forwards on tensors without values; each library's file adds its own."""
in_parts = StandIns()
"""What does the same in calls that can be followed, and so may stand in any forward of ours, on values too."""
