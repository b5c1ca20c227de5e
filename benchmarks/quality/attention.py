"""Networks of attention, cut and recovered: `python -m benchmarks.quality.attention`.

A vision transformer on scikit-learn's digits, and a language model of letters on Python's documentation, both trained
here, lose hidden units of their MLPs and heads, chosen by `fisher`; residual streams stay, as they run
under norms over channels. Recovered without labels. Every row is written as soon as it is there; a run that was stopped
goes on.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import allocator
from benchmarks.common import RESULTS, table  # sets one thread before torch is imported

from . import digits, language
from .networks import Attention
from .rows import add_row, is_known, read_rows

ROWS = RESULTS / "quality_attention.jsonl"
"""One line per network, seed and share."""
PAGE = RESULTS / "recovery_attention.md"
SHARES = (0.8, 0.6, 0.5)
CALIBRATION = 512
WHAT = {"vit": "test error in percent", "language": "perplexity per letter"}
STATES = ("full", "cut", "recovered")
Judge = Callable[[nn.Module], float]


class DigitTransformer(nn.Module):
    """Patches of 2x2 of 8x8 pixels, three layers."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches, self.positions = nn.Conv2d(1, width, 2, 2), nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.layers = nn.Sequential(*(Attention(width, 4, 4 * width) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.layers(x)).mean(1))
        return logits


def vision(seed: int, folder: Path) -> tuple[nn.Module, Tensor, Judge]:
    """Network, inputs for calibration, and what is measured; it is trained anew whenever it is asked for."""
    torch.manual_seed(seed)
    images, classes, *test = digits.digits(seed)
    model = DigitTransformer()
    digits.train(model, images, classes, torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05))
    return model, images[:CALIBRATION], lambda net: 100 - digits.right(net, *test)


def words(seed: int, folder: Path) -> tuple[nn.Module, Tensor, Judge]:
    """The same of the language model, which is trained once and kept in a folder."""
    text, path = language.Text.load(), folder / f"language-{seed}.pt"
    model: nn.Module = language.Decoder(text.letters).eval()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        model = language.train(text, seed)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    data = language.windows(text.calibration, CALIBRATION, torch.Generator().manual_seed(0))
    return model, data, lambda net: language.perplexity(net, text.test)


NETWORKS: dict[str, Callable[[int, Path], tuple[nn.Module, Tensor, Judge]]] = {"vit": vision, "language": words}


def row(model: nn.Module, share: float, data: Tensor, judge: Judge) -> dict[str, Any]:
    """Figures of one cut."""
    result = allocator.allocate(
        model, f"{100 * share}%", data=data[:256], example_inputs=data[:1], certify=False, criterion="fisher"
    )
    recovered = allocator.recover(result, data)
    assert recovered.recovery is not None
    layers = dict(result.model.named_modules())
    return {
        "full": judge(model),
        "cut": judge(result.model),
        "recovered": judge(recovered.model),
        "hidden": [layer.out_features for name, layer in layers.items() if name.endswith(".up")],
        "heads": [
            layer.out_features // 3 // layers[name[:-4]].head_dim
            for name, layer in layers.items()
            if name.endswith(".qkv")
        ],
        "method": recovered.recovery.method,
        "share": result.flops_after / result.flops_before,
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Means over random seeds."""
    lines = []
    for name, what in WHAT.items():
        for share in sorted({row["asked"] for row in rows if row["network"] == name}, reverse=True):
            own = [row for row in rows if row["network"] == name and row["asked"] == share]
            means = (f"{np.mean([row[state] for row in own]):.2f}" for state in STATES)
            first = own[0]
            lines.append([f"{name}: {what}", len(own), f"{share:.0%}", *means, first["hidden"], first["heads"]])
    heads = ["network", "seeds", "FLOPs", *STATES, "hidden units left (first seed)", "heads left"]
    return "\n".join(
        [
            "# Attention, cut and recovered",
            "",
            "Made by `python -m benchmarks.quality.attention`: see its first lines. Nothing is trained after the cut.",
            "",
            table(heads, lines),
            "",
        ]
    )


def main() -> None:
    """See --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"), help="for trained networks")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for seed in args.seeds:
        for name in args.networks:
            todo = [share for share in SHARES if not is_known(ROWS, network=name, seed=seed, asked=share)]
            if not todo:
                continue
            model, data, judge = NETWORKS[name](seed, args.folder)
            for share in todo:
                add_row(ROWS, row(model, share, data, judge), network=name, seed=seed, asked=share)
    PAGE.write_text(markdown(read_rows(ROWS)), encoding="utf-8")


if __name__ == "__main__":
    main()
