"""Exported networks: run from the file, compared with the module, and counted."""

from __future__ import annotations

import copy
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import randomised_norms, untouched
from torch import Tensor, nn

import allocator
from allocator.cli import main
from allocator.errors import ExportError, FileError, MissingPackageError, UnknownNameError
from allocator.io import export as exporting

IMAGE = torch.zeros(1, 1, 32, 32)
NETWORKS = {
    "scalenet": ("recipe:scalenet-small-seed", IMAGE, {}),
    "grouped": ("recipe:resnext-small", IMAGE, {}),
    "res2net": ("recipe:res2net-small", IMAGE, {}),
    "resnet18": ("torchvision:resnet18", torch.zeros(1, 3, 32, 32), {"num_classes": 10}),
}
IN_CI = [("scalenet", "onnx"), ("grouped", "onnx"), ("res2net", "pt2")]
CASES = [
    pytest.param(name, to, marks=[] if (name, to) in IN_CI else pytest.mark.sweep)
    for name in NETWORKS
    for to in ("onnx", "pt2")
]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


class Plain(nn.Module):
    """Two convolutions and a linear layer, quick to export."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        """(n, 1, h, w) to (n, 5)."""
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


SMALL = torch.zeros(1, 1, 8, 8)


def _channels(model: nn.Module) -> dict[str, tuple[int, ...]]:
    kinds = (nn.Conv2d, nn.Linear)
    return {f"{k}.weight": tuple(m.weight.shape) for k, m in model.named_modules() if isinstance(m, kinds)}


def _layer_flops(model: nn.Module, image: Tensor) -> int:
    """From hooks and arithmetic: outputs times the inputs and kernel that each sums over."""
    total, hooks = 0, []

    def count(module: Any, _: Any, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        model(image)
    for hook in hooks:
        hook.remove()
    return total


def _run(file: Path, image: Tensor) -> Tensor:
    if file.suffix == ".pt2":
        return torch.export.load(file).module()(image)
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: image.numpy()})[0])


def _written_channels(file: Path) -> dict[str, tuple[int, ...]]:
    if file.suffix == ".pt2":
        return {name: tuple(value.shape) for name, value in torch.export.load(file).state_dict.items()}
    import onnx

    return {each.name: tuple(each.dims) for each in onnx.load(file).graph.initializer}


@pytest.mark.parametrize(("name", "to"), CASES)
def test_an_allocated_network_is_exported(tmp_path: Path, name: str, to: str) -> None:
    spec, image, kwargs = NETWORKS[name]
    model = randomised_norms(allocator.build(spec, **kwargs))
    result = allocator.allocate(model, "60%", example_inputs=image, certify=False)
    file = tmp_path / f"s.{to}"
    with untouched(result.model):
        made = allocator.export(result, file)
    assert made.batches == (1, 2, 5)
    assert made.difference <= 1e-4
    assert made.notes == ()
    for size in (1, 3):
        given = torch.randn(size, *image.shape[1:])
        torch.testing.assert_close(_run(file, given), result.model(given), atol=1e-4, rtol=1e-4)
    written, expected = _written_channels(file), _channels(result.model)
    assert {key: written[key] for key in expected} == expected
    assert made.layer_flops == _layer_flops(result.model, image)
    assert made.layer_flops < result.flops_after < made.layer_flops * 1.3  # batch norms and pooling are the rest


def test_counting_an_onnx_graph() -> None:
    """2-d and transposed convolutions, Gemm and MatMul, with the arithmetic beside them."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from allocator.io.onnx_flops import layer_flops

    def weight(name: str, *shape: int) -> Any:
        return numpy_helper.from_array(torch.zeros(shape).numpy(), name)

    nodes = [
        helper.make_node("Conv", ["x", "a"], ["y"], strides=[2, 2], group=2),
        helper.make_node("ConvTranspose", ["y", "b"], ["z"]),
        helper.make_node("ReduceMean", ["z", "axes"], ["m"], keepdims=0),
        helper.make_node("Gemm", ["m", "c"], ["g"], transB=1),
        helper.make_node("Transpose", ["d"], ["dt"], perm=[1, 0]),
        helper.make_node("MatMul", ["g", "dt"], ["o"]),
        helper.make_node("Transpose", ["o"], ["ot"], perm=[1, 0]),
        helper.make_node("MatMul", ["ot", "o"], ["q"]),  # of two activations: not a layer
    ]
    axes = numpy_helper.from_array(torch.tensor([2, 3]).numpy(), "axes")
    weights = [weight("a", 6, 2, 3, 3), weight("b", 6, 5, 2, 2), weight("c", 7, 5), weight("d", 3, 7), axes]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 9, 9])
    q = helper.make_tensor_value_info("q", TensorProto.FLOAT, [3, 3])
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [q], weights))
    onnx.checker.check_model(model)
    # y (2,6,4,4) of 2*3*3; every y meets 5*2*2; m (2,5) -> g (2,7) -> o (2,3)
    assert layer_flops(model, [(2, 4, 9, 9)]) == 2 * 96 * 18 + 2 * 96 * 20 + 2 * 7 * 5 + 2 * 3 * 7


