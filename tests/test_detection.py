"""Faster R-CNN on the recipes' networks, COCO data, and allocation of whole detectors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from fvcore.nn import FlopCountAnalysis
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.ops.misc import FrozenBatchNorm2d

import allocator
from allocator import recipes
from allocator.errors import CertificateError, FileError, InputError, UnsupportedModelError
from allocator.flow.follow import value_dependent as downstream
from allocator.recipes.detection import CocoBoxes, collate, faster_rcnn, predict, train_step
from allocator.recipes.scalenet import ScaleNet
from allocator.tracing.value_sized import value_sized

# Few and small, so that a forward takes milliseconds.
SETTINGS: dict[str, Any] = {
    "min_size": 64,
    "max_size": 64,
    "rpn_pre_nms_top_n_test": 40,
    "rpn_post_nms_top_n_test": 20,
    "rpn_post_nms_top_n_train": 40,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 10,
}


def randomise(model: nn.Module) -> nn.Module:
    """Draw the norms' scales and statistics, in place, and set eval mode."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            nn.init.uniform_(module.weight, 0.2, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return model.eval()


def image(height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(3, height, width)


def small_detector(recipe: str = "resnet-small-seed", **settings: Any) -> nn.Module:
    network = randomise(recipes.build(recipe, image_side=64, in_channels=3))
    return faster_rcnn(network, 5, out_channels=16, **{**SETTINGS, **settings}).eval()


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Four images with one to three filled boxes of two classes, one image without; a crowd and an empty box too."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, 6):
        width, height = 64 + 8 * number, 72
        picture = Image.new("RGB", (width, height), "grey")
        draw = ImageDraw.Draw(picture)
        for _ in range((number - 1) % 4):
            x, y = (int(n) for n in torch.randint(2, 30, (2,), generator=generator))
            w, h = (int(n) for n in torch.randint(12, 30, (2,), generator=generator))
            label = (1, 3)[len(annotations) % 2]
            draw.rectangle((x, y, x + w, y + h), fill=("red", "blue")[label // 3])
            annotations.append({"image_id": number, "bbox": [x, y, w, h], "category_id": label, "iscrowd": 0})
        picture.save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
    annotations.append({"image_id": 2, "bbox": [0, 0, 60, 60], "category_id": 1, "iscrowd": 1})
    annotations.append({"image_id": 2, "bbox": [5, 5, 0, 9], "category_id": 1, "iscrowd": 0})
    for i, annotation in enumerate(annotations):
        annotation |= {"id": i + 1, "area": annotation["bbox"][2] * annotation["bbox"][3]}
    categories = [{"id": 1, "name": "red"}, {"id": 3, "name": "blue"}]
    file = folder / "boxes.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return folder / "images", file


# ------------------------------------------------------------------------------------------ the detector


def test_with_a_resnet_it_is_torchvision_s_detector() -> None:
    settings = {**SETTINGS, "min_size": 96, "max_size": 128}
    theirs = randomise(fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=7, **settings))
    ours = faster_rcnn(recipes.build("resnet50"), 7, frozen_norms=False, **settings)
    assert ours.load_state_dict(theirs.state_dict())
    images = [image(80, 100), image(64, 64)]
    for got, wanted in zip(predict(ours, images), predict(theirs, images), strict=True):
        assert len(wanted["boxes"]) == 10
        for key in ("boxes", "labels", "scores"):
            assert torch.allclose(got[key], wanted[key], rtol=1e-5, atol=1e-4)


ALLOCATED: dict[str, dict[str, Any]] = {
    "scalenet-small-seed": {},
    "resnet-small-seed": {"policy": "global"},
    "se-resnet-small-seed": {"policy": "global"},
    "resnext-small-seed": {},
    "res2net-small-seed": {},
}


@pytest.mark.parametrize("recipe", ALLOCATED)
def test_an_allocated_network_becomes_a_detector_that_trains_and_predicts(recipe: str, coco: tuple[Path, Path]) -> None:
    seed = randomise(recipes.build(recipe, image_side=64, in_channels=3))
    network = allocator.allocate(seed, flops="50%", **ALLOCATED[recipe]).model
    before = {key: value.clone() for key, value in network.state_dict().items()}
    data = CocoBoxes(*coco)
    detector = faster_rcnn(network, data.num_classes, out_channels=16, **SETTINGS)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in detector.modules())

    images, targets = next(iter(DataLoader(data, batch_size=4, collate_fn=collate)))
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.01)
    stem = detector.get_parameter("backbone.body.conv1.weight").detach().clone()
    losses = train_step(detector, optimizer, images, targets)
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg", "loss"}
    assert losses["loss"] == pytest.approx(sum(losses.values()) - losses["loss"], rel=1e-5)
    assert not torch.equal(stem, detector.get_parameter("backbone.body.conv1.weight"))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items()), "a copy is trained"

    found = predict(detector, images)
    assert [sorted(each) for each in found] == [["boxes", "labels", "scores"]] * 4
    for each, picture in zip(found, images, strict=True):
        assert each["boxes"].shape == (len(each["scores"]), 4)
        assert float(each["boxes"].max()) <= max(picture.shape)
        assert set(each["labels"].tolist()) <= {1, 2, 3}


