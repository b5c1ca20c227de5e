"""Running statistics taken anew: the mildest recovery, for networks that have batch norms."""

from __future__ import annotations

import torch
from torch import nn

from allocator.modules import modules_of
from allocator.recovering.compare import outputs_of
from allocator.recovering.samples import Samples
from allocator.torch_private import BatchNormBase


def take_statistics(small: nn.Module, samples: Samples) -> list[str]:
    """Put the statistics of the inputs into the batch norms that hold any, in place; names of what was changed.

    Args:
        small: in eval mode.
        samples: inputs, of which those to fit are looked at.
    """
    norms = {
        path: module
        for path, module in modules_of(small).items()
        if isinstance(module, BatchNormBase) and module.running_mean is not None and _over_batch(module)
    }
    momenta = {path: norm.momentum for path, norm in norms.items()}
    counted = {path: None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone() for path, norm in norms.items()}
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    try:
        for inputs in samples.seen:
            outputs_of(small, inputs)
    finally:
        for path, norm in norms.items():
            norm.momentum, norm.training = momenta[path], False
            if counted[path] is not None:
                norm.num_batches_tracked.copy_(counted[path])
    return [f"{path}.{name}".lstrip(".") for path in norms for name in ("running_mean", "running_var")]


def _over_batch(norm: nn.Module) -> bool:
    return not isinstance(norm, nn.modules.instancenorm._InstanceNorm)
