"""The smallest network of each family of pytorchcv: over 150 by other hands than torchvision's and timm's.

python -m benchmarks.coverage_pytorchcv                # needs pip install --no-deps pytorchcv==0.0.74
python -m benchmarks.coverage_pytorchcv --names pspnet raft --print

Each in a process of its own with a limit of CPU time. Beside what `coverage` asks of a network, the result is verified
once more on two other images, larger ones where the network takes them, and the model passed in must be as it was.
Writes results/coverage_pytorchcv.json and .md; a run that was cut off goes on with the families that have no row.
"""

from __future__ import annotations

import resource
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

import allocator

from . import coverage_one
from .common import read, table, where
from .coverage import apart, import_what_tools_import
from .coverage_models import smallest
from .coverage_report import FEW, few, left
from .peer import reason
from .rows import arguments_of, measure_rows

LIMIT = 120
MEMORY = 6 << 30
MOST_SIDE = 64
Row = dict[str, Any]
Arguments = tuple[Any, ...]


def _video() -> Arguments:
    frames, mask = torch.rand(1, 5, 3, 64, 64), torch.ones(1, 5, 1, 64, 64)
    return frames, mask, mask, torch.rand(1, 4, 4, 64, 64), 5


SPECIAL: dict[str, Callable[[], Arguments]] = {
    "jasper": lambda: (torch.rand(1, 64, 64), torch.tensor([64])),
    "jasperdr": lambda: (torch.rand(1, 64, 64), torch.tensor([64])),
    "quartznet": lambda: (torch.rand(1, 64, 64), torch.tensor([64])),
    "nvpattexp": lambda: (torch.rand(2, 8, 16, 29), torch.tensor([3, 3])),
    "propainter": _video,
    "propainter_rfc": lambda: (torch.rand(1, 5, 2, 64, 64), torch.ones(1, 5, 1, 64, 64)),
    "raft": lambda: (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)),
    "superpointnet": lambda: (torch.rand(1, 1, 32, 32),),
    "visemenet": lambda: (torch.rand(34, 8, 195), torch.rand(34, 76)),
    "voca": lambda: (torch.rand(2, 1, 16, 29), torch.tensor([3, 3])),
}
"""What a network takes that is no image of its `in_size`."""
OPTIONS: dict[str, dict[str, Any]] = {name: {"from_audio": False} for name in ("jasper", "jasperdr", "quartznet")}
WITHOUT = ("propainter_ip",)
"""Families without weights."""


def families() -> dict[str, str]:
    """Of each of the package's modules, the network with the fewest parameters."""
    from pytorchcv.model_provider import _models

    names: dict[str, list[str]] = {}
    for name, build in sorted(_models.items()):
        names.setdefault(build.__module__.rpartition(".")[2], []).append(name)
    found = {}
    for family, members in sorted(names.items()):
        if family not in WITHOUT:
            found[family], _ = smallest(members, lambda name, family=family: _models[name](**OPTIONS.get(family, {})))
    return found


def _build(family: str, name: str) -> nn.Module:
    from pytorchcv.model_provider import get_model

    torch.manual_seed(0)
    model: nn.Module = get_model(name, **OPTIONS.get(family, {}))
    for path, numbers in model.named_buffers():  # the channels that a trained CondenseNet picks, as zeros before
        if path.endswith("index") and not numbers.is_floating_point() and not numbers.any():
            numbers.copy_(torch.randperm(len(numbers)))
    return coverage_one.randomised(model)


