"""Torch-Pruning doing the same job, as its documentation shows it: global pruning by batch-norm scale.

It takes no FLOPs budget, so its pruning ratio is bisected, with fvcore counting each try. Every try starts
from a copy of the model, because a step changes the model it is given.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from dataclasses import dataclass, replace

import torch
from torch import nn

from .common import ROOT as ROOT

from reference_set import count, example  # isort: skip

FIXED_RATIO = 0.35
TOLERANCE = 0.01
MOST_TRIES = 14


@dataclass(frozen=True)
class Bisected:
    """Where a bisection ended: the largest model under the budget.

    Attributes:
        model: that model.
        flops: its FLOPs by fvcore.
        ratio: the pruning ratio that gave it.
        tries: how many models were pruned on the way.
        within: whether it is within 1 % under the budget.
    """

    model: nn.Module
    flops: int
    ratio: float
    tries: int
    within: bool


def prune_once(model: nn.Module, image: torch.Tensor, ratio: float = FIXED_RATIO, classes: int = 1000) -> nn.Module:
    """One pass at a fixed pruning ratio, in place; nothing is counted or checked.

    Args:
        model: the network in eval mode; changed.
        image: (1, C, H, W) that it can take.
        ratio: share of channels to prune, over all layers.
        classes: outputs of the linear layers that are left alone.
    """
    import torch_pruning as tp

    heads = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == classes]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BNScalePruner(
            model,
            image,
            importance=tp.importance.BNScaleImportance(),
            global_pruning=True,
            pruning_ratio=ratio,
            ignored_layers=heads,
        )
        pruner.step()
    return model


def prune_to_budget(model: nn.Module, image: torch.Tensor, budget: float, classes: int = 1000) -> Bisected:
    """Bisect the pruning ratio until fvcore's FLOPs are within 1 % under the budget.

    Args:
        model: the network in eval mode; not changed.
        image: (1, C, H, W) that it can take.
        budget: FLOPs at most.
        classes: outputs of the linear layers that are left alone.
    """
    low, high = 0.0, 1.0
    best = Bisected(model, 0, 1.0, 0, False)
    for tries in range(1, MOST_TRIES + 1):
        ratio = (low + high) / 2
        small = prune_once(copy.deepcopy(model), image, ratio, classes)
        flops = count(small, image).flops
        within = (1 - TOLERANCE) * budget <= flops <= budget
        if best.flops < flops <= budget:
            best = Bisected(small, flops, ratio, tries, within)
        if within:
            break
        low, high = (ratio, high) if flops > budget else (low, ratio)
    return replace(best, tries=tries)


def broken_in_training(model: nn.Module, name: str) -> str | None:
    """Why a pruned model's train-mode forward fails, or None; auxiliary heads run in train mode only."""
    batch = torch.cat([example(name)] * 2)
    try:
        with torch.no_grad():
            copy.deepcopy(model).train()(batch)
    except (RuntimeError, ValueError) as error:
        return reason(error)
    return None


def reason(error: Exception) -> str:
    """An error on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120] if lines else ''}"
