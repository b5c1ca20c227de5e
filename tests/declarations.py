"""Operators declared otherwise for the time of a test."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

from allocator.tracing.operators import DECLARATIONS, operator_of


@contextlib.contextmanager
def scratch() -> Iterator[None]:
    """What is declared within is forgotten after it."""
    with mock.patch.dict(DECLARATIONS):
        operator_of.cache_clear()
        yield
    operator_of.cache_clear()


@contextlib.contextmanager
def with_rule(name: str, rule: Callable[[Any, Any], None]) -> Iterator[None]:
    """An operator has another rule within."""
    with scratch():
        DECLARATIONS[name] = replace(DECLARATIONS[name], rule=rule)
        yield
