"""What comes back is a model like any other: it trains, saves, copies, compiles, exports and is allocated again.

The ordinary run takes six networks at small images; `-m sweep` takes the rest of the reference set.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_set import REFERENCE_SET, SIDES
from subjects import randomised_norms, trained, untouched
from torch import Tensor, nn

import allocator
from allocator import Allocation, AllocationMismatchError, Result
from allocator.tracing.outputs import tensors_in

IMAGES = {"recipe:scalenet-small-seed": (1, 1, 32, 32)}
FAST = [
    "recipe:scalenet-small-seed",
    "torchvision:mobilenet_v3_small",
    "torchvision:shufflenet_v2_x1_0",
    "torchvision:googlenet",
    "a short res2net",
    "a short skresnet",
]
NAMES = [*FAST, *(pytest.param(name, marks=pytest.mark.sweep) for name in REFERENCE_SET if name not in FAST)]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def build(name: str) -> nn.Module:
    """A fresh build; the short ones have one block per stage."""
    if not name.startswith("a short"):
        return allocator.build(name)
    from timm.models.res2net import Bottle2neck
    from timm.models.resnet import ResNet
    from timm.models.sknet import SelectiveKernelBasic

    layers: Any = (1, 1, 1, 1)
    block: Any = Bottle2neck if name == "a short res2net" else SelectiveKernelBasic
    if name == "a short res2net":
        return ResNet(block, layers, num_classes=10, base_width=26, block_args={"scale": 4})
    sizes = {"rd_ratio": 1 / 8, "rd_divisor": 16}
    return ResNet(block, layers, num_classes=10, block_args={"sk_kwargs": sizes}, zero_init_last=False)


@pytest.fixture(scope="module")
def image(name: str) -> Tensor:
    """One image of noise; of the network's own size where it needs that."""
    side = SIDES.get(name, 64)
    return torch.randn(IMAGES.get(name, (1, 3, side, side)), generator=torch.Generator().manual_seed(0))


def make(name: str) -> nn.Module:
    """A network as after training, the same every time."""
    torch.manual_seed(0)
    return randomised_norms(build(name))


@pytest.fixture(scope="module")
def model(name: str) -> nn.Module:
    return make(name)


@pytest.fixture(scope="module")
def result(model: nn.Module, image: Tensor) -> Result:
    with untouched(model):
        return allocator.allocate(model, "60%", example_inputs=image)


@pytest.fixture
def small(result: Result) -> Any:
    return copy.deepcopy(result.model)


