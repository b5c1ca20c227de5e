"""What is said where arguments do not mean what they were meant to: each message names what to do next."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from subjects import IMAGE, Branches, trained, untouched
from torch import Tensor, nn
from torch.nn import functional as F

import allocator
from allocator import (
    AllocatorError,
    ArgumentsError,
    BudgetError,
    CriterionError,
    DataError,
    InputError,
    PolicyError,
    UnknownNameError,
    UnmatchedPatternWarning,
)
from allocator.planning.policies import registry as policies
from allocator.scoring import registry

pytestmark = pytest.mark.filterwarnings("error::allocator.AllocatorWarning")


def allocate(model: Any, flops: Any = "60%", inputs: Any = IMAGE, **options: Any) -> allocator.Result:
    return allocator.allocate(model, flops, example_inputs=inputs, **options)


IMAGES = torch.randn(16, *IMAGE.shape[1:], generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 10


# ------------------------------------------------------------------------------------------- losses


def _sweep(model: nn.Module, **options: Any) -> Any:
    return allocator.sweep(model, flops=["80%", "60%"], example_inputs=IMAGE, **options)


def _iterate(model: nn.Module, **options: Any) -> Any:
    return allocator.iterate(model, "60%", steps=2, train=id, example_inputs=IMAGE, **options)


def _score(model: nn.Module, **options: Any) -> Any:
    return allocator.score(allocator.trace(model, IMAGE), **options)


@pytest.mark.parametrize("call", [allocate, _sweep, _iterate, _score])
def test_a_loss_without_data_is_refused(call: Callable[..., Any]) -> None:
    said = r"^loss needs data, whose targets it is called with: pass data=loader of \(inputs, target\) pairs beside it"
    model = trained()
    with untouched(model), pytest.raises(DataError, match=said):
        call(model, loss=F.cross_entropy)


def test_a_class_is_no_loss() -> None:
    said = r"^loss is the class CrossEntropyLoss: pass an object of it, such as CrossEntropyLoss\(\)$"
    with pytest.raises(DataError, match=said):
        allocate(trained(), data=[(IMAGES, LABELS)], loss=nn.CrossEntropyLoss)


@pytest.mark.parametrize("call", [_sweep, _iterate])
def test_a_misspelt_setting_is_an_error_of_the_arguments(call: Callable[..., Any]) -> None:
    with pytest.raises(ArgumentsError, match=r"^no argument 'polciy'; did you mean 'policy'\? \(there are policy, "):
        call(trained(), polciy="global")


@pytest.mark.parametrize(
    ("item", "target", "of"),
    [
        (IMAGES, type(None), "and None for a target, as the data yield none"),
        ((IMAGES, LABELS), Tensor, r"and the target, a tensor of \(8,\) int64"),
        ((IMAGES, LABELS, LABELS), tuple, "and the target, a tuple"),
        ({"x": IMAGES, "y": LABELS}, dict, "and the target, a dict of x, y, which is the whole batch"),
    ],
)
def test_what_a_loss_is_given_is_said_where_it_raises(item: Any, target: type, of: str) -> None:
    given: list[Any] = []

    def loss(output: Tensor, found: Any) -> Tensor:
        given.append(found)
        raise KeyError("label")

    said = rf"^the loss raised KeyError: 'label'; it was called with a tensor of \(8, 10\) float32,? {of}$"
    with pytest.raises(DataError, match=said):
        allocate(trained(), data=[item], loss=loss)
    assert isinstance(given[0], target)


def test_a_loss_that_writes_into_its_target_leaves_the_data_alone() -> None:
    labels = LABELS.clone()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target.clamp_(max=3))

    graph = allocator.trace(trained(), IMAGE)
    scores = allocator.score(graph, "fisher", [(IMAGES, labels)], loss)
    assert torch.equal(labels, LABELS)
    again = allocator.score(graph, "fisher", [(IMAGES, labels.clamp(max=3))], F.cross_entropy)
    assert scores.values.tolist() == again.values.tolist()


class NotFinite(Branches):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) / 0


def _spoilt(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target) * math.nan


@pytest.mark.parametrize(
    ("model", "loss", "said"),
    [
        (Branches, _spoilt, "the model's answers are finite: check the function '_spoilt', and the targets"),
        (NotFinite, _spoilt, "as the model's answers are not finite: check the data, and the model's weights"),
        (NotFinite, None, "as the model's answers are not finite: check the data, and the model's weights"),
    ],
)
def test_who_is_to_blame_for_a_loss_that_is_no_number(model: Any, loss: Any, said: str) -> None:
    with pytest.raises(DataError, match=rf"^the loss is nan, (and )?{said}$"):
        allocate(trained(model()), data=[(IMAGES, LABELS)], loss=loss)


# --------------------------------------------------------------------------------- samples, not batches


@pytest.mark.parametrize("data", [list(IMAGES), [(IMAGES[0], 3)], [{"x": IMAGES[0]}], IMAGES[0]])
def test_a_sample_without_a_batch_dim_is_told_from_a_batch(data: Any) -> None:
    said = (
        r"^the data yield inputs of \(3, 16, 16\) float32, and the model was traced with 1x3x16x16; a sample alone "
        r"needs a batch dim: yield batches, as torch.utils.data.DataLoader makes of a data set, or sample\[None\]"
    )
    model = trained()
    with untouched(model), pytest.raises(DataError, match=said):
        allocate(model, data=data)
    with untouched(model), pytest.raises(DataError, match=said):
        allocate(model, data=data, recover=True)


def test_samples_by_which_a_model_would_be_traced() -> None:
    said = (
        r"^input 1x16x16, from the first of the data, does not fit: .*; a sample alone needs a batch dim: yield batches"
    )
    with pytest.raises(DataError, match=said):
        allocate(trained(), inputs=None, data=list(IMAGES))


# ------------------------------------------------------------------------------------------ multiples


@pytest.mark.parametrize(("multiple", "budget"), [(1000, "90%"), (32, "10%")])
def test_a_multiple_that_no_width_is_of_is_beside_the_widths(multiple: int, budget: str) -> None:
    said = rf"multiple={multiple} \(layers that may get narrower have 16 or 32 channels\): the smallest that can be"
    with pytest.raises(BudgetError, match=said):
        allocate(trained(), budget, multiple=multiple)


def test_many_widths_are_a_range() -> None:
    model = nn.Sequential(*(nn.Conv2d(3 + n, 4 + n, 1) for n in range(9)))
    with pytest.raises(BudgetError, match=r"multiple=99 \(layers that may get narrower have 4 to 11 channels\)"):
        allocate(trained(model), "50%", multiple=99)


# ----------------------------------------------------------------------------------------- criteria

CALLED = (
    "it is called with the graph and a function that gives a tensor by its name, and gives one number per neuron "
    "(a loss is passed as loss=)"
)


def _fails(graph: Any, weights: Any) -> Any:
    return 1 // 0


@pytest.mark.parametrize(
    ("criterion", "said"),
    [
        (lambda: 3, f"criterion '<lambda>' takes other arguments (too many positional arguments): {CALLED}"),
        (lambda graph, weights, data: 3, "takes other arguments (missing a required argument: 'data'): it is called"),
        (len, "criterion 'len' takes other arguments"),
        (dict, "criterion 'dict' raised TypeError: dict expected at most 1 argument, got 2; it is called with"),
        (
            nn.CrossEntropyLoss(),
            "criterion 'CrossEntropyLoss' raised TypeError: cross_entropy_loss(): argument 'input'",
        ),
        (_fails, f"criterion '_fails' raised ZeroDivisionError: integer division or modulo by zero; {CALLED}"),
        (
            lambda graph, weights: None,
            "the scores of '<lambda>' are None: numbers are expected, which a function has to return",
        ),
        (lambda graph, weights: 3, "the scores of '<lambda>' have shape (), expected (64,): one number per neuron"),
        (lambda graph, weights: {"stem": 3}, "the scores of '<lambda>' are not an array of numbers: float()"),
        (lambda graph, weights: torch.ones(graph.size) * 1j, "the scores of '<lambda>' are complex: give real numbers"),
        (lambda graph, weights: np.ones(graph.size) * 1j, "the scores of '<lambda>' are complex: give real numbers"),
        (
            lambda graph, weights: weights("sten.weight"),
            "criterion '<lambda>' reads unknown tensor 'sten.weight': did you mean stem.weight",
        ),
    ],
)
def test_a_criterion_says_what_it_is_called_with_and_gives(criterion: Any, said: str) -> None:
    model = trained()
    with untouched(model), pytest.raises(AllocatorError, match=re.escape(said)) as caught:
        allocate(model, criterion=criterion)
    assert isinstance(caught.value, (CriterionError, UnknownNameError))


def test_a_registered_criterion_says_what_it_is_called_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "CRITERIA", dict(registry.CRITERIA))
    allocator.criterion("short", needs=["moments"])(lambda graph, weights: np.ones(graph.size))
    said = "criterion 'short' takes other arguments .*: it is called with the graph, a function that gives a tensor by"
    with pytest.raises(CriterionError, match=f"^{said} its name and Statistics, and gives one number per neuron"):
        allocate(trained(), criterion="short", data=IMAGES)


def test_a_criterion_that_writes_into_weights_writes_into_a_copy() -> None:
    model = trained()
    model.wide.weight.grad = torch.ones_like(model.wide.weight)

    def of_gradients(graph: Any, weights: Any) -> Any:
        weight = weights("wide.weight")
        moved = weight.detach().mul_(weight.grad.add_(1)).square_().sum((1, 2, 3))
        return np.concatenate([np.full(graph.size - len(moved), 9.0), moved.numpy()])

    with untouched(model):
        assert allocate(model, criterion=of_gradients).certificate.ok
    assert (model.wide.weight.grad == 1).all()


def _wrote(tensors: Any) -> Any:
    with torch.no_grad():
        for name in ("stem.weight", "wide.weight", "wide_norm.running_mean"):
            tensors[name].mul_(2)
            tensors[name].data.zero_()
            tensors[name].numpy()[:] = 3


def _tensors(graph: Any) -> Any:
    return graph.tensors


def _of_modules(graph: Any) -> Any:
    return {
        "stem.weight": graph.modules["stem"].weight,
        "wide.weight": graph.modules["wide"].weight,
        "wide_norm.running_mean": graph.modules["wide_norm"].running_mean,
    }


def _of_the_model(graph: Any) -> Any:
    return {**dict(graph.model.named_parameters()), **dict(graph.model.named_buffers())}


REACHES = [_tensors, _of_modules, _of_the_model]


@pytest.mark.parametrize("reach", REACHES)
def test_a_criterion_and_a_policy_that_write_into_the_graphs_model_write_into_a_copy(
    reach: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "POLICIES", dict(policies.POLICIES))

    def writes(graph: Any, weights: Any) -> Any:
        _wrote(reach(graph))
        assert isinstance(graph, allocator.ChannelGraph)
        return np.arange(graph.size)

    @allocator.policy("writes")
    def keeps_the_forced(problem: Any) -> Any:
        _wrote(reach(problem.graph))
        problem.scores.values[:] = 0
        return problem.forced

    model = trained()
    with untouched(model):
        expected = allocate(model, criterion=lambda graph, weights: np.arange(graph.size))
        assert allocate(model, criterion=writes).allocation.kept == expected.allocation.kept
        assert allocate(model, "90%", policy="writes", fill=False).certificate.ok


def test_a_policy_cannot_move_what_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "POLICIES", dict(policies.POLICIES))

    @allocator.policy("fewer")
    def fewer(problem: Any) -> Any:
        problem.forced[:] = False
        problem.forced[0] = True
        return problem.forced

    with pytest.raises(PolicyError, match=r"^policy 'fewer' drops \d+ neurons that must stay"):
        allocate(trained(), policy="fewer")


def _by_data(model: Any, output: Tensor) -> None:
    model.head.weight.data.clamp_(-0.01, 0.01)


def _by_numpy(model: Any, output: Tensor) -> None:
    model.head.weight.detach().numpy()[0] = 1


def _through_the_output(model: Any, output: Tensor) -> None:
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            node.variable.data.add_(1)
        waiting += [each for each, _ in getattr(node, "next_functions", ()) if each is not None]


@pytest.mark.parametrize("write", [_by_data, _by_numpy, _through_the_output])
def test_a_loss_that_writes_into_the_model_is_refused(write: Callable[[Any, Tensor], None]) -> None:
    model = trained()

    def clipping(output: Tensor, target: Tensor) -> Tensor:
        write(model, output)
        return F.cross_entropy(output, target)

    said = r"^the loss 'clipping' wrote into .*weight.* of the model itself: load the model anew, and let the"
    with pytest.raises(DataError, match=said):
        allocate(model, data=[(IMAGES, LABELS)], loss=clipping)


def test_a_criterion_or_a_policy_that_reaches_the_model_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "POLICIES", dict(policies.POLICIES))
    model = trained()

    def zeroes(graph: Any, weights: Any) -> Any:
        graph.flow.trace.modules["stem"].weight.data.zero_()
        return np.arange(graph.size)

    @allocator.policy("doubles")
    def doubles(problem: Any) -> Any:
        model.wide.weight.data.mul_(2)
        return problem.forced

    said = "wrote into {}.weight of the model itself: load the model anew, and let the function write into nothing but"
    with pytest.raises(CriterionError, match=f"^criterion 'zeroes' {said.format('stem')}"):
        allocate(model, criterion=zeroes)
    with pytest.raises(PolicyError, match=f"^policy 'doubles' {said.format('wide')}"):
        allocate(model, policy="doubles", criterion="magnitude")


def test_a_loss_that_keeps_the_model_and_reads_it_is_none_of_these() -> None:
    model = trained()

    def decayed(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) + sum(p.square().sum() for p in model.parameters())

    with untouched(model):
        assert allocate(model, data=[(IMAGES, LABELS)], loss=decayed).certificate.ok


# ------------------------------------------------------------------------- errors that say nothing


class Speechless(ValueError, RuntimeError, TypeError):
    """Cannot be made a text of."""

    def __str__(self) -> str:
        raise KeyError("no words")


def _raises(*_: Any, **__: Any) -> Any:
    raise Speechless


class Raising(Branches):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) if x.sum() < 1e9 or _raises() else None


class InTrainMode(Branches):
    def forward(self, x: Tensor) -> Any:
        return _raises() if self.training else super().forward(x)


class AtData(Branches):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) if not x.is_meta and x.shape[0] == 1 else _raises()


class Numberless:
    __array__ = _raises


class Uncopied:
    def __deepcopy__(self, memo: Any) -> Any:
        return _raises()


class Copied(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.held = Uncopied()


SPEECHLESS: dict[str, Callable[[], Any]] = {
    "the loss raised Speechless": lambda: allocate(trained(), data=[(IMAGES, LABELS)], loss=_raises),
    "criterion '_raises' raised Speechless": lambda: allocate(trained(), criterion=_raises),
    "are not an array of numbers": lambda: allocate(trained(), criterion=lambda graph, weights: Numberless()),
    "the forward raised Speechless": lambda: allocate(trained(AtData()), inputs=torch.zeros(2, *IMAGE.shape[1:])),
    "the model raised Speechless": lambda: allocate(trained(AtData()), data=IMAGES),
    "cannot be copied (Speechless)": lambda: allocate(trained(Copied())),
    "evaluate raised Speechless": lambda: _sweep(trained(), evaluate=_raises),
    "training raised Speechless": lambda: allocator.iterate(trained(), "60%", train=_raises, example_inputs=IMAGE),
    "latency raised Speechless": lambda: allocator.latency(trained(AtData()), torch.zeros(2, *IMAGE.shape[1:])),
}


@pytest.mark.parametrize("said", SPEECHLESS)
def test_an_error_that_cannot_say_what_it_is_comes_out_as_one_of_ours(said: str) -> None:
    with pytest.raises(AllocatorError, match=re.escape(said.removeprefix("latency "))) as caught:
        SPEECHLESS[said]()
    chain: BaseException | None = caught.value
    while chain is not None and not isinstance(chain, Speechless):
        chain = chain.__cause__ or chain.__context__
    assert chain is not None, "the error itself is its cause"


def test_a_policy_that_raises_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "POLICIES", dict(policies.POLICIES))
    allocator.policy("mine")(_raises)
    with pytest.raises(PolicyError, match=r"^policy 'mine' raised Speechless; it is called with a Problem, and gives"):
        allocate(trained(), policy="mine")


@pytest.mark.parametrize("kind", [Raising, InTrainMode])
def test_a_forward_that_only_sometimes_raises_such_an_error_is_allocated(kind: type[nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert allocate(trained(kind())).certificate.ok


# ------------------------------------------------------------------------------------------- floors


@pytest.mark.parametrize(("pattern", "near"), [("narow.*", "; did you mean 'narrow'?"), ("stem_norm*x", "")])
def test_a_floor_under_no_layer_is_noted(pattern: str, near: str) -> None:
    model = trained()
    said = f"at_least='{pattern}' matches no layer that writes channels{near}"
    with pytest.warns(UnmatchedPatternWarning, match=f"^{re.escape(said)}$"):
        assert said in allocate(model, at_least={"stem": 4, pattern: 8}).notes
    graph = allocator.trace(model, IMAGE)
    with pytest.warns(UnmatchedPatternWarning, match=re.escape(said)):
        allocator.plan(graph, flops="70%", at_least={pattern: 8})
    assert allocator.plan(graph, flops="70%", at_least={"stem": 4, "*": 1}), "of what matches there is no warning"


def test_floors_are_named_by_patterns_alone() -> None:
    model = trained()
    with untouched(model), pytest.raises(InputError, match=r"at_least has the key the class Conv2d: its keys"):
        allocate(model, at_least={nn.Conv2d: 8})
