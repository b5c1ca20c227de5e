"""Metrics: sums of products against brute force, and against what torch and fvcore count in the networks themselves."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from cost_cases import IMAGE, REWRITTEN, WHOLE, inputs_of
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis, parameter_count
from reference_set import REFERENCE_SET, example, randomised
from torch import Tensor, nn

import allocator
from allocator import Allocation, ChannelGraph, UnknownNameError
from allocator.cost.metric import Metric
from allocator.cost.terms import Product, Term, elements, times
from allocator.rewriting.kept import kept_by

METRICS = ("flops", "params", "activations")

# ------------------------------------------------------------------------------------- against brute force

SLOTS, NEURONS = 20, 7


@dataclass
class Drawn:
    """Random products over a few slots, some of which belong to no neuron, and what they come to."""

    terms: list[Term]
    unit_of_slot: np.ndarray

    @property
    def metric(self) -> Metric:
        return Metric("flops", "FLOPs", self.terms, self.unit_of_slot, NEURONS)

    def cost(self, kept: np.ndarray) -> float:
        """Counted slot by slot."""
        total = 0.0
        for term in self.terms:
            product = term.factor
            for axis in term.axes:
                count = 0
                for slot in axis.tolist():
                    unit = self.unit_of_slot[slot]
                    if unit < 0 or kept[unit]:
                        count += 1
                product *= count
            total += product
        return total


def draw(random: np.random.Generator, degree: int) -> Drawn:
    axes = [random.integers(0, SLOTS, random.integers(1, 9)) for _ in range(5)]
    terms = []
    for _ in range(6):
        picked = random.integers(0, len(axes), degree)
        terms.append(Term(int(random.integers(1, 50)), tuple(axes[k] for k in picked)))
    return Drawn(terms, random.integers(-1, NEURONS, SLOTS))


def choices(count: int = NEURONS) -> list[np.ndarray]:
    """Every choice of that many neurons."""
    return [np.array([number >> i & 1 for i in range(count)], dtype=bool) for number in range(2**count)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_a_value_is_counted_slot_by_slot(degree: int, seed: int) -> None:
    drawn = draw(np.random.default_rng([degree, seed]), degree)
    metric = drawn.metric
    assert metric.size == NEURONS
    for kept in choices():
        assert metric.value(kept) == drawn.cost(kept)
    assert metric.whole == drawn.cost(np.ones(NEURONS, dtype=bool))


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_costs_come_term_by_term(degree: int) -> None:
    random = np.random.default_rng(degree)
    drawn = draw(random, degree)
    kept = random.random(NEURONS) > 0.4
    alone = [Drawn([term], drawn.unit_of_slot).cost(kept) for term in drawn.terms]
    assert drawn.metric.per_term(kept).tolist() == alone


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_a_further_neuron_never_makes_it_less(degree: int) -> None:
    random = np.random.default_rng(degree)
    for _ in range(20):
        drawn = draw(random, degree)
        metric, kept = drawn.metric, np.zeros(NEURONS, dtype=bool)
        last = metric.value(kept)
        for unit in random.permutation(NEURONS):
            kept[unit] = True
            assert metric.value(kept) >= last
            last = metric.value(kept)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_a_neuron_or_a_bundle_of_them_adds_the_difference(degree: int) -> None:
    """A bundle may hold neurons that are kept already; `kept` itself stays as it was."""
    random = np.random.default_rng(degree)
    for _ in range(30):
        drawn = draw(random, degree)
        metric, kept = drawn.metric, random.random(NEURONS) > 0.5
        before = kept.copy()
        for size in range(1, NEURONS + 1):
            bundle = random.permutation(NEURONS)[:size]
            together = kept.copy()
            together[bundle] = True
            assert metric.added(kept, bundle) == drawn.cost(together) - drawn.cost(kept)
        unit = int(random.integers(NEURONS))
        assert metric.added(kept, unit) == metric.added(kept, np.array([unit]))
        assert (kept == before).all()


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_what_each_neuron_adds(degree: int) -> None:
    """Exact up to two axes. A neuron on three axes of one term costs more than the sum over pairs of them."""
    random = np.random.default_rng(degree)
    missed = 0
    for _ in range(40):
        drawn = draw(random, degree)
        metric, kept = drawn.metric, random.random(NEURONS) > 0.5
        each = metric.added_each(kept)
        for unit in np.flatnonzero(~kept):
            more = kept.copy()
            more[unit] = True
            exact = drawn.cost(more) - drawn.cost(kept)
            assert each[unit] <= exact
            missed += each[unit] < exact
    assert missed == 0 or degree == 3


def test_a_neuron_that_lies_on_two_axes_of_a_layer_counts_on_both() -> None:
    """A convolution within a stream of 3 channels, of which one is no neuron's."""
    axis = np.array([0, 1, 2])
    metric = Metric("flops", "FLOPs", [Term(10, (axis, axis))], np.array([-1, 0, 1]), 2)
    none, first = np.array([False, False]), np.array([True, False])
    assert metric.value(none) == 10 * 1 * 1
    assert metric.added_each(none).tolist() == [10 * (2 * 2 - 1 * 1)] * 2
    assert metric.added_each(first)[1] == 10 * (3 * 3 - 2 * 2)
    assert metric.added(none, np.array([0, 1])) == 10 * (3 * 3 - 1 * 1)


