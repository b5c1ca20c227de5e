"""The bound that no plan exceeds, and how near `priced` comes: both against trying every choice."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import allocator
from allocator.cost.budget import Budget, Budgets
from allocator.graph.channel_graph import ChannelGraph
from allocator.planning.bound import upper_bound
from allocator.planning.policies.registry import POLICIES
from allocator.planning.problem import Problem, forced_neurons, free_neurons
from allocator.scoring.scores import Scores

IMAGE = torch.zeros(1, 2, 4, 4)


def chain(*widths: int) -> nn.Module:
    """Convolutions one after another: the widths that are multiplied form a path."""
    pairs = itertools.pairwise(widths)
    layers = [layer for a, b in pairs for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 2, 1))


class Stream(nn.Module):
    """A residual stream that two blocks read and write: the widths that are multiplied go in circles."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.down = nn.ModuleList(nn.Conv2d(4, n, 1) for n in (2, 3))
        self.middle = nn.ModuleList(nn.Conv2d(n, n, 3, padding=1) for n in (2, 3))
        self.up = nn.ModuleList(nn.Conv2d(n, 4, 1) for n in (2, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for down, middle, up in zip(self.down, self.middle, self.up):
            x = x + up(middle(down(x).relu()).relu())
        return self.head(x)


class Joined(nn.Module):
    """Branches of different prices, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 3, padding=1)
        self.after, self.head = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(torch.cat([self.one(x), self.three(x)], 1).relu()).relu())


NETWORKS: dict[str, Any] = {"chain": lambda: chain(2, 4, 3, 4), "stream": Stream, "joined": Joined}


def problem(graph: ChannelGraph, share: float, seed: int, metric: str = "flops") -> Problem:
    scores = Scores("own", np.random.default_rng(seed).lognormal(size=graph.size))
    forced = forced_neurons(graph, scores, free_neurons(graph, scores, "all"))
    least, whole = graph.metric(metric).value(forced), graph.metric(metric).whole
    return Problem(graph, scores, forced, Budgets([Budget(graph.metric(metric), least + share * (whole - least))]))


def best_of_all(asked: Problem) -> float:
    """The most that any choice keeps, by trying all of them."""
    free = np.flatnonzero(~asked.forced)
    best = 0.0
    for chosen in itertools.product([False, True], repeat=len(free)):
        kept = asked.forced.copy()
        kept[free] = chosen
        worth = float(asked.scores.values[kept].sum())
        if worth > best and asked.budgets.met(kept):
            best = worth
    return best


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_no_choice_exceeds_the_bound_and_priced_comes_near(name: str, share: float) -> None:
    graph = allocator.trace(NETWORKS[name](), IMAGE)
    asked = problem(graph, share, seed=len(name))
    best, bound = best_of_all(asked), upper_bound(asked)
    kept = POLICIES["priced"](asked)
    worth = float(asked.scores.values[kept].sum())
    assert bound is not None
    assert asked.budgets.met(kept)
    assert not (asked.forced & ~kept).any()
    assert 0.9 * best <= worth <= best + 1e-9 <= bound + 2e-9
    assert bound <= 1.12 * best


@pytest.mark.parametrize("policy", ["global", "per_block", "uniform", "isomorphic"])
@pytest.mark.parametrize("metric", ["flops", "params", "activations"])
def test_priced_keeps_at_least_what_others_keep(metric: str, policy: str) -> None:
    graph = allocator.trace(allocator.build("recipe:resnet-small"), torch.zeros(1, 1, 32, 32))
    for seed in range(3):
        asked = problem(graph, 0.4, seed, metric)
        priced, other = (POLICIES[name](asked) for name in ("priced", policy))
        bound = upper_bound(asked)
        assert bound is not None
        assert asked.budgets.met(priced)
        values = asked.scores.values
        assert values[other].sum() <= values[priced].sum() <= bound + 1e-6


def test_several_budgets_bound_and_hold_together() -> None:
    graph = allocator.trace(allocator.build("recipe:resnet-small"), torch.zeros(1, 1, 32, 32))
    one, other = problem(graph, 0.5, 0, "flops"), problem(graph, 0.2, 0, "params")
    both = Problem(graph, one.scores, one.forced, Budgets([*one.budgets.each, *other.budgets.each]))
    bounds = [upper_bound(asked) or 0.0 for asked in (one, other)]
    assert upper_bound(both) == pytest.approx(min(bounds))
    kept = POLICIES["priced"](both)
    assert both.budgets.met(kept)
    assert both.budgets.used(kept) > 0.99
    assert one.scores.values[kept].sum() > 0.9 * min(bounds)


def test_what_stays_in_any_case_is_all_there_is() -> None:
    graph = allocator.trace(chain(2, 4), IMAGE)
    asked = problem(graph, 0.5, 0)
    everything = Problem(graph, asked.scores, np.ones(graph.size, dtype=bool), asked.budgets)
    assert upper_bound(everything) == pytest.approx(asked.scores.values.sum())


@pytest.mark.sweep
@pytest.mark.parametrize("scope", ["inner", "all"])
def test_gaps_on_the_reference_set(scope: str) -> None:
    from reference_set import REFERENCE_SET

    gaps = {}
    for name in REFERENCE_SET:
        graph = allocator.trace(allocator.build(name))
        scores = Scores("own", np.random.default_rng(0).lognormal(size=graph.size))
        forced = forced_neurons(graph, scores, free_neurons(graph, scores, scope))
        asked = Problem(graph, scores, forced, Budgets([Budget(graph.metric("flops"), 0.5 * graph.flops)]))
        if not asked.budgets.met(forced):
            continue
        kept = POLICIES["priced"](asked)
        bound = upper_bound(asked)
        gaps[name] = None if bound is None else bound / float(scores.values[kept].sum()) - 1
    assert all(gap is None or gap >= -1e-9 for gap in gaps.values()), gaps
    small = [name for name, gap in gaps.items() if gap is not None and gap <= 0.001]
    assert len(small) >= (12 if scope == "inner" else 0), gaps
    assert all(gap is not None and gap <= 0.02 for gap in gaps.values()), gaps
