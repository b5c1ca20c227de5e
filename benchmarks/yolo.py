"""Ultralytics' networks, as its YAML files give them."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from torch import nn

# Before the library is imported: its settings go where nobody's are, and it installs nothing.
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
os.environ.setdefault("YOLO_AUTOINSTALL", "false")

NAMES = (
    "yolov5n", "yolov8n", "yolov8n-seg", "yolov8n-pose", "yolov8n-cls", "yolov9t", "yolov9c-seg", "yolov10n",
    "yolo11n", "yolo11n-seg", "yolo11n-pose", "yolo11n-cls", "yolo12n", "yolo12n-seg", "yolo12n-pose", "yolo12n-cls",
    "yolo26n", "yolo26n-seg", "yolo26n-pose", "yolo26n-cls",
)  # fmt: skip
"""Every generation and task that is built from a YAML file, in its smallest size; version 9 is without pose and
classes, 9 and 10 segment in other sizes or not at all, and 5 detects only."""


def yolo(name: str, *, mixed: bool = False) -> Any:
    """The wrapper with random weights.

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