def test_a_printed_count_is_rounded_as_a_whole() -> None:
    axis = np.arange(1, 11)
    model = Metric("flops", "FLOPs", [Term(2 * 1234, (axis,), printed=True)], np.arange(-1, 10), 10)
    everything = np.ones(10, dtype=bool)
    assert model.value(everything) == 24_680 // 2
    assert model.value(np.arange(10) < 7) == 17_280 // 2  # 2 * 1234 * 7 + 1 = 17 277
    assert model.added_each(np.arange(10) < 7)[9] == 1234


def test_no_calls_cost_nothing() -> None:
    assert Metric("flops", "FLOPs", [], np.zeros(0, dtype=int), 0).value(np.zeros(0, dtype=bool)) == 0
    empty = Metric("flops", "FLOPs", [], np.array([-1, 0, 1]), 2)
    assert empty.whole == 0
    assert empty.added_each(np.zeros(2, dtype=bool)).tolist() == [0, 0]


# ---------------------------------------------------------------------------------------------- the terms


def test_elements_of_a_value_are_a_product_of_its_dims() -> None:
    graph = allocator.trace(Odd().eval(), torch.zeros(2, 3, 8, 6))
    everything = np.ones(graph.size, dtype=bool)
    for index, value in enumerate(graph.flow.trace.values):
        for dims in (slice(None), slice(0, 2), slice(-1, None)):
            term = Term.of(elements(graph.flow, index, 5, dims))
            metric = Metric("flops", "FLOPs", [term], graph.unit_of_slot, graph.size)
            assert metric.value(everything) == 5 * int(np.prod(value.shape[dims], dtype=int))


def test_products_are_multiplied() -> None:
    rows, columns = np.array([1, 2]), np.array([3])
    product = times(Product(3, [None, rows]), Product(5, [columns]))
    assert product.factor == 15
    term = Term.of(product, "layer", 4)
    assert (term.factor, term.module, term.op, term.printed) == (15, "layer", 4, False)
    assert [axis.tolist() for axis in term.axes] == [[1, 2], [3]]
    assert Term.of(Product(2, [rows], printed=True)).printed


# ----------------------------------------------------------------------------- against torch's and fvcore's count


def counted(model: nn.Module, *inputs: Tensor) -> dict[str, int]:
    """What a user reads from torch and from fvcore."""
    params = sum(parameter.numel() for parameter in model.parameters())
    assert parameter_count(model)[""] == params
    return {
        "flops": int(_analysis(FlopCountAnalysis, model, inputs).total()),
        "params": params,
        "activations": int(_analysis(ActivationCountAnalysis, model, inputs).total()),
    }


