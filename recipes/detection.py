"""Object detection: an allocated network as the backbone of Faster R-CNN with a feature pyramid, and COCO data.

Sources: Ren et al., "Faster R-CNN", NeurIPS 2015 (arXiv 1506.01497); Lin et al., "Feature Pyramid Networks for
Object Detection", CVPR 2017 (arXiv 1612.03144); both as torchvision implements them. With a ResNet-50 the
parameter names are those of torchvision's `fasterrcnn_resnet50_fpn`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import allocator
from allocator.errors import FileError, InputError, UnsupportedModelError
from allocator.io.rebuild import check_harmless
from allocator.recipes.residual import stage_features

if TYPE_CHECKING:
    from torchvision.models.detection import FasterRCNN

Target = dict[str, Tensor]
_MISSING = "detection needs torchvision and pycocotools: pip install 'neuron-allocator[detection]'"


class Stages(nn.Module):
    """Stem and stages of a recipe's network; takes (N, C, H, W) and gives every stage's features, by number."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.stages, self.stem_pools = list(network.stages), network.stem_pools  # type: ignore[arg-type]
        # As children of its own, so that parameters are called as in torchvision's detectors: backbone.body.layer1...
        for name in ("conv1", "bn1", *self.stages):
            self.add_module(name, network.get_submodule(name))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        # An OrderedDict, as torchvision's feature pyramid is declared to take.
        features = OrderedDict()
        for i, feature in enumerate(stage_features(self, x)):
            features[str(i)] = feature
        return features


class Pyramid(nn.Module):
    """Backbone and feature pyramid; takes (N, C, H, W) and gives features of equal width, finest first."""

    def __init__(self, body: nn.Module, widths: Sequence[int], out_channels: int) -> None:
        from torchvision.ops import FeaturePyramidNetwork
        from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(list(widths), out_channels, LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features: dict[str, Tensor] = self.fpn(self.body(x))
        return features


def faster_rcnn(
    network: nn.Module, num_classes: int, *, out_channels: int = 256, frozen_norms: bool = True, **settings: Any
) -> FasterRCNN:
    """Faster R-CNN with a feature pyramid over all stages of a classification network.

    Args:
        network: a network of the recipes', allocated or not, or one of torchvision's or timm's with the modules
            `layer1`, `layer2` ... of a ResNet. The detector has a copy of its stem and stages.
        num_classes: classes with the background, which is class 0; 91 for COCO.
        out_channels: width of the pyramid.
        frozen_norms: keep the statistics and scales of the network's batch norms as they are, as is usual for
            detectors, whose batches are small.
        settings: passed to torchvision's `FasterRCNN`, such as `min_size=600, max_size=1000`.

    Raises:
        InputError: the network does not take 3 channels, or there is no class beside the background.
        UnsupportedModelError: it has no stages that are known; or torchvision is not installed.
    """
    detection = _torchvision("models.detection")
    ops = _torchvision("ops")
    if num_classes < 2:
        raise InputError(f"expected 2 classes or more, of which one is the background, got {num_classes}")
    body = _body(copy.deepcopy(network))
    widths = _widths(body)
    if frozen_norms:
        _freeze_norms(body)
    names = [str(i) for i in range(len(widths))]
    # As torchvision's own defaults for four stages, for any number. Anchors are no buffers: they need their values
    # even where the network is built without storage.
    anchors = tuple((32 * 2**i,) for i in range(len(widths) + 1))
    with torch.device("cpu"):
        generator = detection.anchor_utils.AnchorGenerator(anchors, ((0.5, 1.0, 2.0),) * len(anchors))
    settings.setdefault("rpn_anchor_generator", generator)
    settings.setdefault("box_roi_pool", ops.MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2))
    detector: FasterRCNN = detection.FasterRCNN(Pyramid(body, widths, out_channels), num_classes, **settings)
    return detector


def check_backbone(name: str, arguments: dict[str, Any]) -> None:
    """See that a name is one that a file may give: a network of a known library, with nothing to fetch.

    Raises:
        UnsafeFileError: it is not.
    """
    check_harmless(name, arguments, "the detector")


