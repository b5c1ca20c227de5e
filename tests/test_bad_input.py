"""Input that cannot work: each kind has an error that says what to do next, and the model stays as it was.

Layers that are easily got wrong (shared, computed, run several times) come in test_unusual_layers.py.
"""

from __future__ import annotations

import collections
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from subjects import IMAGE, Branches, trained, untouched
from torch import Tensor, nn

import allocator
from allocator import (
    AllocatorError,
    AllocatorWarning,
    BudgetError,
    BudgetNotBindingWarning,
    CriterionError,
    InputError,
    NothingToAllocateError,
    TraceError,
    UninformativeScoresWarning,
    UnknownNameError,
    UnmatchedPatternWarning,
    UnsupportedModelError,
    ValueDependentTraceWarning,
)

pytestmark = [
    pytest.mark.filterwarnings("error::allocator.AllocatorWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*"),
]


def allocate(model: Any, flops: Any = "60%", inputs: Any = IMAGE, **options: Any) -> allocator.Result:
    return allocator.allocate(model, flops, example_inputs=inputs, **options)


# ---------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    ("flops", "said"),
    [
        (0, r"flops=0 must be positive and finite; the model's own is 1,389,024 FLOPs"),
        ("0%", r"flops='0%' must be positive"),
        (True, r"flops=True is not a number"),
        (-5, r"flops=-5 must be positive"),
        ("-5%", r"flops='-5%' must be positive"),
        (math.nan, r"flops=nan must be positive and finite"),
        ("nan", r"flops='nan' must be positive and finite"),
        (math.inf, r"flops=inf must be positive and finite"),
        ("half", r"flops='half' is not a number: pass FLOPs such as 4.2e9 or '4.2G', or a share such as '60%'"),
        ("%", r"flops='%' is not a number"),
        ("", r"flops='' is not a number"),
        (
            None,
            r"no budget is given: pass flops='60%', or one of flops, params, activations, peak_activations, latency",
        ),
        ([4e9], r"is not a number: pass FLOPs"),
    ],
)
def test_a_budget_that_is_no_positive_number(flops: Any, said: str) -> None:
    model = trained()
    with untouched(model), pytest.raises(BudgetError, match=said) as caught:
        allocate(model, flops)
    assert caught.value.reachable is None
    assert isinstance(caught.value, (AllocatorError, ValueError))


def test_a_budget_larger_than_any_float() -> None:
    model = trained()
    with untouched(model), pytest.raises(BudgetError, match=r"is not a number|must be positive and finite"):
        allocate(model, 10**400)


@pytest.mark.parametrize("flops", [1_389_024, 1.5e6, "100%", "250%"])
def test_a_budget_above_the_models_own_gives_an_unchanged_copy(flops: Any) -> None:
    model = trained()
    with untouched(model), pytest.warns(BudgetNotBindingWarning, match=r"not below the model's own 1,389,024"):
        result = allocate(model, flops)
    assert result.flops_after == result.flops_before == 1_389_024
    assert result.allocation.kept == {}
    assert result.certificate.ok
    state = result.model.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor)
        assert state[name].data_ptr() != tensor.data_ptr(), f"{name} is shared with the caller's model"


@pytest.mark.parametrize("scope", ["auto", "branches", "inner", "all"])
@pytest.mark.parametrize("policy", ["per_block", "global", "uniform"])
def test_a_budget_below_what_can_be_reached_says_what_can(policy: str, scope: str) -> None:
    model = trained()
    said = rf"100 FLOPs cannot be met with scope='{scope}': the smallest that can be reached is [\d,]+ FLOPs"
    with untouched(model), pytest.raises(BudgetError, match=said) as caught:
        allocate(model, 100, policy=policy, scope=scope)
    reachable = caught.value.reachable
    assert caught.value.asked == 100
    assert reachable is not None
    with pytest.raises(BudgetError, match="cannot be met"):
        allocate(model, reachable - 1, policy=policy, scope=scope)
    result = allocate(model, reachable, policy=policy, scope=scope)
    assert result.flops_after == reachable
    assert result.certificate.ok


# ------------------------------------------------------------------------------------- nothing to rank by


