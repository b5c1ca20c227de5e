"""What can still be proven of a network whose weights were refitted: that it is the cut one but for these."""

from __future__ import annotations

import torch
from torch import nn

from allocator.modules import skeleton
from allocator.recovering.record import Recovery
from allocator.rewriting.allocation import Allocation
from allocator.rewriting.index_map import take
from allocator.rewriting.lineage import RECOVERY_ATTRIBUTE


def as_it_was_cut(model: nn.Module, small: nn.Module, allocation: Allocation, recovery: Recovery) -> nn.Module:
    """A copy of `small` in which the tensors that were refitted are the parts of the original's that were kept.

    All others are shared with it: if one of them is not the original's, the certificate will say so.

    Args:
        model: the original.
        small: the refitted network; not changed.
        allocation: what it kept.
        recovery: what was refitted.
    """
    originals = dict((*model.named_parameters(), *model.named_buffers()))
    refitted = set(recovery.tensors)

    def put_back(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in refitted or name not in originals:
            return tensor
        cut = take(originals[name], allocation.kept.get(name, ()))
        return cut if cut.shape == tensor.shape else tensor

    copy = skeleton(small, put_back)
    delattr(copy, RECOVERY_ATTRIBUTE)
    return copy
