"""The ways of choosing that are compared: ours, the controls, and Torch-Pruning's.

Every arm gets a trained network, unlabelled and labelled calibration images, and a share of the FLOPs, and gives a
smaller network at or under it. Torch-Pruning has no budget; its ratio is bisected until fvcore's count of what it
leaves is within 1 % below.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

import allocator
from allocator.cost.fvcore import fvcore_flops
from allocator.tracing.inputs import Inputs

from .networks import Attention
from .task import Part

Arm = Callable[[nn.Module, Part, float], "nn.Module | allocator.Result"]
CALIBRATION = 256
TOLERANCE = 0.01
MOST_TRIES = 16
LOST = {("Crepe", "conv6")}
"""Layers, by a network's class and their name, that Torch-Pruning loses sight of: its result runs only if they stay."""


def _ours(*, data: str = "", **options: Any) -> Arm:
    """An allocation of ours; `data` is "" for none, "images", or "labels"."""

    def choose(model: nn.Module, part: Part, share: float) -> allocator.Result:
        images, labels = part.images[:CALIBRATION], part.labels[:CALIBRATION]
        if data:
            options["data"] = images if data == "images" else [(images, labels)]
        if data == "labels":
            options["loss"] = F.cross_entropy
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", allocator.AllocatorWarning)
            flops = f"{100 * share}%"
            return allocator.allocate(model, flops, example_inputs=images[:1], certify=False, **options)

    return choose


def _peer(importance: Callable[[Any], Any], how: str, *, labels: bool = False) -> Arm:
    """Torch-Pruning with one of its importances, globally, layer by layer, or among layers that are alike."""

    def choose(model: nn.Module, part: Part, share: float) -> nn.Module:
        image = part.images[:1]
        budget = share * fvcore_flops(model, Inputs((image,)))[0]
        low, high, best, most = 0.0, 1.0, None, 0
        gradients = _gradients(model, part) if labels else []
        for _ in range(MOST_TRIES):
            ratio = (low + high) / 2
            small = _pruned(model, part, importance, how, ratio, gradients)
            flops = fvcore_flops(small, Inputs((image,)))[0]
            if most < flops <= budget:
                best, most = small, flops
            if (1 - TOLERANCE) * budget <= flops <= budget:
                break
            if flops > budget:
                low = ratio
            else:
                high = ratio
        if best is None:
            raise RuntimeError("no ratio leaves a network under the budget")
        return best

    return choose


def _gradients(model: nn.Module, part: Part) -> list[Tensor | None]:
    """By parameter, of the loss on the labelled images: the same at every ratio."""
    model = copy.deepcopy(model).eval()
    F.cross_entropy(model(part.images[:CALIBRATION]), part.labels[:CALIBRATION]).backward()
    return [parameter.grad for parameter in model.parameters()]


def _pruned(
    model: nn.Module,
    part: Part,
    importance: Callable[[Any], Any],
    how: str,
    ratio: float,
    gradients: Sequence[Tensor | None],
) -> nn.Module:
    import torch_pruning as tp

    small = copy.deepcopy(model).eval()
    classes = small(part.images[:1]).shape[1]
    stay = [
        layer
        for name, layer in small.named_modules()
        if (isinstance(layer, nn.Linear) and layer.out_features == classes) or (type(small).__name__, name) in LOST
    ]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            small,
            part.images[:1],
            importance(tp.importance),
            global_pruning=how != "local",
            isomorphic=how == "isomorphic",
            pruning_ratio=ratio,
            ignored_layers=stay,
            **_whole_heads(small, ratio),
        )
        for parameter, gradient in zip(small.parameters(), gradients, strict=False):
            parameter.grad = None if gradient is None else gradient.clone()
        pruner.step()
    small.zero_grad()
    return small


def _whole_heads(model: nn.Module, ratio: float) -> dict[str, Any]:
    """What tells it of attention, of which heads go as a whole, the same share as of channels; nothing else runs."""
    attention = [module for module in model.modules() if isinstance(module, Attention)]
    if not attention:
        return {}
    heads = {module.qkv: module.heads for module in attention}
    return {"num_heads": heads, "prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": ratio}


def _peers() -> dict[str, Arm]:
    importances: dict[str, Callable[[Any], Any]] = {
        "BN": lambda tp: tp.BNScaleImportance(),
        "L2": lambda tp: tp.GroupMagnitudeImportance(p=2),
        "LAMP": lambda tp: tp.LAMPImportance(),
        "Taylor": lambda tp: tp.GroupTaylorImportance(),
    }
    return {
        f"TP {name} {how}": _peer(importance, how, labels=name == "Taylor")
        for name, importance in importances.items()
        for how in ("global", "local", "isomorphic")
    }


OURS: dict[str, Arm] = {
    "default": _ours(),
    "default with data": _ours(data="images"),
    "fisher": _ours(criterion="fisher", data="images"),
    "activation": _ours(criterion="activation", data="images"),
    "bn_scale, per_block, narrowest": _ours(criterion="bn_scale", policy="per_block", scope="narrowest"),
    "bn_scale, per_block": _ours(criterion="bn_scale", policy="per_block"),
    "bn_scale, global": _ours(criterion="bn_scale", policy="global"),
    "magnitude, per_block": _ours(criterion="magnitude", policy="per_block"),
    "magnitude, global": _ours(criterion="magnitude", policy="global"),
    "group_norm, global": _ours(criterion="group_norm", policy="global"),
    "group_norm, per_block": _ours(criterion="group_norm", policy="per_block"),
    "group_norm, isomorphic": _ours(criterion="group_norm", policy="isomorphic"),
    "fpgm, global": _ours(criterion="fpgm", policy="global"),
    "surgeon": _ours(criterion="surgeon", data="images"),
    "activation, priced": _ours(criterion="activation", policy="priced", data="images"),
    "activation, priced, floor": _ours(criterion="activation", policy="priced", at_least="25%", data="images"),
    "fisher, global": _ours(criterion="fisher", policy="global", data="images"),
    "fisher, priced": _ours(criterion="fisher", policy="priced", data="images"),
    "fisher, priced, floor": _ours(criterion="fisher", policy="priced", at_least="25%", data="images"),
    "fisher, priced, floor 40 %": _ours(criterion="fisher", policy="priced", at_least="40%", data="images"),
    "fisher, priced, floor, labels": _ours(criterion="fisher", policy="priced", at_least="25%", data="labels"),
    "taylor, priced, floor": _ours(criterion="taylor", policy="priced", at_least="25%", data="labels"),
    "reconstruction, priced, floor": _ours(criterion="reconstruction", policy="priced", at_least="25%", data="images"),
    "fisher+group_norm, global": _ours(criterion=["fisher", "group_norm"], policy="global", data="images"),
    "random, uniform": _ours(criterion="random", policy="uniform"),
    "magnitude, uniform": _ours(criterion="magnitude", policy="uniform"),
}
PEERS = _peers()
ARMS = {**OURS, **PEERS}


def flops_of(model: nn.Module, image: Tensor) -> int:
    """By fvcore."""
    return fvcore_flops(model, Inputs((image,)))[0]
