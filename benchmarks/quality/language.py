"""A small language model of letters, and the text that it learns: Python's own documentation, as `pydoc` ships it."""

from __future__ import annotations

from dataclasses import dataclass
from pydoc_data import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .networks import Attention

CONTEXT = 64
WIDTH, HEADS, LAYERS = 96, 6, 3
STEPS, BATCH, RATE = 1200, 32, 3e-3
TEST_SHARE = 10
"""One topic in so many is kept for the test, and another for calibration."""


@dataclass(frozen=True)
class Text:
    """Letters as numbers, of topics of their own each."""

    train: Tensor
    calibration: Tensor
    test: Tensor
    letters: int

    @classmethod
    def load(cls) -> Text:
        """Python's topics, in the order of their names."""
        pieces = [topics.topics[name] for name in sorted(topics.topics)]
        letters = sorted(set("".join(pieces)))
        number = {letter: place for place, letter in enumerate(letters)}
        parts: dict[str, list[int]] = {"train": [], "calibration": [], "test": []}
        for place, piece in enumerate(pieces):
            part = {0: "test", 1: "calibration"}.get(place % TEST_SHARE, "train")
            parts[part] += [number[letter] for letter in piece]
        return cls(**{name: torch.tensor(part) for name, part in parts.items()}, letters=len(letters))


class Decoder(nn.Module):
    """Predicts the next letter: (N, T) numbers to (N, T, letters) logits."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.letters, self.positions = nn.Embedding(letters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.Sequential(*(Attention(WIDTH, HEADS, 4 * WIDTH, causal=True) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, letters)

    def forward(self, x: Tensor) -> Tensor:
        y = self.letters(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        logits: Tensor = self.head(self.norm(self.layers(y)))
        return logits


def windows(text: Tensor, count: int, generator: torch.Generator, length: int = CONTEXT) -> Tensor:
    """(count, length) pieces of a text from anywhere."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    return text[starts + torch.arange(length)]


def train(text: Text, seed: int) -> nn.Module:
    """AdamW, one cosine."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(text.letters)
    optimiser = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        piece = windows(text.train, BATCH, generator, CONTEXT + 1)
        loss = F.cross_entropy(model(piece[:, :-1]).flatten(0, 1), piece[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def perplexity(model: nn.Module, text: Tensor) -> float:
    """Of a text, in pieces that do not overlap: e to the mean cross-entropy per letter."""
    pieces = text[: (len(text) - 1) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    following = text[1 : 1 + pieces.numel()].view(-1, CONTEXT)
    total = 0.0
    for x, y in zip(pieces.split(64), following.split(64), strict=True):
        total += float(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum"))
    return float(torch.tensor(total / pieces.numel()).exp())
