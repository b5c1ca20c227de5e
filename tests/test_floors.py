"""What must stay whatever the budget: scopes, floors, and widths that the caller asks for."""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_graphs import channel_units
from subjects import IMAGE, Nested, trained
from torch import nn

import allocator
from allocator import BudgetError, ChannelGraph, InputError, Scores
from allocator.cost.budget import Budget, Budgets, parse_budgets
from allocator.cost.metric import Metric
from allocator.cost.terms import Term
from allocator.flow.facts import AtLeast
from allocator.planning.multiples import to_multiples
from allocator.planning.plan import make_plan
from allocator.planning.problem import Problem, Widths, forced_neurons, free_neurons

SCOPES = ("branches", "inner", "all")


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    return allocator.trace(trained(Nested()), IMAGE)


@pytest.fixture
def scores(graph: ChannelGraph) -> Scores:
    return allocator.score(graph, "bn_scale")


def test_a_scope_lets_neurons_go(graph: ChannelGraph, scores: Scores) -> None:
    branches = {*channel_units(graph, "left"), *channel_units(graph, "right")}
    inner = branches | set(channel_units(graph, "inner"))
    whole = inner | set(channel_units(graph, "stem"))
    assert len(whole) == graph.size == 12 + 10 + 14
    for scope, expected in zip(SCOPES, (branches, inner, whole), strict=True):
        assert set(np.flatnonzero(free_neurons(graph, scores, scope)).tolist()) == expected
    values = scores.values.copy()
    values[[0, 13, 30]] = np.nan
    free = free_neurons(graph, Scores("mine", values), "all")
    assert np.flatnonzero(~free).tolist() == [0, 13, 30]


def with_floors(graph: ChannelGraph, floors: list[AtLeast], optional: tuple[str, ...] = ()) -> ChannelGraph:
    """The same graph, of which other numbers of neurons must stay."""
    return replace(graph, facts=replace(graph.facts, at_least=floors), optional={layer: (layer,) for layer in optional})


def neuron_of_slot(graph: ChannelGraph) -> dict[int, int]:
    """By the names of the neurons' members, not by the graph's own table."""
    return {graph.slots.base[name][dim] + index: n.index for n in graph.neurons for name, dim, index in n.members}


def staying(label: np.ndarray, units: dict[int, int], kept: np.ndarray) -> int:
    """How many of these slots stay."""
    return sum(kept[units[slot]] if slot in units else True for slot in label.tolist())


def best_enough(label: np.ndarray, minimum: int, units: dict[int, int], free: np.ndarray, values: np.ndarray) -> Any:
    """The fewest best neurons beside those that are not free with which enough slots stay."""
    kept = ~free
    among = sorted({units[slot] for slot in label.tolist() if slot in units}, key=lambda unit: (-values[unit], unit))
    for unit in among:
        if staying(label, units, kept) >= minimum:
            break
        kept[unit] = True
    return kept


@pytest.mark.parametrize("minimum", [1, 2, 3, 100])
@pytest.mark.parametrize("seed", range(8))
def test_the_best_of_each_floor_stay(graph: ChannelGraph, minimum: int, seed: int) -> None:
    """Slots of a floor may be no neuron's, may be of one that is not free, and several may be of one neuron."""
    random = np.random.default_rng(seed)
    units, values = neuron_of_slot(graph), random.random(graph.size)
    free = random.random(graph.size) < 0.8
    few = set(random.choice(graph.size, 4, replace=False).tolist())
    of_few = [slot for slot, unit in units.items() if unit in few]
    slots = np.array(of_few) if seed % 2 else np.arange(graph.slots.total)
    label = random.choice(slots, 8, replace=False)
    forced = forced_neurons(with_floors(graph, [AtLeast(label, "layer", minimum)]), Scores("mine", values), free)
    assert forced.tolist() == best_enough(label, minimum, units, free, values).tolist()
    assert staying(label, units, forced) >= min(minimum, len(label))


