"""What the training loop asks of accelerate, the same without it, and sums over the processes."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Engine(Protocol):
    """What the loop asks of accelerate's `Accelerator`."""

    @property
    def device(self) -> torch.device: ...
    @property
    def num_processes(self) -> int: ...
    @property
    def process_index(self) -> int: ...
    @property
    def is_main_process(self) -> bool: ...
    def prepare(self, *args: Any) -> Any: ...
    def backward(self, loss: Tensor) -> None: ...
    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]: ...
    def clip_grad_norm_(self, parameters: Any, max_norm: float) -> Any: ...
    def reduce(self, tensor: Tensor, reduction: str) -> Any: ...


@dataclass
class OneProcess:
    """An engine without accelerate: one process, in the weights' own precision."""

    device: torch.device
    num_processes: int = 1
    process_index: int = 0
    is_main_process: bool = True

    def prepare(self, *args: Any) -> Any:
        return args

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def clip_grad_norm_(self, parameters: Any, max_norm: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor


def seed_torch(seed: int, device: torch.device) -> None:
    """Set torch's random state, on the CPU and on the device."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def summed(values: list[float], engine: Engine) -> list[float]:
    """The sum of each value over the processes."""
    if engine.num_processes == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64, device=engine.device)
    total: list[float] = engine.reduce(sums, reduction="sum").tolist()
    return total


@torch.no_grad()
def average_buffers(module: nn.Module, engine: Engine) -> None:
    """Replace the floating buffers, such as batch norm's statistics, by their mean over the processes."""
    if engine.num_processes > 1:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(engine.reduce(buffer, reduction="mean"))
