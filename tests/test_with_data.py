"""Criteria that look at data: against gates and variances worked out by hand, and whatever a loader yields."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from subjects import trained, untouched
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import allocator
from allocator.scoring.answers import own_answers
from allocator.scoring.batches import Batch, first_sample
from allocator.scoring.calibration import CHUNK
from allocator.scoring.calibration import _noise as noise_of
from allocator.tracing.inputs import Inputs

IMAGE = torch.zeros(1, 3, 12, 12)


class Net(nn.Module):
    """A batch norm, a depthwise layer and a flattened image between the layers that write and those that read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.depthwise = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.head = nn.Linear(6 * 16, 5)

    def gated(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """The forward with a factor per channel where it is read."""
        x = self.norm(self.first(x)).relu() * first[:, None, None]
        x = self.depthwise(self.second(x)).relu() * second[:, None, None]
        return self.head(F.adaptive_avg_pool2d(x, 4).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.second(self.norm(self.first(x)).relu())).relu()
        return self.head(F.adaptive_avg_pool2d(x, 4).flatten(1))


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    nn.init.uniform_(net.norm.weight, 0.5, 2)
    nn.init.uniform_(net.get_buffer("norm.running_var"), 0.5, 2)
    return net


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3 * CHUNK, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def by_gates(model: Net, images: Tensor, loss: Callable[[Tensor, Any], Tensor], labels: Tensor | None) -> np.ndarray:
    """Half the mean squared derivative of the loss by a factor at every channel."""
    rows = []
    for start in range(0, len(images), CHUNK):
        gates = torch.ones(8, requires_grad=True), torch.ones(6, requires_grad=True)
        output = model.gated(images[start : start + CHUNK], *gates)
        chunk = images[start : start + CHUNK]
        if labels is None:
            value = own_answers(output, noise_of(Batch(Inputs((chunk,))), 0), "shaken")
        else:
            value = loss(output, labels[start : start + CHUNK])
        rows.append(torch.cat(torch.autograd.grad(value, gates)))
    return (torch.stack(rows).square().mean(0) / 2).double().numpy()


@pytest.mark.parametrize("labelled", [False, True])
def test_fisher_is_the_squared_gradient_of_a_gate(model: Net, images: Tensor, labelled: bool) -> None:
    labels = torch.randint(5, (len(images),), generator=torch.Generator().manual_seed(2)) if labelled else None
    graph = allocator.trace(model, IMAGE)
    with untouched(model):
        if labels is None:
            scores = allocator.score(graph, "fisher", images)
        else:
            scores = allocator.score(graph, "fisher", [(images, labels)], F.cross_entropy)
    np.testing.assert_allclose(scores.values, by_gates(model, images, F.cross_entropy, labels), rtol=1e-3, atol=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_shaken_answer_speaks_for_every_class() -> None:
    """On average over the noise: the squared gradient of a certain answer, and as much for each of the others."""
    logits = torch.tensor([[9.0, 0.0, 1.0, -2.0]], requires_grad=True)
    squares = torch.zeros(4)
    generator, draws = torch.Generator().manual_seed(0), 4000
    for _ in range(draws):
        (found,) = torch.autograd.grad(own_answers(logits, generator, "shaken"), logits)
        assert abs(float(found.sum())) < 1e-5  # a rise of all logits says nothing
        squares += found[0].square() / draws
    certain = logits.detach()[0].softmax(0) - torch.tensor([1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(squares, certain.square() + (1 - 1 / 4) / 4, rtol=0.1, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_classes_that_are_ruled_out_and_large_sums_shake_nothing(dtype: torch.dtype) -> None:
    logits = torch.full((64, 20000), -3000.0, dtype=dtype)
    logits[:, 7] = -torch.inf
    logits.requires_grad_()
    value = own_answers(logits, torch.Generator().manual_seed(0), "shaken")
    (found,) = torch.autograd.grad(value, logits)
    assert bool(value.isfinite())
    assert bool(found.isfinite().all())
    assert not found[:, 7].any()
    assert bool(found[:, 8].any())


def test_what_speaks_for_a_class_that_no_input_shows_counts() -> None:
    """Two neurons, one for each of two classes; the model is certain that all inputs are of the first."""
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2) + 0.1)
        model[0].bias.fill_(1.0)
        model[2].weight.copy_(torch.tensor([[30.0, 0.02], [0.01, 5.0], [0.02, 0.01]]))
        model[2].bias.zero_()
    x = torch.rand(64, 2, generator=torch.Generator().manual_seed(0))
    first, second = allocator.score(allocator.trace(model, x[:1]), "fisher", x).values
    assert second > 0.01 * first > 0


def test_answers_that_are_no_classes_stand_in_by_noise(model: Net, images: Tensor) -> None:
    class Regressor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.net(x)
            return {"a": y[:, :1], "b": y[:, None, None]}

    graph = allocator.trace(Regressor(), IMAGE)
    values = allocator.score(graph, "fisher", images).values
    assert (values > 0).all()
    again = allocator.score(graph, "fisher", images).values
    np.testing.assert_array_equal(values, again)


def test_activation_is_the_variance_that_readers_see(model: Net, images: Tensor) -> None:
    graph = allocator.trace(model, IMAGE)
    found = allocator.score(graph, "activation", images).values
    with torch.no_grad():
        first = model.norm(model.first(images)).relu()
        second = F.adaptive_avg_pool2d(model.depthwise(model.second(first)).relu(), 4)
    spread = first.double().transpose(0, 1).flatten(1).var(1, unbiased=False) * model.second.weight.square().sum(
        (0, 2, 3)
    )
    pixels = second.double().flatten(1).var(0, unbiased=False) * model.head.weight.square().sum(0)
    expected = torch.cat([spread / spread.sum(), pixels.view(6, 16).sum(1) / pixels.sum()]).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_reconstruction_sees_that_one_of_two_alike_can_go() -> None:
    """By variance both matter; refitted, either does the work of both."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).eval()
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = model[0].weight[0], model[0].bias[0]
    x = torch.randn(200, 6)
    graph = allocator.trace(model, x[:1])
    values = allocator.score(graph, "reconstruction", x).values
    others = allocator.score(graph, "activation", x).values
    assert values[:2].max() < 0.05 * values[2:].min()
    assert others[:2].min() > 0.1 * others[2:].min()


def test_taylor_needs_labels(model: Net, images: Tensor) -> None:
    graph = allocator.trace(model, IMAGE)
    with pytest.raises(allocator.CriterionError, match="'taylor' needs labels: pass loss=function"):
        allocator.score(graph, "taylor", images)
    values = allocator.score(graph, "taylor", [(images, torch.zeros(len(images)).long())], F.cross_entropy).values
    assert np.isfinite(values).all()


def test_a_criterion_that_looks_at_data_asks_for_them(model: Net) -> None:
    with pytest.raises(allocator.CriterionError, match="'fisher' looks at data: pass data=loader"):
        allocator.score(allocator.trace(model, IMAGE), "fisher")


def test_several_criteria_are_averaged_by_rank(model: Net, images: Tensor) -> None:
    graph = allocator.trace(model, IMAGE)
    both = allocator.score(graph, ["fisher", "group_norm"], images)
    assert both.criterion == "fisher+group_norm"
    ranks = []
    for name in ("fisher", "group_norm"):
        values = allocator.score(graph, name, images).values
        ranks.append((np.argsort(np.argsort(values)) + 1) / len(values))
    np.testing.assert_allclose(both.values, np.mean(ranks, axis=0))


# ----------------------------------------------------------------------------------------- what loaders yield


def _loaders(images: Tensor) -> dict[str, Any]:
    labels = torch.zeros(len(images), dtype=torch.long)
    halves = images.chunk(2)
    return {
        "a tensor": images,
        "tensors": list(halves),
        "a generator": (half for half in halves),
        "pairs": [(half, labels[: len(half)]) for half in halves],
        "lists": [[half, labels[: len(half)]] for half in halves],
        "tuples of one": [(half,) for half in halves],
        "a dict alone": {"x": images, "labels": torch.zeros(len(images))},
        "dicts by the forward's name": [{"x": half, "labels": labels} for half in halves],
        "dicts of a detector's loader": [{"img": half, "cls": labels, "im_file": ["a"]} for half in halves],
        "double precision": [half.double() for half in halves],
        "a torch loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=10),
    }


@pytest.mark.parametrize("kind", list(_loaders(torch.zeros(2, 3, 12, 12))))
def test_whatever_a_loader_yields(model: Net, images: Tensor, kind: str) -> None:
    graph = allocator.trace(model, IMAGE)
    values = allocator.score(graph, "activation", _loaders(images)[kind]).values
    np.testing.assert_allclose(values, allocator.score(graph, "activation", images).values, rtol=1e-5)


def _raises() -> Iterator[Tensor]:
    yield torch.zeros(2, 3, 12, 12)
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("data", "loss", "said"),
    [
        ([], None, "the loader yields no batch"),
        (torch.zeros(0, 3, 12, 12), None, "or none with a sample"),
        (torch.zeros(2, 3, 12, 12, device="meta"), None, "the data lie on the meta device"),
        (torch.zeros(20, 3, 12, 12).to_sparse(), None, "the model raised RuntimeError"),
        (7, None, "data is an int: pass a loader"),
        ("photographs", None, "data is a str: pass a loader"),
        ([3.5], None, "the data yield a float: expected tensors"),
        (np.zeros((2, 3, 12, 12)), None, "the data yield an ndarray: .*; torch.from_numpy makes a tensor of it"),
        ([{"a": torch.zeros(2, 3, 12, 12)}], None, "the data yield dicts of a, none of which Net.forward takes"),
        ([torch.zeros(2, 5, 12, 12)], None, r"the model raised RuntimeError on inputs of \(2, 5, 12, 12\) float32"),
        (
            [torch.full((2, 3, 12, 12), math.nan)],
            None,
            "the loss is nan, as the model's answers are not finite: check the data",
        ),
        ([torch.zeros(2, 3, 12, 12)], lambda y, t: y.mean(1), r"the loss gave shape \(2,\), expected a scalar"),
        ([torch.zeros(2, 3, 12, 12)], lambda y, t: 3.0, "the loss gave float, expected a scalar"),
        (
            [torch.zeros(2, 3, 12, 12)],
            F.cross_entropy,
            "the loss raised TypeError: .*; it was called with a tensor of "
            r"\(2, 5\) float32, and None for a target, as the data yield none",
        ),
        (
            [torch.zeros(2, 3, 12, 12)],
            lambda y, t: y.sum() * math.inf,
            "the loss is (nan|-?inf), and the model's answers are "
            "finite: check the function '<lambda>', and the targets",
        ),
    ],
)
def test_data_that_do_not_fit_are_refused(model: Net, data: Any, loss: Any, said: str) -> None:
    with untouched(model), pytest.raises(allocator.DataError, match=said):
        allocator.allocate(model, "60%", example_inputs=IMAGE, data=data, loss=loss)


def test_a_loss_of_its_own_weights_or_of_the_models_leaves_their_gradients(model: Net, images: Tensor) -> None:
    scale = nn.Parameter(torch.ones(5))
    pairs = [(images, torch.zeros(len(images), dtype=torch.long))]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output * scale, target) + sum(p.square().sum() for p in model.parameters())

    graph = allocator.trace(model, IMAGE)
    with untouched(model):
        values = allocator.score(graph, "taylor", pairs, loss).values
    assert scale.grad is None
    np.testing.assert_allclose(values, allocator.score(graph, "taylor", pairs, F.cross_entropy).values, rtol=1e-5)


def test_random_states_are_left_alone(model: Net, images: Tensor) -> None:
    tp = pytest.importorskip("torch_pruning")
    pairs = torch.utils.data.TensorDataset(images, torch.zeros(len(images), dtype=torch.long))
    shuffled = torch.utils.data.DataLoader(pairs, batch_size=8, shuffle=True)
    state = torch.get_rng_state()
    for criterion in ("fisher", tp.importance.GroupTaylorImportance(), tp.importance.RandomImportance()):
        allocator.allocate(model, "60%", example_inputs=IMAGE, criterion=criterion, data=shuffled)
        assert torch.equal(torch.get_rng_state(), state)


def test_an_error_of_the_loader_is_its_own(model: Net) -> None:
    with untouched(model), pytest.raises(OSError, match="the disk is gone"):
        allocator.allocate(model, "60%", example_inputs=IMAGE, data=_raises())


def test_progress_is_told(model: Net, images: Tensor) -> None:
    said: list[str] = []
    allocator.allocate(model, "60%", example_inputs=IMAGE, data=images, progress=said.append)
    assert f"looking at the data: {len(images)} samples" in said


# ----------------------------------------------------------------------------------------- Torch-Pruning's


def test_importances_of_torch_pruning_give_what_they_give_there(model: Net) -> None:
    tp = pytest.importorskip("torch_pruning")
    graph = allocator.trace(model, IMAGE)
    dependencies = tp.DependencyGraph().build_dependency(model, IMAGE)
    group = dependencies.get_pruning_group(model.first, tp.prune_conv_out_channels, list(range(8)))
    for importance in (tp.importance.GroupMagnitudeImportance(), tp.importance.LAMPImportance()):
        scores = allocator.score(graph, importance)
        assert scores.criterion == type(importance).__name__
        np.testing.assert_allclose(scores.values[:8], importance(group).numpy(), rtol=1e-5)


def test_an_importance_that_looks_at_gradients_gets_them(model: Net, images: Tensor) -> None:
    tp = pytest.importorskip("torch_pruning")
    graph, importance = allocator.trace(model, IMAGE), tp.importance.GroupTaylorImportance()
    with pytest.raises(allocator.CriterionError, match="it looks at gradients: pass data and loss"):
        allocator.score(graph, importance)
    with untouched(model):
        result = allocator.allocate(model, "60%", example_inputs=IMAGE, criterion=importance, data=images)
    assert result.allocation.criterion == "GroupTaylorImportance"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_importance_of_a_users_own(model: Net) -> None:
    tp = pytest.importorskip("torch_pruning")

    class FirstLayer(tp.importance.Importance):  # type: ignore[name-defined]
        def __call__(self, group: Any) -> Tensor:
            (dependency, indices), *_ = group
            return dependency.layer.weight.data[indices].abs().flatten(1).amax(1)

    values = allocator.score(allocator.trace(model, IMAGE), FirstLayer()).values
    np.testing.assert_allclose(values[:8], model.first.weight.detach().abs().flatten(1).amax(1).numpy())


class Pooled(nn.Sequential):
    """Takes any size of image and does not say which."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def test_inputs_are_of_the_size_of_the_data_where_the_model_does_not_say() -> None:
    torch.manual_seed(0)
    model, images = Pooled().eval(), torch.randn(12, 1, 10, 9)
    note = "input 1x1x10x9, from the first of the data"
    loaders: list[Any] = [images, [images], [(images, torch.zeros(12))], DataLoader(TensorDataset(images), 4)]
    loaders += [{"input": images}, [{"input": images, "labels": torch.zeros(12)}]]
    for data in loaders:
        result = allocator.allocate(model, "60%", data=data)
        assert note in result.notes
        assert result.allocation.input_shapes == [[1, 1, 10, 9]]
    curve = allocator.sweep(model, flops=["80%", "60%"], data=images)
    assert curve.points[0].allocation.input_shapes == [[1, 1, 10, 9]]
    done = allocator.iterate(model, "60%", steps=1, train=lambda network: None, data=images)
    assert done.allocation.input_shapes == [[1, 1, 10, 9]]
    given = allocator.allocate(model, "60%", data=images, example_inputs=images[:1, :, :8])
    assert given.allocation.input_shapes == [[1, 1, 8, 9]]


def test_the_model_s_word_on_its_inputs_counts_more_than_the_data_and_an_iterator_is_left_whole() -> None:
    model: Any = Pooled().eval()
    once = iter([torch.randn(12, 1, 10, 10)])
    assert first_sample(once, model) is None
    assert len(list(once)) == 1
    assert first_sample([{"nothing of it": torch.zeros(1, 1, 10, 10)}], model) is None
    assert first_sample([], model) is None
    assert first_sample(3, model) is None
    assert first_sample(torch.zeros(2, 3, dtype=torch.long), model) is None
    model.input_size = (1, 12, 12)
    result = allocator.allocate(model, "60%", data=torch.randn(12, 1, 10, 10))
    assert result.allocation.input_shapes == [[1, 1, 12, 12]]


def test_data_that_do_not_fit_are_blamed_where_the_inputs_are_of_them() -> None:
    with pytest.raises(allocator.DataError, match=r"1x3x10x10, from the first of the data, does not fit: .*1 channels"):
        allocator.allocate(Pooled().eval(), "60%", data=torch.randn(12, 3, 10, 10))


def test_prices_leave_every_layer_a_part_unless_asked_otherwise() -> None:
    graph = allocator.trace(trained(), torch.zeros(1, 3, 16, 16))
    values = np.ones(graph.size)
    values[graph.unit_of_slot[graph.slots.labels("wide.weight")[0]]] = 1e-6  # 32 neurons worth next to nothing
    scores = allocator.Scores("fisher", values)

    def width(flops: str, **options: Any) -> int:
        indices = allocator.plan(graph, scores, flops, fill=False, **options).kept["wide.weight"][0]
        assert indices is not None
        return len(indices)

    for flops, floor in (("20%", math.ceil(0.25 * 32)), ("10%", math.ceil(0.125 * 32))):
        assert width(flops) >= floor
        assert width(flops, at_least=0) == width(flops, policy="priced") < floor


def test_a_result_is_one_line() -> None:
    model = trained()
    result = allocator.allocate(model, "60%", example_inputs=torch.zeros(1, 3, 16, 16))
    assert "\n" not in repr(result)
    assert len(repr(result)) < 200
    assert len(repr(result.allocation)) < 1000
