"""Choices that look at data, each process at its share, under torchrun: `scoring_ranks.py FOLDER`."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from subjects import Nested, trained
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import allocator

SIZE = (3, 16, 16)


class Boxes(nn.Module):
    """Answers that are no classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained(Nested())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.net(x)
        return {"boxes": y[:, :4, None], "scores": y[:, 4:]}


def loader() -> DataLoader[Any]:
    """All of the data: eight batches, by turns of two kinds, so that either half of them would choose otherwise."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.tensor([[4.0, 1.0, 0.1], [0.1, 0.5, 4.0]]).repeat_interleave(8, 0).repeat(4, 1)
    images = (torch.randn(64, *SIZE, generator=generator) + 0.5) * kinds[:, :, None, None]
    return DataLoader(TensorDataset(images, torch.randint(5, (64,), generator=generator)), batch_size=8)


def _torch_pruning() -> Any:
    import torch_pruning

    return torch_pruning.importance.GroupTaylorImportance()


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any], Any]] = {
    "fisher of its own answers": (Nested, lambda: "fisher", None),
    "fisher of answers that are no classes": (Boxes, lambda: "fisher", None),
    "taylor": (Nested, lambda: "taylor", F.cross_entropy),
    "activation": (Nested, lambda: "activation", None),
    "reconstruction": (Nested, lambda: "reconstruction", None),
    "surgeon": (Nested, lambda: "surgeon", None),
    "by trial": (Nested, lambda: "auto", None),
    "several": (Nested, lambda: ["fisher", "activation"], None),
    "Torch-Pruning's": (Nested, _torch_pruning, F.cross_entropy),
}


def chosen(name: str, data: Any) -> Any:
    """What is kept and the ranking of all neurons, as JSON has them."""
    network, criterion, loss = CASES[name]
    torch.manual_seed(0)
    model = trained(network())
    result = allocator.allocate(
        model, "50%", example_inputs=torch.zeros(1, *SIZE), criterion=criterion(), data=data, loss=loss
    )
    assert result.plan.problem is not None
    ranking = result.plan.problem.scores.values.argsort(kind="stable").tolist()
    return json.loads(json.dumps({"kept": result.allocation.kept, "ranking": ranking}))


def refused(data: Any) -> str:
    """What an allocation that looks at these data raises."""
    try:
        chosen("fisher of its own answers", data)
    except allocator.DataError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    from accelerate import Accelerator

    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    accelerator = Accelerator(cpu=True)
    assert torch.distributed.get_world_size() == 2
    batches = list(loader())
    found = {name: chosen(name, batches[rank::2]) for name in CASES}
    found["halves"] = chosen("activation", batches[4 * rank : 4 * rank + 4])
    found["accelerate"] = chosen("fisher of its own answers", accelerator.prepare(loader()))
    found["one input"] = chosen("by trial", [(batches[0][0][:1], batches[0][1][:1])] if rank else batches)
    found["not finite"] = refused([torch.full((2, *SIZE), math.nan if rank else 1.0)])
    found["empty"] = refused([] if rank else batches)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    accelerator.end_training()  # a process that ends with its group open may abort
