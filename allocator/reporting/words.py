"""Numbers and names as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from allocator.cost.latency import Latency
from allocator.errors import plural
from allocator.graph.channel_graph import METRICS

_UNITS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


def short(number: float) -> str:
    """Three digits and a unit: 1513 as "1.51 k"; below a thousand as it is."""
    for factor, unit in _UNITS:
        if abs(number) >= 0.9995 * factor:  # from here on, three digits round up to the next unit
            return f"{number / factor:#.3g}".rstrip(".") + f" {unit}"
    return f"{number:,.0f}"


def size(numbers: Iterable[int]) -> str:
    """(1, 3, 224, 224) as "1x3x224x224"."""
    return "x".join(map(str, numbers))


def change(before: int, after: int | None) -> str:
    """Such as "64", or "64 → 40" where a budget changes it."""
    if after is None or before == after:
        return str(before)
    return f"{before} → {after}"


def share_of(part: float, whole: float) -> float:
    """How much of the whole a part is; of nothing, nothing."""
    return part / whole if whole else 0.0


def percent(share: float, digits: int = 1) -> str:
    """0.1234 as "12.3%"."""
    return f"{share:.{digits}%}"


def spread(gamma: tuple[float, float, float] | None) -> str:
    """(mean, min, max) as "min–max"; "" where there is none."""
    if gamma is None:
        return ""
    low, high = f"{gamma[1]:.2g}", f"{gamma[2]:.2g}"
    return low if low == high else f"{low}–{high}"


def milliseconds(seconds: float) -> str:
    """0.01234 as "12.3 ms", 1.234 as "1,234 ms"."""
    thousandths = seconds * 1e3
    if thousandths >= 999.5:
        return f"{thousandths:,.0f} ms"
    return f"{thousandths:#.3g}".rstrip(".") + " ms"


def cost_of(metric: str, value: float) -> str:
    """A budget, or what is used of it, with its unit; a latency is in nanoseconds."""
    return milliseconds(value / 1e9) if metric == "latency" else f"{value:,.0f} {METRICS[metric]}"


def timed(now: Latency, kept: Latency | None = None) -> str:
    """The time of a forward, and what is left of it, with how it was measured."""
    time = milliseconds(now.seconds)
    if kept is not None:
        time += f" now, {milliseconds(kept.seconds)} ({percent(kept.seconds / now.seconds)}) kept"
    threads = plural(now.threads, "thread")
    inputs = ", ".join(size(shape) for shape in now.inputs)
    return f"{time}; median of {plural(now.forwards, 'forward')}, {now.device}, {threads}, input {inputs}"


def counted(operators: Mapping[str, int]) -> str:
    """Operators with the number of their calls, such as "max_pool2d (8), add (3)"."""
    return ", ".join(f"{name.removeprefix('aten::')} ({calls})" for name, calls in operators.items())


def printable(text: str) -> str:
    """The text without characters that could command a terminal or break a line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
