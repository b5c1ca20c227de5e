"""Forwards that do what a trace may get wrong, each under a condition that one trace alone would not meet.

python tests/adversarial.py --report benchmarks/results/adversarial.md
"""

from __future__ import annotations

import argparse
import copy
import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import allocator
from allocator.fitting import fit

SIDE = 8
CHANNELS = 16
MODES = ((False, 1, SIDE), (True, 2, SIDE), (False, 3, 12), (True, 3, 12), (False, 2, 5), (True, 2, 6))
"""(train mode, batch, side of the image) in which a result is held against the original."""
Middle = Callable[[Any, Tensor], Tensor]


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Network(nn.Module):
    """Three convolutions with something between the first two."""

    cache: ClassVar[dict[Any, Tensor]] = {}
    index: Tensor
    state: Tensor
    first: nn.Conv2d
    second: nn.Conv2d
    other: nn.Conv2d

    def __init__(self, middle: Middle, condition: Callable[[Any, Tensor], bool]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.middle, self.condition, self.width = middle, condition, CHANNELS
        self.seen: list[int] = []
        self.first, self.norm = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)
        self.second, self.other = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(CHANNELS, 5)
        nn.init.uniform_(self.norm.weight, 0.2, 1.5)
        self.matrix = nn.Parameter(torch.randn(CHANNELS, CHANNELS) / 4)
        self.depth = nn.Parameter(torch.randn(CHANNELS, 1, 3, 3))
        self.register_buffer("index", torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("state", torch.zeros(CHANNELS))

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.first(x)).relu()
        y = self.middle(self, y) if self.condition(self, y) else y
        return self.head(self.second(y).relu().mean((2, 3)))


def _cached(m: Any, y: Tensor) -> Tensor:
    key = y.shape[1:], y.dtype, y.device
    if key not in Network.cache:
        Network.cache[key] = torch.linspace(1, 2, y.shape[1], device=y.device, dtype=y.dtype)
    return y * Network.cache[key].view(1, -1, 1, 1)


def _averaged(m: Any, y: Tensor) -> Tensor:
    with torch.no_grad():
        m.state.lerp_(y.detach().mean((0, 2, 3)).to(m.state), 0.1)
    return y + m.state.view(1, -1, 1, 1).to(y)


def _remembered(m: Any, y: Tensor) -> Tensor:
    m.seen.append(y.shape[1])
    return y * (m.seen[-1] / m.seen[0])


