"""One network, one tool, in this process: what `benchmarks.coverage` runs in a process of its own for each."""

from __future__ import annotations

import copy
import resource
import time
import warnings
from collections import Counter
from typing import Any

import torch
from torch import nn

import allocator
from allocator.tracing.inputs import as_inputs
from allocator.tracing.outputs import tensors_in

from . import peer

SHARE = 60
LEAST = 2  # FLOPs, which no network comes down to
DETECTION = "torchvision.models.detection"
SIDE, OBJECTS = 320, 10
Row = dict[str, Any]


def built(name: str) -> nn.Module:
    """The network with random weights."""
    torch.manual_seed(0)
    model = randomised(allocator.build(name))
    if type(model).__module__.startswith(DETECTION):
        _scale_down(model)
    return model.eval()


def randomised(model: nn.Module) -> nn.Module:
    """The network with batch norms that rank something and are not at their start, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.1, generator=generator)
    return model.eval()


def _scale_down(detector: Any) -> None:
    """Images that may have any size at `SIDE` pixels instead of 800, and at most `OBJECTS` objects instead of 100."""
    if detector.transform.fixed_size is None:
        detector.transform.min_size = (SIDE,)
    if hasattr(detector, "roi_heads"):
        detector.roi_heads.detections_per_img = OBJECTS


def example(model: nn.Module) -> Any:
    """Example inputs as the model takes them: an image, a clip, two frames; for a detector, a list of one image."""
    return as_inputs(None, model).map(torch.rand_like).args


def _batch(inputs: Any) -> list[Any]:
    """Two of the example; for a detector, with an object in each image."""
    if not isinstance(inputs[0], list):
        samples = next(len(x) for x in inputs if isinstance(x, torch.Tensor))
        return [_two(x, samples) for x in inputs]
    (image,) = inputs[0]
    corners = torch.tensor([[40.0, 60.0, 200.0, 240.0]])
    points = torch.tensor([60.0, 80.0, 1.0]).expand(1, 17, 3)
    target = {"boxes": corners, "labels": torch.ones(1, dtype=torch.int64), "keypoints": points}
    target["masks"] = torch.ones(1, *image.shape[-2:], dtype=torch.uint8)
    return [[image, image.flip(-1)], [target, target]]


def _two(x: Any, samples: int) -> Any:
    """It and another like it; whole numbers twice where they are of each sample, else (a graph's edges) as they are."""
    if not isinstance(x, torch.Tensor):
        return x
    if x.is_floating_point():
        return torch.cat([x, x + 0.1 * torch.randn_like(x)])
    return torch.cat([x, x]) if len(x) == samples else x


def trains(model: nn.Module, inputs: Any) -> bool:
    """One step in train mode on a batch of two; raises what the model raises."""
    model = copy.deepcopy(model).train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-4)
    batch = _batch(inputs)
    loss = sum(t.float().square().mean() for t in tensors_in(model(*batch)) if t.is_floating_point())
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    optimiser.step()
    return True


def ours(model: nn.Module, inputs: Any, row: Row) -> allocator.Result:
    """Trace, allocate to 60 %, certify, train a step; fills the row as far as it gets, and gives the result back."""
    graph = allocator.trace(model, inputs)
    row |= {"traced": graph.flow.trace.mode, "operators": len(graph.flow.trace.ops), "share": graph.share()}
    row |= {"unsupported": sorted(graph.unsupported), "blocks": dict(Counter(b.kind for b in graph.blocks))}
    start = time.process_time()
    try:
        result = allocator.allocate(model, f"{SHARE}%", example_inputs=inputs)
    except allocator.BudgetError as error:
        row["floor"] = row["smallest"] = (error.reachable or 0) / graph.flops
        if not error.reachable or error.reachable >= graph.flops:
            raise
        start = time.process_time()
        result = allocator.allocate(model, float(error.reachable), example_inputs=inputs)
    row["seconds"] = time.process_time() - start
    row |= {"achieved": result.flops_after / graph.flops, "asked": result.flops_asked / graph.flops}
    row |= {"scope": result.allocation.scope, "error": result.certificate.relative_error}
    row |= {"criterion": result.allocation.criterion, "drawn": result.certificate.drawn}
    row |= {"exact": result.certificate.exact, "frozen": [note for note in result.notes if " stay" in note]}
    row["share"] = result.graph.share()
    row["reasons"] = result.graph.reasons()[:6]
    row["train_step"] = _trains_like(model, result.model, inputs, row)
    if "floor" not in row:
        row["floor"] = floor(graph)
    return result


def floor(graph: allocator.ChannelGraph) -> float:
    """The lowest share of the FLOPs that a plan was seen to reach, as the error of a budget below it says."""
    try:
        allocator.plan(graph, flops=LEAST)
    except allocator.BudgetError as error:
        return (error.reachable or graph.flops) / graph.flops
    return LEAST / graph.flops


def _trains_like(model: nn.Module, small: nn.Module, inputs: Any, row: Row) -> bool:
    """Whether the result trains a step, or fails to as the original does."""
    try:
        return trains(small, inputs)
    except Exception as error:  # whatever it raises is a result here
        row["train_error"] = peer.reason(error)
    try:
        trains(model, inputs)
    except Exception as error:
        row["original_train_error"] = peer.reason(error)
        return True
    return False


def other(model: nn.Module, inputs: Any, row: Row) -> None:
    """Torch-Pruning at a fixed ratio: a forward and a train step of what it leaves."""
    classes = next((m.out_features for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), 0)
    start = time.process_time()
    image: Any = inputs[0] if len(inputs) == 1 else tuple(inputs)
    small = peer.prune_once(model, image, classes=classes)
    row["seconds"] = time.process_time() - start
    with torch.no_grad():
        small.eval()(*inputs)
    row["forward"] = True
    row["train_step"] = trains(small, inputs)


def row(name: str, tool: str) -> Row:
    """What one tool does with one network; what failed is in it, as far as it got."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: Row = {}
    try:
        model = built(name)
        inputs = example(model)
        weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        base = _peak()
        (ours if tool == "ours" else other)(model, inputs, found)
        found |= {"memory": _peak() - base, "weights": weights}
    except Exception as error:  # whatever a tool raises is a result here
        found["failed"] = peer.reason(error)
    return found


def _peak() -> int:
    """Largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