def test_a_step_lowers_the_loss_of_its_batch(coco: tuple[Path, Path]) -> None:
    detector = small_detector(frozen_norms=False)
    images, targets = collate([CocoBoxes(*coco)[i] for i in (1, 2, 3)])
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.005, momentum=0.9)
    losses = [train_step(detector, optimizer, images, targets)["loss"] for _ in range(15)]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet10t"])
def test_other_libraries_resnets_are_backbones(name: str) -> None:
    network = allocator.build(name)
    detector = faster_rcnn(network, 3, **SETTINGS)
    (found,) = predict(detector, [image()])
    assert found["boxes"].shape[1] == 4
    assert isinstance(network.bn1, nn.BatchNorm2d), "the network that was passed in stays as it is"


def test_frozen_norms_give_what_the_batch_norms_gave() -> None:
    network = randomise(recipes.build("resnet-small", image_side=64, in_channels=3))
    plain, frozen = (
        faster_rcnn(network, 3, frozen_norms=frozen, **SETTINGS).eval().get_submodule("backbone.body")
        for frozen in (False, True)
    )
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(plain(x).values(), frozen(x).values(), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- allocation of a detector


def check_heads(small: nn.Module, original: nn.Module) -> None:
    """Classes, boxes and anchors are as they were."""
    for path in ("roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"):
        assert small.get_submodule(path).out_features == original.get_submodule(path).out_features
    for path in ("rpn.head.cls_logits", "rpn.head.bbox_pred"):
        assert small.get_submodule(path).out_channels == original.get_submodule(path).out_channels


@pytest.mark.parametrize(("criterion", "share"), [("bn_scale", "75%"), ("magnitude", "50%")])
def test_a_whole_detector_is_allocated(criterion: str, share: str) -> None:
    model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5, **SETTINGS)
    randomise(model)
    result = allocator.allocate(model, flops=share, example_inputs=([image()],), criterion=criterion)
    assert 0.995 * result.flops_asked <= result.flops_after <= result.flops_asked
    assert result.certificate.ok
    assert result.certificate.outputs == 3
    assert result.certificate.effect is not None
    assert result.certificate.effect > 1e-3
    assert "results whose size depends on values count at their largest (nms, nonzero)" in result.notes
    check_heads(result.model, model)
    counter = FlopCountAnalysis(result.model, ([image()],)).unsupported_ops_warnings(False)
    assert counter.uncalled_modules_warnings(False).tracer_warnings("none").total() <= result.flops_after
    assert len(predict(result.model, [image(80, 50), image()])) == 2
    fpn, was = (len(each.get_parameter("backbone.fpn.layer_blocks.0.0.bias")) for each in (result.model, model))
    assert (fpn < was) == (criterion == "magnitude"), "the pyramid has no batch norm to rank it by"


@pytest.mark.parametrize("frozen", [False, True])
def test_a_detector_s_norms_rank_its_neurons_frozen_or_not(frozen: bool) -> None:
    detector = small_detector("scalenet-small-seed", frozen_norms=frozen)
    ranked = {"criterion": "bn_scale", "scope": "narrowest"}
    result = allocator.allocate(detector, flops="90%", example_inputs=([image()],), **ranked)  # type: ignore[arg-type]
    assert result.certificate.ok
    check_heads(result.model, detector)
    body = "backbone.body.layer3.0"
    scales: list[float] = []
    whole: list[float] = []
    for i in range(4):
        norm = detector.state_dict()[f"{body}.bn2.{i}.weight"].tolist()
        if f"{body}.conv2.{i}" not in result.allocation.absent:
            kept = result.allocation.kept[f"{body}.conv2.{i}.weight"][0]
            assert kept is not None
            scales += [norm[j] for j in np.ravel(kept)]
        whole += norm
    assert 0 < len(scales) < len(whole)
    assert sorted(scales) == sorted(whole)[-len(scales) :], "the best of the block are kept"