def _shuffled(m: Any, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    return y.view(b, 4, c // 4, h, w).transpose(1, 2).reshape(b, c, h, w)


def _padded(m: Any, y: Tensor) -> Tensor:
    return F.pad(y, (0, 0, 0, 0, 1, 1))[:, 1 : 1 + y.shape[1]]


def _in_place(m: Any, y: Tensor) -> Tensor:
    z = y.clone()
    z[:, :4].mul_(2)
    return z


MIDDLES: dict[str, Middle] = {
    "shuffle": _shuffled,
    "swapped halves": lambda m, y: torch.cat(y.chunk(2, 1)[::-1], 1),
    "even and odd": lambda m, y: torch.cat([y[:, ::2], y[:, 1::2]], 1),
    "a constant of ones": lambda m, y: y * torch.ones(1, CHANNELS, 1, 1).to(y),
    "a constant of numbers": lambda m, y: y + torch.arange(float(CHANNELS)).view(1, -1, 1, 1).to(y),
    "numpy's numbers": lambda m, y: y * torch.from_numpy(np.linspace(1, 2, y.shape[1])).view(1, -1, 1, 1).to(y),
    "a share of the width": lambda m, y: y * (CHANNELS / y.shape[1]),
    "an attribute over the width": lambda m, y: y * (m.width / y.shape[1]),
    "numpy's root of the width": lambda m, y: y * float(np.sqrt(np.float32(y.shape[1]))),
    "a tensor of the width": lambda m, y: y / torch.tensor(y.shape[1]).sqrt().to(y),
    "index_select": lambda m, y: y.index_select(1, m.index),
    "indexing": lambda m, y: y[:, m.index],
    "gather": lambda m, y: y.gather(1, m.index.view(1, -1, 1, 1).expand(len(y), -1, *y.shape[2:])),
    "a list of indices": lambda m, y: y[:, list(range(y.shape[1]))[::-1]],
    "a cache on the class": _cached,
    "a running average": _averaged,
    "an attribute that remembers": _remembered,
    "a custom function": lambda m, y: _Doubled.apply(y),
    "strides": lambda m, y: y.contiguous().as_strided(y.shape, y.contiguous().stride()),
    "flipped": lambda m, y: y.flip(1),
    "rolled": lambda m, y: y.roll(1, 1),
    "softmax": lambda m, y: y.softmax(1) * y,
    "cumulative": lambda m, y: y.cumsum(1),
    "padded": _padded,
    "einsum": lambda m, y: torch.einsum("bchw,cd->bdhw", y, m.matrix.to(y)),
    "one by one": lambda m, y: torch.stack([y[:, i] * 2 for i in range(y.shape[1])], 1),
    "the first four": lambda m, y: torch.cat([y[:, :4] * 2, y[:, 4:]], 1),
    "in place": _in_place,
    "resized": lambda m, y: F.interpolate(F.avg_pool2d(y, 2), y.shape[2:]),
    "patches": lambda m, y: F.fold(F.unfold(y, 3, padding=1), y.shape[2:], 3, padding=1),
    "depthwise": lambda m, y: F.conv2d(y, m.depth.to(y), padding=1, groups=y.shape[1]),
    "another layer": lambda m, y: y + m.other(y).relu(),
    "a fixed view": lambda m, y: (y.view(len(y), CHANNELS, -1) * 2).view_as(y),
    "the mean over channels": lambda m, y: y - y.mean(1, keepdim=True),
}
CONDITIONS: dict[str, Callable[[Any, Tensor], bool]] = {
    "always": lambda m, y: True,
    "in train mode": lambda m, y: bool(m.training),
    "in eval mode": lambda m, y: not m.training,
    "of one sample": lambda m, y: len(y) == 1,
    "of several samples": lambda m, y: len(y) > 1,
    "of larger images": lambda m, y: y.shape[-1] > SIDE,
    "of smaller images": lambda m, y: y.shape[-1] < SIDE,
    "of even sides": lambda m, y: y.shape[-1] % 2 == 0,
    "of odd sides": lambda m, y: y.shape[-1] % 2 == 1,
}


def cut(model: Network, kept: dict[str, list[Any]]) -> Network:
    """The original in float64 in which nothing reads a dropped channel, by the allocation alone."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            dims = kept.get(name, [None, None])
            reads = 0 if name == "matrix" else 1
            if parameter.dim() > 1 and name != "depth" and dims[reads] is not None:
                gone = sorted(set(range(parameter.shape[reads])) - set(dims[reads]))
                parameter.index_fill_(reads, torch.tensor(gone, dtype=torch.long), 0)
    return model


def outcome(middle: str, condition: str) -> str:
    """ "right", "refused" or what is wrong with the result."""
    Network.cache.clear()
    model = Network(MIDDLES[middle], CONDITIONS[condition]).eval()
    x = torch.zeros(1, 3, SIDE, SIDE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = allocator.allocate(model, "70%", example_inputs=x, criterion="magnitude", scope="all")
    except allocator.AllocatorError as refused:
        return "refused" if str(refused) else "refused without a word"
    for training, batch, side in MODES:
        x = torch.randn(batch, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(side))
        pair: list[Any] = []
        each: Any
        for each in (cut(model, result.allocation.kept), copy.deepcopy(result.model).double()):
            Network.cache.clear()
            each.seen = []
            try:
                pair.append(each.train(training)(x.clone()))
            except Exception as raised:
                pair.append(raised)
        where = f"{'train' if training else 'eval'} mode, {batch}x3x{side}x{side}"
        if isinstance(pair[0], Exception):
            continue
        if isinstance(pair[1], Exception):
            return f"raises in {where}: {str(pair[1]).splitlines()[0]}"
        error = float((pair[0] - pair[1]).abs().max() / pair[0].abs().max().clamp_min(1))
        if not error <= 1e-9:
            return f"off by {error:.1e} in {where}"
    return "right"


def main() -> None:
    parser = argparse.ArgumentParser(description="Hold results of adversarial forwards against the originals")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--one-forward", action="store_true", help="trace the example inputs in eval mode alone")
    args = parser.parse_args()
    if args.one_forward:
        fit.elsewhere = lambda graph: graph
    start, found = time.process_time(), {}
    for middle in MIDDLES:
        for condition in CONDITIONS:
            found[middle, condition] = outcome(middle, condition)
            if found[middle, condition] not in ("right", "refused"):
                print(middle, condition, found[middle, condition], flush=True)
        print(len(found), Counter(found.values()).most_common(3), flush=True)
    page = report(found, time.process_time() - start)
    if args.report:
        args.report.write_text(page)


def report(found: dict[tuple[str, str], str], seconds: float) -> str:
    """The outcomes as a page."""
    count = Counter(found.values())
    held = ("right", "refused")
    wrong = [f"- {middle}, {condition}: {what}" for (middle, condition), what in found.items() if what not in held]
    lines = [
        "# Adversarial forwards",
        "",
        f"Written by `python tests/adversarial.py --report FILE` on Python {platform.python_version()}, torch "
        f"{version('torch')}, one thread, {seconds:.0f} s of CPU time.",
        "",
        f"{len(found)} forwards: {len(MIDDLES)} things that a trace may get wrong under {len(CONDITIONS)} conditions, "
        "allocated at 70 % of their FLOPs. Every result was held against the original without what reads a dropped "
        "channel, by the allocation alone, in float64, in eval and in train mode, in batches of 1 to 3 and four sizes.",
        "",
        f"{count['right']} were right, {count['refused']} refused with a reason, {len(wrong)} wrong.",
        "",
        *wrong,
        *([""] if wrong else []),
        f"| | {' | '.join(CONDITIONS)} |",
        f"|---{'|---' * len(CONDITIONS)}|",
        *(f"| {middle} | {' | '.join(_short(found[middle, each]) for each in CONDITIONS)} |" for middle in MIDDLES),
    ]
    return "\n".join(lines) + "\n"


def _short(outcome: str) -> str:
    return {"right": "right", "refused": "refused"}.get(outcome, "wrong")


if __name__ == "__main__":
    main()
