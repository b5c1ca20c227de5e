"""Wider networks: they compute the same, without what was added they are the original, and budgets are exact."""

from __future__ import annotations

import collections
import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_set import REFERENCE_SET, count, example, fvcore_count, randomised
from subjects import IMAGE, Branches, Nested, Parts, trained, untouched
from torch import Tensor, nn

import allocator
from allocator import AllocationMismatchError, BudgetError, InputError, NothingToAllocateError, Result
from allocator.pipeline.choice import budgets_of
from allocator.planning.widths import Layers, widest_within
from allocator.rewriting.index_map import added_places
from allocator.settings import Limits

INITS = ("zero", "copy")
# Shuffles, depthwise convolutions and squeeze-and-excitation in every run, the others in the long one.
ORDINARY = ("torchvision:shufflenet_v2_x1_0", "torchvision:mobilenet_v3_small")
NETWORKS = [pytest.param(name, marks=() if name in ORDINARY else pytest.mark.sweep) for name in REFERENCE_SET]


def added_neurons(result: Result, graph: allocator.ChannelGraph) -> np.ndarray:
    """(neurons,) bool: which neurons of the wider network were added."""
    added = np.zeros(graph.size, dtype=bool)
    for name, dims in result.allocation.kept.items():
        for start, source in zip(graph.slots.base[name], dims, strict=True):
            if source is not None:
                source = source[0] if isinstance(source[0], list) else source
                added[graph.unit_of_slot[start + added_places(np.array(source))]] = True
    return added


