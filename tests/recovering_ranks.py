"""Recovers a small network on this rank's share of the inputs: `recovering_ranks.py FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import allocator

PARTS = {torch.float32: (16, 16), torch.float64: (4, 16)}
"""How many parts of how many inputs one process makes. Those of float64 are not those that two make; of float32, which
rounds otherwise in other parts, they are."""


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


def inputs(rank: int | None, dtype: torch.dtype) -> Tensor:
    """Those of a rank, or of one process that has all, in an order in which the same ones are held back."""
    torch.manual_seed(1)
    count, size = PARTS[dtype]
    parts = torch.randn(count, size, 3, 6, 6, dtype=dtype)
    if rank is None:
        return parts.flatten(0, 1)
    if count == 16:
        return parts.chunk(2)[rank].flatten(0, 1)
    return parts.unflatten(1, (2, size // 2))[:, rank].flatten(0, 1)


def recovered(rank: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
    data = inputs(rank, dtype)
    result = allocator.allocate(network().to(dtype), "50%", example_inputs=data[:1])
    return allocator.recover(result, data).model.state_dict()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    mine = int(os.environ["RANK"])
    torch.save({str(dtype): recovered(mine, dtype) for dtype in PARTS}, Path(sys.argv[1]) / f"rank{mine}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # a process that ends with its group open may abort
