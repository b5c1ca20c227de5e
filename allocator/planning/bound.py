"""How much importance any plan could keep under a budget: the bound that a plan's gap is measured against.

Neurons that every axis of a metric counts alike form a class; of a class, the best n are kept, so that a plan is a
number per class. What it keeps is a sum of concave functions of these numbers; what it costs is a sum of products of
counts along axes, each linear in the numbers.

For any price level, the most that importance minus price can come to bounds every plan (Lagrange). Where the classes
that are multiplied with one another form trees, that is found exactly by dynamic programming. Elsewhere products are
replaced by the planes below them (McCormick), in pieces, and the rest is a mixed-integer linear programme.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from allocator.cost.budget import Budget
from allocator.planning.problem import Problem

LEVELS = 60
"""Of the bisection for the best price level."""
SECONDS = 1.2
"""For the mixed-integer programme; whatever it has proven by then holds."""
TANGENTS = 24
PIECES = 6
MOST_CLASSES = 600


@dataclass(frozen=True)
class _Classes:
    """A problem by numbers per class, n, and by counts per axis, fixed + weights @ n.

    Attributes:
        best: per class, (n + 1,) the importance of its best 0..n neurons.
        fixed: (axes,) indices along each axis that stay.
        weights: (axes, classes) indices that a neuron of the class adds.
        constant, linear, products: the cost is constant + linear @ counts + the sum of products[i, j] count_i count_j.
        limit: of the cost.
        kept: importance of the neurons that stay in any case.
    """

    best: list[np.ndarray]
    fixed: np.ndarray
    weights: np.ndarray
    constant: float
    linear: np.ndarray
    products: dict[tuple[int, int], float]
    limit: float
    kept: float

    def polynomial(self) -> tuple[float, np.ndarray, np.ndarray]:
        """The cost by classes: constant + linear @ n + the sum of quadratic[c, d] n_c n_d over c <= d."""
        size = len(self.best)
        constant = self.constant + float(self.linear @ self.fixed)
        linear, quadratic = self.linear @ self.weights, np.zeros((size, size))
        for (i, j), factor in self.products.items():
            constant += factor * self.fixed[i] * self.fixed[j]
            linear = linear + factor * (self.fixed[i] * self.weights[j] + self.fixed[j] * self.weights[i])
            product = factor * np.outer(self.weights[i], self.weights[j])
            quadratic += np.triu(product + product.T, 1) + np.diag(np.diag(product))
        return constant, linear, quadratic


def upper_bound(problem: Problem) -> float | None:
    """The importance that no choice of neurons exceeds under the problem's budgets; None where none is known.

    Of several budgets, each bounds by itself, and the least holds.
    """
    found = [_of_budget(problem, budget) for budget in problem.budgets.each]
    known = [bound for bound in found if bound is not None]
    return min(known) if known else None


def _of_budget(problem: Problem, budget: Budget) -> float | None:
    classes = _classes(problem, budget)
    if classes is None or not classes.best:
        return None if classes is None else classes.kept
    constant, linear, quadratic = classes.polynomial()
    tree = _Tree(classes.best, linear, quadratic, classes.limit - constant)
    bound = tree.bound() if nx.is_forest(tree.products) else _by_planes(classes)
    return None if bound is None else classes.kept + bound


def _classes(problem: Problem, budget: Budget) -> _Classes | None:
    """None where a term has three axes or more that may shrink, or there are too many classes."""
    metric, values = budget.metric, np.nan_to_num(problem.scores.values)
    free = np.flatnonzero(~problem.forced)
    columns = metric.incidence.tocsc()[:, free]
    signature = np.unique(_hashes(columns), return_inverse=True)[1] if len(free) else np.zeros(0, dtype=int)
    count = int(signature.max(initial=-1)) + 1
    if count > MOST_CLASSES:
        return None
    first = np.array([np.flatnonzero(signature == c)[0] for c in range(count)], dtype=int)
    weights = np.asarray(columns[:, first].todense(), dtype=np.float64)
    fixed = metric.counts(problem.forced)[:-1].astype(np.float64)
    alike, axis_of = np.unique(np.column_stack([fixed, weights]), axis=0, return_inverse=True)
    axis_of = axis_of.reshape(-1)
    constant, linear = 0.0, np.zeros(len(alike))
    products: dict[tuple[int, int], float] = {}
    for factor, axes in zip(metric.factors, metric.axes_of_term, strict=True):
        named = [int(axis_of[a]) for a in axes if a < len(axis_of)]
        moving = sorted(a for a in named if alike[a, 1:].any())
        plain = float(factor) * float(np.prod([alike[a, 0] for a in named if not alike[a, 1:].any()]))
        if len(moving) > 2:
            return None
        if not moving:
            constant += plain
        elif len(moving) == 1:
            linear[moving[0]] += plain
        else:
            pair = moving[0], moving[1]
            products[pair] = products.get(pair, 0.0) + plain
    best = []
    for c in range(count):
        own = np.sort(values[free[signature == c]])[::-1]
        best.append(np.append(0.0, np.cumsum(own)))
    limit, kept = float(budget.limit), float(values[problem.forced].sum())
    return _Classes(best, alike[:, 0], alike[:, 1:], constant, linear, products, limit, kept)


def _hashes(columns: coo_matrix) -> np.ndarray:
    """(n,) a number per column, the same for equal ones: sums of two independent random weights per row."""
    random = np.random.default_rng(0).integers(1, 2**31, size=(2, columns.shape[0])).astype(np.float64)
    sums = np.asarray(columns.T @ random.T)
    return sums[:, 0] + 1j * sums[:, 1]


# Trees ----------------------------------------------------------------------------------------------


class _Tree:
    """Classes whose products form trees: linear @ n + the sum of quadratic[c, d] n_c n_d must not exceed the limit."""

    def __init__(self, best: list[np.ndarray], linear: np.ndarray, quadratic: np.ndarray, limit: float) -> None:
        self.best, self.linear, self.quadratic, self.limit = best, linear, quadratic, limit
        self.products = nx.Graph()
        self.products.add_nodes_from(range(len(best)))
        rows, cols = np.nonzero(np.triu(quadratic, 1))
        self.products.add_edges_from(zip(rows.tolist(), cols.tolist(), strict=True))

    def bound(self) -> float:
        """The least, over price levels, of the most that importance minus price can come to."""
        orders = [list(nx.dfs_postorder_nodes(self.products, min(p))) for p in nx.connected_components(self.products)]
        roots = [(order, dict(nx.bfs_predecessors(self.products, order[-1]))) for order in orders]
        top = max(float(best[1]) for best in self.best if len(best) > 1)
        cheapest = max(float(self.linear[self.linear > 0].min(initial=np.inf)), 1e-12)
        low, high = 0.0, 2 * top / cheapest if np.isfinite(cheapest) else 1.0
        bound = np.inf
        for _ in range(LEVELS):
            level = (low + high) / 2
            value, cost = self.at_level(roots, level)
            bound = min(bound, value + level * self.limit)
            if cost > self.limit:
                low = level
            else:
                high = level
        return float(bound)

    def at_level(self, roots: list[tuple[list[int], dict[int, int]]], level: float) -> tuple[float, float]:
        """The most that importance minus `level` times cost can come to, and what that costs."""
        total, numbers = 0.0, np.zeros(len(self.best))
        for order, parent in roots:
            gains: dict[int, np.ndarray] = {}
            choices: dict[int, np.ndarray] = {}
            for c in order:
                n = np.arange(len(self.best[c]))
                own = self.best[c] - level * (self.linear[c] * n + self.quadratic[c, c] * n**2)
                own = own + gains.pop(c, 0.0)
                if c not in parent:
                    numbers[c] = int(np.argmax(own))
                    total += float(own[int(numbers[c])])
                    continue
                above = parent[c]
                m = np.arange(len(self.best[above]))
                factor = level * self.quadratic[min(c, above), max(c, above)]
                best, choices[c] = _best_response(own, factor, n, m)
                gains[above] = gains.get(above, np.zeros(len(m))) + best
            for c in reversed(order[:-1]):
                numbers[c] = choices[c][int(numbers[parent[c]])]
        return total, float(self.linear @ numbers + numbers @ np.triu(self.quadratic) @ numbers)


def _best_response(own: np.ndarray, factor: float, n: np.ndarray, m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each m, the most of own[n] - factor n m over n, and the n that gives it: an upper envelope of lines.

    The lines have falling slopes, so that those on the envelope are found by one pass, as for a convex hull.
    """
    hull: list[int] = []
    for i in n.tolist():
        while hull and own[hull[-1]] <= own[i] and factor == 0:
            hull.pop()
        while len(hull) >= 2 and _never_best(own, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)
    lines = np.array(hull)
    # Where the line of more neurons overtakes that of fewer: own[b] - own[a] over (b - a), falling along the hull.
    gain = np.diff(own[lines]) / np.diff(lines)
    chosen = lines[np.searchsorted(-gain, -factor * m, side="left")]
    return own[chosen] - factor * chosen * m, chosen


def _never_best(own: np.ndarray, a: int, b: int, c: int) -> bool:
    """Whether the point b lies on or below the chord from a to c."""
    return bool((own[b] - own[a]) * (c - b) <= (own[c] - own[b]) * (b - a))


# Planes ---------------------------------------------------------------------------------------------


def _by_planes(classes: _Classes) -> float | None:
    """A mixed-integer linear programme that no plan exceeds; its proven bound."""
    programme = _Programme()
    sizes = np.array([len(best) - 1 for best in classes.best])
    numbers = [programme.variable(0, size) for size in sizes]
    for c, best in enumerate(classes.best):
        gain = programme.variable(0, float(best[-1]), objective=-1.0)
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