@pytest.mark.parametrize("seed", range(20))
def test_floors_that_overlap_are_all_satisfied(graph: ChannelGraph, seed: int) -> None:
    random = np.random.default_rng(seed)
    units, values = neuron_of_slot(graph), random.random(graph.size)
    slots = np.array(sorted(units))
    floors = []
    for _ in range(6):
        label = random.choice(slots, random.integers(3, 20), replace=False)
        floors.append(AtLeast(label, "layer", int(random.integers(1, 4))))
    free = random.random(graph.size) < 0.9
    forced = forced_neurons(with_floors(graph, floors), Scores("mine", values), free)
    assert forced[~free].all()
    for floor in floors:
        assert staying(floor.label, units, forced) >= floor.minimum
    assert (forced & free).sum() <= sum(floor.minimum for floor in floors)


def test_what_a_small_floor_keeps_counts_for_a_large_one(graph: ChannelGraph) -> None:
    """Whichever was noted first: the best of the left layer is one of the two that the concatenation keeps."""
    left, right = (graph.slots.labels(f"{layer}.weight")[0] for layer in ("left", "right"))
    values = np.arange(float(graph.size))
    floors = [AtLeast(np.concatenate([left, right]), "", 2), AtLeast(left, "left"), AtLeast(right, "right")]
    free = np.ones(graph.size, dtype=bool)
    expected = sorted([max(channel_units(graph, "left")), max(channel_units(graph, "right"))])
    for order in (floors, floors[::-1]):
        forced = forced_neurons(with_floors(graph, order), Scores("mine", values), free)
        assert np.flatnonzero(forced).tolist() == expected


def test_a_layer_that_the_forward_can_do_without_has_no_floor(graph: ChannelGraph, scores: Scores) -> None:
    floors = [AtLeast(graph.slots.labels(f"{layer}.weight")[0], layer) for layer in ("left", "right")]
    free = np.ones(graph.size, dtype=bool)
    forced = forced_neurons(with_floors(graph, floors, ("left",)), scores, free)
    assert not forced[channel_units(graph, "left")].any()
    best = max(channel_units(graph, "right"), key=lambda unit: scores.values[unit])
    assert np.flatnonzero(forced).tolist() == [best]


@pytest.mark.parametrize("name", ["scalenet-small", "res2net-small", "resnext-small"])
def test_floors_of_networks_are_satisfied(name: str) -> None:
    graph = allocator.trace(allocator.build(f"recipe:{name}"), torch.zeros(1, 1, 32, 32))
    random = Scores("random", np.random.default_rng(0).random(graph.size))
    units = neuron_of_slot(graph)
    for scope in SCOPES:
        free = free_neurons(graph, random, scope)
        forced = forced_neurons(graph, random, free)
        floors = [floor for floor in graph.facts.at_least if floor.module not in graph.optional]
        assert floors
        assert all(staying(floor.label, units, forced) >= floor.minimum for floor in floors)
        assert forced[~free].all()
        assert (forced & free).sum() < free.sum()


# ------------------------------------------------------------------------------------- widths that are asked for


@pytest.mark.parametrize(
    ("asked", "width", "minimum"),
    [
        (None, 10, 0),
        (0, 10, 0),
        (3, 10, 3),
        ("3", 10, 3),
        (30, 10, 10),
        ("25%", 10, 3),
        ("30%", 10, 3),
        ("7%", 100, 7),
        (" 10 % ", 64, 7),
        (0.25, 10, 3),
        (0.3, 10, 3),
        (1, 10, 1),
        ("100%", 10, 10),
        ({"stem": 4}, 10, 4),
        ({"stem*": 4, "s*": "50%"}, 10, 5),
        ({"stem.weight": 2}, 10, 2),
        ({"other": 4}, 10, 0),
        ({}, 10, 0),
    ],
)
def test_a_least_width_is_a_number_or_a_share(asked: Any, width: int, minimum: int) -> None:
    assert Widths(asked).minimum("stem.weight", width) == minimum


