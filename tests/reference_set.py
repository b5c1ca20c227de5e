"""The networks that every promise is checked on, with batch norms that are not at their start."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import allocator

REFERENCE_SET: tuple[str, ...] = (
    "torchvision:resnet50",
    "torchvision:resnext50_32x4d",
    "torchvision:googlenet",
    "torchvision:inception_v3",
    "torchvision:densenet121",
    "torchvision:shufflenet_v2_x1_0",
    "torchvision:mobilenet_v3_small",
    "torchvision:efficientnet_b0",
    "torchvision:regnet_y_400mf",
    "timm:res2net50_26w_4s",
    "timm:seresnet50",
    "timm:skresnet18",
    "timm:hrnet_w18_small",
    "timm:inception_v4",
    "recipe:scalenet50",
)


SIDES = {"torchvision:inception_v3": 299, "timm:inception_v4": 299}
"""Pixels of the images that a network is published for, where these are not 224."""


@dataclass(frozen=True)
class Count:
    """fvcore's own count: FLOPs, and calls per operator that it leaves out."""

    flops: int
    uncounted: dict[str, int]


def fvcore_count(model: nn.Module, name: str) -> Count:
    """Count with fvcore alone, in eval mode at the size that the network is published for.

    Args:
        model: the network or a rewritten one; put in eval mode.
        name: as for `allocator.build`; tells the size.
    """
    return count(model, example(name))


def count(model: nn.Module, image: torch.Tensor) -> Count:
    """Count with fvcore alone, in eval mode, on one image."""
    from fvcore.nn import FlopCountAnalysis

    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    analysis = FlopCountAnalysis(model.eval(), image)
    analysis.uncalled_modules_warnings(False).unsupported_ops_warnings(False).tracer_warnings("none")
    with torch.no_grad():
        return Count(int(analysis.total()), dict(analysis.unsupported_ops()))


def example(name: str) -> torch.Tensor:
    """One image of zeros, (1, 3, side, side)."""
    side = SIDES.get(name, 224)
    return torch.zeros(1, 3, side, side)


def randomised(name: str, seed: int = 0) -> nn.Module:
    """Build a model by name with random batch norms through which signals pass, in eval mode.

    Running statistics are those of a batch of noise, then disturbed. Drawn at random instead they would let
    the signal fade from layer to layer, so that outputs hardly depend on the early layers and a comparison
    of outputs could not see mistakes there.

    Args:
        name: as for `allocator.build`.
        seed: of the weights and of the batch norms; the same seed gives the same model.

    Returns:
        The model; gamma is uniform in 0.2..1.5, one in ten negative, beta normal with deviation 0.2; means
        are off by a normal deviation of 0.2 standard deviations, variances by a factor of 0.7..1.4.
    """
    torch.manual_seed(seed)
    model = allocator.build(name)
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    with torch.no_grad():
        for norm in norms:
            _draw_affine(norm, generator)
        _calibrate(model, norms, torch.randn(4, *example(name).shape[1:], generator=generator))
        for norm in norms:
            _disturb(norm, generator)
    return model.eval()


def _draw_affine(norm: _BatchNorm, generator: torch.Generator) -> None:
    gamma = 0.2 + 1.3 * torch.rand(norm.num_features, generator=generator)
    signs = torch.where(torch.rand(norm.num_features, generator=generator) < 0.1, -1.0, 1.0)
    norm.weight.copy_(gamma * signs)
    norm.bias.copy_(0.2 * torch.randn(norm.num_features, generator=generator))


def _calibrate(model: nn.Module, norms: list[_BatchNorm], images: torch.Tensor) -> None:
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _disturb(norm: _BatchNorm, generator: torch.Generator) -> None:
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    mean += 0.2 * variance.sqrt() * torch.randn(norm.num_features, generator=generator)
    variance *= 0.7 + 0.7 * torch.rand(norm.num_features, generator=generator)
