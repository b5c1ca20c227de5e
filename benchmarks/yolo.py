"""Ultralytics' networks: which share of their channels is free, how little they can come down to, what works after.

python -m benchmarks.yolo                         # needs pip install 'neuron-allocator[ultralytics]'
python -m benchmarks.yolo --names yolo11n --print

Writes results/yolo.json and .md; a run that was cut off goes on with the networks that have no row.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

# Before the library is imported: its settings go where nobody's are, and it installs nothing.
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
os.environ.setdefault("YOLO_AUTOINSTALL", "false")

import torch
from torch import nn

import allocator

from .common import read, table, where
from .coverage_one import trains
from .rows import arguments_of, measure_rows

NAMES = (
    "yolov5n", "yolov8n", "yolov8n-seg", "yolov8n-pose", "yolov8n-cls", "yolov9t", "yolov9c-seg", "yolov10n",
    "yolo11n", "yolo11n-seg", "yolo11n-pose", "yolo11n-cls", "yolo12n", "yolo12n-seg", "yolo12n-pose", "yolo12n-cls",
    "yolo26n", "yolo26n-seg", "yolo26n-pose", "yolo26n-cls",
)  # fmt: skip
"""Every generation and task that is built from a YAML file, in its smallest size: 5 and 10 detect only, and 9 segments
as well, in a larger one."""
SIDE = 96
Row = dict[str, Any]


def yolo(name: str, *, mixed: bool = False) -> Any:
    """The wrapper with random weights, in eval mode.

    Args:
        name: of the YAML file.
        mixed: with running statistics and scales as training leaves them, so that numbers neither vanish nor explode.
    """
    import ultralytics

    torch.manual_seed(0)
    made = ultralytics.YOLO(f"{name}.yaml")
    if mixed:
        norms = [module for module in made.model.modules() if isinstance(module, nn.BatchNorm2d)]
        made.model.train()
        for norm in norms:
            norm.momentum = None  # the mean over all batches
            norm.reset_running_stats()
            nn.init.uniform_(norm.weight, 0.5, 1.5)
        with torch.no_grad():
            for _ in range(2):
                made.model(torch.rand(2, 3, 96, 96))
        for norm in norms:
            norm.momentum = 0.03
    made.model.eval()
    return made


def measured(name: str) -> Row:
    """What can go, the least that is left at all, and a network of 60 % of the FLOPs: proven, fused and trained."""
    network, image = yolo(name, mixed=True).model, torch.rand(1, 3, SIDE, SIDE)
    graph = allocator.trace(network, image)
    row: Row = {"flops": graph.flops, "channels": graph.share(), "traced": graph.flow.trace.mode}
    try:
        least = allocator.allocate(network, 1, example_inputs=image, at_least=0, certify=False).flops_after
    except allocator.BudgetError as error:
        least = error.reachable or graph.flops
        row["what stays"] = error.reasons[:3]
    row["least"] = least / graph.flops
    start = time.process_time()
    result = allocator.allocate(network, "60%", example_inputs=image)
    row |= {"seconds": time.process_time() - start, "achieved": result.flops_after / result.flops_before}
    row |= {"error": result.certificate.relative_error, "fitted": result.graph.share(), "notes": result.notes}
    fused: Any = copy.deepcopy(result.model)
    row["fused"] = _difference(result.model, fused.fuse(verbose=False), image)
    row["trains"] = trains(result.model, (image,))
    return row


def _difference(one: nn.Module, other: nn.Module, image: torch.Tensor) -> float:
    """Largest difference of an answer, relative to its largest number."""
    with torch.no_grad():
        expected, found = _first(one(image)), _first(other(image))
    return float((expected - found).abs().max() / expected.abs().max())


def _first(out: Any) -> torch.Tensor:
    while isinstance(out, (tuple, list)):
        out = out[0]
    answer: torch.Tensor = out
    return answer


def markdown(data: dict[str, Any]) -> str:
    """The page."""
    header = ["network", "FLOPs", "free", "after fitting", "least left", "at 60 %", "error", "fused within", "CPU s"]
    text = [
        "# Ultralytics",
        "",
        "Made by `python -m benchmarks.yolo`. Built from YAML files, random weights, batch norms as after training, "
        f"one image of {SIDE} × {SIDE}; FLOPs as fvcore counts them. *Free* is the share of channels that can go, "
        "*after fitting* what is left of it once the rewritten forward was tried, *least left* the smallest share of "
        "the FLOPs that can be reached with `at_least=0`. Each network that was allocated to 60 % ran a training step.",
        "",
        table(header, [_line(name, data["rows"][name]) for name in NAMES if name in data["rows"]]),
        "",
        *_why(data["rows"]),
        "",
        f"ultralytics {data['ultralytics']}; {where(data['environment'])}",
    ]
    return "\n".join(text)


def _line(name: str, row: Row) -> list[str]:
    if "failed" in row:
        return [name, *[""] * 7, row["failed"][:100].replace("|", "/")]
    shares = [f"{100 * row[key]:.1f} %" for key in ("channels", "fitted", "least", "achieved")]
    return [name, f"{row['flops']:,}", *shares, f"{row['error']:.0e}", f"{row['fused']:.0e}", f"{row['seconds']:.1f}"]


def _why(rows: dict[str, Row]) -> list[str]:
    """What stays where less than 40 % of the FLOPs is out of reach, or where a forward did not fit."""
    lines = []
    for name, row in rows.items():
        if row.get("least", 0) > 0.4:
            lines.append(f"- {name}: {'; '.join(row['what stays'])}")
        lines += [f"- {name}: {note.partition(': ')[0]}" for note in row.get("notes", []) if "stay" in note]
    return ["What did not fit when it was tried, and stays:", "", *lines] if lines else ["Nothing had to be repaired."]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the networks that have no row yet."""
    chosen = arguments_of("yolo").parse_args(arguments)
    warnings.simplefilter("ignore")
    data = {**(read("yolo") or {"rows": {}}), "ultralytics": version("ultralytics")}
    measure_rows("yolo", data, NAMES, measured, markdown, chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
