"""Budgets: how much of a metric the smaller network may cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from allocator.cost.metric import Metric
from allocator.errors import BudgetError, as_given


@dataclass(frozen=True)
class Budget:
    """A metric with a limit.

    Attributes:
        metric: what is limited.
        limit: the most that may be kept of it, in its own unit.
    """

    metric: Metric
    limit: float

    def left(self, kept: np.ndarray) -> float:
        """How much may still be added when the neurons with `kept` true are kept; negative where it is exceeded."""
        return self.limit - self.metric.value(kept)


class Budgets:
    """Budgets that hold at once. All metrics grow with the kept neurons, so that what meets them can be bisected.

    Args:
        budgets: at least one.
    """

    def __init__(self, budgets: Sequence[Budget]) -> None:
        self.each = tuple(budgets)

    @property
    def first(self) -> Budget:
        """The one that was named first: its figures lead in messages."""
        return self.each[0]

    @property
    def names(self) -> list[str]:
        """The metrics that are limited."""
        return [budget.metric.name for budget in self.each]

    def met(self, kept: np.ndarray) -> bool:
        """Whether a choice of neurons is within all of them."""
        return all(budget.left(kept) >= 0 for budget in self.each)

    def unmet(self, kept: np.ndarray) -> list[Budget]:
        """Those that a choice of neurons exceeds."""
        return [budget for budget in self.each if budget.left(kept) < 0]

    def used(self, kept: np.ndarray) -> float:
        """The share that is used of the budget that is nearest to its limit."""
        return max(budget.metric.value(kept) / budget.limit for budget in self.each)

    def on(self, metrics: Mapping[str, Metric]) -> Budgets:
        """The same limits on other metrics of the same names, as those of a graph that a repair changed."""
        return Budgets([Budget(metrics[budget.metric.name], budget.limit) for budget in self.each])

    def limit(self, name: str) -> float:
        """The limit of the metric of this name."""
        return next(budget.limit for budget in self.each if budget.metric.name == name)

    def with_limit(self, name: str, limit: float) -> Budgets:
        """With another limit for the metric of this name."""
        return Budgets([Budget(b.metric, limit if b.metric.name == name else b.limit) for b in self.each])


_UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_EXAMPLES = {
    "flops": "4.2e9 or '4.2G'",
    "params": "10e6 or '10M'",
    "latency": "0.008 (in seconds) or '8ms'",
}
_TIMES = {"NS": 1.0, "US": 1e3, "MS": 1e6, "S": 1e9}


def parse_limit(name: str, asked: float | str, metric: Metric) -> float:
    """Read a budget: a number, text as people write it ("4.2G", "10 M"), or a share of the model's own ("60%").

    A time is in seconds, or has its unit ("8ms").

    Args:
        name: of the argument, for messages.
        asked: what the caller gave.
        metric: what it limits.

    Raises:
        BudgetError: zero, negative, NaN, infinite, not a number, or a share without its sign.
    """
    whole, is_time = metric.whole, name == "latency"
    try:
        value = number_of(asked, whole, is_time)
    except (TypeError, ValueError, OverflowError):
        what, example = "seconds" if is_time else metric.unit, _EXAMPLES.get(name, "5e6 or '5M'")
        raise BudgetError(
            f"{name}={as_given(asked)} is not a number: pass {what} such as {example}, or a share such as '60%'"
        ) from None
    if not math.isfinite(value) or value <= 0:
        raise BudgetError(
            f"{name}={as_given(asked)} must be positive and finite; the model's own is {metric.show(whole)}"
        )
    if value < 1 < whole and not is_time and not str(asked).strip().endswith("%"):
        share = f"{100 * value:g}%"
        raise BudgetError(
            f"{name}={as_given(asked)} is {value:g} {metric.unit} out of {whole:,}: did you mean {share!r}?"
        )
    return value


def check_limit(name: str, asked: float | str) -> None:
    """That a budget can be read, before there is a model to hold it against.

    Raises:
        BudgetError: not a number, zero, negative, NaN or infinite.
    """
    try:
        value = number_of(asked, 1, name == "latency")
    except (TypeError, ValueError, OverflowError):
        example = _EXAMPLES.get(name, "5e6 or '5M'")
        raise BudgetError(
            f"{name}={as_given(asked)} is not a number such as {example}, or a share such as '60%'"
        ) from None
    if not math.isfinite(value) or value <= 0:
        raise BudgetError(f"{name}={as_given(asked)} must be positive and finite")


def number_of(asked: float | str, whole: int = 1, is_time: bool = False) -> float:
    """The number that a figure or a text such as "4.2G" stands for; a share is of `whole`, a time in nanoseconds.

    Raises:
        TypeError, ValueError, OverflowError: it is none.
    """
    if isinstance(asked, bool):
        raise TypeError("a truth value limits nothing")
    if not isinstance(asked, str):
        return float(asked) * (1e9 if is_time else 1.0)
    text = asked.strip().upper().replace(",", "").replace("_", "").replace("\N{GREEK CAPITAL LETTER MU}", "U")
    if text.endswith("%"):
        return whole * float(text[:-1]) / 100
    units = _TIMES if is_time else _UNITS
    for unit in sorted(units, key=len, reverse=True):
        if text.endswith(unit):
            return float(text[: -len(unit)]) * units[unit]
    return float(text) * (1e9 if is_time else 1.0)


def parse_budgets(asked: Mapping[str, float | str], metrics: Mapping[str, Metric]) -> Budgets:
    """Read budgets by the names of their metrics; raises like `parse_limit`."""
    return Budgets([Budget(metrics[name], parse_limit(name, figure, metrics[name])) for name, figure in asked.items()])
