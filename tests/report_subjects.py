"""A small network with one block of each common kind, and summaries of it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from subjects import randomised_norms
from torch import Tensor, nn
from torch.nn import functional as F

import allocator
from allocator.reporting import Summary, pareto, summarise
from allocator.reporting.facts import BlockFacts, Layer
from allocator.rewriting.kept import kept_by

IMAGE = torch.zeros(1, 3, 16, 16)


class Mixed(nn.Module):
    """A stem, two scales that are concatenated, a residual sum around a grouped convolution, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.fine = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12))
        self.coarse = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.reduce = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.grouped = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(8))
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) to (n, 5)."""
        x = F.relu(self.stem(x))
        coarse = F.interpolate(self.coarse(F.max_pool2d(x, 2)), scale_factor=2)
        x = F.relu(torch.cat([self.fine(x), coarse], 1))
        x = x + self.expand(F.relu(self.grouped(F.relu(self.reduce(x)))))
        return self.head(x.mean((2, 3)))


class Scales(nn.Module):
    """Two kernels side by side, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(4, 2, 3, padding=1)
        self.coarse = nn.Conv2d(4, 2, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 4, h, w), the same size."""
        return F.relu(self.norm(torch.cat([self.fine(x), self.coarse(x)], 1)))


def many_blocks(blocks: int = 5000) -> nn.Module:
    """As many blocks as asked for, one after the other, each with the parameters of a few neurons."""
    body = (Scales() for _ in range(blocks))
    return nn.Sequential(nn.Conv2d(3, 4, 1), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def mixed() -> nn.Module:
    """`Mixed` as after training, the same every time."""
    torch.manual_seed(0)
    return randomised_norms(Mixed())


@cache
def summary(flops: str | None = None, curve: bool = False) -> Summary:
    """Of `Mixed`, with what a budget leaves where one is given."""
    graph = allocator.trace(mixed(), IMAGE)
    scores = allocator.score(graph, "bn_scale")
    allocation = None if flops is None else allocator.plan(graph, scores, flops, "per_block", scope="narrowest")
    kept = None if allocation is None else kept_by(graph, allocation)
    points = pareto(graph, scores) if curve else ()
    return summarise(graph, "mixed", scores=scores, allocation=allocation, kept=kept, curve=points)


def deep(blocks: int, source: Summary | None = None) -> Summary:
    """As many blocks as asked for: those of a small network over and over, each with a name of its own."""
    source = source or summary("60%", True)
    count = len(source.blocks)
    total = blocks * source.totals.flops // count + 1

    def block(i: int) -> BlockFacts:
        original = source.blocks[i % count]
        parent = original.parent
        moved = None if parent is None else (i - i % count + parent[0], parent[1])
        if moved is not None and moved[0] >= blocks:
            moved = None
        share = original.flops / total
        branches = tuple(replace(branch, share=branch.own_flops / total) for branch in original.branches)
        return replace(original, name=f"stage{i}.{original.name}", share=share, parent=moved, branches=branches)

    made = tuple(block(i) for i in range(blocks))
    used = sum(each.flops for each in made)
    lanes: dict[tuple[int, int], list[Layer | int]] = {
        (-1, -1): [i for i, each in enumerate(made) if each.parent is None]
    }
    for i in range(blocks):
        for j in range(len(made[i].branches)):
            lane = source.lanes.get((i % count, j), [])
            lanes[i, j] = [item if not isinstance(item, int) else i - i % count + item for item in lane]
            lanes[i, j] = [item for item in lanes[i, j] if not isinstance(item, int) or item < blocks]
    return replace(
        source,
        model=f"{blocks} blocks",
        totals=replace(source.totals, flops=total),
        blocks=made,
        outside=total - used,
        outside_kept=0 if source.budget else None,
        lanes=lanes,
    )
