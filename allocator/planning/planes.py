"""A bound for classes that hang together in any way: products are replaced by the planes below them (McCormick), in
pieces, and the rest is a mixed-integer linear programme.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from allocator.planning.classes import Classes

SECONDS = 1.2
"""For the mixed-integer programme; whatever it has proven by then holds."""
TANGENTS = 24
PIECES = 6


def by_planes(classes: Classes) -> float | None:
    """A mixed-integer linear programme that no plan exceeds; its proven bound."""
    programme = _Programme()
    sizes = np.array([len(best) - 1 for best in classes.best])
    numbers = [programme.variable(0, size) for size in sizes]
    for c, best in enumerate(classes.best):
        gain = programme.variable(float(best.min()), float(best.max()), objective=-1.0)
        for at in np.unique(np.linspace(0, sizes[c] - 1, TANGENTS).astype(int)).tolist():
            slope = float(best[at + 1] - best[at])
            programme.at_most({gain: 1.0, numbers[c]: -slope}, float(best[at]) - slope * at)
    counts = []
    for fixed, weights in zip(classes.fixed, classes.weights, strict=True):
        count = _Count(programme.variable(fixed, fixed + weights @ sizes), fixed, float(fixed + weights @ sizes))
        row = {numbers[c]: float(weights[c]) for c in np.flatnonzero(weights).tolist()}
        programme.equal({**row, count.variable: -1.0}, -float(fixed))
        counts.append(count)
    cost = {count.variable: float(factor) for count, factor in zip(counts, classes.linear, strict=True) if factor}
    pieces = {hub: _Pieces(programme, counts[hub]) for hub in _cover(list(classes.products))}
    for (a, b), factor in classes.products.items():
        hub, other = (a, b) if a in pieces else (b, a)
        product = programme.variable(0, counts[a].high * counts[b].high)
        pieces[hub].below(product, counts[other], same=hub == other)
        cost[product] = factor
    scale = max(cost.values(), default=1.0)
    programme.at_most({k: v / scale for k, v in cost.items()}, (classes.limit - classes.constant) / scale)
    return programme.bound()


@dataclass(frozen=True)
class _Count:
    """A variable of a programme, between two numbers."""

    variable: int
    low: float
    high: float


def _cover(edges: list[tuple[int, int]]) -> list[int]:
    """Classes that touch every product, those of many products first."""
    left, cover = set(edges), []
    while left:
        degree: dict[int, int] = {}
        for edge in left:
            for c in set(edge):
                degree[c] = degree.get(c, 0) + 1
        hub = max(degree, key=lambda c: (degree[c], -c))
        cover.append(hub)
        left = {edge for edge in left if hub not in edge}
    return cover


class _Programme:
    """A linear programme with some variables of whole numbers, put together piece by piece."""

    def __init__(self) -> None:
        self.low: list[float] = []
        self.high: list[float] = []
        self.objective: list[float] = []
        self.whole: list[int] = []
        self.rows: list[dict[int, float]] = []
        self.limits: list[tuple[float, float]] = []

    def variable(self, low: float, high: float, *, objective: float = 0.0, whole: bool = False) -> int:
        """A new variable; its number."""
        self.low.append(float(low))
        self.high.append(float(high))
        self.objective.append(objective)
        self.whole.append(int(whole))
        return len(self.low) - 1

    def at_most(self, row: dict[int, float], limit: float) -> None:
        """A weighted sum of variables is at most a limit."""
        self.rows.append(row)
        self.limits.append((-np.inf, limit))

    def equal(self, row: dict[int, float], value: float) -> None:
        """A weighted sum of variables has a value."""
        self.rows.append(row)
        self.limits.append((value, value))

    def bound(self) -> float | None:
        """What the objective is proven not to exceed, as a maximum; None where nothing is proven."""
        places = [(i, k, value) for i, row in enumerate(self.rows) for k, value in row.items()]
        i, k, value = (np.array(column) for column in zip(*places, strict=True))
        matrix = coo_matrix((value, (i.astype(int), k.astype(int))), shape=(len(self.rows), len(self.low))).tocsc()
        lower, upper = (np.array(side) for side in zip(*self.limits, strict=True))
        result = milp(
            np.array(self.objective),
            integrality=np.array(self.whole),
            bounds=Bounds(np.array(self.low), np.array(self.high)),
            constraints=LinearConstraint(matrix, lower, upper),
            options={"time_limit": SECONDS, "mip_rel_gap": 1e-4},
        )
        proven = getattr(result, "mip_dual_bound", None)
        return None if proven is None or not np.isfinite(proven) else -float(proven)


class _Pieces:
    """The range of one count, in pieces of which one holds it."""

    def __init__(self, programme: _Programme, count: _Count) -> None:
        self.programme = programme
        stops = np.linspace(count.low, count.high, PIECES + 1)
        self.spans = list(zip(stops[:-1].tolist(), stops[1:].tolist(), strict=True))
        self.inside = [programme.variable(0, 1, whole=True) for _ in self.spans]
        self.parts = [programme.variable(0, high) for _, high in self.spans]
        programme.equal(dict.fromkeys(self.inside, 1.0), 1.0)
        programme.equal({**dict.fromkeys(self.parts, 1.0), count.variable: -1.0}, 0.0)
        for (low, high), inside, part in zip(self.spans, self.inside, self.parts, strict=True):
            programme.at_most({part: 1.0, inside: -high}, 0.0)
            programme.at_most({part: -1.0, inside: low}, 0.0)

    def below(self, product: int, other: _Count, *, same: bool) -> None:
        """`product` is at least this count times another, by the planes below it in every piece."""
        programme = self.programme
        shares, products = [], []
        for (low, high), inside, part in zip(self.spans, self.inside, self.parts, strict=True):
            share = part if same else programme.variable(0, other.high)
            within = programme.variable(0, high * other.high)
            if not same:
                programme.at_most({share: 1.0, inside: -other.high}, 0.0)
                programme.at_most({share: -1.0, inside: other.low}, 0.0)
            # At the lower corner, and at the upper one, both counts at their least and at their most.
            least, most = (low, high) if same else (other.low, other.high)
            programme.at_most(_sum((share, low), (part, least), (inside, -low * least), (within, -1.0)), 0.0)
            programme.at_most(_sum((share, high), (part, most), (inside, -high * most), (within, -1.0)), 0.0)
            shares.append(share)
            products.append(within)
        if not same:
            programme.equal({**dict.fromkeys(shares, 1.0), other.variable: -1.0}, 0.0)
        programme.equal({**dict.fromkeys(products, 1.0), product: -1.0}, 0.0)


def _sum(*parts: tuple[int, float]) -> dict[int, float]:
    """A row in which a variable may be named twice."""
    row: dict[int, float] = {}
    for variable, value in parts:
        row[variable] = row.get(variable, 0.0) + value
    return row
