"""Every error and warning this package raises, under one base class."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any


class AllocatorError(Exception):
    """Base class of all errors raised by this package.

    What its words name may come from a file: characters that would move a terminal's cursor, or that no terminal can
    show, are written as Python writes them.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*(_printable(each) if isinstance(each, str) else each for each in args))


class UnsupportedModelError(AllocatorError, TypeError):
    """The object is not a model that can be traced as it is (lazy, quantised, TorchScript, wrapped ...)."""


class InputError(AllocatorError, ValueError):
    """Example inputs are missing, or do not fit the model in shape, dtype or device."""


class ArgumentsError(InputError, TypeError):
    """A function was called with an argument too few, too many, or of a name that it does not take."""


class TraceError(AllocatorError, RuntimeError):
    """The model's own forward raised, or could not be followed."""


class CriterionError(AllocatorError, ValueError):
    """A criterion is unknown, or has nothing to rank this model by."""


class PolicyError(AllocatorError, ValueError):
    """A policy's choice is none of neurons, exceeds a budget, or drops what must stay."""


class BudgetError(AllocatorError, ValueError):
    """A budget that is not a number, or that cannot be met.

    Attributes:
        asked: the budget in its own unit, or None where it could not be read.
        reachable: the smallest that can be reached, or None where the budget could not be read.
        reasons: why no less can be, one line per cause of what has to stay, most frequent first.
    """

    def __init__(self, message: str, *, asked: float | None = None, reachable: int | None = None):
        super().__init__(message)
        self.asked = asked
        self.reachable = reachable
        self.reasons: list[str] = []

    def because(self, reasons: Sequence[str]) -> BudgetError:
        """The same error, which says why as well."""
        said = f"{self}; what stays: {'; '.join(reasons[:3])}" if reasons and not self.reasons else str(self)
        error = type(self)(said, asked=self.asked, reachable=self.reachable)
        error.reasons = self.reasons or list(reasons)
        return error


class NothingToAllocateError(AllocatorError, ValueError):
    """No neuron of the model can be removed.

    Attributes:
        reasons: why, one line per cause, most frequent first.
    """

    def __init__(self, message: str, *, reasons: Sequence[str] = ()):
        super().__init__(message)
        self.reasons = list(reasons)


class IterationError(AllocatorError, RuntimeError):
    """A step of `iterate` could not be made, or its training raised.

    Attributes:
        done: what the steps before it came to, as `iterate` gives it; None where there was none.
    """

    def __init__(self, message: str, done: Any):
        super().__init__(message)
        self.done = done


class SweepError(InputError, RuntimeError):
    """What `evaluate` raised, or gave instead of numbers, for a network of a sweep.

    Attributes:
        done: the sweep over the budgets before it, which may be none.
    """

    def __init__(self, message: str, done: Any):
        super().__init__(message)
        self.done = done


class RewriteError(AllocatorError, RuntimeError):
    """The rewritten model does not run, and no smaller plan was found that does."""


class RecoveryError(AllocatorError, ValueError):
    """A network has no layer that can be refitted, or its recovery cannot be told from its files."""


class CertificateError(AllocatorError, AssertionError):
    """The rewritten model is not the original minus the removed neurons."""


class CostMismatchError(AllocatorError, AssertionError):
    """The cost model and fvcore disagree on the FLOPs of a model."""


class AdapterError(AllocatorError, RuntimeError):
    """What is registered for a class of modules raised, or does not fit a module of that class."""


class AllocationMismatchError(AllocatorError, ValueError):
    """An allocation does not fit the model it is applied to."""


class FileError(AllocatorError, OSError):
    """A file is missing, truncated, not a model, or in an unknown format."""


class UnsafeFileError(FileError):
    """A file holds a pickle that would run code; opened only where the caller trusts it."""


class ExportError(AllocatorError, RuntimeError):
    """A model cannot be exported, or what was exported does not do what the model does."""


