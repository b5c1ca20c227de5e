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
EXACT = 1e5
"""Numbers to compute for which every width of a layer is looked at; else `WIDTHS` of them, with lines between."""
WIDTHS = 40
LARGEST = 2e6
"""Numbers to hold at once: wide layers have fewer counts of a hub looked at."""


def by_hubs(classes: Classes) -> float | None:
    """What the free neurons can be worth at most; None where hubs tie the trees together too tightly."""
    bound = whole = sum(float(best[-1]) for best in classes.best)
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
            options={"xatol": closely},
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
    for axis in axes:
        row, fixed = classes.weights[axis], float(classes.fixed[axis])
        high = fixed + float(row @ sizes)
        within = [b for b in axes if _is_part(classes.weights[b], row) and classes.fixed[b] <= fixed]
        inner = max(within, key=lambda b: np.count_nonzero(classes.weights[b]), default=None)
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
        closed: the hub whose lines are prices for some of them.
    """

    trees: list[tuple[list[int], dict[int, int]]]
    closed: int | None


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
    rest = graph.copy()
    rest.remove_node(hub)
    near = set(graph[hub])
    groups = [group for group in nx.connected_components(rest) if group & near]
    behind = [group for group in groups if not group & open_hubs and not group & before]
    others = [group for group in groups if group & open_hubs or group & before]
    if known is None:
        return behind if len(others) <= 1 else None
    readers = set(costs.readers[hub])
    return None if any(group & readers for group in others) else behind


def _parts(
    costs: _Costs, trees: nx.Graph, groups: Iterable[set[int]], closed: set[int], hub: int | None
) -> list[_Part] | None:
    """None where a group holds a circle, or two closed hubs, or one that counts another than the present."""
    parts = []
    for group in groups:
        within = trees.subgraph(group - costs.hubs.keys())
        ends = [node for node in group & closed if node in costs.hubs]
        if len(ends) > 1 or not (within.number_of_nodes() == 0 or nx.is_forest(within)):
            return None
        if ends and costs.hubs[ends[0]].inner not in (None, hub):
            return None
        found = []
        for tree in nx.connected_components(within):
            root = min(tree)
            found.append((list(nx.dfs_postorder_nodes(within, root)), dict(nx.bfs_predecessors(within, root))))
        parts.append(_Part(found, ends[0] if ends else None))
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
                return total + sum(float(self._of_part(part, {}, np.zeros(1))[0]) for part in step.parts)
            counts, readers = self._counts(step, points), self.costs.read(step.hub)
            value = sum((self._of_part(part, readers, counts) for part in step.parts), np.zeros(len(counts)))
            if step.hub in self.costs.hubs:
                slope = np.diff(value) / np.diff(counts)
                self.lines[step.hub] = value[:-1] - slope * counts[:-1], slope
            else:
                self.own[step.hub] = self.own[step.hub] + np.interp(self.numbers[step.hub], counts, value)
        return total

    def _counts(self, step: _Step, points: int) -> np.ndarray:
        """Counts of a hub, from the least to the most it can be, closer where it is small."""
        assert step.hub is not None
        hub = self.costs.hubs.get(step.hub)
        low, high = (0.0, float(len(self.own[step.hub]) - 1)) if hub is None else (hub.low, hub.high)
        classes = [c for part in step.parts for order, _ in part.trees for c in order]
        widest = max((len(self.own[c]) for c in classes), default=1)
        points = max(min(points, int((LARGEST / widest) ** 0.5)), 3)
        return np.unique(np.append(low, np.geomspace(max(low, 1.0), max(high, 1.0), points)))

    def _of_part(self, part: _Part, readers: dict[int, float], counts: np.ndarray) -> np.ndarray:
        """(counts,) the most that a part can come to for each count of the hub that it reads."""
        start, slope, members = np.zeros(1), np.zeros(1), dict[int, float]()
        total = np.zeros((len(counts), 1))
        if part.closed is not None:
            hub = self.costs.hubs[part.closed]
            start, slope = self.lines[part.closed]
            total = total + start + slope * (hub.fixed + (counts[:, None] if hub.inner is not None else 0.0))
            members = hub.members
        for order, parent in part.trees:
            answers: dict[int, np.ndarray] = {}
            for c in order:
                n = self.numbers[c]
                own = self.own[c][None, None] + answers.pop(c, 0.0)
                if c in readers:
                    own = own - self.level * readers[c] * counts[:, None, None] * n
                if c in members:
                    own = own + members[c] * slope[:, None] * n
                if c not in parent:
                    total = total + own.max(axis=2)
                    continue
                above = parent[c]
                factor = self.level * self.costs.products[min(c, above), max(c, above)]
                answers[above] = answers.get(above, 0.0) + _answer(own, factor, len(self.own[above]))
        return np.asarray(total.max(axis=1))


def _answer(own: np.ndarray, factor: float, width: int) -> np.ndarray:
    """For m = 0 to `width` - 1 of the parent, along a new last axis, the most of own[n] - factor n m over n.

    That is convex in m, so that it lies below the lines between a few of its values.
    """
    n, m = np.arange(own.shape[-1]), np.arange(width)
    if own.size * width <= EXACT:
        return np.asarray((own[..., None, :] - factor * m[:, None] * n).max(axis=-1))
    some = np.unique(np.geomspace(1, width, WIDTHS).round()) - 1
    found = np.stack([(own - factor * at * n).max(axis=-1) for at in some], axis=-1)
    return np.asarray(found @ np.stack([np.interp(m, some, row) for row in np.eye(len(some))]))