def test_heads_can_be_left_alone_altogether() -> None:
    detector = small_detector()
    result = allocator.allocate(
        detector, flops="80%", example_inputs=([image()],), criterion="magnitude", exclude=["rpn.*", "roi_heads.*"]
    )
    for head in ("rpn", "roi_heads"):
        shapes = [[p.shape for p in each.get_submodule(head).parameters()] for each in (result.model, detector)]
        assert shapes[0] == shapes[1]
    assert result.certificate.ok


def test_the_cost_is_that_of_the_most_boxes_there_can_be() -> None:
    """Boxes that overlap are dropped, so that a forward costs less; the settings say how many there can be."""
    flops = {}
    for boxes in (10, 20):
        model = small_detector(rpn_post_nms_top_n_test=boxes, rpn_nms_thresh=0.01)
        flops[boxes] = allocator.trace(model, ([image()],)).flops
        counter = FlopCountAnalysis(model, ([image()],)).unsupported_ops_warnings(False)
        actual = counter.uncalled_modules_warnings(False).tracer_warnings("none").total()
        assert actual < flops[boxes]
    # fc6 16*7*7 -> 1024, fc7 1024 -> 1024, 5 classes and 20 coordinates.
    assert flops[20] - flops[10] == 10 * (16 * 49 * 1024 + 1024 * 1024 + 1024 * 25)


def test_a_detector_that_finds_nothing_is_not_said_to_be_compared() -> None:
    detector = small_detector(box_score_thresh=1.0)
    with pytest.raises(CertificateError, match="was not shown to be the original minus the dropped neurons: NOT SHOWN"):
        allocator.allocate(detector, flops="90%", example_inputs=([image()],))
    result = allocator.allocate(detector, flops="90%", example_inputs=([image()],), certify=False)
    assert len(predict(result.model, [image()])[0]["boxes"]) == 0
    assert result.certificate.structural
    assert result.certificate.effect is None


def test_many_boxes_are_traced_without_values_too() -> None:
    """From 20,000 numbers on torchvision suppresses class by class, in a loop over the classes that it found."""
    network = recipes.build("resnet-small", image_side=64, in_channels=3)
    settings = {**SETTINGS, "rpn_pre_nms_top_n_test": 300, "rpn_post_nms_top_n_test": 300}
    detector = faster_rcnn(network, 91, out_channels=16, **settings)
    graph = allocator.trace(detector, ([image()],))
    assert graph.flow.trace.mode == "meta"
    # 300 boxes, each in each of 90 classes.
    assert max(graph.flow.shape(i)[0] for op in value_sized(graph.flow.trace) for i in op.outputs) == 300 * 90


class Picks(nn.Module):
    """Classifies those pixels that are bright."""

    def __init__(self, pick: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 10)
        self.pick = pick

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.stem(x).flatten(2).transpose(1, 2).flatten(0, 1)
        out: Tensor = self.head(self.pick(pixels, x.mean(1).flatten() > 0))
        return out