class UnknownNameError(AllocatorError, KeyError):
    """A model, criterion, policy or recipe name that is not registered; names near ones."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ConfigurationError(AllocatorError, ValueError):
    """A training configuration has unknown keys or values that do not fit; all of them are listed."""


class DataError(AllocatorError, ValueError):
    """A data set is missing, empty or unreadable, or its classes are not those of the network."""


class MissingPackageError(AllocatorError, ImportError):
    """An optional package is not installed; says which extra brings it."""


class UnexpectedTorchError(AllocatorError, ImportError):
    """The torch that is installed differs in a way that would make results wrong; says which was expected."""


class AllocatorWarning(UserWarning):
    """Base class of all warnings raised by this package."""


class UninformativeScoresWarning(AllocatorWarning):
    """All scores are equal, so the ranking carries no information."""


class BudgetNotBindingWarning(AllocatorWarning):
    """The budget is at or above the model's own FLOPs; the model comes back unchanged."""


class UnmatchedPatternWarning(AllocatorWarning):
    """A name pattern or class that matches nothing in the model, and may be misspelled; names near ones."""


class NotSelfContainedWarning(AllocatorWarning):
    """Who opens the file that was written needs more than it: the network's code, or a fresh build; says which."""


class ValueDependentTraceWarning(AllocatorWarning):
    """The forward needs values: what was traced holds for inputs that take the same path."""


def warn(message: str, category: type[AllocatorWarning]) -> None:
    """Warn at the line outside this package that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "allocator":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _printable(text: str) -> str:
    if text.replace("\n", "").isprintable():
        return text
    return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)


_SHORT = 8
"""Entries of a list that is shown as it was written."""


def did_you_mean(name: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6, mark: str = "") -> str:
    """ "did you mean a or b?" with the names nearest to one that is not there; "" where none is near.

    Args:
        name: that was asked for.
        known: names that there are.
        most: how many to give.
        cutoff: how near they have to be, from 0 to 1.
        mark: put around each name.
    """
    near = difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)
    return f"did you mean {' or '.join(f'{mark}{each}{mark}' for each in near)}?" if near else ""


def none_of(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a word that is none of a few: the one that is near, and all that there are."""
    names = list(known)
    near = did_you_mean(name, names, mark="'") if isinstance(name, str) else ""
    return f"no {kind} {as_given(name)}{near and '; ' + near} (there are {', '.join(names)})"


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not there: near ones, or all where there are few."""
    names = list(known)
    in_other_case = [each for each in names if each.lower() == name.lower()]
    near = list(dict.fromkeys([*in_other_case, *difflib.get_close_matches(name, names, n=4, cutoff=0.6)]))
    if near:
        hint = f"did you mean {', '.join(near)}?"
    elif len(names) <= 12:
        hint = f"known: {', '.join(sorted(names))}"
    else:
        hint = f"{len(names)} are known"
    return f"unknown {kind} {as_given(name)}: {hint}"


def a_kind(value: object) -> str:
    """The class of a value with its article, such as "an ndarray"."""
    name = type(value).__name__
    return f"{'an' if name.lower().startswith(('a', 'e', 'i', 'o', 'nd')) else 'a'} {name}"


def as_given(value: object, limit: int = 60) -> str:
    """A value in a message: a number, text or a short list of such as it was written, anything else by its class.

    Args:
        value: of any kind.
        limit: characters that are shown at most.
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if not _is_plain(value):
        return a_kind(value)
    try:
        text = repr(value)
    except ValueError:  # a number of thousands of digits
        return a_kind(value)
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def _is_plain(value: object, levels: int = 2) -> bool:
    if type(value) in (list, tuple, set, dict) and levels:
        inside = [*value, *value.values()] if isinstance(value, dict) else list(value)  # type: ignore[call-overload]
        return len(inside) <= _SHORT and all(_is_plain(each, levels - 1) for each in inside)
    return value is None or isinstance(value, (str, int, float, complex))


def text_of(error: BaseException) -> str:
    """What an error says, "" where it cannot say it: errors of others are anybody's code."""
    try:
        return str(error)
    except Exception:
        return ""


def first_line(error: BaseException) -> str:
    """What an error says first, or its class where it says nothing; at most 200 characters."""
    return (text_of(error).strip() or type(error).__name__).splitlines()[0][:200]


def in_words(error: BaseException, most: int = 300) -> str:
    """The class of an error and so many characters of what it says, such as "ValueError: no data"."""
    text = text_of(error)[:most]
    return f"{type(error).__name__}{text and ': ' + text}"


def plural(number: int, what: str) -> str:
    """Such as "1 block", "1,024 branches"."""
    if number != 1:
        what += "es" if what.endswith("ch") else "s"
    return f"{number:,} {what}"