def run(model: nn.Module, image: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tensors_in(model(image))


def assert_same(got: list[Tensor], expected: list[Tensor], tolerance: float = 0.0) -> None:
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def runs(model: nn.Module, image: Tensor) -> bool:
    """Whether the network takes such an image at all."""
    try:
        run(model, image)
    except (RuntimeError, ValueError, AssertionError):
        return False
    return True


# ------------------------------------------------------------------------------------ names and modules


def test_classes_and_names_are_the_originals(model: nn.Module, result: Result) -> None:
    small, gone = result.model, tuple(result.allocation.absent)
    expected = {path: type(m) for path, m in model.named_modules() if path not in gone}
    assert {path: type(m) for path, m in small.named_modules()} == expected
    names = [key for key in model.state_dict() if key.rpartition(".")[0] not in gone]
    assert list(small.state_dict()) == names
    assert [n for n, _ in small.named_parameters()] == [n for n, _ in model.named_parameters() if n in names]
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert small.training == model.training


def test_layers_say_what_they_are(result: Result) -> None:
    for path, module in result.model.named_modules():
        said, true = _sizes(module)
        assert said == true, path


def _sizes(module: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a layer says of its sizes, and what its tensors are."""
    if isinstance(module, nn.Conv2d):
        out, read = module.weight.shape[:2]
        return (module.out_channels, module.in_channels // module.groups), (out, read)
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features), tuple(module.weight.shape)
    if isinstance(module, nn.BatchNorm2d):
        return (module.num_features,), tuple(module.weight.shape)
    return (), ()


def test_every_tensor_is_its_own(model: nn.Module, result: Result) -> None:
    theirs = {t.data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}
    assert theirs.isdisjoint(t.data_ptr() for t in (*result.model.parameters(), *result.model.buffers()) if t.numel())


# --------------------------------------------------------------------------------------------- training


def test_hooks_on_it_are_not_the_originals(model: nn.Module, result: Result) -> None:
    modules = list(result.model.modules())
    handles = [module.register_forward_hook(lambda *_: None) for module in modules]
    handles += [module.register_full_backward_hook(lambda *_: None) for module in modules]
    found = [module for module in model.modules() if module._forward_hooks or module._backward_hooks]
    for handle in handles:
        handle.remove()
    assert found == []


def test_it_trains_a_step_with_all_its_heads(model: nn.Module, small: Any, image: Tensor) -> None:
    small.train()
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    optimiser = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9)
    outputs = tensors_in(small(torch.cat([image, image.flip(-1)])))
    assert len(outputs) == len(run(copy.deepcopy(model).train(), torch.cat([image, image])))
    loss = torch.stack([nn.functional.cross_entropy(t, torch.tensor([1, 2])) for t in outputs]).sum()
    loss.backward()
    optimiser.step()
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), name
    moved = [n for n, p in small.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) > 0.9 * len(before)


# -------------------------------------------------------------------------------------- copies and files


def test_its_state_dict_fills_a_fresh_build(name: str, result: Result, image: Tensor) -> None:
    stream = io.BytesIO()
    torch.save(result.model.state_dict(), stream)
    stream.seek(0)
    fresh = allocator.apply(build(name), result.allocation).eval()
    fresh.load_state_dict(torch.load(stream, weights_only=True), strict=True)
    assert_same(run(fresh, image), run(result.model, image))


def test_it_deep_copies(result: Result, image: Tensor) -> None:
    expected = run(result.model, image)
    copied = copy.deepcopy(result.model)
    assert_same(run(copied, image), expected)
    for parameter in copied.parameters():
        parameter.data.zero_()
    assert_same(run(result.model, image), expected)


def test_the_allocation_saved_and_applied_gives_the_same_model(
    model: nn.Module, result: Result, image: Tensor, tmp_path: Path
) -> None:
    result.allocation.save(tmp_path / "allocation.json")
    assert Allocation.load(tmp_path / "allocation.json").to_dict() == result.allocation.to_dict()
    with untouched(model):
        again = allocator.apply(model, tmp_path / "allocation.json")
    expected = result.model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    assert_same(run(again, image), run(result.model, image))
    with pytest.raises(AllocationMismatchError):
        allocator.apply(trained(), result.allocation)


# ----------------------------------------------------------------------------------- compile and export


def test_it_compiles(result: Result, small: Any, image: Tensor) -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(small, backend="eager")
    assert_same(run(compiled, image), run(result.model, image), 1e-5)


def test_it_exports(result: Result, small: Any, image: Tensor) -> None:
    exported = torch.export.export(small, (image,), strict=False).module()
    assert_same(run(exported, image), run(result.model, image), 1e-5)


# ------------------------------------------------------------------------------- other inputs and dtypes


def other_images(image: Tensor) -> Iterator[Tensor]:
    side = image.shape[-1]
    for batch, height, width in ((3, side, side), (2, side + 32, side + 32), (1, side + 32, side)):
        yield torch.randn(batch, image.shape[1], height, width)


def test_it_takes_the_batches_and_sizes_that_the_original_took(model: nn.Module, result: Result, image: Tensor) -> None:
    taken = [other for other in other_images(image) if runs(model, other)]
    assert len(taken) >= 2
    for other in taken:
        got, expected = run(result.model, other), run(model, other)
        assert [t.shape for t in got] == [t.shape for t in expected]
        assert all(t.isfinite().all() for t in got)


def test_channels_last_stays_channels_last(model: nn.Module, result: Result, image: Tensor) -> None:
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    made = allocator.rewrite(last, result.allocation)
    for key, parameter in made.named_parameters():
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last), key
    image = image.contiguous(memory_format=torch.channels_last)
    assert_same(run(made, image), run(result.model, image), 1e-4)


def test_bfloat16_stays_bfloat16(model: nn.Module, result: Result, image: Tensor) -> None:
    half, image = copy.deepcopy(model).bfloat16(), image.bfloat16()
    if not runs(half, image):
        pytest.skip("the original does not run in bfloat16")
    made = allocator.allocate(half, "60%", example_inputs=image)
    assert made.certificate.ok
    assert made.flops_after <= made.flops_asked
    tensors = made.model.state_dict()
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.bfloat16}
    assert all(t.dtype == torch.bfloat16 and t.isfinite().all() for t in run(made.model, image))


# -------------------------------------------------------------------------------------------- options


def test_reset_weights_are_fresh_and_of_the_same_sizes(model: nn.Module, result: Result, image: Tensor) -> None:
    torch.manual_seed(1)  # not the seed of the first build
    with untouched(model):
        reset = allocator.rewrite(model, result.allocation, weights="reset")
    shapes = {key: t.shape for key, t in result.model.state_dict().items()}
    assert {key: t.shape for key, t in reset.state_dict().items()} == shapes
    assert all(t.isfinite().all() for t in run(reset, image))
    for path, module in reset.named_modules():
        kept: Any = result.model.get_submodule(path)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and isinstance(kept, type(module)):
            assert not torch.equal(module.weight, kept.weight), path
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all(), path
            assert module.running_mean is not None
            assert not module.running_mean.any(), path


def test_what_cannot_be_reset_is_named() -> None:
    model = trained()
    model.register_parameter("shift", nn.Parameter(torch.ones(3)))
    said = "reset after the certificate was made, but not those of the model itself, which have no reset_parameters()"
    notes = allocator.allocate(model, "60%", example_inputs=torch.zeros(1, 3, 16, 16), weights="reset").notes
    assert any(note.endswith(said) for note in notes)


def test_what_is_excluded_stays(model: nn.Module, result: Result, image: Tensor) -> None:
    touched = sorted({key.rpartition(".")[0] for key in result.allocation.kept})
    excluded = touched[len(touched) // 2 :: 7]
    again = allocator.allocate(model, "80%", example_inputs=image, exclude=excluded, certify=False)
    for path in excluded:
        assert not any(key.rpartition(".")[0] == path for key in again.allocation.kept), path
    assert 0.95 * again.flops_asked <= again.flops_after <= again.flops_asked


# --------------------------------------------------------------------------------- again, and the same


def test_allocated_again_it_composes(model: nn.Module, result: Result, image: Tensor, tmp_path: Path) -> None:
    with untouched(result.model):
        second = allocator.allocate(result.model, 0.4 * result.flops_before, example_inputs=image)
    assert second.certificate.ok
    assert second.flops_before == result.flops_after
    assert second.flops_after <= 0.4 * result.flops_before
    both = result.allocation.compose(second.allocation)
    assert both.flops_before == result.flops_before
    assert both.flops_after == second.flops_after
    both.save(tmp_path / "both.json")
    at_once = allocator.apply(model, tmp_path / "both.json")
    expected = second.model.state_dict()
    assert at_once.state_dict().keys() == expected.keys()
    for key, tensor in at_once.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    assert_same(run(at_once, image), run(second.model, image))
    assert allocator.verify(model, second.model, both, example_inputs=image).ok


def test_the_same_model_gives_the_same_allocation(name: str, result: Result, image: Tensor) -> None:
    again = allocator.allocate(make(name), "60%", example_inputs=torch.zeros_like(image), certify=False)
    assert again.allocation.to_dict() == result.allocation.to_dict()
