"""What is particular to torchvision while its models are traced."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from unittest import mock


@contextlib.contextmanager
def one_suppression() -> Iterator[None]:
    """Let torchvision suppress boxes of all classes in one call.

    Many boxes it takes class by class, in a loop over the classes that it found, which needs values; few it takes
    in one call with the same result.
    """
    boxes = sys.modules.get("torchvision.ops.boxes")
    by_class, at_once = "_batched_nms_vanilla", "_batched_nms_coordinate_trick"
    if boxes is None or not (hasattr(boxes, by_class) and hasattr(boxes, at_once)):
        yield
        return
    with mock.patch.object(boxes, by_class, getattr(boxes, at_once)):
        yield