def check_widened(model: nn.Module, result: Result, image: Tensor, *, at_most: float | None = None) -> None:
    """What is promised of every wider network, seen from outside."""
    certificate = result.certificate
    assert certificate.ok
    assert certificate.widens
    assert certificate.weights
    assert certificate.relative_error is not None
    assert certificate.relative_error <= 1e-9
    assert certificate.effect is not None
    assert certificate.effect > 1e-6
    counted = count(result.model, image)
    assert counted.flops == result.flops_after > result.flops_before
    if at_most is not None:
        assert result.next_cost is not None
        assert counted.flops <= at_most < counted.flops + result.next_cost
    x = torch.randn(2, *image.shape[1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(result.model.eval()(x), model.eval()(x), rtol=1e-3, atol=1e-4)


def back(result: Result, image: Any) -> Result:
    """The original again: what was added is worth nothing, so that a budget of the original's drops it."""
    graph = allocator.trace(result.model, image)
    worth = np.where(added_neurons(result, graph), 0.0, 1.0)
    settings: dict[str, Any] = {"policy": "global", "example_inputs": image}
    return allocator.allocate(result.model, flops=result.flops_before, criterion=worth, **settings)


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("make", [Branches, Nested, Parts])
def test_a_wider_network_computes_the_same(make: type[nn.Module], init: Any) -> None:
    model = trained(make())
    with untouched(model):
        result = allocator.widen(model, flops="170%", init=init, example_inputs=IMAGE)
    check_widened(model, result, IMAGE, at_most=1.7 * result.flops_before)
    assert type(result.model) is type(model)
    assert result.model.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("make", [Branches, Nested, Parts])
def test_an_allocation_gives_the_original_back_bit_for_bit(make: type[nn.Module]) -> None:
    model = trained(make())
    result = allocator.widen(model, factor=1.5, example_inputs=IMAGE)
    again = back(result, IMAGE)
    assert again.flops_after == result.flops_before
    assert same_bits(again.model, model)


def test_data_show_what_nothing_reads() -> None:
    torch.manual_seed(0)
    model = trained(Nested())
    result = allocator.widen(model, factor=1.5, example_inputs=IMAGE)
    again = allocator.allocate(
        result.model,
        flops=result.flops_before,
        criterion="reconstruction",
        at_least=0,
        data=torch.randn(64, 3, 16, 16),
        example_inputs=IMAGE,
    )
    assert same_bits(again.model, model)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_every_kind(name: str, init: Any) -> None:
    model = randomised(name)
    result = allocator.widen(model, flops="130%", init=init)
    check_widened(model, result, example(name), at_most=1.3 * result.flops_before)
    assert result.flops_after > 1.29 * result.flops_before
    assert result.flops_after == fvcore_count(result.model, name).flops


@pytest.mark.parametrize("init", INITS)
def test_every_layer_grows_by_a_factor(init: Any) -> None:
    model = trained()
    result = allocator.widen(model, factor=1.5, init=init, example_inputs=IMAGE)
    wide = result.model
    assert [wide.stem.out_channels, wide.narrow.out_channels, wide.wide.out_channels] == [24, 24, 48]  # type: ignore[union-attr]
    assert wide.head.in_features == 72  # type: ignore[union-attr]
    assert result.plan.scope == "auto"


def test_what_reads_an_added_neuron_is_zero_and_what_writes_it_is_not() -> None:
    model = trained()
    result = allocator.widen(model, factor=1.5, example_inputs=IMAGE)
    graph = allocator.trace(result.model, IMAGE)
    added = added_neurons(result, graph)
    head = graph.slots.labels("head.weight")[1]
    columns = dict(result.model.named_parameters())["head.weight"].detach()
    assert not columns[:, added[graph.unit_of_slot[head]]].any()
    rows, own = dict(result.model.named_parameters())["wide.weight"].detach(), model.wide.weight.detach()
    fresh = rows[added[graph.unit_of_slot[graph.slots.labels("wide.weight")[0]]]]
    assert 0.5 < float(fresh[:, :4].std() / own.std()) < 2
    assert not any(torch.equal(row[:4], other[:4]) for row in fresh for other in own)


def test_shares_of_copies_add_up_to_the_last_bit_and_differ() -> None:
    model = trained()
    result = allocator.widen(model, factor=3.6, init="copy", example_inputs=IMAGE)
    source = np.array(result.allocation.kept["head.weight"][1])
    wide = dict(result.model.named_parameters())["head.weight"].detach()
    for column in range(model.head.in_features):
        parts = [wide[:, i] for i in np.flatnonzero(source == column)]
        assert len(parts) in (3, 4)
        total = parts[-1]
        for part in parts[-2::-1]:
            total = part + total  # the later share is what the earlier left
        assert torch.equal(total, model.head.weight[:, column])
        assert all(not torch.equal(a, b) for i, a in enumerate(parts) for b in parts[:i])


def test_copies_part_after_one_training_step() -> None:
    model = trained(Nested())
    result = allocator.widen(model, factor=2, init="copy", example_inputs=IMAGE)
    wide = result.model.train()
    names = [name for name in result.allocation.kept if name.endswith("weight") and "norm" not in name]
    before = copies(result, names)
    assert any(torch.equal(a, b) for a, b in before), "copies are alike before"
    optimiser = torch.optim.SGD(wide.parameters(), lr=0.1)
    wide(torch.randn(8, 3, 16, 16)).square().mean().backward()
    optimiser.step()
    assert not any(torch.equal(a, b) for a, b in copies(result, names))


def copies(result: Result, names: list[str]) -> list[tuple[Tensor, Tensor]]:
    """Rows of weights that write neurons with one source."""
    parameters, pairs = dict(result.model.named_parameters()), []
    for name in names:
        source = result.allocation.kept[name][0] or []
        for i in added_places(np.array(source, dtype=np.int64)).tolist():
            rows = parameters[name].detach()
            pairs.append((rows[source.index(source[i])], rows[i]))
    return pairs


def test_the_widths_of_an_allocation() -> None:
    """What was learned of a network with more neurons than it needs, for one with fewer."""
    seed = allocator.widen(trained(), factor=2, example_inputs=IMAGE)
    learned = allocator.allocate(seed.model, flops="80%", example_inputs=IMAGE, scope="branches", at_least="75%")
    small = trained(Branches())
    result = allocator.widen(small, like=learned, example_inputs=IMAGE)
    check_widened(small, result, IMAGE)
    for layer in ("narrow", "wide"):
        wanted = learned.model.get_submodule(layer).out_channels
        assert result.model.get_submodule(layer).out_channels == wanted
    with pytest.raises(InputError, match=r"narrower than they are \(.*weight has 32 channels, and \d+ there"):
        allocator.widen(seed.model, like=learned, example_inputs=IMAGE)


def test_only_what_is_included_grows() -> None:
    model = trained()
    result = allocator.widen(model, factor=2, include="wide", example_inputs=IMAGE)
    check_widened(model, result, IMAGE)
    assert result.model.wide.out_channels == 64  # type: ignore[union-attr]
    assert result.model.narrow.out_channels == 16  # type: ignore[union-attr]
    branches = allocator.widen(model, factor=2, scope="branches", example_inputs=IMAGE).model
    assert branches.stem.out_channels == 16  # type: ignore[union-attr]
    assert branches.narrow.out_channels == 32  # type: ignore[union-attr]


class Normed(nn.Module):
    """A group norm over three groups of four, a grouped convolution, and a layer norm over the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(3, 12)
        self.grouped = nn.Conv2d(12, 6, 3, padding=1, groups=3)
        self.last = nn.Conv2d(6, 8, 1)
        self.inner, self.outer = nn.Linear(8, 20), nn.Linear(20, 8)
        self.layer_norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.grouped(self.norm(self.stem(x)).relu())).mean((2, 3))
        return self.head(self.layer_norm(x + self.outer(self.inner(x).relu())))


@pytest.mark.parametrize("init", INITS)
def test_groups_grow_whole_and_what_a_norm_averages_over_is_named(init: Any) -> None:
    torch.manual_seed(0)
    model = Normed().eval()
    result = allocator.widen(model, factor=5 / 3, init=init, example_inputs=IMAGE)
    check_widened(model, result, IMAGE)
    wide: Any = result.model
    assert (wide.norm.num_groups, wide.norm.num_channels) == (5, 20)
    assert (wide.grouped.groups, wide.grouped.in_channels, wide.grouped.out_channels) == (5, 20, 10)
    assert (wide.inner.out_features, wide.last.out_channels) == (33, 8)
    assert any("8 neurons that a norm averages over (last.weight), which grow to whole" in s for s in result.notes)
    narrow = allocator.widen(model, factor=1.5, init=init, groups="width", include="grouped", example_inputs=IMAGE)
    check_widened(model, narrow, IMAGE)


# Kept, read and composed ----------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
def test_a_wider_network_is_saved_loaded_applied_and_verified(init: Any, tmp_path: Path) -> None:
    model = trained(Nested())
    result = allocator.widen(model, factor=1.4, init=init, example_inputs=IMAGE, seed=3)
    allocator.save(result, tmp_path / "wide.safetensors")
    result.allocation.save(tmp_path / "wide.json")
    assert same_bits(allocator.load(tmp_path / "wide.safetensors", model=trained(Nested())), result.model)
    assert same_bits(allocator.apply(model, tmp_path / "wide.json"), result.model)
    assert allocator.verify(model, result.model, tmp_path / "wide.json", example_inputs=IMAGE).ok
    unsaid = replace(result.allocation, added={})
    with pytest.raises(AllocationMismatchError, match="its field 'added' does not say what they are filled with"):
        allocator.apply(model, unsaid)
    with pytest.raises(AllocationMismatchError, match="its field 'added' does not say what they are filled with"):
        allocator.verify(model, result.model, unsaid, example_inputs=IMAGE)
    changed = copy.deepcopy(result.model)
    with torch.no_grad():
        changed.left.weight[0, -1] += 1e-3  # type: ignore[index,union-attr,operator]
    assert not allocator.verify(model, changed, result.allocation, example_inputs=IMAGE).ok
    with pytest.raises(AllocationMismatchError):
        allocator.apply(trained(), result.allocation)


def test_an_index_that_was_put_elsewhere_is_noticed() -> None:
    model = trained()
    result = allocator.widen(model, factor=1.5, example_inputs=IMAGE)
    other = copy.deepcopy(result.allocation)
    rows = other.kept["narrow.weight"][0]
    assert rows is not None
    rows[0], rows[2] = rows[2], rows[0]
    assert not allocator.verify(model, result.model, other, example_inputs=IMAGE).ok


def test_a_wider_network_is_allocated_and_widened_again(tmp_path: Path) -> None:
    model = trained(Nested())
    wide = allocator.widen(model, factor=1.5, example_inputs=IMAGE)
    small = allocator.allocate(wide.model, flops="60%", example_inputs=IMAGE)
    wider = allocator.widen(small.model, factor=1.25, init="copy", example_inputs=IMAGE)
    allocator.save(wider, tmp_path / "wider.safetensors")
    assert same_bits(allocator.load(tmp_path / "wider.safetensors", model=trained(Nested())), wider.model)
    whole = wide.allocation.compose(small.allocation).compose(wider.allocation)
    assert allocator.verify(model, wider.model, whole, example_inputs=IMAGE).ok
    assert same_bits(allocator.apply(model, whole), wider.model)


# What cannot be ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"factor": 0.5}, InputError, "factor=0.5 would make layers narrower: pass 1.5, for example; allocate takes"),
        ({"factor": float("nan")}, InputError, "factor=nan is no number such as 1.5"),
        ({"factor": True}, InputError, "factor is True, and takes a number"),
        ({"factor": "2"}, InputError, "factor is '2', and takes a number"),
        ({"factor": 10**400}, InputError, r"factor=10+ \.\.\. is more than 1024"),
        ({"factor": 1e30}, InputError, r"factor=1e\+30 is more than 1024, the most that layers are widened by"),
        ({"flops": "1e30%"}, BudgetError, "would make every layer more than 1024 times as wide: ask for less"),
        ({"factor": 1.01}, NothingToAllocateError, "adds nothing to any layer: .* has 32 neurons, and 1.016 adds 1"),
        ({"flops": "50%"}, BudgetError, "694,512 FLOPs are below the model's own 1,389,024 FLOPs: widen adds neurons"),
        ({"flops": "100%"}, BudgetError, "leave no room for another neuron .* the least that adds one is 1,[0-9,]+"),
        ({"flops": "150%", "multiple": 10**9}, NothingToAllocateError, r"no number added .* a multiple of 1000000000"),
        ({"flops": "150%", "multiple": 3000}, BudgetError, "leave no room for another neuron .* the least that adds"),
        ({"flops": "much"}, BudgetError, "flops='much' is not a number"),
        ({}, InputError, "none of flops, factor and like given: pass one of them"),
        ({"flops": "150%", "factor": 2}, InputError, "flops and factor given: pass one of them"),
        ({"factor": 2, "init": "ones"}, allocator.UnknownNameError, "no init 'ones'"),
        (
            {"factor": 2, "like": None, "include": "nothing*"},
            NothingToAllocateError,
            r"no neuron can be added to the model exactly: include='nothing\*' matches no module or parameter",
        ),
        ({"factor": 2, "seed": -1}, InputError, r"seed=-1 is no whole number from 0 to 2\*\*63 - 1"),
        ({"factor": 2, "init": "copy", "seed": 2**63}, InputError, "seed=9223372036854775808 is no whole number"),
    ],
)
@pytest.mark.filterwarnings("ignore::allocator.UnmatchedPatternWarning")
def test_what_is_asked_must_be_wider(asked: dict[str, Any], error: type[Exception], message: str) -> None:
    model = trained()
    with untouched(model), pytest.raises(error, match=message):
        allocator.widen(model, **asked, example_inputs=IMAGE)


@pytest.mark.parametrize("factor", [np.float32(1.5), np.int64(2), np.float64(1.5)])
def test_numbers_of_numpy_are_numbers(factor: Any) -> None:
    model = trained()
    wide, same = (allocator.widen(model, factor=each, example_inputs=IMAGE) for each in (factor, float(factor)))
    assert wide.flops_before < wide.flops_after == same.flops_after


def test_a_scope_without_neurons_is_named() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with pytest.raises(NothingToAllocateError, match="8 neurons can only be added to in a wider scope than 'branches'"):
        allocator.widen(model, factor=2, scope="branches", example_inputs=torch.zeros(1, 6))


def test_where_nothing_can_be_added_the_error_says_what_would_be_inexact() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Softmax(-1), nn.Linear(8, 3)).eval()
    with pytest.raises(NothingToAllocateError, match=r"exactly: every channel depends on all others .* in 1 \(8"):
        allocator.widen(model, factor=2, example_inputs=torch.zeros(1, 6))


def test_the_least_that_adds_a_neuron_adds_one() -> None:
    model = trained()
    with pytest.raises(BudgetError) as raised:
        allocator.widen(model, flops="100%", example_inputs=IMAGE)
    reachable = raised.value.reachable
    assert reachable is not None
    assert allocator.widen(model, flops=reachable, example_inputs=IMAGE).flops_after == reachable


def test_widths_are_found_in_steps_that_grow_with_the_layers() -> None:
    """Calls of functions are counted, and no time: of three times as many layers about three times as many."""

    def steps(count: int) -> int:
        chain = nn.Sequential(*[nn.Linear(8, 8) for _ in range(count)], nn.Linear(8, 2))
        graph = allocator.trace(chain, torch.zeros(2, 8))
        layers = Layers.of(graph, "all", np.zeros(0, dtype=np.int64))
        budgets = budgets_of(graph, Limits(flops="150%"))
        seen = collections.Counter[str]()
        sys.setprofile(lambda frame, event, argument: seen.update([event]))
        try:
            widest_within(layers, budgets)
        finally:
            sys.setprofile(None)
        return seen["call"] + seen["c_call"]

    assert steps(90) < 4.5 * steps(30)
