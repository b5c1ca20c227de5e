"""A comparison in several formats: the one place that knows them all."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable

from allocator.errors import plural
from allocator.reporting.compare import Comparison
from allocator.reporting.compare_page import to_html
from allocator.reporting.compare_text import ComparisonText
from allocator.reporting.compare_words import cell, difference_cell, latencies
from allocator.reporting.tables import csv_cell, escaped, markdown_table
from allocator.shown import as_plain_text


def to_text(comparison: Comparison) -> str:
    """What a terminal shows."""
    return as_plain_text(ComparisonText(comparison))


def to_json(comparison: Comparison) -> str:
    """`Comparison.to_dict` as text."""
    return json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False) + "\n"


def to_csv(comparison: Comparison) -> str:
    """One line per branch, and a last one for the latency where it was measured; what is not there stays empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["block", "kind", "branch", "a", "b", "difference"])
    for row in comparison.rows:
        writer.writerow([csv_cell(row.block), row.kind, csv_cell(row.branch), row.a, row.b, row.difference])
    a, b = comparison.a.latency, comparison.b.latency
    if a is not None and b is not None:
        writer.writerow(["", "latency (seconds)", "", a.seconds, b.seconds, b.seconds - a.seconds])
    return text.getvalue()


def to_markdown(comparison: Comparison) -> str:
    """A table of the blocks that differ."""
    a, b = comparison.a, comparison.b
    lines = [f"# {escaped(a.name)} and {escaped(b.name)}", ""]
    lines += [f"A has {a.flops:,} FLOPs, B {b.flops:,} ({b.flops - a.flops:+,}).", ""]
    for sentence in latencies(comparison):
        lines += [f"{sentence}.", ""]
    rows, alike = [], 0
    for block in comparison.blocks():
        if not block.differs:
            alike += 1
            continue
        for row in block.rows:
            cells = [cell(row.a), cell(row.b), difference_cell(row.difference)]
            rows.append([escaped(row.block), escaped(row.branch), *cells])
    lines += markdown_table(["block", "branch", "A", "B", "B - A"], rows, right=(2, 3, 4))
    return "\n".join([*lines, "", f"{plural(alike, 'block')} alike, not shown.", ""])


COMPARISONS: dict[str, Callable[[Comparison], str]] = {
    "rich": to_text,
    "json": to_json,
    "csv": to_csv,
    "html": to_html,
    "md": to_markdown,
}