def _analysis(kind: Any, model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    # Gradients stay on: without them torch fuses attention into calls that neither fvcore nor a trace sees into.
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    analysis = kind(model.eval(), inputs)
    return analysis.tracer_warnings("none").uncalled_modules_warnings(False).unsupported_ops_warnings(False)


def whole(graph: ChannelGraph) -> dict[str, int]:
    return {name: graph.metric(name).whole for name in METRICS}


def planned(graph: ChannelGraph, allocation: Allocation) -> dict[str, int]:
    kept = kept_by(graph, allocation)
    assert kept is not None
    return {name: graph.metric(name).value(kept) for name in METRICS}


def smaller(graph: ChannelGraph, asked: dict[str, Any], criterion: Any, **options: Any) -> tuple[Allocation, nn.Module]:
    """A plan within these budgets, and the network that was really rewritten by it."""
    allocation = allocator.plan(graph, allocator.score(graph, criterion), **asked, **options)
    return allocation, allocator.rewrite(graph.model, allocation)


class Odd(nn.Module):
    """Parameters of every sort: shared, single numbers, unused, grouped, under a norm and without one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.plain_norm = nn.BatchNorm2d(8, affine=False)
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, bias=False)
        self.second.weight = self.first.weight
        self.depthwise, self.wide = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 1)
        self.scale, self.per_channel = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.rand(12, 1, 1))
        self.unused = nn.Linear(5, 7)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain_norm(self.norm(self.stem(x)).relu())
        x = self.depthwise(self.second(self.first(x).relu()))
        return self.head((self.wide(x) * self.per_channel * self.scale).relu().mean((2, 3)))


@pytest.mark.parametrize("name", list(WHOLE))
def test_a_call_writes_what_fvcore_counts(name: str) -> None:
    model, shapes = WHOLE[name]
    inputs = inputs_of(shapes)
    assert whole(allocator.trace(model, inputs)) == counted(model, *inputs)


def test_a_convolution_padded_by_a_word_writes_as_much_as_any_other() -> None:
    """fvcore leaves it out; its FLOPs are counted as well."""
    by_word, by_number = nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(3, 4, 3, padding=1)
    image = torch.zeros(1, 3, 9, 8)
    assert counted(by_word, image)["activations"] == 0
    assert whole(allocator.trace(by_word, image)) == counted(by_number, image)


@pytest.mark.parametrize("limited", METRICS)
def test_parameters_of_every_sort(limited: str) -> None:
    model, image = Odd().eval(), torch.zeros(1, 3, 8, 6)
    graph = allocator.trace(model, image)
    assert whole(graph) == counted(model, image)
    allocation, small = smaller(graph, {limited: "60%"}, "magnitude")
    assert planned(graph, allocation) == counted(small, image)
    assert planned(graph, allocation)[limited] <= 0.6 * whole(graph)[limited]


@pytest.mark.parametrize("name", list(REWRITTEN))
def test_a_rewritten_network_is_as_large_as_planned(name: str) -> None:
    model, options = REWRITTEN[name]
    traced = {key: options[key] for key in ("groups", "norms") if key in options}
    graph = allocator.trace(model, IMAGE, **traced)
    assert whole(graph) == counted(model, IMAGE)
    for limited in ("params", "activations"):
        allocation, small = smaller(graph, {limited: "75%"}, "magnitude")
        assert planned(graph, allocation) == counted(small, IMAGE)
        assert planned(graph, allocation)[limited] <= 0.75 * whole(graph)[limited]


def test_a_layer_without_neurons_has_no_parameters() -> None:
    model = allocator.build("recipe:scalenet-small-seed", planes=[4, 6], blocks=[1, 1], num_classes=5).eval()
    image = torch.zeros(1, 1, 32, 32)
    graph = allocator.trace(model, image)
    layer = next(iter(graph.optional))
    scores = np.arange(1.0, graph.size + 1)
    scores[graph.units(graph.slots.labels(f"{layer}.weight")[0])] = 0
    allocation, small = smaller(graph, {"params": "90%"}, scores, policy="global", fill=False)
    assert layer in allocation.absent
    assert f"{layer}.weight" not in small.state_dict()
    assert planned(graph, allocation) == counted(small, image)


SMALL = (
    "torchvision:shufflenet_v2_x1_0",
    "torchvision:mobilenet_v3_small",
    "timm:skresnet18",
)
NETWORKS = [pytest.param(name, marks=() if name in SMALL else pytest.mark.sweep) for name in REFERENCE_SET]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_counted_as_others_count_it(name: str) -> None:
    """Whole, under a budget of one metric, and under budgets of all three, of which none is exceeded."""
    model, image = randomised(name), example(name)
    graph = allocator.trace(model, image)
    own = counted(model, image)
    assert whole(graph) == own
    for asked in ({"params": "70%"}, {"flops": "85%", "params": "80%", "activations": "90%"}):
        allocation, small = smaller(graph, asked, "bn_scale", policy="global")
        count = counted(small, image)
        assert planned(graph, allocation) == count
        for metric, share in asked.items():
            figures = allocation.costs[metric]
            assert (figures["before"], figures["after"]) == (own[metric], count[metric])
            assert count[metric] <= figures["asked"] == pytest.approx(own[metric] * float(share[:-1]) / 100)


def test_terms_say_which_module_runs() -> None:
    """Added up over each module's children they are fvcore's counts by module."""
    model, image = randomised("torchvision:mobilenet_v3_small"), example("torchvision:mobilenet_v3_small")
    graph = allocator.trace(model, image)
    everything = np.ones(graph.size, dtype=bool)
    modules = dict(model.named_modules())
    by_module = {
        "flops": _analysis(FlopCountAnalysis, model, (image,)).by_module(),
        "params": parameter_count(model),
        "activations": _analysis(ActivationCountAnalysis, model, (image,)).by_module(),
    }
    for name, expected in by_module.items():
        metric = graph.metric(name)
        found: Counter[str] = Counter()
        for term, cost in zip(metric.terms, metric.per_term(everything).tolist(), strict=True):
            found[""] += cost
            path = term.module
            while path:
                found[path] += cost
                path = path.rpartition(".")[0]
        assert {path: count for path, count in found.items() if count} == {
            path: count for path, count in expected.items() if count and path in modules
        }


def test_a_metric_that_there_is_not() -> None:
    graph = allocator.trace(Odd().eval(), IMAGE)
    with pytest.raises(UnknownNameError, match=r"no metric 'energy' \(there are flops, params, activations"):
        graph.metric("energy")
    with pytest.raises(UnknownNameError, match=r"no metric 'flop'; did you mean 'flops'\? \(there are"):
        graph.metric("flop")
    with pytest.raises(UnknownNameError, match=r"latency is not known before it is measured"):
        graph.metric("latency")
