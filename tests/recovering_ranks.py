"""Recovers a small network on this rank's share of the inputs: `recovering_ranks.py FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import allocator

HELD, SEEN = 16, 48


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 5),
    )
    return model.eval()


def inputs(rank: int | None) -> Tensor:
    """Those of a rank, or of one process that has all, in an order in which the same ones are held back."""
    torch.manual_seed(1)
    seen, held = torch.randn(SEEN, 3, 6, 6), torch.randn(HELD, 3, 6, 6)
    if rank is not None:
        seen, held = seen.chunk(2)[rank], held.chunk(2)[rank]
    first = len(held)
    return torch.cat([seen[:first], held, seen[first:]])


def recovered(rank: int | None) -> dict[str, Tensor]:
    data = inputs(rank)
    result = allocator.allocate(network(), "50%", example_inputs=data[:1])
    return allocator.recover(result, data).model.state_dict()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    mine = int(os.environ["RANK"])
    torch.save(recovered(mine), Path(sys.argv[1]) / f"rank{mine}.pt")