def test_a_model_without_batch_norms_names_a_criterion_that_works() -> None:
    model = Branches(norm=False)
    with untouched(model), pytest.raises(CriterionError, match=r"no batch norm.*pass criterion='magnitude'"):
        allocate(model, criterion="bn_scale")
    with untouched(model):
        result = allocate(model, criterion="magnitude")
    assert result.flops_after <= 0.6 * result.flops_before
    assert result.certificate.ok


@pytest.mark.parametrize("policy", ["per_block", "global", "uniform"])
def test_equal_gammas_are_spread_evenly_over_the_branches(policy: str) -> None:
    model = Branches()
    said = r"all 64 scores of criterion 'bn_scale' are 1, so the ranking carries no information"
    results = []
    options = {"criterion": "bn_scale", "policy": policy, "scope": "branches"}
    for _ in range(2):
        with untouched(model), pytest.warns(UninformativeScoresWarning, match=said):
            results.append(allocate(model, "50%", fill=False, **options))
    first, second = results
    assert first.allocation.kept == second.allocation.kept
    (block,) = (b for b in first.allocation.blocks if b["kind"] == "concat")
    shares = [row["after"] / row["before"] for row in block["branches"]]
    one_neuron = [1 / row["before"] for row in block["branches"]]
    assert len(shares) == 2
    assert max(shares) < 1
    assert max(shares) - min(shares) <= max(one_neuron), shares


def test_a_warning_names_the_callers_line() -> None:
    model = Branches()
    graph = allocator.trace(model, IMAGE)
    for call in (
        lambda: allocator.allocate(model, "50%", example_inputs=IMAGE, criterion="bn_scale"),
        lambda: allocator.plan(graph, allocator.score(graph, "bn_scale"), flops="50%"),
        lambda: allocator.score(graph, "bn_scale"),
        lambda: allocator.allocate(model, "100%", example_inputs=IMAGE),
    ):
        with pytest.warns(allocator.AllocatorWarning) as caught:
            call()
        assert {warning.filename for warning in caught} == {__file__}


def test_equal_gammas_of_a_deep_model_are_spread_over_every_block() -> None:
    model = allocator.build("torchvision:googlenet", init_weights=False)
    graph = allocator.trace(model)
    with pytest.warns(UninformativeScoresWarning, match="carries no information"):
        scores = allocator.score(graph, "bn_scale")
    plan = allocator.plan(graph, scores, flops="60%", policy="per_block", scope="branches", fill=False)
    shares = [
        row["after"] / row["before"]
        for block in plan.blocks
        if block["kind"] == "concat"
        for row in block["branches"]
        if row["before"] >= 32
    ]
    assert len(shares) >= 27
    assert max(shares) - min(shares) <= 1 / 32 + 1e-9, (min(shares), max(shares))


def test_gammas_that_are_not_finite() -> None:
    model = trained()
    model.norm.weight.data[3] = math.inf
    for criterion in ("group_norm", "bn_scale"):
        with untouched(model), pytest.raises(CriterionError, match=r"norm\.weight holds values that are not finite"):
            allocate(model, criterion=criterion)


def test_weights_that_are_not_numbers_do_not_hide_a_right_result() -> None:
    model = trained()
    model.stem.weight.data[5, 1, 0, 0] = math.nan
    with untouched(model), pytest.raises(CriterionError, match=r"stem\.weight holds values that are not finite"):
        allocate(model)
    with untouched(model):
        found = allocate(model, criterion="bn_scale").certificate
    assert found.ok
    assert found.weights
    assert found.drawn, "outputs that are all NaN show nothing"


# ---------------------------------------------------------------------------------- nothing to allocate


def test_everything_excluded() -> None:
    model = trained()
    with untouched(model), pytest.raises(NothingToAllocateError, match="excluded by the caller") as caught:
        allocate(model, exclude="*")
    assert any("excluded by the caller" in reason for reason in caught.value.reasons)


def test_a_misspelled_exclusion_is_noted() -> None:
    said = r"exclude='narow\.\*' matches no module or parameter; did you mean 'narrow'\?"
    with pytest.warns(UnmatchedPatternWarning, match=said):
        allocate(trained(), exclude=["stem", "narow.*"])


