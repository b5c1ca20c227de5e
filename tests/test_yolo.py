"""Ultralytics: the wrapper, its files, and what is done with an allocated network afterwards."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import allocator
from allocator.cli import main
from allocator.errors import UnsafeFileError, UnsupportedModelError
from allocator.io.files import save_model
from benchmarks.yolo import NAMES, yolo

pytest.importorskip("ultralytics")
pytestmark = pytest.mark.filterwarnings("ignore")
IMAGE = torch.rand(1, 3, 64, 64)
QUICK = ("yolov8n", "yolo26n")
TRAINING: dict[str, Any] = {
    "project": tempfile.mkdtemp(),
    "epochs": 1,
    "imgsz": 64,
    "batch": 2,
    "workers": 0,
    "device": "cpu",
    "plots": False,
    "verbose": False,
    "amp": False,
}


def shapes(network: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


SQUARE = "0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75"
LABELS = {
    "detect": "0.5 0.5 0.5 0.5",
    "segment": SQUARE,
    "pose": "0.5 0.5 0.5 0.5 " + " ".join(f"{0.3 + place / 50} 0.5 2" for place in range(17)),
}
"""By task, what follows the class in a line of labels: a box, a polygon, a box with keypoints."""


def boxes(folder: Path, *, task: str = "detect", images: int = 4, side: int = 64, classes: int = 2) -> Path:
    """A data set of bright squares on grey in the library's layout; the path of its description."""
    drawn = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for number in range(images):
        picture = np.full((side, side, 3), 90, dtype=np.uint8)
        picture[16:48, 16:48, number % classes] = drawn.integers(200, 255)
        Image.fromarray(picture).save(folder / "images" / f"{number}.png")
        (folder / "labels" / f"{number}.txt").write_text(f"{number % classes} {LABELS[task]}\n")
    names = "".join(f"  {i}: kind{i}\n" for i in range(classes))
    description = folder / "data.yaml"
    description.write_text(f"path: {folder}\ntrain: images\nval: images\nkpt_shape: [17, 3]\nnames:\n{names}")
    return description


def predictions(network: Any, image: torch.Tensor = IMAGE) -> torch.Tensor:
    """The first tensor that a network answers with."""
    with torch.no_grad():
        out: Any = copy.deepcopy(network).eval()(image)
    while isinstance(out, (tuple, list)):
        out = out[0]
    return out


@pytest.fixture(scope="module")
def small() -> Any:
    """A `YOLO` around a detector at half of its FLOPs."""
    return allocator.allocate(yolo("yolov8n", mixed=True), "50%", example_inputs=IMAGE).model


def test_a_wrapper_comes_back_as_one_and_trains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given = yolo("yolov8n")
    monkeypatch.setattr(type(given), "train", lambda *_, **__: pytest.fail("a training was started"))
    before = {name: tensor.clone() for name, tensor in given.model.state_dict().items()}
    result = allocator.allocate(given, "50%", example_inputs=IMAGE)
    assert isinstance(result.model, type(given))
    assert result.flops_after <= 0.5 * result.flops_before
    assert result.certificate.ok
    assert result.certificate.relative_error is not None
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.model.state_dict().items())
    assert given.overrides == yolo("yolov8n").overrides
    assert allocator.verify(given, result.model, result.allocation).ok
    assert allocator.trace(given, IMAGE).flops == result.flops_before
    assert "DetectionModel" in repr(result)


def test_stages_take_and_give_a_wrapper(tmp_path: Path) -> None:
    given = yolo("yolov8n")
    point = allocator.sweep(given, ["60%"], example_inputs=IMAGE, evaluate=lambda model: isinstance(model, type(given)))
    assert point.points[0].values["value"] == 1
    result = allocator.allocate(given, "60%", example_inputs=IMAGE, certify=False)
    assert shapes(allocator.apply(given, result.allocation).model) == shapes(result.model.model)
    allocator.save(result, tmp_path / "small.safetensors")
    loaded = allocator.load(tmp_path / "small.safetensors", model=yolo("yolov8n"))
    assert isinstance(loaded, type(given))
    torch.testing.assert_close(predictions(loaded.model), predictions(result.model.model), rtol=0, atol=0)
    step = allocator.iterate(given, "60%", steps=1, example_inputs=IMAGE, train=lambda m: m.model.float())
    assert isinstance(step.model, type(given))


def test_a_wrapper_of_an_exported_file_is_refused(tmp_path: Path) -> None:
    given = yolo("yolov8n")
    given.__dict__["_modules"]["model"] = "yolov8n.onnx"
    with pytest.raises(UnsupportedModelError, match=r"YOLO holds no network but 'yolov8n\.onnx'"):
        allocator.allocate(given, "50%")