@pytest.mark.parametrize("asked", ["a few", "", "%", -1, "-5%", "150%", math.nan, math.inf, [3], {"stem": "x"}])
def test_a_least_width_that_is_neither_says_so(asked: Any) -> None:
    with pytest.raises(InputError, match=r"^at_least=.* is neither a number of channels nor a share such as '25%'$"):
        Widths(asked).minimum("stem.weight", 10)


def test_the_best_of_each_layer_stay_up_to_its_least_width(graph: ChannelGraph, scores: Scores) -> None:
    asked = {"stem": 5, "inner": "35%", "r*": 0.25}
    least = {"stem": 5, "inner": 4, "left": 1, "right": 2}
    free = np.ones(graph.size, dtype=bool)
    forced = forced_neurons(graph, scores, free, Widths(asked))
    for layer, count in least.items():
        units = channel_units(graph, layer)
        best = sorted(units, key=lambda unit: -scores.values[unit])[:count]
        assert [unit for unit in units if forced[unit]] == sorted(best)


def widths_of(model: nn.Module) -> dict[str, int]:
    """Channels that each convolution writes."""
    return {name: module.out_channels for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def test_a_rewritten_network_has_at_least_what_was_asked() -> None:
    model = trained(Nested())
    plain = allocator.allocate(model, "30%", example_inputs=IMAGE)
    asked = {"inner": 7, "left": "100%"}
    result = allocator.allocate(model, "30%", example_inputs=IMAGE, at_least=asked)
    before, after = widths_of(plain.model), widths_of(result.model)
    assert before["inner"] < 7
    assert before["left"] < 6
    assert after["inner"] >= 7
    assert after["left"] == 6
    assert result.flops_after <= result.flops_asked
    assert result.certificate.ok


WIDTHS = {"stem": 12, "inner": 10, "left": 6, "right": 8}


def stops(width: int, multiple: int) -> list[int]:
    """The widths that a layer may have: multiples, and its own."""
    return sorted({*range(multiple, width, multiple), width})


def kept_of(graph: ChannelGraph, kept: np.ndarray) -> dict[str, int]:
    return {layer: int(kept[channel_units(graph, layer)].sum()) for layer in WIDTHS}


@pytest.mark.parametrize("policy", ["global", "per_block", "priced", "uniform"])
@pytest.mark.parametrize("multiple", [2, 3, 4])
def test_widths_are_multiples_or_a_layers_own(graph: ChannelGraph, scores: Scores, multiple: int, policy: str) -> None:
    """Of each layer the best are kept, and no layer could be one step wider."""
    for share in (40, 55, 75, 90):
        budgets = parse_budgets({"flops": f"{share}%"}, {"flops": graph.metric("flops")})
        plan = make_plan(graph, scores, budgets, policy=policy, widths=Widths(multiple=multiple))
        assert budgets.met(plan.kept)
        for layer, count in kept_of(graph, plan.kept).items():
            units = sorted(channel_units(graph, layer), key=lambda unit: -scores.values[unit])
            assert count in stops(WIDTHS[layer], multiple)
            assert plan.kept[units[:count]].all()
            wider = [stop for stop in stops(WIDTHS[layer], multiple) if stop > count]
            if wider:
                more = plan.kept.copy()
                more[units[: wider[0]]] = True
                assert not budgets.met(more)


@pytest.mark.parametrize("multiple", [2, 3, 4])
def test_without_filling_widths_are_rounded_down(graph: ChannelGraph, scores: Scores, multiple: int) -> None:
    """Up only where there is no multiple below."""
    budgets = parse_budgets({"params": "60%"}, {"params": graph.metric("params")})
    plain = make_plan(graph, scores, budgets, policy="global", fill=False)
    plan = make_plan(graph, scores, budgets, policy="global", fill=False, widths=Widths(multiple=multiple))
    rounded = kept_of(graph, plan.kept)
    for layer, count in kept_of(graph, plain.kept).items():
        lower = [stop for stop in stops(WIDTHS[layer], multiple) if stop <= count]
        assert rounded[layer] == (lower[-1] if lower else multiple)


def test_a_multiple_goes_with_a_least_width(graph: ChannelGraph) -> None:
    """Five of the inner layer would do, were they not to be a multiple; six of the left branch are all."""
    values = np.arange(float(graph.size)) + 100
    values[channel_units(graph, "inner")] /= 1000
    budgets = parse_budgets({"flops": "60%"}, {"flops": graph.metric("flops")})
    asked = {"inner": 5, "left": "100%"}
    plain = make_plan(graph, Scores("mine", values), budgets, fill=False, widths=Widths(asked))
    plan = make_plan(graph, Scores("mine", values), budgets, fill=False, widths=Widths(asked, 4))
    assert (kept_of(graph, plain.kept)["inner"], kept_of(graph, plan.kept)["inner"]) == (5, 8)
    assert kept_of(graph, plan.kept)["left"] == 6


def test_a_layer_is_widened_where_it_just_fits(graph: ChannelGraph) -> None:
    """Both branches are four wide; the right one, which is worth more, gets the whole rest of the budget."""
    values = np.ones(graph.size)
    values[channel_units(graph, "right")] = 50
    four, wanted = np.ones(graph.size, dtype=bool), np.ones(graph.size, dtype=bool)
    for kept in (four, wanted):
        kept[channel_units(graph, "left")[4:]] = False
    four[channel_units(graph, "right")[4:]] = False
    metric, nothing = graph.metric("flops"), np.zeros(graph.size, dtype=bool)
    for spare, expected in ((0, wanted), (-1, four)):
        budgets = parse_budgets({"flops": metric.value(wanted) + spare}, {"flops": metric})
        problem = Problem(graph, Scores("mine", values), nothing, budgets, widths=Widths(multiple=4))
        found = kept_of(graph, to_multiples(problem, four))
        assert found["right"] == kept_of(graph, expected)["right"]
        assert (found["left"] == 4) == (spare == 0)


def test_a_multiple_goes_with_what_is_gone(graph: ChannelGraph, scores: Scores) -> None:
    budgets = parse_budgets({"flops": "90%"}, {"flops": graph.metric("flops")})
    gone = np.zeros(graph.slots.total, dtype=bool)
    stem = channel_units(graph, "stem")
    worst = np.argsort(scores.values[stem])[:7]
    gone[graph.slots.labels("stem.weight")[0][worst]] = True
    plan = make_plan(graph, scores, budgets, widths=Widths(multiple=4), gone=gone)
    assert kept_of(graph, plan.kept) == {"stem": 4, "inner": 10, "left": 6, "right": 8}, "of stem's five that may stay"
    assert not plan.kept[np.array(stem)[worst]].any()


@pytest.mark.parametrize("policy", ["global", "uniform", "priced"])
@pytest.mark.parametrize("multiple", [2, 3, 4, 5, 8])
def test_multiples_are_found_wherever_there_are_any(
    graph: ChannelGraph, scores: Scores, multiple: int, policy: str
) -> None:
    """Against every combination of widths. Where a layer had to be rounded up, others are narrower."""
    metric = graph.metric("flops")
    costs = []
    for widths in itertools.product(*(stops(width, multiple) for width in WIDTHS.values())):
        kept = np.zeros(graph.size, dtype=bool)
        for layer, count in zip(WIDTHS, widths, strict=True):
            kept[channel_units(graph, layer)[:count]] = True
        costs.append(metric.value(kept))
    met = set()
    for share in range(12, 80, 8):
        limit = metric.whole * share / 100
        budgets = Budgets([Budget(metric, limit)])
        for fills in (True, False):
            options: dict[str, Any] = {"policy": policy, "fill": fills, "widths": Widths(multiple=multiple)}
            if min(costs) <= limit:
                plan = make_plan(graph, scores, budgets, **options)
                assert metric.value(plan.kept) in costs
                assert budgets.met(plan.kept)
            else:
                with pytest.raises(BudgetError) as caught:
                    make_plan(graph, scores, budgets, **options)
                assert caught.value.reachable is not None
                assert caught.value.reachable <= min(costs)
        met.add(min(costs) <= limit)
    assert met == {True, False} or multiple == 2


def test_what_is_worth_least_is_narrowed_first(graph: ChannelGraph) -> None:
    """All layers cost the same per neuron; the inner one cannot come down to what the policy left of it."""
    values = np.zeros(graph.size)
    for layer, value in {"stem": 3.0, "inner": 0.1, "left": 2.0, "right": 5.0}.items():
        values[channel_units(graph, layer)] = value
    metric = Metric("params", "parameters", [Term(1, (np.arange(graph.size),))], np.arange(graph.size), graph.size)
    forced = np.zeros(graph.size, dtype=bool)
    for layer in WIDTHS:
        forced[channel_units(graph, layer)[0]] = True
    problem = Problem(graph, Scores("mine", values), forced, Budgets([Budget(metric, 24)]), False, Widths(multiple=4))
    kept = np.ones(graph.size, dtype=bool)
    kept[channel_units(graph, "inner")[1:]] = False  # 12 + 1 + 6 + 8
    assert kept_of(graph, to_multiples(problem, kept)) == {"stem": 8, "inner": 4, "left": 4, "right": 8}


def test_multiples_that_no_budget_allows_say_what_they_cost(graph: ChannelGraph, scores: Scores) -> None:
    metric = graph.metric("params")
    forced = forced_neurons(graph, scores, free_neurons(graph, scores, "all"))
    budgets = parse_budgets({"params": metric.value(forced)}, {"params": metric})
    assert make_plan(graph, scores, budgets).kept.tolist() == forced.tolist()
    with pytest.raises(BudgetError, match=r"parameters cannot be met with scope='auto', multiple=4") as caught:
        make_plan(graph, scores, budgets, widths=Widths(multiple=4))
    kept = np.zeros(graph.size, dtype=bool)
    for layer in WIDTHS:
        kept[sorted(channel_units(graph, layer), key=lambda unit: -scores.values[unit])[:4]] = True
    assert caught.value.reachable == metric.value(kept)
    assert f"the smallest that can be reached is {metric.value(kept):,} parameters" in str(caught.value)


def test_a_layer_that_can_be_done_without_may_go_whole() -> None:
    """None of its neurons is a multiple of any number."""
    model = allocator.build("recipe:scalenet-small-seed", planes=[4, 6], blocks=[1, 1], num_classes=5).eval()
    image = torch.zeros(1, 1, 32, 32)
    graph = allocator.trace(model, image)
    assert graph.optional
    result = allocator.allocate(model, "40%", example_inputs=image, multiple=4)
    assert result.certificate.ok
    assert result.allocation.absent
    for name, width in widths_of(result.model).items():
        assert width % 4 == 0 or width == widths_of(model)[name]


def test_a_rewritten_network_has_multiples() -> None:
    model = trained(Nested())
    result = allocator.allocate(model, "60%", example_inputs=IMAGE, multiple=4)
    for layer, width in widths_of(result.model).items():
        assert width % 4 == 0 or width == WIDTHS[layer]
    assert result.flops_after <= result.flops_asked
    assert result.certificate.ok


@pytest.mark.parametrize(
    ("per_group", "groups", "said"), [(4, "whole", True), (4, "width", False), (1, "whole", False)]
)
def test_a_floor_under_whole_groups_says_that_they_may_be_narrowed(per_group: int, groups: Any, said: bool) -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8 // per_group), nn.Conv2d(8, 2, 1)]
    with pytest.raises(BudgetError, match="cannot be met") as caught:
        allocator.allocate(nn.Sequential(*layers), "1%", example_inputs=torch.zeros(1, 3, 8, 8), groups=groups)
    assert ("groups='width' narrows all groups of a layer alike, and may reach less" in str(caught.value)) == said


IN_GROUPS = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 2, 1))