def named_faster_rcnn(
    num_classes: int = 91,
    backbone: str = "recipe:scalenet50",
    backbone_arguments: dict[str, Any] | None = None,
    allocation: dict[str, Any] | None = None,
    **options: Any,
) -> FasterRCNN:
    """`faster_rcnn` from plain data alone, so that a saved result can say how to build it: `recipe:faster-rcnn`.

    Args:
        num_classes, options: as for `faster_rcnn`.
        backbone, backbone_arguments: as for `allocator.build`; a recipe, or a network of torchvision's or timm's.
        allocation: of the backbone, as `Allocation.to_dict` gives it.

    Raises:
        UnsafeFileError: the backbone is not of a known library, or an argument would fetch something.
        AllocationMismatchError: the allocation is not one of this backbone.
    """
    arguments = backbone_arguments or {}
    check_backbone(backbone, arguments)
    network = allocator.build(backbone, **arguments)
    if allocation is not None:
        network = allocator.apply(network, allocator.Allocation.from_dict(allocation))
    return faster_rcnn(network, num_classes, **options)


def _body(network: nn.Module) -> nn.Module:
    if hasattr(network, "stem_pools") and hasattr(network, "stages"):
        return Stages(network)
    layers = [f"layer{i}" for i in range(1, 9) if hasattr(network, f"layer{i}")]
    if not layers:
        raise UnsupportedModelError(
            f"{type(network).__name__} has no stages layer1, layer2 ... to build a pyramid on: pass a network of "
            "the recipes', or one with the modules of a ResNet"
        )
    getter: nn.Module = _torchvision("models._utils").IntermediateLayerGetter(
        network, {name: str(i) for i, name in enumerate(layers)}
    )
    return getter


def _widths(body: nn.Module) -> list[int]:
    """Channels of each stage, found by running a small image."""
    # By running it, as an allocated stage's width stands in no attribute that all networks have.
    first = next(module for module in body.modules() if isinstance(module, nn.Conv2d))
    if first.in_channels != 3:
        raise InputError(f"a detector's network takes images of 3 channels, this one takes {first.in_channels}")
    mode = body.training
    with torch.no_grad():
        features = body.eval()(first.weight.new_zeros(1, 3, 64, 64))
    body.train(mode)
    return [int(feature.shape[1]) for feature in features.values()]


def _freeze_norms(body: nn.Module) -> None:
    """Put norms with fixed statistics and scales in place of the batch norms."""
    frozen_norm = _torchvision("ops.misc").FrozenBatchNorm2d
    # Listed first, as the walk would not outlast the changes.
    for owner in list(body.modules()):
        for name, child in list(owner.named_children()):
            # Not subclasses, such as those that hold an activation as well.
            if type(child) is nn.BatchNorm2d:
                frozen = frozen_norm(child.num_features, eps=child.eps).to(child.weight.device)
                state = child.state_dict()
                # All but the number of batches seen, which a frozen norm does not have.
                frozen.load_state_dict({key: state[key] for key in frozen.state_dict()})
                owner._modules[name] = frozen


