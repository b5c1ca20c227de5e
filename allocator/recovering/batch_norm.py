"""Running statistics taken anew: the mildest recovery, for networks that have batch norms."""

from __future__ import annotations

import torch
from torch import nn

from allocator.modules import modules_of
from allocator.recovering.moments import average
from allocator.recovering.samples import Samples
from allocator.scoring.batches import outputs_of
from allocator.torch_private import BatchNormBase

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def take_statistics(small: nn.Module, samples: Samples) -> list[str]:
    """Put the mean of the statistics of the inputs to fit into the batch norms, in place; names of what was changed.

    Args:
        small: in eval mode.
        samples: inputs.
    """
    norms = {
        path: module
        for path, module in modules_of(small).items()
        if isinstance(module, BatchNormBase) and module.num_batches_tracked is not None and _over_batch(module)
    }
    momenta = {path: norm.momentum for path, norm in norms.items()}
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    try:
        with torch.no_grad():
            for inputs in samples.seen:
                outputs_of(small, inputs)
    finally:
        for path, norm in norms.items():
            norm.momentum, norm.training = momenta[path], False
            for name in _STATISTICS[:2]:
                average(getattr(norm, name))
    return [f"{path}.{name}".lstrip(".") for path in norms for name in _STATISTICS]


def _over_batch(norm: nn.Module) -> bool:
    return not isinstance(norm, nn.modules.instancenorm._InstanceNorm)