def test_without_inputs_the_size_is_the_networks_own() -> None:
    given = yolo("yolov8n")
    given.model.args["imgsz"] = 96
    graph = allocator.trace(given)
    assert graph.notes == ["input 1x3x96x96, from the model's imgsz"]
    assert graph.flow.trace.mode == "meta"


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.sweep) for n in NAMES])
def test_every_generation_is_allocated_and_fused(name: str) -> None:
    given = yolo(name, mixed=True)
    result = allocator.allocate(given, "60%", example_inputs=IMAGE)
    network: Any = result.model.model
    head, was = network.model[-1], given.model.model[-1]
    assert result.certificate.ok
    assert result.flops_after / result.flops_before > 0.59
    assert predictions(network).shape == predictions(given.model).shape
    assert getattr(head, "nc", None) == getattr(was, "nc", None)
    if hasattr(was, "stride"):
        assert torch.equal(head.stride, was.stride)
        assert head.no == was.no
    for path, block in network.named_modules():  # C2f's `c` follows: what is exported splits by it
        if hasattr(block, "forward_split"):
            assert block.cv1.conv.out_channels == 2 * block.c, path
    expected = predictions(network)
    fused = copy.deepcopy(network).fuse(verbose=False)
    torch.testing.assert_close(predictions(fused), expected, rtol=1e-3, atol=1e-3)


def test_attention_gets_narrower_with_what_it_reads() -> None:
    result = allocator.allocate(yolo("yolo11n", mixed=True), "40%", example_inputs=IMAGE, at_least=0)
    network: Any = result.model.model
    attention = network.model[10].m[0].attn
    assert attention.num_heads * attention.head_dim == attention.proj.conv.in_channels < 128
    assert attention.qkv.conv.in_channels == attention.proj.conv.in_channels
    assert (attention.num_heads, attention.key_dim, attention.scale) == (2, 32, 32**-0.5)
    assert not [note for note in result.notes if "stay" in note]


@pytest.mark.parametrize("name", [n if n == "yolov8n" else pytest.param(n, marks=pytest.mark.sweep) for n in NAMES])
def test_export_works_after_a_count_by_fvcore(name: str, tmp_path: Path) -> None:
    from fvcore.nn import FlopCountAnalysis

    network = yolo(name, mixed=True).model
    FlopCountAnalysis(network, IMAGE).unsupported_ops_warnings(False).total()
    network = allocator.allocate(network, "60%", example_inputs=IMAGE, certify=False).model
    suffix = "pt2" if name == "yolov8n" else "onnx"
    assert allocator.export(network, tmp_path / f"a.{suffix}", example_inputs=IMAGE).difference < 1e-4


def test_a_checkpoint_in_half_precision_goes_through_the_shell_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = yolo("yolov8n")
    full, out = tmp_path / "full.pt", tmp_path / "small.pt"
    given.save(full)
    assert next(torch.load(full, weights_only=False)["model"].parameters()).dtype == torch.float16
    words = ["allocate", str(full), "--flops", "60%", "--input-size", "1x3x64x64", "-o", str(out)]
    assert main(words) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "checkpoints of Ultralytics hold the whole model as a pickle, and need --trust" in said
    assert main([*words, "--trust", "--quiet"]) == 0
    again = type(given)(out)
    assert next(again.model.parameters()).dtype == torch.float32
    assert again.model.model[0].conv.out_channels < given.model.model[0].conv.out_channels
    assert again.predict(torch.rand(1, 3, 64, 64), verbose=False)[0].boxes is not None


def test_the_averaged_weights_of_a_checkpoint_are_those_that_count(tmp_path: Path) -> None:
    averaged = yolo("yolov8n").model
    torch.save({"model": nn.Linear(2, 2), "ema": averaged.half()}, tmp_path / "last.pt")
    with pytest.raises(UnsafeFileError, match="need --trust"):
        allocator.load_model(tmp_path / "last.pt")
    loaded = allocator.load_model(tmp_path / "last.pt", trust=True)
    assert type(loaded) is type(averaged)
    assert next(loaded.parameters()).dtype == torch.float32


def test_a_network_is_built_by_its_name() -> None:
    assert shapes(allocator.build("ultralytics:yolo11n-seg")) == shapes(yolo("yolo11n-seg").model)
    with pytest.raises(allocator.errors.UnknownNameError, match=r"did you mean .*yolov8"):
        allocator.build("ultralytics:yolov8x-sge")


