"""Criteria that look at data: what a neuron's going costs, by gradients or by what its readers read.

Their scores add up and have the unit of a loss, so that they may be divided by what a neuron costs.
"""

from __future__ import annotations

import numpy as np
import torch

from allocator.graph.channel_graph import ChannelGraph
from allocator.scoring.calibration import COVARIANCES, GRADIENTS, MOMENTS, Statistics
from allocator.scoring.registry import Weights, as_array, criterion
from allocator.scoring.scores import SlotScores

RIDGE = 1e-3
"""Of the mean diagonal, added to a covariance that is inverted."""


@criterion("fisher", needs=[GRADIENTS], additive=True)
def fisher(graph: ChannelGraph, weights: Weights, statistics: Statistics) -> SlotScores:
    """Half the mean squared change of the loss if all weights that read a neuron were zero, to first order.

    After Theis et al. (2018) and Liu et al. (ICML 2021), per small batch; without a loss, of the model's own answers.
    """
    return _squared(graph, statistics.read / np.sqrt(2))


@criterion("taylor", needs=[GRADIENTS], additive=True, labels=True)
def taylor(graph: ChannelGraph, weights: Weights, statistics: Statistics) -> SlotScores:
    """Mean squared change of the loss if all weights that write and scale a neuron were zero, to first order
    (Molchanov et al., CVPR 2019)."""
    return _squared(graph, statistics.written)


def _squared(graph: ChannelGraph, changes: np.ndarray) -> SlotScores:
    """(batches, neurons) changes, at the first slot of each neuron: of neurons that go together, they add up first."""
    scored = np.flatnonzero(graph.unit_of_slot >= 0)
    units, first = np.unique(graph.unit_of_slot[scored], return_index=True)
    return SlotScores(scored[first], changes[:, units], "mean_square")


@criterion("activation", needs=[MOMENTS], additive=True)
def activation(graph: ChannelGraph, weights: Weights, statistics: Statistics) -> SlotScores:
    """What a neuron adds to the variance of its readers' outputs, as a share of each layer's; the mean can be folded
    away, so that it costs nothing to lose."""
    rows = []
    for (name, dim), moments in statistics.moments.items():
        spread = moments.variance * _squared_columns(weights(name), dim, name)
        total = spread.sum()
        rows.append((graph.slots.labels(name)[dim], spread / total if total > 0 else spread))
    return SlotScores.of(rows, "sum")


@criterion("reconstruction", needs=[COVARIANCES], additive=True)
def reconstruction(graph: ChannelGraph, weights: Weights, statistics: Statistics) -> SlotScores:
    """What a neuron's readers lose if it goes and the others are refitted, as a share of each layer's output.

    Of one neuron at a time: ||W_u||^2 / [(X^T X / m + ridge)^-1]_uu (optimal brain surgeon; OSSCAR, ICML 2024), where
    a kernel reads a channel's pixels alike.
    """
    rows = []
    for (name, dim), moments in statistics.moments.items():
        mean = moments.total / moments.count
        covariance = moments.squares / moments.count - np.outer(mean, mean)
        ridge = RIDGE * max(float(np.trace(covariance)) / len(covariance), 1e-12)
        inverse = np.linalg.inv(covariance + ridge * np.eye(len(covariance)))
        columns = _squared_columns(weights(name), dim, name)
        total = float((np.diag(covariance) * columns).sum())
        rows.append((graph.slots.labels(name)[dim], columns / np.diag(inverse) / (total if total > 0 else 1.0)))
    return SlotScores.of(rows, "sum")


def _squared_columns(weight: torch.Tensor, dim: int, name: str) -> np.ndarray:
    """(n,) sum of the squared weights at each index of a dim; the name is for messages."""
    wide = weight.detach().to(torch.float64).square()
    others = [d for d in range(wide.dim()) if d != dim]
    return as_array(wide.sum(others) if others else wide, name)