def _example(family: str, model: Any) -> Arguments:
    """What the network takes: an image of its own size, made smaller by powers of two as far as it runs on that."""
    if family in SPECIAL:
        return SPECIAL[family]()
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    most = 1
    while max(model.in_size) / most > MOST_SIDE:
        most *= 2
    for factor in sorted({max(most // times, 1) for times in (1, 2, 4, most)}, reverse=True):
        for channels in (first.in_channels, 3):
            x = torch.rand(1, channels, *(side // factor for side in model.in_size))
            if _runs(model, (x,)):
                return (x,)
    raise ValueError(f"takes no image of {model.in_size}")


def _runs(model: nn.Module, inputs: Arguments) -> bool:
    try:
        with torch.no_grad():
            model(*inputs)
    except (RuntimeError, ValueError, AssertionError):
        return False
    return True


def _further(model: nn.Module, inputs: Arguments) -> Arguments | None:
    """Two images a quarter larger, or as large, or one that is larger; None where the network takes none of these."""
    return next((given for given in _others(inputs) if _runs(model, given)), None)


def _others(inputs: Arguments) -> Iterator[Arguments]:
    first, *others = inputs
    if not all(isinstance(other, torch.Tensor) for other in others):
        return
    larger = [*first.shape[:2], *(side + side // 4 for side in first.shape[2:])]
    for batch, shape in ((2, larger), (2, first.shape), (1, larger)):
        if first.dim() == 4 or shape == first.shape:
            yield torch.cat([torch.rand(shape)] * batch), *(torch.cat([other] * batch) for other in others)


def row(family: str, name: str) -> Row:
    """What is measured of one network, as far as it gets."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    found: Row = {"network": name}
    try:
        model = _build(family, name)
        inputs = _example(family, model)
        found["input"] = _sizes(inputs)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        result = coverage_one.ours(model, inputs, found)
        now = model.state_dict()
        found["untouched"] = now.keys() == before.keys() and all(_same(now[key], before[key]) for key in before)
        given = _further(model, inputs)
        if given is not None:
            checked = allocator.verify(model, result.model, result.allocation, example_inputs=given)
            found |= {"again": _sizes(given), "again_ok": checked.ok}
    except Exception as error:  # whatever it raises is a result here
        found["failed"] = reason(error)
    return found


def _sizes(inputs: Arguments) -> str:
    return ", ".join("×".join(map(str, each.shape)) or "1" for each in inputs if isinstance(each, torch.Tensor))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, 0, 0, equal_nan=True)


def markdown(data: dict[str, Any]) -> str:
    """The page."""
    found = data["rows"]
    named = [{"model": f"pytorchcv:{each['network']}", "ours": each} for _, each in sorted(found.items())]
    done = [each for each in found.values() if each.get("train_step")]
    again = [each for each in done if "again" in each]
    worst = max((each["error"] or 0.0 for each in done), default=0.0)
    header = ["family", "network", "input", "can go", "floor", "FLOPs", "error", "train step", "verified again", "s"]
    text = [
        "# The smallest network of each family of pytorchcv",
        "",
        "Made by `python -m benchmarks.coverage_pytorchcv`, with pytorchcv 0.0.74 and nothing written for it. Random "
        "weights, images as small as a network takes them in steps of two from its own size, each network in a process "
        "of its own. Asked for: 60 % of the FLOPs; where that is out of reach, the smallest that is not (marked ≥). "
        "Can go: the share of channels that can be removed, of which those that the model returns are none; floor: the "
        "lowest FLOPs that a plan was seen to reach; verified again: by `allocator.verify`, on another batch and a "
        "larger image, as far as the network takes these. Seconds are of the CPU, one thread.",
        "",
        f"{len(found)} families: {len(done)} allocated, certified and trained a step, "
        f"{sum('smallest' not in each for each in done)} of them at 60 %; largest certificate error {worst:.1e}. "
        f"{sum(each['again_ok'] for each in again)} of {len(again)} verified again; the model that was passed in was "
        f"left as it was by {sum(each['untouched'] for each in done)} of {len(done)}. "
        f"{len(data['families']) - len(found)} families have no row yet.",
        "",
        table(header, [_line(family, each) for family, each in sorted(found.items())]),
        "",
        *left(named),
        *few(named, FEW),
        where(data["environment"]),
    ]
    return "\n".join(text)


def _line(family: str, found: Row) -> list[str]:
    if "failed" in found and "train_step" not in found:
        return [family, found["network"], found.get("input", ""), *[""] * 4, f"no: {found['failed'][:80]}", "", ""]
    flops = f"{'≥ ' if 'smallest' in found else ''}{100 * found['achieved']:.1f} %"
    error = "" if found["error"] is None else f"{found['error']:.0e}"
    checked = "none taken" if "again" not in found else found["again"] if found["again_ok"] else "no"
    figures = [f"{100 * found['share']:.0f} %", f"{100 * found['floor']:.1f} %", flops, error]
    trained = "yes" if found["train_step"] else "no"
    return [family, found["network"], found["input"], *figures, trained, checked, f"{found['seconds']:.1f}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the families that have no row yet."""
    parser = arguments_of("coverage_pytorchcv")
    parser.add_argument("--limit", type=int, default=LIMIT, help=f"CPU seconds per network (default {LIMIT})")
    chosen = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    import_what_tools_import()
    data = read("coverage_pytorchcv") or {"families": families(), "rows": {}}
    known = data["families"]

    def measure(family: str) -> Row:
        return {"network": known[family], **apart(row, (family, known[family]), chosen.limit)}

    measure_rows("coverage_pytorchcv", data, known, measure, markdown, chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
