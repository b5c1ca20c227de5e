"""A bound for classes whose products form trees, or trees that meet in hubs: by prices, and dynamic programming.

For any price level, the most that importance minus price can come to bounds every plan (Lagrange). Where the classes
that are multiplied with one another form trees, it is found from the leaves to the root. Elsewhere some *hubs* tie the
trees together: a count that several layers read, such as the width of a concatenation or of a residual stream. Once its
hubs are known, what lies behind one is trees again, and costs more in proportion to the hub's count. The most that
these can come to is therefore a convex function of that count, which lies below the straight lines between its values
at a few counts. So hubs are closed one after another, from the last layers to the first: what lies behind one becomes
such lines, the highest of which counts, and each line is no more than a price for the members of the hub.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import networkx as nx
import numpy as np
from scipy.optimize import minimize_scalar

from allocator.planning.classes import Classes

RANGE = 14.0
"""How far, as a logarithm, the best price level may be from importance per cost on the whole."""
ROUNDS = ((RANGE, 0.1, 6), (0.3, 1e-3, 20))
"""Of the search for the best level: how far to look, how closely, and at how many counts of a hub."""
MOST_LOOKS = 20
"""At levels, per round: each is linear in the network's size, so that the whole is."""
EXACT = 1e5
"""Numbers to compute for which every width of a layer is looked at; else `WIDTHS` of them, with lines between."""
WIDTHS = 40
MOST_TIES = 3
"""Hubs and classes whose numbers are looked at beside those of another hub."""
LARGEST = 5e5
"""Numbers to hold at once: wide layers have fewer counts of a hub looked at."""


def by_hubs(classes: Classes) -> float | None:
    """What the free neurons can be worth at most; None where hubs tie the trees together too tightly."""
    bound = whole = sum(float(best.max()) for best in classes.best)
    if whole <= 0 or classes.limit <= 0:
        return whole
    programme = _programme(classes)
    if programme is None:
        return None
    level = float(np.log(whole / classes.limit))
    for within, closely, points in ROUNDS:
        found = minimize_scalar(
            lambda at, points: programme.at_level(float(np.exp(at)), points),
            bounds=(level - within, level + within),
            args=(points,),
            method="bounded",
            options={"xatol": closely, "maxiter": MOST_LOOKS},
        )
        level, bound = float(found.x), min(bound, float(found.fun))
    return bound


def _programme(classes: Classes) -> _Programme | None:
    """With as many hubs as there may be, or with those alone that several classes are multiplied with."""
    for readers in (1, 2):
        costs = _Costs.of(classes, readers)
        steps = _order(costs)
        if steps is not None:
            return _Programme(classes, costs, steps)
    return None


# What there is ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Hub:
    """A count that several classes read: fixed + the sum of weight times number over its members.

    Attributes:
        fixed: what it counts in any case.
        low, high: between which it lies.
        members: weights of classes.
        inner: another hub that it counts too, once; its members and what is fixed of it are not listed again.
    """

    fixed: float
    low: float
    high: float
    members: dict[int, float]
    inner: int | None = None