@pytest.mark.parametrize("criterion", ["bn_scale", "magnitude", "random"])
def test_a_model_whose_every_channel_leaves_it(criterion: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    said = r"no neuron of the model can be removed: .*an output of the model \(8 channels\)"
    with untouched(model), pytest.raises(NothingToAllocateError, match=said) as caught:
        allocate(model, criterion=criterion)
    assert "an output of the model (8 channels)" in caught.value.reasons


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(), nn.MaxPool2d(2)], ids=str)
def test_a_model_without_flops(model: nn.Module) -> None:
    with untouched(model), pytest.raises(NothingToAllocateError, match="no operator that fvcore counts FLOPs for"):
        allocate(model)


# -------------------------------------------------------------------------------------- example inputs


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (torch.zeros(1, 4, 16, 16), r"example_inputs do not fit: .*in stem with inputs of \(1, 4, 16, 16\) float32"),
        (torch.zeros(16), r"do not fit: .*inputs of \(16,\) float32"),
        ((IMAGE, IMAGE), r"do not fit: .*takes 2 positional arguments but 3 were given"),
        ((), r"do not fit: .*inputs of no tensors.*missing 1 required positional argument"),
        ({"y": IMAGE}, r"do not fit: .*unexpected keyword argument 'y'"),
        (IMAGE[:0], r"example_inputs are empty \(inputs of \(0, 3, 16, 16\) float32\): pass a batch of 1"),
        ((1, 3, 16, 16), r"plain numbers, not tensors: pass torch.zeros\(1, 3, 16, 16\)"),
        ("image.png", r"hold no tensor, only str: pass a tensor, a tuple of arguments, or a dict"),
        (IMAGE.numpy(), r"hold no tensor, only ndarray: pass a tensor"),
    ],
)
def test_inputs_of_the_wrong_shape_or_kind(inputs: Any, said: str) -> None:
    model = trained()
    with untouched(model), pytest.raises(InputError, match=f"(?s){said}"):
        allocate(model, inputs=inputs)


def test_a_mapping_of_arguments_need_be_no_dict() -> None:
    model = trained()
    name = next(iter(inspect.signature(model.forward).parameters))
    assert allocate(model, inputs=collections.UserDict({name: IMAGE})).flops_after < allocator.trace(model, IMAGE).flops