@pytest.mark.parametrize(
    "pick",
    [
        lambda pixels, bright: pixels[bright],
        lambda pixels, bright: pixels[bright.nonzero().squeeze(1)],
        lambda pixels, bright: pixels[torch.where(bright)[0]],
        lambda pixels, bright: pixels.masked_select(bright[:, None]).view(-1, pixels.shape[1]),
    ],
    ids=["mask", "nonzero", "where", "masked_select"],
)
def test_pixels_picked_by_value_all_count(pick: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = randomise(Picks(pick))
    x = torch.randn(1, 3, 8, 8)
    graph = allocator.trace(model, x)
    assert graph.flow.trace.mode == "meta"
    # 64 pixels, each through 16 3x3 convolutions of 3 channels, a norm and 10 classes.
    assert graph.flops == 64 * (27 * 16 + 16 * 2 + 16 * 10)
    assert graph.certain_flops(np.ones(graph.size, dtype=bool)) == 64 * 16 * 29
    assert len(value_sized(graph.flow.trace)) == 1
    assert downstream(graph.flow.trace)


def test_pixels_picked_by_value_are_allocated() -> None:
    model = randomise(Picks(lambda pixels, bright: pixels[bright]))
    result = allocator.allocate(model, flops="50%", example_inputs=torch.randn(1, 3, 8, 8))
    assert result.certificate.ok
    assert result.flops_after == 64 * 8 * (27 + 2 + 10)
    assert any("at their largest (index)" in note for note in result.notes)


# -------------------------------------------------------------------------------------------------- data


def test_boxes_are_read_as_corners_without_crowds_and_empty_ones(coco: tuple[Path, Path]) -> None:
    data = CocoBoxes(*coco)
    assert len(data) == 5
    assert data.num_classes == 4
    assert [len(data[i][1]["boxes"]) for i in range(5)] == [0, 1, 2, 3, 0]
    picture, target = data[1]
    assert picture.shape == (3, 72, 80)
    assert target["image_id"].tolist() == [2]
    x1, y1, x2, y2 = (int(n) for n in target["boxes"][0])
    assert target["labels"].tolist() == [1]
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    assert (picture[:, y1:y2, x1:x2] == red).all()
    assert not (picture[:, y2 + 1 :] == red).all(0).any()


def broken(coco: tuple[Path, Path], folder: Path, **change: Any) -> Path:
    content = {**json.loads(coco[1].read_text()), **change}
    path = folder / "boxes.json"
    path.write_text(json.dumps(content))
    return path


def test_data_that_cannot_be_read(coco: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FileError, match="nowhere: no such folder of images"):
        CocoBoxes(tmp_path / "nowhere", coco[1])
    with pytest.raises(FileError, match=r"boxes\.json: no such file of annotations"):
        CocoBoxes(coco[0], tmp_path / "boxes.json")
    with pytest.raises(FileError, match=r"boxes\.json: lists no images"):
        CocoBoxes(coco[0], broken(coco, tmp_path, images=[], annotations=[]))
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(FileError, match=r"list\.json: not annotations in COCO's format"):
        CocoBoxes(coco[0], tmp_path / "list.json")
    (tmp_path / "1.png").write_bytes((coco[0] / "1.png").read_bytes()[:60])
    data = CocoBoxes(tmp_path, coco[1])
    with pytest.raises(FileError, match=r"1\.png: not a readable image"):
        data[0]
    with pytest.raises(FileError, match=r"2\.png: not a readable image"):
        data[1]


def test_bad_input() -> None:
    with torch.device("meta"):
        vgg = torchvision.models.vgg11(weights=None)
    with pytest.raises(UnsupportedModelError, match="VGG has no stages layer1"):
        faster_rcnn(vgg, 3)
    with pytest.raises(InputError, match="images of 3 channels, this one takes 1"):
        faster_rcnn(recipes.build("resnet-small"), 3)
    with pytest.raises(InputError, match="2 classes or more"):
        faster_rcnn(recipes.build("resnet-small", in_channels=3), 1)
    detector = small_detector()
    target = {"boxes": torch.tensor([[1.0, 1.0, 9.0, 9.0]]), "labels": torch.tensor([5])}
    with pytest.raises(InputError, match="labels run from 5 to 5, the detector has classes 1 to 4"):
        train_step(detector, torch.optim.SGD(detector.parameters(), lr=0.1), [image()], [target])


def test_an_allocated_scalenet_s_absent_scales_stay_absent() -> None:
    seed = randomise(recipes.build("scalenet-small-seed", image_side=64, in_channels=3))
    with torch.no_grad():
        for norm in seed.get_submodule("layer2.0.bn2.3"), seed.get_submodule("layer2.0.bn2.1"):
            assert isinstance(norm, nn.BatchNorm2d)
            norm.weight.fill_(1e-3)
    network = allocator.allocate(seed, flops="50%", criterion="bn_scale", scope="narrowest").model
    assert isinstance(network, ScaleNet)
    assert network.rows()[1][3] == 0
    assert predict(faster_rcnn(network, 3, **SETTINGS), [image()])