@dataclass
class _Costs:
    """The cost by numbers of classes: constant + linear @ n + square @ n² + the sum of products[c, d] n_c n_d + hubs.

    Attributes:
        hubs: by their number, which is none of a class.
        readers: by hub, factors: it costs its count times factor times number of each of these classes.
    """

    constant: float
    linear: np.ndarray
    square: np.ndarray
    products: dict[tuple[int, int], float] = field(default_factory=dict)
    hubs: dict[int, _Hub] = field(default_factory=dict)
    readers: dict[int, dict[int, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, classes: Classes, readers: int) -> _Costs:
        """Counts of several classes that so many are multiplied with become hubs; others are multiplied out."""
        size, fixed, weights = len(classes.best), classes.fixed, classes.weights
        linear = classes.linear @ weights
        costs = cls(classes.constant + float(classes.linear @ fixed), linear, np.zeros(size))
        members = [np.flatnonzero(row).tolist() for row in weights]
        beside: list[set[int]] = [set() for _ in members]
        for i, j in classes.products:
            beside[i].update(members[j])
            beside[j].update(members[i])
        is_hub = [len(own) > 1 and len(others) >= readers for own, others in zip(members, beside, strict=True)]
        for (i, j), factor in classes.products.items():
            a, b = (j, i) if is_hub[j] and (not is_hub[i] or len(beside[j]) > len(beside[i])) else (i, j)
            costs.constant += factor * fixed[a] * fixed[b]
            costs.linear = costs.linear + factor * fixed[b] * weights[a]
            if is_hub[a] and a != b:
                of_hub = costs.readers.setdefault(size + a, {})
                for c in members[b]:
                    of_hub[c] = of_hub.get(c, 0.0) + factor * weights[b, c]
            else:
                costs.linear = costs.linear + factor * fixed[a] * weights[b]
                costs._multiply(factor, {c: weights[a, c] for c in members[a]}, {c: weights[b, c] for c in members[b]})
        costs.hubs = _nested(classes, [hub - size for hub in costs.readers])
        return costs

    def _multiply(self, factor: float, a: dict[int, float], b: dict[int, float]) -> None:
        for c, own in a.items():
            for d, other in b.items():
                if c == d:
                    self.square[c] += factor * own * other
                else:
                    pair = min(c, d), max(c, d)
                    self.products[pair] = self.products.get(pair, 0.0) + factor * own * other

    def read(self, hub: int) -> dict[int, float]:
        """The factors of the classes that are multiplied with a hub, or with a class that serves as one."""
        if hub in self.readers:
            return self.readers[hub]
        return {a if b == hub else b: factor for (a, b), factor in self.products.items() if hub in (a, b)}


def _nested(classes: Classes, axes: Sequence[int]) -> dict[int, _Hub]:
    """Hubs by number; one that counts all that another does, and more, counts that one."""
    size, sizes = len(classes.best), np.array([len(best) - 1 for best in classes.best])
    hubs = {}
    most_first = sorted(axes, key=lambda axis: -np.count_nonzero(classes.weights[axis]))
    first = {axis: int(np.flatnonzero(classes.weights[axis])[0]) for axis in axes}
    for axis in axes:
        row, fixed = classes.weights[axis], float(classes.fixed[axis])
        high = fixed + float(row @ sizes)
        within = (b for b in most_first if row[first[b]] and classes.fixed[b] <= fixed)
        inner = next((b for b in within if _is_part(classes.weights[b], row)), None)
        low, left = fixed, row
        if inner is not None:
            left, fixed = row - classes.weights[inner], fixed - float(classes.fixed[inner])
        members = {int(c): float(left[c]) for c in np.flatnonzero(left)}
        hubs[size + axis] = _Hub(fixed, low, high, members, None if inner is None else size + inner)
    return hubs


def _is_part(part: np.ndarray, whole: np.ndarray) -> bool:
    """Whether all that one axis counts another does, as often, and more."""
    own = part > 0
    return bool((part[own] == whole[own]).all() and own.sum() < np.count_nonzero(whole))


# In which order hubs are closed ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Classes that hang together once the count of a hub is known.

    Attributes:
        trees: of classes: from the leaves to the root, and the parent of each.
        closed: hubs whose lines are prices for some of them.
        tied: further classes, without which these are trees.
    """

    trees: list[tuple[list[int], dict[int, int]]]
    closed: list[int]
    tied: list[int]


@dataclass(frozen=True)
class _Step:
    """A hub to close, and what lies behind it; None at last, for what is left."""

    hub: int | None
    parts: list[_Part]


def _order(costs: _Costs) -> list[_Step] | None:
    """Hubs with what lies behind each once those before are closed; None where there is no such order."""
    trees = nx.Graph()
    trees.add_nodes_from(range(len(costs.linear)))
    trees.add_edges_from(costs.products)
    graph = trees.copy()
    for number, known in costs.hubs.items():
        inner = () if known.inner is None else (known.inner,)
        graph.add_edges_from((number, other) for other in (*costs.readers[number], *known.members, *inner))
    streams = _cut(trees)
    steps: list[_Step] = []
    open_hubs = sorted(costs.hubs, key=lambda h: -len(_members(costs, h))) + streams
    closed: set[int] = set()
    while open_hubs:
        left = len(open_hubs)
        for hub in list(open_hubs):
            behind = _behind(costs, graph, hub, set(open_hubs))
            parts = None if behind is None else _parts(costs, trees, behind, closed, hub)
            if behind is None or parts is None:
                continue
            steps.append(_Step(hub, parts))
            open_hubs.remove(hub)
            closed.add(hub)
            graph.remove_nodes_from([node for each in behind for node in each])
        if len(open_hubs) == left:
            return None
    rest = _parts(costs, trees, nx.connected_components(graph), closed, None)
    return None if rest is None else [*steps, _Step(None, rest)]


def _members(costs: _Costs, hub: int) -> set[int]:
    """All classes that a hub counts."""
    inner = costs.hubs[hub].inner
    return set(costs.hubs[hub].members) | (set() if inner is None else _members(costs, inner))


def _cut(trees: nx.Graph) -> list[int]:
    """Classes that circles of products meet in, and one of each circle that is left."""
    core = nx.k_core(trees, 2)
    cut = [c for c, degree in core.degree if degree > 2]
    core.remove_nodes_from(cut)
    circles = nx.connected_components(nx.k_core(core, 2))
    return cut + [min(circle) for circle in circles]


def _behind(costs: _Costs, graph: nx.Graph, hub: int, open_hubs: set[int]) -> list[set[int]] | None:
    """What hangs on a hub without any that is open; None where what else hangs on it does not hang together."""
    known = costs.hubs.get(hub)
    before = set() if known is None else {*known.members, *(() if known.inner is None else (known.inner,))}
    readers = {} if known is None else costs.readers[hub]
    behind: list[set[int]] = []
    others: list[int] = []
    for node in (*readers, *graph[hub]):
        if any(node in group for group in behind):
            continue
        group = _without(graph, hub, node, open_hubs | before)
        if group is not None:
            behind.append(group)
        elif node in readers:
            return None
        else:
            others.append(node)
    if known is None and others and not set(others) <= (_without(graph, hub, others[0], set()) or set()):
        return None
    return behind


def _without(graph: nx.Graph, hub: int, start: int, stops: set[int]) -> set[int] | None:
    """What hangs together with a node once a hub is gone; None where a stop is among it, and no further is looked."""
    if start in stops:
        return None
    found = {start}
    for _, node in nx.generic_bfs_edges(graph, start, lambda at: (n for n in graph[at] if n != hub)):
        if node in stops:
            return None
        found.add(node)
    return found


def _parts(
    costs: _Costs, trees: nx.Graph, groups: Iterable[set[int]], closed: set[int], hub: int | None
) -> list[_Part] | None:
    """None where a group is tied too tightly, or has a hub that counts another than the present one."""
    parts = []
    for group in groups:
        ends = sorted(node for node in group & closed if node in costs.hubs)
        within = nx.Graph(trees.subgraph(group - costs.hubs.keys()))
        tied = []
        while core := nx.k_core(within, 2):
            tied.append(max(core.degree, key=lambda pair: (pair[1], -pair[0]))[0])
            within.remove_node(tied[-1])
        if len(ends) + len(tied) > MOST_TIES or any(costs.hubs[end].inner not in (None, hub) for end in ends):
            return None
        found = []
        for tree in nx.connected_components(within):
            root = min(tree)
            found.append((list(nx.dfs_postorder_nodes(within, root)), dict(nx.bfs_predecessors(within, root))))
        parts.append(_Part(found, ends, tied))
    return parts


# What it comes to -----------------------------------------------------------------------------------


class _Programme:
    """The most that importance minus price can come to."""

    def __init__(self, classes: Classes, costs: _Costs, steps: list[_Step]) -> None:
        self.best, self.costs, self.steps = classes.best, costs, steps
        self.left = classes.limit - costs.constant
        self.numbers = [np.arange(len(best), dtype=np.float64) for best in classes.best]

    def at_level(self, level: float, points: int) -> float:
        """A bound by one price level; every hub's value is looked at for about so many counts."""
        self.level = level
        self.own = [
            best - level * (linear * n + square * n**2)
            for best, n, linear, square in zip(
                self.best, self.numbers, self.costs.linear, self.costs.square, strict=True
            )
        ]
        self.lines: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        total = level * self.left
        for step in self.steps:
            if step.hub is None:
                return total + sum(float(self._of_part(part, {}, np.zeros(1), points)[0]) for part in step.parts)
            counts, readers = self._counts(step, points), self.costs.read(step.hub)
            value = np.zeros(len(counts))
            for part in step.parts:
                value += self._of_part(part, readers, counts, len(counts))
            if step.hub in self.costs.hubs:
                slope = np.diff(value) / np.diff(counts)
                self.lines[step.hub] = value[:-1] - slope * counts[:-1], slope
            else:
                self.own[step.hub] = self.own[step.hub] + np.interp(self.numbers[step.hub], counts, value)
        return total

    def _counts(self, step: _Step, points: int) -> np.ndarray:
        """Counts of a hub; the fewer, the wider the layers are and the more else is looked at beside them."""
        assert step.hub is not None
        for part in step.parts:
            widest = max(
                (len(self.own[c]) for c in (*part.tied, *itertools.chain(*(o for o, _ in part.trees)))), default=1
            )
            beside = 1 + len(part.closed) + len(part.tied)
            points = min(points, int((LARGEST / widest) ** (1 / max(beside, 2))))
        hub = self.costs.hubs.get(step.hub)
        return _spread(0.0, self.numbers[step.hub][-1], points) if hub is None else _spread(hub.low, hub.high, points)

    def _of_part(self, part: _Part, readers: dict[int, float], counts: np.ndarray, points: int) -> np.ndarray:
        """(counts,) the most that a part can come to for each count of the hub that it reads.

        One dim for the counts, one for the lines of each closed hub, one for numbers of each tied class: trees are
        evaluated for all of these at once, each in the dims that it depends on.
        """
        looked = [_spread(0.0, self.numbers[c][-1], points) for c in part.tied]
        dims = [counts, *(self.lines[hub][1] for hub in part.closed), *looked]
        total, prices = np.zeros([len(dim) for dim in dims]), dict[int, np.ndarray]()

        def add_price(at: int, values: np.ndarray, factors: dict[int, float]) -> None:
            for c, factor in factors.items():
                prices[c] = prices.get(c, 0.0) + factor * _along(at, values, len(dims))[..., None]

        add_price(0, self.level * counts, readers)
        for at, number in enumerate(part.closed, 1):
            hub, (start, slope) = self.costs.hubs[number], self.lines[number]
            total += _along(at, start + slope * hub.fixed, len(dims))
            if hub.inner is not None:
                total += _along(at, slope, len(dims)) * _along(0, counts, len(dims))
            add_price(at, -slope, hub.members)
        for at, c in enumerate(part.tied, 1 + len(part.closed)):
            add_price(at, self.level * looked[at - 1 - len(part.closed)], self.costs.read(c))
        for order, parent in part.trees:
            total += self._of_tree(order, parent, prices, len(dims))
        for at, c in enumerate(part.tied, 1 + len(part.closed)):
            value = np.moveaxis(total, at, -1) @ _between(dims[at], self.numbers[c])
            own = self.own[c] - prices.get(c, 0.0) * self.numbers[c]
            total = (np.expand_dims(value, at) + own).max(axis=-1)
        return np.asarray(total.reshape(len(counts), -1).max(axis=1))

    def _of_tree(
        self, order: list[int], parent: dict[int, int], prices: dict[int, np.ndarray], dims: int
    ) -> np.ndarray:
        """The most that a tree can come to, along all dims that its prices depend on."""
        answers: dict[int, np.ndarray] = {}
        for c in order:
            own = self.own[c].reshape([1] * dims + [-1]) - prices.get(c, 0.0) * self.numbers[c] + answers.pop(c, 0.0)
            if c in parent:
                above = parent[c]
                factor = self.level * self.costs.products[min(c, above), max(c, above)]
                answers[above] = answers.get(above, 0.0) + _answer(own, factor, len(self.own[above]))
        return np.asarray(own.max(axis=-1))


def _spread(low: float, high: float, points: int) -> np.ndarray:
    """About so many numbers from the least to the most, closer where they are small."""
    return np.unique(np.append(low, np.geomspace(max(low, 1.0), max(high, 1.0), max(points, 3))))


def _along(dim: int, values: np.ndarray, dims: int) -> np.ndarray:
    return values.reshape([-1 if at == dim else 1 for at in range(dims)])


def _between(some: np.ndarray, all_of: np.ndarray) -> np.ndarray:
    """(some, all) shares with which values at some numbers make up those on the lines between them."""
    return np.stack([np.interp(all_of, some, row) for row in np.eye(len(some))])


def _answer(own: np.ndarray, factor: float, width: int) -> np.ndarray:
    """For m = 0 to `width` - 1 of the parent, along a new last axis, the most of own[n] - factor n m over n.

    That is convex in m, so that it lies below the lines between a few of its values.
    """
    n, m = np.arange(own.shape[-1]), np.arange(width)
    if own.size * width <= EXACT:
        return np.asarray((own[..., None, :] - factor * m[:, None] * n).max(axis=-1))
    some = np.unique(np.geomspace(1, width, WIDTHS).round()) - 1
    found = np.stack([(own - factor * at * n).max(axis=-1) for at in some], axis=-1)
    return np.asarray(found @ _between(some, m))