def test_a_wrong_shape_is_answered_with_one_that_runs() -> None:
    with pytest.raises(InputError, match=r"the model runs with inputs of \(1, 3, 224, 224\) float32"):
        allocate(trained(), inputs=torch.zeros(1, 4, 16, 16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_inputs_of_the_wrong_dtype(dtype: torch.dtype) -> None:
    model = trained()
    name = str(dtype).removeprefix("torch.")
    with untouched(model), pytest.raises(InputError, match=rf"do not fit: .*\(1, 3, 16, 16\) {name}.*\) float32"):
        allocate(model, inputs=IMAGE.to(dtype))


def test_inputs_on_another_device() -> None:
    model = trained()
    said = r"lie on meta, the model on cpu: make them there, for example torch.zeros\(\(1, 3, 16, 16\), device='cpu'\)"
    with untouched(model), pytest.raises(InputError, match=said):
        allocate(model, inputs=IMAGE.to("meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_inputs_on_the_gpu_and_a_model_on_the_cpu() -> None:
    model = trained()
    said = r"lie on cuda:0, the model on cpu: move one of them, for example example_inputs.to\('cpu'\)"
    with untouched(model), pytest.raises(InputError, match=said):
        allocate(model, inputs=IMAGE.cuda())


def test_a_model_without_values() -> None:
    model = trained().to("meta")
    said = r"stem.weight lies on the meta device and has no values: build the model on a real device"
    with untouched(model), pytest.raises(UnsupportedModelError, match=said):
        allocate(model)
    graph = allocator.trace(model, IMAGE)
    assert len(graph.neurons) == 64
    assert [branch.gamma for block in graph.blocks for branch in block.branches] == [None, None]
    with pytest.raises(CriterionError, match=r"reads stem.weight, which lies on the meta device and has no values"):
        allocator.score(graph)
    assert len(allocator.score(graph, "random").values) == 64


def test_no_inputs_and_nothing_to_infer_them_from() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.ReLU())
    with pytest.raises(InputError, match=r"no input size can be inferred from Sequential: pass example_inputs"):
        allocate(model, inputs=None)


# ---------------------------------------------------------------------------------------- the forward


class Raises(Branches):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError(f"no image of {x.shape[-1]} pixels")


@pytest.mark.parametrize("inputs", [IMAGE, None])
def test_a_forward_that_raises(inputs: Any) -> None:
    model = trained(Raises())
    said = r"the forward raised ValueError in the model's own forward .*: no image of \d+ pixels; check that model\("
    with untouched(model), pytest.raises(TraceError, match=said) as caught:
        allocate(model, inputs=inputs)
    assert isinstance(caught.value.__cause__, ValueError)


class Inner(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.narrow_norm = nn.Sequential(self.narrow_norm, Raises())


def test_a_forward_that_raises_inside_is_found() -> None:
    model = trained(Inner())
    with untouched(model), pytest.raises(TraceError, match=r"raised ValueError in narrow_norm\.1 with"):
        allocate(model)


class Switches(Branches):
    """Pools in another way if the image is dark."""

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        if x.mean() > 0:
            return self.head(features.amax((2, 3)).flip(1))
        return self.head(features.mean((2, 3)))


class Counts(Branches):
    """Multiplies by a number read from a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        times = int(x.sum().item()) + 2
        return self.head(self.features(x).mean((2, 3))) * times


@pytest.mark.parametrize("make", [Switches, Counts])
@pytest.mark.parametrize("image", [IMAGE, IMAGE + 0.25], ids=["dark", "bright"])
def test_a_forward_that_needs_values_is_allocated_with_a_warning(make: Callable[[], nn.Module], image: Tensor) -> None:
    model = trained(make())
    said = "the forward needs values: the trace holds for inputs that take the same path"
    with untouched(model), pytest.warns(ValueDependentTraceWarning, match=said):
        result = allocate(model, inputs=image)
    assert said in result.notes
    assert result.flops_after <= result.flops_asked
    assert result.certificate.ok
    assert result.certificate.relative_error is not None
    assert result.model(image).shape == (1, 10)


class Literal(Branches):
    """Adds a constant made on the CPU, which a meta tensor does not meet, but a fake one does."""

    def features(self, x: Tensor) -> Tensor:
        return super().features(x) + torch.ones(1, 1, 1, 1)


def test_a_forward_that_makes_tensors_on_the_cpu_is_traced_without_its_values() -> None:
    model, plain = trained(Literal()), Branches()
    plain.load_state_dict(model.state_dict())
    with untouched(model):
        result = allocate(model)
    assert result.graph.flow.trace.mode == "fake"
    assert result.allocation.kept == allocate(plain).allocation.kept
    assert result.certificate.ok


class Writes(Branches):
    """Counts its calls in a buffer, in a number and in a list."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.number, self.sizes = 0, [16]

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        self.number += 1
        self.sizes.append(x.shape[-1])
        return super().forward(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_forward_that_writes_into_the_model_writes_into_copies(dtype: torch.dtype) -> None:
    model = trained(Writes()).to(dtype)
    with untouched(model):
        result = allocate(model, inputs=IMAGE.to(dtype))
    assert result.certificate.ok
    small: Any = result.model
    assert small.calls.item() == 0
    assert small.number == 0


# ------------------------------------------------------------------------------- models of another kind


def _lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.Conv2d(8, 4, 1))


def _quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(Branches().eval(), {nn.Linear}, dtype=torch.qint8)


def _compiled() -> Any:
    return torch.compile(trained(), backend="eager")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_lazy, r"0\.weight is lazily initialised: run model\(\*example_inputs\) once"),
        (_quantised, r"head is quantised \(Linear\): allocate the float model, then quantise it"),
        (lambda: torch.jit.script(trained()), r"the model is TorchScript \(RecursiveScriptModule\).*pass the Python"),
        (lambda: torch.jit.trace(trained(), IMAGE), r"the model is TorchScript \(TopLevelTracedModule\)"),
        (lambda: nn.Sequential(torch.jit.trace(trained(), IMAGE)), r"0 is TorchScript \(TopLevelTracedModule\)"),
        (lambda: nn.DataParallel(trained()), r"the model is wrapped in DataParallel: pass its \.module"),
        (lambda: nn.Sequential(nn.DataParallel(trained())), r"0 is wrapped in DataParallel: replace it by its \.mod"),
        (_compiled, r"the model is wrapped in OptimizedModule: pass the module that was compiled \(its \._orig_mod\)"),
        (lambda: nn.Sequential(_compiled()), r"0 is wrapped in OptimizedModule: replace it by the module that was"),
        (lambda: trained().state_dict(), r"of type OrderedDict: this looks like a state_dict: build the model, load"),
        (lambda: None, r"the model is of type NoneType: pass a torch.nn.Module"),
        (lambda: Branches, r"this is the class Branches: pass an instance of it"),
        (lambda: "resnet50", r"of type str: pass a torch.nn.Module, such as allocator.build\('resnet50'\)"),
        (lambda: torch.export.export(trained(), (IMAGE,)), r"of type ExportedProgram: pass exported_program.mod"),
    ],
)
def test_models_that_cannot_be_rewritten_say_what_to_pass(make: Callable[[], Any], said: str) -> None:
    model = make()
    with untouched(model), pytest.raises(UnsupportedModelError, match=f"(?s){said}") as caught:
        allocate(model)
    assert isinstance(caught.value, TypeError)
    with pytest.raises(UnsupportedModelError, match=f"(?s){said}"):
        allocator.trace(model, IMAGE)


def test_the_advice_for_an_exported_program_works() -> None:
    result = allocate(torch.export.export(trained(), (IMAGE,)).module())
    assert result.flops_after <= result.flops_asked
    assert result.certificate.ok


@pytest.mark.parametrize("run", [False, True])
def test_a_model_compiled_in_place_is_allocated_as_it_was_before(run: bool) -> None:
    model = trained()
    plain = allocate(model)
    model.compile(backend="eager")
    if run:
        model(IMAGE)
    with untouched(model):
        result = allocate(model)
    assert result.allocation.kept == plain.allocation.kept
    assert result.certificate.ok
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(result.model(x), plain.model(x))


# ------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": "best"}, r"no policy 'best' \(there are auto, per_block, global, isomorphic, uniform, priced\)"),
        ({"criterion": "bn_scal"}, r"no criterion 'bn_scal'; did you mean 'bn_scale'\?"),
        ({"scope": "some"}, r"no scope 'some' \(there are auto, branches, inner, all, narrowest\)"),
        ({"weights": "drop"}, r"no weights 'drop' \(there are keep, reset\)"),
        ({"groups": "half"}, r"no groups 'half' \(there are auto, whole, width\)"),
        ({"norms": "any"}, r"no norms 'any' \(there are exact, loose\)"),
    ],
)
def test_names_that_do_not_exist(options: dict[str, Any], said: str) -> None:
    model = trained()
    with untouched(model), pytest.raises(UnknownNameError, match=said):
        allocate(model, **options)


def test_success_leaves_the_model_as_it_was() -> None:
    model = trained()
    model.stem.weight.requires_grad_(False)
    model.narrow.train()
    model.stem.register_forward_hook(lambda module, args, output: None)
    model.wide.weight.grad = torch.ones_like(model.wide.weight)
    for options in ({}, {"weights": "reset"}, {"policy": "uniform", "scope": "all"}, {"certify": False}):
        with untouched(model):
            small: Any = allocate(model, **options).model
        assert not small.stem.weight.requires_grad
        assert len(small.stem._forward_hooks) == 1


def test_every_warning_and_error_has_a_common_base() -> None:
    for name in allocator.__all__:
        kind = getattr(allocator, name)
        if isinstance(kind, type) and issubclass(kind, Exception):
            base = AllocatorWarning if issubclass(kind, Warning) else AllocatorError
            assert issubclass(kind, base), name
