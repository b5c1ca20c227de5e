"""A comparison as one HTML page that opens offline; it needs no script."""

from __future__ import annotations

from collections.abc import Sequence

from allocator.errors import plural
from allocator.reporting.compare import BlockRows, Comparison, Row
from allocator.reporting.compare_words import cell, difference_cell, flops_difference, latencies
from allocator.reporting.html_parts import asset, filled, text
from allocator.reporting.words import share_of, short


def to_html(comparison: Comparison) -> str:
    """The page: totals, the blocks that differ with a bar per side, and those that are alike, folded away."""
    blocks = comparison.blocks()
    differing = [block for block in blocks if block.differs]
    alike = [block for block in blocks if not block.differs]
    times = "".join(f"<p>{text(sentence)}.</p>" for sentence in latencies(comparison))
    parts = {
        "title": text(f"{comparison.a.name} and {comparison.b.name}"),
        "style": asset("page.css"),
        "totals": _totals(comparison) + times,
        "differing": _table(differing),
        "alike": f"<details><summary>{plural(len(alike), 'block')}</summary>{_table(alike)}</details>",
    }
    return filled("compare.html", parts)


def _totals(comparison: Comparison) -> str:
    rows = ""
    for letter, side in (("A", comparison.a), ("B", comparison.b)):
        rows += f"<tr><th scope=row>{letter}: {text(side.name)}</th>"
        rows += f"<td>{side.flops:,} <small>({short(side.flops)})</small></td>"
    return (
        "<table><caption>FLOPs, as fvcore counts them: one is one multiply-add</caption>"
        f"<tbody>{rows}</tbody></table><p>{text(flops_difference(comparison))}.</p>"
    )


def _table(blocks: Sequence[BlockRows]) -> str:
    """A table of branches, block by block; bars are shares of the larger side of the block's largest branch."""
    if not blocks:
        return "<p>none</p>"
    lines = []
    for block in blocks:
        kind = f"<span class=tag>{block.kind}</span>"
        lines.append(f"<tr><th scope=rowgroup colspan=6>{text(block.name)} {kind}</th></tr>")
        widest = max(max(row.a or 0, row.b or 0) for row in block.rows)
        lines += [_row(row, widest) for row in block.rows]
    titles = "".join(f"<th scope=col>{title}</th>" for title in ("block / branch", "A", "", "B", "", "B - A"))
    head = f"<thead><tr>{titles}</tr></thead>"
    return f"<table><caption>channels per branch</caption>{head}<tbody>{''.join(lines)}</tbody></table>"


def _row(row: Row, widest: int) -> str:
    cells = ""
    for channels in (row.a, row.b):
        width = f"{share_of(channels or 0, widest):.1%}"
        cells += f"<td>{cell(channels)}</td>"
        cells += f"<td><span class=bar aria-hidden=true><i style='width:{width}'></i></span></td>"
    return f"<tr><th scope=row>{text(row.branch)}</th>{cells}<td>{difference_cell(row.difference)}</td></tr>"