def test_a_fixed_batch_is_said(tmp_path: Path) -> None:
    class Fixed(Plain):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x).reshape(1, 5)

    made = allocator.export(Fixed(), tmp_path / "m.pt2", example_inputs=SMALL)
    assert made.batches == (1,)
    assert "batch size is fixed" in made.notes[0]


# ------------------------------------------------------------------------------------------ what is refused


def test_wrong_outputs_are_noticed_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = exporting._WRITERS["pt2"]

    def slightly_wrong(program: Any, path: Path, inputs: Any) -> Any:
        run, facts = original(program, path, inputs)
        return lambda given: [t * (1 + 2e-4) for t in run(given)], facts

    monkeypatch.setitem(exporting._WRITERS, "pt2", slightly_wrong)
    (tmp_path / "m.pt2").write_text("old")
    with pytest.raises(ExportError, match=r"differ from the module's by 0\.0002"):
        allocator.export(Plain(), tmp_path / "m.pt2", example_inputs=SMALL)
    assert [each.name for each in tmp_path.iterdir()] == ["m.pt2"]
    assert (tmp_path / "m.pt2").read_text() == "old"


class Sharp(Plain):
    """So steep that the last bits of float32 show in what it gives, as in a softmax of large numbers."""

    def forward(self, x: Tensor) -> Any:
        answer = torch.sin(1e4 * super().forward(x))
        return (answer, [answer.sum(1), {"means": answer.mean(0)}]), answer[:, :2]


@pytest.mark.parametrize("wrong", [0.0, 0.3])
def test_what_the_module_itself_rounds_away_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    original = exporting._WRITERS["pt2"]

    def in_another_order(program: Any, path: Path, inputs: Any) -> Any:
        _, facts = original(program, path, inputs)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.b.weight.mul_(1 + 2e-7).add_(wrong * other.b.weight.abs().mean())
        return lambda given: exporting._tensors(other(*given.args)), facts

    torch.manual_seed(0)
    model = Sharp()
    monkeypatch.setitem(exporting._WRITERS, "pt2", in_another_order)
    with pytest.raises(ExportError, match="module itself rounds to") if wrong else nullcontext():
        made = allocator.export(model, tmp_path / "m.pt2", example_inputs=SMALL)
        assert made.difference > 1e-4
        assert "the module itself rounds to" in made.notes[-1]


def test_a_small_output_beside_a_large_one_is_compared_by_its_own_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Two(Plain):
        def forward(self, x: Tensor) -> Any:
            small = super().forward(x)
            return small, small * 1e6

    original = exporting._WRITERS["pt2"]

    def wrong(program: Any, path: Path, inputs: Any) -> Any:
        run, facts = original(program, path, inputs)
        return lambda given: [run(given)[0] * 1.5, run(given)[1]], facts

    monkeypatch.setitem(exporting._WRITERS, "pt2", wrong)
    with pytest.raises(ExportError, match=r"was not written: its outputs differ from the module's by 0\.5"):
        allocator.export(Two(), tmp_path / "m.pt2", example_inputs=SMALL)


