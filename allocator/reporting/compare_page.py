"""A comparison as one HTML page that opens offline; it needs no script."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import groupby

from allocator.reporting.compare import Comparison, Row
from allocator.reporting.page import asset, filled
from allocator.reporting.words import plural, printable, short


def to_html(comparison: Comparison, latencies: Sequence[str]) -> str:
    """The page: totals, the blocks that differ with a bar per side, and those that are alike, folded away.

    Args:
        comparison: what to show.
        latencies: lines on the time that the sides take.
    """
    differing = {row.block for row in comparison.rows if row.a != row.b}
    alike = [row for row in comparison.rows if row.block not in differing]
    count = plural(len({row.block for row in alike}), "block")
    parts = {
        "title": _text(f"{comparison.a.name} and {comparison.b.name}"),
        "style": asset("page.css"),
        "totals": _totals(comparison) + "".join(f"<p>{_text(line)}.</p>" for line in latencies),
        "differing": _table([row for row in comparison.rows if row.block in differing]),
        "alike": f"<details><summary>{count}</summary>{_table(alike)}</details>",
    }
    return filled("compare.html", parts)


def _text(text: str) -> str:
    return html.escape(printable(text))


def _totals(comparison: Comparison) -> str:
    a, b = comparison.a, comparison.b
    share = f", {b.flops / a.flops:.1%} of A's" if a.flops else ""
    rows = "".join(
        f"<tr><th scope=row>{letter}: {_text(side.name)}</th>"
        f"<td>{side.flops:,} <small>({short(side.flops)})</small></td>"
        for letter, side in (("A", a), ("B", b))
    )
    return (
        "<table><caption>FLOPs, as fvcore counts them: one is one multiply-add</caption>"
        f"<tbody>{rows}</tbody></table><p>{_text(f'B has {b.flops - a.flops:+,} FLOPs{share}')}.</p>"
    )


def _table(rows: Sequence[Row]) -> str:
    """A table of branches, block by block; bars are shares of the larger side of the block's largest branch."""
    if not rows:
        return "<p>none</p>"
    titles = "".join(f"<th scope=col>{title}</th>" for title in ("A", "", "B", "", "B - A"))
    lines = []
    for block, of in groupby(rows, lambda row: row.block):
        branches = list(of)
        most = max(max(row.a or 0, row.b or 0) for row in branches) or 1
        lines.append(
            f"<tr><th scope=rowgroup colspan=6>{_text(block)} <span class=tag>{branches[0].kind}</span></th></tr>"
        )
        lines += [_row(row, most) for row in branches]
    head = f"<thead><tr><th scope=col>block / branch</th>{titles}</tr></thead>"
    return f"<table><caption>channels per branch</caption>{head}<tbody>{''.join(lines)}</tbody></table>"


def _row(row: Row, most: int) -> str:
    cells = "".join(
        f"<td>{'-' if n is None else n}</td>"
        f"<td><span class=bar aria-hidden=true><i style='width:{(n or 0) / most:.1%}'></i></span></td>"
        for n in (row.a, row.b)
    )
    difference = f"{row.difference:+}" if row.difference else ""
    return f"<tr><th scope=row>{_text(row.branch)}</th>{cells}<td>{difference}</td></tr>"
