"""What a training run leaves: its networks' figures, the last network and what was kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

import allocator


@dataclass
class Stage:
    """What became of one network of a run.

    Attributes:
        name: `seed` or `final`.
        test: figures of the test images, each from 0 to 1: `accuracy` (share classified right), or a detector's
            `AP`, `AP50` ... as COCO defines them.
        flops: for one image, as fvcore counts.
        parameters: how many numbers it has.
        seconds: wall time of its training.
        loss, accuracy: mean over the last epoch's training images; a detector has no accuracy.
    """

    name: str
    test: dict[str, float]
    flops: int
    parameters: int
    seconds: float
    loss: float
    accuracy: float | None = None

    @property
    def test_accuracy(self) -> float:
        """Share of the test images classified right, of a classifier."""
        return self.test["accuracy"]

    def to_dict(self) -> dict[str, Any]:
        """Flat: `test_accuracy`, or `test_AP` and so on, beside the other figures that there are."""
        figures = {}
        for key, value in asdict(self).items():
            # A detector has no accuracy, and JSON's null would look as if it were missing.
            if key != "test" and value is not None:
                figures[key] = value
        return figures | as_test(self.test)


@dataclass
class RunResult:
    """What a run leaves.

    Attributes:
        model: the last network, in eval mode, on the CPU.
        allocation: what was kept; None if nothing was allocated.
        stages: the networks that were trained, in order.
        folder: where the files are.
        corrupt: images that could not be read, with the reason.
        main: whether this is the process that talks and writes.
    """

    model: nn.Module
    allocation: allocator.Allocation | None
    stages: list[Stage]
    folder: Path
    corrupt: list[str] = field(default_factory=list)
    main: bool = True

    def to_dict(self) -> dict[str, Any]:
        """For machines; without model and indices."""
        figures = ("flops_asked", "flops_before", "flops_after", "policy", "criterion", "scope", "blocks")
        allocation = self.allocation and {key: getattr(self.allocation, key) for key in figures}
        return {
            "stages": [stage.to_dict() for stage in self.stages],
            "allocation": allocation,
            "corrupt": self.corrupt,
            "folder": str(self.folder),
        }


def as_test(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures of the test images, named so that they can stand beside those of the training."""
    return {f"test_{key}": value for key, value in figures.items()}
