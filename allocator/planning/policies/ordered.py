"""Policies that put neurons in order, and keep them while the budgets last."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_matrix

from allocator.arguments import checked
from allocator.graph.channel_graph import ChannelGraph
from allocator.planning.classes import alike_columns
from allocator.planning.policies.registry import policy
from allocator.planning.problem import Problem
from allocator.planning.search import keep_in_order

Thresholds = Callable[[Problem], np.ndarray]
"""(neurons,) the width multiplier, from 0 to 1, from which on a neuron is kept."""


@checked
def ordered(name: str) -> Callable[[Thresholds], Thresholds]:
    """Register the policy that keeps neurons by ascending threshold; decorates the function that gives it."""

    def register(thresholds: Thresholds) -> Thresholds:
        @policy(name)
        def choose(problem: Problem) -> np.ndarray:
            return keep_in_order(problem, thresholds(problem))

        return thresholds

    return register


@ordered("per_block")
def per_block(problem: Problem) -> np.ndarray:
    """One width multiplier for the network, the best in each block, so that its branches compete (ScaleNet's rule)."""
    graph, values = problem.graph, problem.scores.values
    return rank_within(graph.pool_of, values, rank_within(graph.branch_of, values))


@ordered("global")
def all_together(problem: Problem) -> np.ndarray:
    """One ranking of all neurons; of equals, the best of each branch first."""
    graph, values = problem.graph, np.nan_to_num(problem.scores.values)
    everything = np.arange(graph.size)
    order = np.lexsort((everything, rank_within(graph.branch_of, problem.scores.values), -values))
    rank = np.empty(graph.size)
    rank[order] = everything
    return (rank + 0.5) / max(graph.size, 1)


@ordered("isomorphic")
def isomorphic(problem: Problem) -> np.ndarray:
    """One ranking among the neurons of layers that are alike, in what they hold and in the shapes of it.

    After Fang et al. (ECCV 2024): scores of layers of another kind or shape need not have the same scale.
    """
    graph, values = problem.graph, problem.scores.values
    return rank_within(kinds_of(graph), values, rank_within(graph.branch_of, values))


def kinds_of(graph: ChannelGraph) -> np.ndarray:
    """(neurons,) a number per kind of neuron: the dims of weights that it lies in, by their shapes and classes."""
    held: dict[tuple[object, ...], list[np.ndarray]] = {}
    for name, shape in graph.slots.shapes.items():
        owner = type(graph.modules[name.rpartition(".")[0]]) if name.rpartition(".")[0] in graph.modules else None
        for dim, label in enumerate(graph.slots.labels(name)):
            units = graph.unit_of_slot[label]
            held.setdefault((owner, name.rpartition(".")[2], shape, dim), []).append(units[units >= 0])
    units_of = [np.unique(np.concatenate(each)) for each in held.values()]
    rows = np.repeat(np.arange(len(units_of)), [len(units) for units in units_of])
    columns = np.concatenate(units_of) if units_of else rows
    return alike_columns(csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(units_of), graph.size)))


@ordered("uniform")
def uniform(problem: Problem) -> np.ndarray:
    """Every branch keeps the same share: the control that learned shares have to beat."""
    return rank_within(problem.graph.branch_of, problem.scores.values)


def rank_within(group: np.ndarray, values: np.ndarray, tie: np.ndarray | None = None) -> np.ndarray:
    """(rank + 1/2) / size of each element in its group, best value first; ties by `tie`, then by index."""
    n = len(group)
    second = np.arange(n) if tie is None else tie
    order = np.lexsort((np.arange(n), second, -np.nan_to_num(values), group))
    _, start, size = np.unique(group[order], return_index=True, return_counts=True)
    rank = np.empty(n)
    rank[order] = (np.arange(n) - np.repeat(start, size) + 0.5) / np.repeat(size, size)
    return rank