class CocoBoxes(Dataset[tuple[Tensor, Target]]):
    """Images and boxes in COCO's format, read by torchvision's `CocoDetection`.

    An item is an image, (3, H, W) float from 0 to 1, and a target: `boxes` (n, 4) float as x1, y1, x2, y2 in
    pixels, `labels` (n,) int64 as the file's category ids, `image_id` (1,) int64. Crowds and boxes without area
    are left out; an image without boxes has n = 0.
    """

    def __init__(self, images: str | Path, annotations: str | Path) -> None:
        """Open a data set.

        Args:
            images: the folder of the images.
            annotations: the JSON file.

        Raises:
            FileError: the file or folder is missing, is not COCO's format, or lists no images.
            UnsupportedModelError: torchvision or pycocotools is not installed.
        """
        datasets = _torchvision("datasets")
        for path, kind in ((Path(images), "folder of images"), (Path(annotations), "file of annotations")):
            if not os.path.exists(path):
                raise FileError(f"{path}: no such {kind}")
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
                self.data = datasets.CocoDetection(str(images), str(annotations))
            # Files of boxes alone often lack them, and the evaluation asks for both.
            for annotation in self.data.coco.anns.values():
                annotation.setdefault("iscrowd", 0)
                annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
        except ModuleNotFoundError as error:
            raise UnsupportedModelError(_MISSING) from error
        except (ValueError, KeyError, TypeError, AssertionError, IndexError) as error:
            raise FileError(f"{annotations}: not annotations in COCO's format: {error!r}") from error
        if not len(self.data):
            raise FileError(f"{annotations}: lists no images")

    @property
    def num_classes(self) -> int:
        """Classes that a detector for these labels needs, with the background."""
        return 1 + max((int(i) for i in self.data.coco.getCatIds()), default=0)

    def drop_empty(self) -> None:
        """Leave out the images without a box, in place."""
        annotations_of = self.data.coco.imgToAnns
        with_boxes = []
        for image_id in self.data.ids:
            if any(_is_box(annotation) for annotation in annotations_of.get(image_id, [])):
                with_boxes.append(image_id)
        self.data.ids = with_boxes

    def path(self, index: int) -> Path:
        """The file of an image."""
        return Path(self.data.root) / str(self.data.coco.imgs[self.data.ids[index]]["file_name"])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        to_tensor = _torchvision("transforms.functional").to_tensor
        image_id = self.data.ids[index]
        try:
            image, annotations = self.data[index]
        except OSError as error:  # missing, truncated, or not an image
            raise FileError(f"{self.path(index)}: not a readable image: {error}") from error
        annotations = [annotation for annotation in annotations if _is_box(annotation)]
        # Reshaped because of images without boxes: a tensor of an empty list has a single dim.
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
        return to_tensor(image), {"boxes": boxes, "labels": labels, "image_id": torch.tensor([image_id])}


def _is_box(annotation: dict[str, Any]) -> bool:
    return not annotation["iscrowd"] and min(annotation["bbox"][2:]) > 0


def collate(items: Iterable[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """A batch of images of any sizes, as detectors take it; for a DataLoader's `collate_fn`."""
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)


def train_step(
    detector: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Sequence[Tensor],
    targets: Sequence[Target],
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> dict[str, float]:
    """One step of training in place; returns each loss by its name, and their sum as "loss".

    Args:
        detector: put in train mode, and left there.
        optimizer: over the parameters that are trained.
        images, targets: a batch as `collate` gives it, on the detector's device.
        backward: how the sum is differentiated, such as an accelerator's own.

    Raises:
        InputError: a label is not one of the detector's classes.
    """
    classes = detector.get_submodule("roi_heads.box_predictor.cls_score").out_features
    labels = torch.cat([target["labels"] for target in targets])
    if len(labels) and not 0 < int(labels.min()) <= int(labels.max()) < int(classes):  # type: ignore[arg-type]
        raise InputError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, the detector has classes 1 to "
            f"{int(classes) - 1} beside the background"  # type: ignore[arg-type]
        )
    losses: dict[str, Tensor] = detector.train()(list(images), list(targets))
    total = torch.stack(list(losses.values())).sum()
    optimizer.zero_grad()
    backward(total)
    optimizer.step()
    return {**{name: float(loss.detach()) for name, loss in losses.items()}, "loss": float(total.detach())}


@torch.no_grad()
def predict(detector: nn.Module, images: Sequence[Tensor]) -> list[Target]:
    """Boxes (n, 4), labels (n,) and scores (n,) of every (3, H, W) image, best first; sets eval mode."""
    detections: list[Target] = detector.eval()(list(images))
    return detections


def _torchvision(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"torchvision.{module}")
    except ModuleNotFoundError as error:
        raise UnsupportedModelError(_MISSING) from error
