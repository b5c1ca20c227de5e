"""What is particular to torchvision."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from allocator.adapters import Adapter, Kept, register
from allocator.adapters.library import library
from allocator.adapters.stand_ins import stand_ins
from allocator.errors import UnknownNameError, unknown


def build(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """The model of this name, with random weights unless `weights` asks for others."""
    models = library("torchvision.models")
    if name not in models.list_models():
        raise UnknownNameError(unknown("torchvision model", name, models.list_models()))
    kwargs = {"weights": None, **kwargs}
    # A detector fetches its backbone's weights by default, even where its own are not asked for.
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    if "weights_backbone" in parameters:
        kwargs.setdefault("weights_backbone", None)
    if name.endswith(("googlenet", "inception_v3")) and kwargs["weights"] is None:
        kwargs.setdefault("init_weights", True)  # says what is done anyway; left out, it warns
    model: nn.Module = models.get_model(name, **kwargs)
    return model


def _suppressed(boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor, threshold: float) -> torch.Tensor:
    """All classes in one call, by boxes that are moved apart class by class, as torchvision does where they are few.

    Many it takes class by class, in a loop over the classes that were found.
    """
    from torchvision.ops.boxes import _batched_nms_coordinate_trick

    kept: torch.Tensor = _batched_nms_coordinate_trick(boxes, scores, classes, threshold)
    return kept


def _keypoints(maps: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best place of each heatmap in its box: (K, N, H, W) and (K, 4) to (K, N, 3) and scores (K, N).

    torchvision resizes each heatmap to its box before.
    """
    scores, places = maps.flatten(2).max(2)
    # Half a cell is added because a keypoint lies in the middle of its cell, as torchvision has it.
    left, top, right, bottom = boxes[:, :, None].unbind(1)
    x = left + (places % maps.shape[3] + 0.5) * (right - left) / maps.shape[3]
    y = top + (places // maps.shape[3] + 0.5) * (bottom - top) / maps.shape[2]
    return torch.stack([x, y, torch.ones_like(x)], 2), scores


def _masks(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int], padding: int = 1) -> torch.Tensor:
    """Masks (K, 1, M, M) as large as the image, (K, 1, H, W), as if their boxes were.

    torchvision resizes each mask to its box, and pastes it there.
    """
    return torch.nn.functional.interpolate(masks, size, mode="bilinear", align_corners=False)


def _image(*shape: int, times: int = 1, source: str) -> Callable[[nn.Module], tuple[tuple[Any, ...], str]]:
    def inputs(_: nn.Module) -> tuple[tuple[Any, ...], str]:
        return tuple(torch.zeros(shape) for _ in range(times)), source

    return inputs


def _scene(_: nn.Module) -> tuple[tuple[Any, ...], str]:
    return ([torch.zeros(3, 320, 320)],), "a detector takes a list of images"


def _children(*names: str) -> Callable[[nn.Module], list[str]]:
    """Those of the names that are layers of a head's own."""

    def outputs(head: nn.Module) -> list[str]:
        return [name for name in names if name in head._modules]

    return outputs


def _list_entries(name: str) -> Callable[[nn.Module], list[str]]:
    """All layers of a head's `ModuleList`: SSD has one per feature map."""

    def outputs(head: nn.Module) -> list[str]:
        layers = head.get_submodule(name)
        return [f"{name}.{child}" for child, _ in layers.named_children()]

    return outputs


def _sizes(layer: nn.Module, kept: Kept) -> Mapping[str, Any]:
    """Of a deformable convolution without groups, whose others stay whole."""
    return {"out_channels": int(kept("weight", 0).sum()), "in_channels": int(kept("weight", 1).sum() * layer.groups)}


_DETECTION, _VIDEO = "torchvision.models.detection", "torchvision.models.video"
stand_ins.add("torchvision.ops.boxes", "_batched_nms_vanilla", _suppressed)
stand_ins.add(f"{_DETECTION}.roi_heads", "heatmaps_to_keypoints", _keypoints)
# The name in `transform` is the one that is called: that module has imported the function from `roi_heads`.
stand_ins.add(f"{_DETECTION}.transform", "paste_masks_in_image", _masks)
register("torchvision.ops.deform_conv.DeformConv2d", Adapter(sizes=_sizes))
register("torchvision.ops.misc.FrozenBatchNorm2d", Adapter(norm_scale="weight"))
register(
    "torchvision.models.inception.Inception3",
    Adapter(inputs=_image(1, 3, 299, 299, source="the size that Inception v3 is trained at")),
)
register(f"{_VIDEO}.*", Adapter(inputs=_image(1, 3, 16, 112, 112, source="a clip of 16 frames")))
register(
    [f"{_VIDEO}.s3d.S3D", f"{_VIDEO}.mvit.MViT", f"{_VIDEO}.swin_transformer.SwinTransformer3d"],
    Adapter(inputs=_image(1, 3, 16, 224, 224, source="a clip of 16 frames")),
)
register(
    "torchvision.models.optical_flow.raft.RAFT",
    Adapter(inputs=_image(1, 3, 128, 128, times=2, source="two images of 128 pixels")),
)
register(f"{_DETECTION}.*", Adapter(inputs=_scene))
for _path, _layers in {
    "faster_rcnn.FastRCNNPredictor": _children("cls_score", "bbox_pred"),
    "rpn.RPNHead": _children("cls_logits", "bbox_pred"),
    "mask_rcnn.MaskRCNNPredictor": _children("mask_fcn_logits"),
    "keypoint_rcnn.KeypointRCNNPredictor": _children("kps_score_lowres"),
    "retinanet.RetinaNetClassificationHead": _children("cls_logits"),
    "retinanet.RetinaNetRegressionHead": _children("bbox_reg"),
    "fcos.FCOSClassificationHead": _children("cls_logits"),
    "fcos.FCOSRegressionHead": _children("bbox_reg", "bbox_ctrness"),
    "ssd.SSDScoringHead": _list_entries("module_list"),
}.items():
    register(f"{_DETECTION}.{_path}", Adapter(outputs=_layers))
