"""A problem by numbers of neurons: what a plan keeps and costs as functions of a few widths.

Neurons that every axis of a metric counts alike form a class; of a class, the best n are kept, so that a plan is a
number per class. What it keeps is a sum of concave functions of these numbers; what it costs is a sum of products of
counts along axes, each linear in the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import spmatrix

from allocator.cost.budget import Budget
from allocator.planning.problem import Problem

MOST_CLASSES = 600


@dataclass(frozen=True)
class Classes:
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


def classes_of(problem: Problem, budget: Budget) -> Classes | None:
    """None where a term has three axes or more that may shrink, or there are too many classes."""
    metric, values = budget.metric, np.nan_to_num(problem.scores.values)
    free = np.flatnonzero(~problem.forced)
    columns = metric.incidence.tocsc()[:, free]
    signature = alike_columns(columns)
    count = int(signature.max(initial=-1)) + 1
    if count > MOST_CLASSES:
        return None
    first = np.array([np.flatnonzero(signature == c)[0] for c in range(count)], dtype=int)
    weights = np.asarray(columns[:, first].todense(), dtype=np.float64)
    fixed = metric.counts(problem.forced)[:-1].astype(np.float64)
    distinct, axis_of = np.unique(np.column_stack([fixed, weights]), axis=0, return_inverse=True)
    axis_of = axis_of.reshape(-1)
    constant, linear = 0.0, np.zeros(len(distinct))
    products: dict[tuple[int, int], float] = {}
    for factor, axes in zip(metric.factors, metric.axes_of_term, strict=True):
        named = [int(axis_of[a]) for a in axes if a < len(axis_of)]
        moving = sorted(a for a in named if distinct[a, 1:].any())
        plain = float(factor) * float(np.prod([distinct[a, 0] for a in named if not distinct[a, 1:].any()]))
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
    return Classes(best, distinct[:, 0], distinct[:, 1:], constant, linear, products, limit, kept)


def alike_columns(columns: spmatrix) -> np.ndarray:
    """(n,) a number from 0 per column, the same for equal ones: told apart by sums of two random weights per row."""
    random = np.random.default_rng(0).integers(1, 2**31, size=(2, columns.shape[0])).astype(np.float64)
    sums = np.asarray(columns.T @ random.T)
    return np.unique(sums[:, 0] + 1j * sums[:, 1], return_inverse=True)[1]
