"""Sentences on a comparison, which its renderers share."""

from __future__ import annotations

from allocator.reporting.compare import Comparison
from allocator.reporting.words import percent, timed


def flops_difference(comparison: Comparison) -> str:
    """Such as "B has -672 FLOPs, 98.2% of A's"."""
    a, b = comparison.a.flops, comparison.b.flops
    sentence = f"B has {b - a:+,} FLOPs"
    if a:
        sentence += f", {percent(b / a)} of A's"
    return sentence


def latencies(comparison: Comparison) -> list[str]:
    """A sentence per side whose time was measured, and one for both."""
    a, b = comparison.a.latency, comparison.b.latency
    sentences = []
    if a is not None:
        sentences.append(f"A takes {timed(a)}")
    if b is not None:
        sentences.append(f"B takes {timed(b)}")
    if a is not None and b is not None:
        sentences.append(f"B takes {percent(b.seconds / a.seconds)} of A's time")
    return sentences


def cell(channels: int | None) -> str:
    """Channels of a branch; "-" where a side has no such branch."""
    return "-" if channels is None else str(channels)


def difference_cell(difference: int) -> str:
    """With its sign; empty where there is none."""
    return f"{difference:+}" if difference else ""
