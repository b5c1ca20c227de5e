"""The task of detection: boxes in COCO's format, the detector's losses, and average precision.

Source of the figures: Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014 (arXiv 1405.0312), computed by
its authors' pycocotools.
"""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import allocator
from allocator.errors import ConfigurationError, DataError, FileError, UnsafeFileError
from allocator.io.models import BUILD_ATTRIBUTE
from allocator.io.results import RESULT_SUFFIX, load_result_allocation
from allocator.recipes.data import Batch, DataSets, Samples, TestBatches, what_of_corrupt, without_gaps
from allocator.recipes.detection import CocoBoxes, Target, check_backbone, faster_rcnn
from allocator.recipes.engine import Engine
from allocator.recipes.sections import Config, Data, Detector, Training
from allocator.recipes.tasks import Met, build_network

FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
"""In the order of pycocotools."""


@dataclass
class BoxSamples(Samples):
    """Images with boxes; `flip` mirrors half of them, boxes too."""

    flip: bool = False

    def read(self, index: int, seed: int) -> tuple[Tensor, Target]:
        image, target = self.source[index]
        if self.flip:
            generator = torch.Generator().manual_seed(seed)
            if float(torch.rand(1, generator=generator)) < 0.5:
                return mirrored(image, target)
        return image, target

    def collate(self, samples: Sequence[tuple[Tensor | None, Any, tuple[str, ...]]]) -> Batch:
        # Lists: images are of any sizes here, and the detector pads them itself.
        return Batch(*without_gaps(samples))

    def name(self, index: int) -> str:
        assert isinstance(self.source, CocoBoxes)
        return str(self.source.path(index))


