"""The public functions for networks that are larger than the memory: weights go from folder to folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from allocator.arguments import checked
from allocator.clock import Progress
from allocator.io.files import load_allocation
from allocator.pipeline.folder import allocate_in_folder, apply_in_folder
from allocator.result import Result
from allocator.rewriting.allocation import Allocation
from allocator.settings import Limit, Limits, Settings
from allocator.tracing.isolation import as_usual
from allocator.verifying.certificate import Certificate

MAX_SHARD_SIZE = 2**30
"""Bytes of a file of weights, all of which are in memory before it is written."""


@checked
@as_usual
def allocate_folder(
    folder: str | Path,
    output: str | Path,
    flops: Limit = None,
    *,
    params: Limit = None,
    activations: Limit = None,
    peak_activations: Limit = None,
    model: nn.Module | None = None,
    example_inputs: Any = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Progress | None = None,
    **settings: Any,
) -> Result:
    """`allocate` for weights that do not fit into memory: from one folder of safetensors into another.

    The network is traced and planned on the meta device; its weights are read one by one, to rank neurons and to be
    written smaller. The certificate holds for the structure: outputs are not compared, as nothing runs.

    Args:
        folder: weights as `save_pretrained` of transformers writes them, in one file or in several with an index; not
            changed.
        output: a folder that is not there yet, or is empty; complete once it is there. Tokenizers and what else lies
            beside the weights are copied, but for other forms of weights and what lies in folders.
        flops, params, activations, peak_activations: budgets, as for `allocate`.
        model: the network whose weights these are, on the meta device; left out, that which the folder's config.json
            says.
        example_inputs, progress: as for `allocate`.
        max_shard_size: bytes of a file of weights at most; so much is in memory at a time, and the tensor being read.
        settings: how neurons are chosen, as for `sweep`; criteria are those that read weights alone.

    Returns:
        The result, whose model lies on the meta device: `allocator.load("hf:OUTPUT")` gives it with its weights, and
        `from_pretrained` where the configuration follows.

    Raises:
        FileError: no safetensors in the folder, other tensors in them than the model has, or the output is there.
        BudgetError, NothingToAllocateError, CriterionError, UnsupportedModelError, InputError, TraceError,
        CertificateError, CostMismatchError: as for `allocate`.
    """
    limits = Limits(flops, params, activations, peak_activations)
    return allocate_in_folder(
        folder, output, limits, example_inputs, Settings(**settings), model=model, most=max_shard_size,
        progress=progress,
    )  # fmt: skip


@checked
@as_usual
def apply_folder(
    folder: str | Path,
    allocation: Allocation | str | Path,
    output: str | Path,
    *,
    model: nn.Module | None = None,
    example_inputs: Any = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Progress | None = None,
) -> Certificate:
    """`apply` for weights that do not fit into memory: from one folder of safetensors into another.

    Args:
        folder, output, model, max_shard_size, progress: as for `allocate_folder`.
        allocation: made for this network, with or without weights, or the path of its file.
        example_inputs: as for `verify`.

    Returns:
        The certificate of the structure, from before anything was written.

    Raises:
        FileError: a file cannot be read or written, as for `allocate_folder`.
        AllocationMismatchError: the allocation was made for another architecture.
    """
    choice = allocation if isinstance(allocation, Allocation) else load_allocation(allocation)
    return apply_in_folder(folder, choice, output, example_inputs, model=model, most=max_shard_size, progress=progress)