@pytest.mark.parametrize(("budget", "groups"), [("70%", "whole"), ("45%", "width")])
def test_groups_get_narrower_where_whole_ones_cannot_meet_the_budget(budget: str, groups: str) -> None:
    """One of the two groups is 50 % of the FLOPs."""
    image = torch.zeros(1, 3, 8, 8)
    result = allocator.allocate(IN_GROUPS, budget, example_inputs=image)
    assert result.allocation.groups == groups
    assert result.certificate.ok
    assert result.flops_after <= result.flops_asked
    assert any(note.startswith("groups of convolutions get narrower") for note in result.notes) == (groups == "width")
    assert result.model.get_submodule("1").groups == (1 if groups == "whole" else 2)
    again = allocator.rewrite(IN_GROUPS, result.allocation)
    assert again(image).shape == result.model(image).shape
    with contextlib.nullcontext() if groups == "whole" else pytest.raises(BudgetError, match="groups='width'"):
        allocator.allocate(IN_GROUPS, budget, example_inputs=image, groups="whole")


@pytest.mark.parametrize("criterion", ["group_norm", "fisher", "taylor"])
def test_groups_that_get_narrower_are_ranked_as_if_that_had_been_asked_for(criterion: str) -> None:
    """What goes together is scored together: the places of all groups, not the groups."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=3), nn.ReLU(), nn.Conv2d(24, 2, 1)]
    model = nn.Sequential(*layers)
    images = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    how: Any = {"criterion": criterion, "data": images, "loss": lambda output, _: output.square().mean()}
    either, width = (
        allocator.allocate(model, "30%", example_inputs=images[0][:1], groups=groups, **how)
        for groups in ("auto", "width")
    )
    assert either.allocation.kept == width.allocation.kept
    assert either.allocation.groups == "width"


def test_of_groups_that_go_either_way_the_lower_floor_is_named() -> None:
    image = torch.zeros(1, 3, 8, 8)

    def floor(groups: Any) -> BudgetError:
        with pytest.raises(BudgetError) as caught:
            allocator.allocate(IN_GROUPS, "1%", example_inputs=image, groups=groups)
        return caught.value

    whole, width, either = (floor(groups).reachable for groups in ("whole", "width", "auto"))
    assert whole is not None
    assert width is not None
    assert either == width < whole
    assert "groups='width'" not in str(floor("auto"))


def test_a_graph_followed_by_whole_groups_is_planned_on_as_it_is() -> None:
    image = torch.zeros(1, 3, 8, 8)
    assert allocator.plan(allocator.trace(IN_GROUPS, image), flops="45%").groups == "width"
    with pytest.raises(BudgetError, match="groups='width'"):
        allocator.plan(allocator.trace(IN_GROUPS, image, groups="whole"), flops="45%")


def test_budgets_of_a_sweep_lie_within_one_another_when_the_last_needs_narrower_groups() -> None:
    points = allocator.sweep(IN_GROUPS, ["70%", "45%"], example_inputs=torch.zeros(1, 3, 8, 8)).points
    assert [point.allocation.groups for point in points] == ["width", "width"]
    larger, smaller = (point.allocation.kept for point in points)
    for name in ("0.weight", "1.weight"):
        assert set(smaller[name][0] or ()) < set(larger[name][0] or range(8))


def test_steps_reach_a_budget_that_narrower_groups_alone_can_meet() -> None:
    done = allocator.iterate(
        IN_GROUPS, "45%", schedule=[0.5, 1.0], train=lambda model: None, example_inputs=torch.zeros(1, 3, 8, 8)
    )
    assert done.allocation.flops_after <= 0.45 * done.allocation.flops_before