def mirrored(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """An image (3, H, W) and its boxes, left to right."""
    boxes = target["boxes"].clone()
    # The left edge becomes the right one, so the two change places.
    boxes[:, [0, 2]] = image.shape[2] - boxes[:, [2, 0]]
    return image.flip(2), {**target, "boxes": boxes}


class Detection:
    """Boxes and their classes; the network is Faster R-CNN on the configuration's network."""

    rated = False
    test_batch = 2
    protected: tuple[str, ...] = ("rpn.*", "roi_heads.*")

    def open(self, config: Config) -> DataSets:
        """The images and boxes; those without boxes are left out of the training.

        Raises:
            DataError: files or folders are missing or empty, or the classes do not fit the detector.
        """
        data, detector = config.data, config.detector
        assert detector is not None
        train, test = _coco(data, data.train), _coco(data, data.test)
        # Only here: in the test, what is found in an image without boxes is wrong, and has to count.
        train.drop_empty()
        if train.num_classes != test.num_classes:
            raise DataError(
                f"{data.train} has category ids to {train.num_classes - 1}, {data.test} to {test.num_classes - 1}"
            )
        if train.num_classes != detector.num_classes:
            raise DataError(
                f"the detector has {detector.num_classes} classes with the background, the data {train.num_classes}: "
                f"set detector.num_classes={train.num_classes}"
            )
        in_training, in_test = what_of_corrupt(data)
        return DataSets(
            BoxSamples(train, None, config.random_seed, in_training, flip=data.augment == "flip"),
            BoxSamples(test, None, config.random_seed, in_test),
            train.num_classes,
        )

    def build(self, config: Config) -> nn.Module:
        """The detector, on the network with its allocation and weights.

        Raises:
            ConfigurationError: settings that torchvision's detector does not have, or more stages than there are.
            AllocationMismatchError, FileError, UnknownNameError: as for `tasks.build_network`.
            InputError, UnsupportedModelError: as for `detection.faster_rcnn`.
        """
        options = config.detector
        assert options is not None
        _check_settings(options)
        allocation = _allocation_of_backbone(config)
        backbone = build_network(config, allocation)
        pretrained = config.network.weights is not None
        frozen_norms = options.frozen_norms
        if frozen_norms is None:
            # Fresh norms have no statistics yet that would be worth keeping.
            frozen_norms = pretrained
        shape = {"min_size": options.min_size, "max_size": options.max_size, **options.settings}
        shape |= {"out_channels": options.out_channels, "frozen_norms": frozen_norms}
        detector = faster_rcnn(backbone, options.num_classes, **shape)
        _train_stages(detector, options.trained_stages, pretrained=pretrained)
        _record_build(detector, config, allocation, shape)
        if frozen_norms and any(training.l1 for training in config.trainings().values()):
            raise ConfigurationError("l1 needs batch norms that are trained: set detector.frozen_norms=false")
        return detector

    def example(self, network: nn.Module, data: DataSets) -> tuple[list[Tensor]]:
        """One image of the detector's size, 3 high and 4 wide where `max_size` lets it."""
        transform: Any = network.get_submodule("transform")
        height = int(transform.min_size[0])
        return ([torch.zeros(3, height, min(int(transform.max_size), height * 4 // 3))],)

    def loss(self, model: nn.Module, batch: Batch, device: torch.device, options: Training) -> Met:
        images = [image.to(device, non_blocking=True) for image in batch.images]
        targets = []
        for target in batch.labels:
            targets.append({key: values.to(device, non_blocking=True) for key, values in target.items()})
        losses: dict[str, Tensor] = model(images, targets)
        return Met(torch.stack(list(losses.values())).sum(), len(images))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: TestBatches, engine: Engine, corrupt: set[str]) -> dict[str, float]:
        was_training = model.training
        model.eval()
        rows: list[dict[str, Any]] = []
        seen: list[int] = []
        try:
            for batch in batches:
                corrupt.update(batch.corrupt)
                if not batch.images:
                    continue
                detections = model([image.to(engine.device) for image in batch.images])
                for target, detection in zip(batch.labels, detections, strict=True):
                    image_id = int(target["image_id"])
                    rows += _rows(image_id, detection)
                    seen.append(image_id)
        finally:
            model.train(was_training)
        if engine.num_processes > 1:
            from accelerate.utils import gather_object

            # Average precision is no mean over images: it needs what all processes found.
            rows, seen = gather_object(rows), gather_object(seen)
        assert isinstance(batches.samples.source, CocoBoxes)
        return average_precision(batches.samples.source, rows, seen)

    def flops(self, network: nn.Module, example: Any) -> int:
        """For the most boxes there can be."""
        return allocator.trace(network, example).flops


def average_precision(data: CocoBoxes, rows: list[dict[str, Any]], seen: list[int]) -> dict[str, float]:
    """COCO's average precision of boxes.

    Args:
        data: with the true boxes.
        rows: what was found, in COCO's format for results: `image_id`, `category_id`, `bbox` (x, y, width and
            height in pixels) and `score`.
        seen: ids of the images that were looked at.

    Returns:
        `AP` (mean over overlaps of 0.5 to 0.95), `AP50`, `AP75`, and AP of small, medium and large boxes, from 0
        to 1; those that the seen images have no boxes for are left out.
    """
    from pycocotools.cocoeval import COCOeval

    truth = data.data.coco
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        if rows:
            results = truth.loadRes(rows)
        else:
            # `loadRes` looks at the first of them, and fails where a young detector has found nothing.
            results = type(truth)()
            results.dataset = {**truth.dataset, "annotations": []}
            results.createIndex()
        evaluation = COCOeval(truth, results, "bbox")
        evaluation.params.imgIds = sorted(seen)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = {}
    for name, figure in zip(FIGURES, evaluation.stats[: len(FIGURES)], strict=True):
        # pycocotools gives -1 where there are no boxes of a size.
        if figure >= 0:
            figures[name] = float(figure)
    return figures


def _rows(image_id: int, detection: Target) -> list[dict[str, Any]]:
    """What a detector found in one image, in COCO's format."""
    corners = detection["boxes"].float().cpu()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
    classes, scores = detection["labels"].tolist(), detection["scores"].tolist()
    rows = []
    for box, category_id, score in zip(boxes, classes, scores, strict=True):
        rows.append({"image_id": image_id, "category_id": category_id, "bbox": box, "score": score})
    return rows


def _coco(data: Data, part: str) -> CocoBoxes:
    """One of the two data sets, with categories that a detector can have."""
    pattern = data.annotations or "annotations/instances_{part}.json"
    if data.root is None:
        raise DataError(f"data.root is missing: the folder that holds {part}/IMAGE and {pattern}")
    # Not str.format, to which other braces in a path would be fields.
    file = Path(data.root) / pattern.replace("{part}", part)
    folder = Path(data.root) / part
    try:
        boxes = CocoBoxes(folder, file)
    except FileError as error:
        raise DataError(f"{error}; expected {part}/IMAGE and {pattern} in {data.root}") from error
    if not any(folder.iterdir()):
        raise DataError(f"{folder} is empty; {file} lists {len(boxes)} images")
    _check_categories(boxes, file)
    return boxes


def _check_categories(boxes: CocoBoxes, file: Path) -> None:
    listed = set(boxes.data.coco.getCatIds())
    used = {annotation["category_id"] for annotation in boxes.data.coco.anns.values()}
    if not used:
        raise DataError(f"{file} has no boxes")
    if used - listed:
        raise DataError(f"{file}: boxes of category {min(used - listed)}, which is not in its list of categories")
    if min(listed) < 1:
        raise DataError(f"{file}: category id {min(listed)}; ids start at 1, as 0 stands for the background")


def _allocation_of_backbone(config: Config) -> allocator.Allocation | None:
    """What the backbone was allocated to before: from the file named, or from the weights' own."""
    named, weights = config.network.allocation, config.network.weights
    if named is not None:
        if named.endswith(RESULT_SUFFIX):
            return load_result_allocation(named)
        return allocator.Allocation.load(named)
    if weights is not None and weights.endswith(RESULT_SUFFIX):
        return load_result_allocation(weights)
    return None


def _record_build(
    detector: nn.Module, config: Config, allocation: allocator.Allocation | None, shape: dict[str, Any]
) -> None:
    """Note on a detector how to build its like, so that a file of it needs no more than itself."""
    assert config.detector is not None
    arguments = {
        "num_classes": config.detector.num_classes,
        "backbone": config.network.name,
        "backbone_arguments": config.network.arguments,
        "allocation": allocation and allocation.to_dict(),
        **shape,
    }
    with contextlib.suppress(UnsafeFileError):  # a network of the caller's own is not for a file to name
        check_backbone(config.network.name, config.network.arguments)
        setattr(detector, BUILD_ATTRIBUTE, {"name": "recipe:faster-rcnn", "kwargs": arguments})


def _check_settings(options: Detector) -> None:
    """torchvision's constructors pass over what they do not know."""
    from torchvision.models.detection import FasterRCNN

    parameters = set(inspect.signature(FasterRCNN).parameters) - {"backbone", "num_classes", "kwargs"}
    # What has a key of its own in the section would otherwise be given twice.
    unknown = sorted(options.settings.keys() - (parameters - asdict(options).keys()))
    if unknown:
        raise ConfigurationError(f"detector.settings: unknown to torchvision's FasterRCNN, or not for here: {unknown}")


def _train_stages(detector: nn.Module, count: int | None, *, pretrained: bool) -> None:
    """Leave stem and first stages of the backbone as they are, but for the last `count`."""
    body = detector.get_submodule("backbone.body")
    # The stem's convolution and norm are children, too, and are trained only with all of the stages.
    stages = [name for name, _ in body.named_children() if name.startswith("layer")]
    if count is None:
        count = len(stages) - 1 if pretrained else len(stages)
    if count > len(stages):
        raise ConfigurationError(f"detector.trained_stages: the network has {len(stages)} stages, got {count}")
    if count < len(stages):
        trained = stages[len(stages) - count :]
        for name, child in body.named_children():
            child.requires_grad_(name in trained)