def test_what_comes_back_predicts_validates_and_exports(small: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    data = boxes(tmp_path / "data")
    wrapper = copy.copy(small)
    wrapper.model = copy.deepcopy(small.model)
    assert wrapper.predict(str(tmp_path / "data/images/0.png"), imgsz=64, verbose=False)[0].boxes is not None
    wrapper.model.names = {i: f"class {i}" for i in range(80)}
    found = wrapper.val(data=str(data), imgsz=64, workers=0, plots=False, device="cpu", verbose=False)
    assert 0 <= found.box.map <= 1
    wrapper.save(tmp_path / "small.pt")
    picture = str(tmp_path / "data/images/0.png")
    direct = type(small)(tmp_path / "small.pt").predict(picture, imgsz=64, verbose=False, conf=0.0)[0].boxes
    assert len(direct)
    for file in (wrapper.export(format="torchscript", imgsz=64), wrapper.export(format="onnx", imgsz=64)):
        from_file = type(small)(file, task="detect").predict(picture, imgsz=64, verbose=False, conf=0.0)[0].boxes
        torch.testing.assert_close(from_file.conf, direct.conf, rtol=1e-2, atol=1e-3)


def test_training_keeps_the_widths(small: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from allocator.adapters.yolo import YOLO

    monkeypatch.chdir(tmp_path)
    data = boxes(tmp_path / "data")
    small.save(tmp_path / "small.pt")
    again = YOLO(tmp_path / "small.pt")
    before = shapes(again.model)
    again.train(data=str(data), **TRAINING)
    after = shapes(again.model)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"model.22.cv3.{i}.2.{kind}" for i in range(3) for kind in ("weight", "bias")}  # 2 classes
    assert after["model.22.cv3.0.2.weight"][0] == again.model.model[-1].nc == 2
    assert again.model.names == {0: "kind0", 1: "kind1"}
    moved = again.model.state_dict()["model.0.conv.weight"].float()
    assert not torch.equal(moved, small.model.state_dict()["model.0.conv.weight"].float())


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("-cls")])
def test_every_generation_trains_with_its_widths(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    small: Any = allocator.allocate(yolo(name, mixed=True), "50%", example_inputs=IMAGE, certify=False).model
    before = shapes(small.model)
    data = boxes(tmp_path / "data", task=small.task)
    small.train(data=str(data), **TRAINING)
    after = shapes(small.model)
    changed = {each for each in before if before[each] != after[each]}
    assert changed
    assert all(any(part in each for part in (".cv3.", ".one2one_cv3.", ".semseg.")) for each in changed)
    assert small.predict(str(tmp_path / "data/images/0.png"), imgsz=64, verbose=False)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("-cls")])
def test_classifiers_train_with_their_widths(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    boxes(tmp_path / "data")
    for part in ("train", "val"):
        for number in range(4):
            folder = tmp_path / "sorted" / part / f"kind{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.png").write_bytes((tmp_path / f"data/images/{number}.png").read_bytes())
    small: Any = allocator.allocate(yolo(name, mixed=True), "50%", example_inputs=IMAGE, certify=False).model
    before = shapes(small.model)
    small.train(data=str(tmp_path / "sorted"), **TRAINING)
    after = shapes(small.model)
    assert {each.rpartition(".")[0][-6:] for each in before if before[each] != after[each]} == {"linear"}
    assert small.predict(str(tmp_path / "data/images/0.png"), imgsz=64, verbose=False)[0].probs is not None


def test_the_librarys_own_training_is_stopped_with_words(small: Any, tmp_path: Path, monkeypatch: Any) -> None:
    import ultralytics

    from allocator.adapters.yolo import keeping_widths

    monkeypatch.chdir(tmp_path)
    data = str(boxes(tmp_path / "data"))
    small.save(tmp_path / "small.pt")
    own = ultralytics.YOLO(tmp_path / "small.pt")
    with pytest.raises(KeyError, match=r"was allocated, train it as allocator\.adapters\.yolo\.YOLO"):
        own.train(data=data, **TRAINING)
    with pytest.raises(UnsupportedModelError, match=r"pretrained=False builds the network from its YAML file"):
        small.train(data=data, pretrained=False, **TRAINING)
    with pytest.raises(UnsupportedModelError, match=r"tune trains in processes of its own"):
        small.tune(data=data, **TRAINING)
    trainer = keeping_widths(own._smart_load("trainer"))
    own.train(data=data, trainer=trainer, **TRAINING)
    assert own.model.model[0].conv.out_channels == small.model.model[0].conv.out_channels


def test_the_trainer_reaches_other_processes() -> None:
    cloudpickle = pytest.importorskip("cloudpickle")  # as the library sends its trainers to several GPUs
    from ultralytics.models.yolo.detect import DetectionTrainer

    from allocator.adapters.yolo import keeping_widths

    trainer = keeping_widths(DetectionTrainer)
    assert keeping_widths(trainer) is trainer
    again = cloudpickle.loads(cloudpickle.dumps(trainer))
    assert issubclass(again, DetectionTrainer)
    assert again.get_model.__qualname__ == trainer.get_model.__qualname__ != DetectionTrainer.get_model.__qualname__


def test_save_model_writes_what_the_library_reads(small: Any, tmp_path: Path) -> None:
    save_model(small.model, tmp_path / "a.pt")
    save_model(small, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        read = type(small)(tmp_path / name)
        torch.testing.assert_close(predictions(read.model), predictions(small.model), rtol=0, atol=0)
