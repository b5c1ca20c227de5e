"""The processes of a run: accelerate's view of them, and what they have to agree on."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from allocator.errors import AllocatorError, ConfigurationError, MissingPackageError
from allocator.recipes.sections import Config

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


def make_accelerator(config: Config) -> Accelerator:
    """accelerate's view of the processes and devices there are.

    Raises:
        MissingPackageError: accelerate or TensorBoard is not installed.
        ConfigurationError: the device cannot do the precision.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
    except ImportError as error:
        raise MissingPackageError("training needs accelerate: pip install 'neuron-allocator[train]'") from error
    if config.run.tensorboard and find_spec("tensorboard") is None:
        raise MissingPackageError(
            "run.tensorboard needs TensorBoard: pip install 'neuron-allocator[train]', or set run.tensorboard=false"
        )
    # Its state is one for the whole process, and the first configuration's would hold for those after it.
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(
            cpu=config.device == "cpu" or not torch.accelerator.is_available(),
            mixed_precision="no" if config.precision == "fp32" else config.precision,
            log_with="tensorboard" if config.run.tensorboard else None,
            project_dir=config.run.output,
            kwargs_handlers=[
                # The loop averages statistics itself where it needs them; sent at every forward, those of one process
                # would overwrite the others'.
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=timedelta(seconds=config.run.timeout)),
            ],
        )
    except ValueError as error:
        raise ConfigurationError(f"precision={config.precision} on device={config.device}: {error}") from error
    # Where accelerate does not see its launcher, every process would train alone and write to the same folder.
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ConfigurationError(f"{launched} processes were launched, accelerate sees {accelerator.num_processes}")
    return accelerator


def agree(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """What the main process makes, on every process; if it fails, they all do."""
    # The error travels, too: the others would wait for what never comes until they time out.
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = make()
        except AllocatorError as error:
            outcome[1] = error
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(outcome)
    made, failure = outcome
    if failure is not None:
        raise failure
    agreed: T = made
    return agreed


@torch.no_grad()
def average_weights(network: nn.Module, accelerator: Accelerator) -> None:
    """Replace every weight, and so every neuron's importance, by its mean over the processes.

    They hold the same weights, so this changes nothing but what rounding on unlike devices may have set apart.
    """
    if accelerator.num_processes > 1:
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(accelerator.reduce(tensor, reduction="mean"))