@pytest.mark.parametrize("wrong", ["more FLOPs", "other channels", "nan"])
def test_a_wrong_graph_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    original = exporting._WRITERS["pt2"]

    def other(program: Any, path: Path, inputs: Any) -> Any:
        run, facts = original(program, path, inputs)
        if wrong == "nan":
            return lambda given: [t * float("nan") for t in run(given)], facts
        shapes = facts.shapes | ({"a.weight": (5, 1, 3, 3)} if wrong == "other channels" else {})
        return run, exporting.GraphFacts(shapes, facts.flops + (wrong == "more FLOPs"))

    monkeypatch.setitem(exporting._WRITERS, "pt2", other)
    with pytest.raises(ExportError):
        allocator.export(Plain(), tmp_path / "m.pt2", example_inputs=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_exported_say_why(tmp_path: Path) -> None:
    class Branching(Plain):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) if x.sum() > 0 else -super().forward(x)

    with pytest.raises(ExportError, match=r"torch\.export cannot follow Branching: .*data-dependent"):
        allocator.export(Branching(), tmp_path / "m.onnx", example_inputs=SMALL)
    with pytest.raises(ExportError, match=r"float16.*model\.float\(\)"):
        allocator.export(Plain().half(), tmp_path / "m.onnx", example_inputs=SMALL.half())
    broken = Plain()
    nn.init.constant_(broken.head.bias, float("nan"))
    with pytest.raises(ExportError, match="not finite"):
        allocator.export(broken, tmp_path / "m.pt2", example_inputs=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=r"needs onnxruntime.*neuron-allocator\[export\]"):
        allocator.export(Plain(), tmp_path / "m.onnx", example_inputs=SMALL)


@pytest.mark.parametrize(
    ("name", "to", "said"),
    [
        ("m.onx", None, "'onx' to export to; did you mean onnx"),
        ("m.onnx", "ONX", "did you mean onnx"),
        ("m.onnx", "tflite", "there are onnx and pt2"),
        ("m.pt2", "onnx", "does not end in .onnx"),
        ("m", None, "no format ''"),
    ],
)
def test_unknown_formats(tmp_path: Path, name: str, to: str | None, said: str) -> None:
    with pytest.raises(UnknownNameError, match=said):
        allocator.export(Plain(), tmp_path / name, to=to)


def test_places_that_cannot_be_written_are_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no folder"):
        allocator.export(Plain(), tmp_path / "nowhere" / "m.onnx", example_inputs=SMALL)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    allocator.save_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), "ein Netz ü.pt")
    command = ["export", "ein Netz ü.pt", "--to", "pt2", "-o", "aus gabe ü.pt2", "--input-size", "1x3x8x8"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "outputs    within 0.0e+00 of the module's largest, at batches of 1, 2, 5" in said
    assert f"layers     {36 * 4 * 27:,} FLOPs" in said  # 6x6 positions
    assert main(command) == 1
    assert "exists; use --force" in capsys.readouterr().err
    assert main([*command, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layer_flops"] == 36 * 4 * 27
    assert main(["export", "ein Netz ü.pt", "--to", "onxx", "-o", "a.onnx"]) == 2
    assert "did you mean onnx" in capsys.readouterr().err
    assert main(["export", "ein Netz ü.pt"]) == 2
    assert "-o FILE" in capsys.readouterr().err


class Remembers(nn.Module):
    """Keeps what it computed, as detectors keep their anchors: by the image's size, and deep within containers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.shape: torch.Size | None = None
        self.kept: dict[str, list[torch.Tensor]] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        if self.shape != x.shape[1:]:
            self.shape, self.kept = x.shape[1:], {"seen": [x, x.new_ones(1)]}
        return x * self.kept["seen"][1]


def test_a_network_that_keeps_what_it_computed_is_exported_and_allocated(tmp_path: Path) -> None:
    from fvcore.nn import FlopCountAnalysis

    model, image = Remembers(), torch.rand(1, 3, 4, 4)
    for count in (lambda: None, lambda: model(image), lambda: FlopCountAnalysis(model, image).total()):
        count()  # leaves results that have a history, then sizes that are tensors
        before = model.shape
        exported = allocator.export(model, tmp_path / "remembers.pt2", example_inputs=image)
        assert exported.difference <= 1e-6
        assert model.shape is before
        with pytest.raises(allocator.NothingToAllocateError):
            allocator.allocate(model, "50%", example_inputs=image)
