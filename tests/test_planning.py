"""Planning: who competes with whom, policies of the caller's own, scopes, and what errors say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import torch
from small_graphs import channel_units, graph_of, net
from subjects import IMAGE, Nested, trained
from torch import Tensor, nn

import allocator
from allocator import BudgetError, ChannelGraph, NothingToAllocateError, PolicyError, Scores, UnknownNameError
from allocator.cost.budget import Budgets, parse_budgets
from allocator.planning.plan import CLOSE, Plan, make_plan
from allocator.planning.policies import ordered
from allocator.planning.policies.registry import POLICIES, find_policy, policy
from allocator.planning.problem import Problem, forced_neurons, free_neurons, least

SCOPES = ("branches", "inner", "all")
POLICY_NAMES = "there are auto, per_block, global, isomorphic, uniform, priced"


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    return allocator.trace(trained(Nested()), IMAGE)


@pytest.fixture
def scores(graph: ChannelGraph) -> Scores:
    return allocator.score(graph, "bn_scale")


def budgets_of(graph: ChannelGraph, asked: dict[str, Any]) -> Budgets:
    return parse_budgets(asked, {name: graph.metric(name) for name in asked})


# ---------------------------------------------------------------------------------------------------- policies


def ranks(values: np.ndarray, group: np.ndarray, tie: np.ndarray) -> list[float]:
    """(rank + 1/2) / size of each neuron in its group: the best first, of equals the first by `tie`, then by index."""
    shares = [0.0] * len(values)
    for number in set(group.tolist()):
        members = [i for i in range(len(values)) if group[i] == number]
        members.sort(key=lambda i: (-np.nan_to_num(values[i]), tie[i], i))
        for rank, i in enumerate(members):
            shares[i] = (rank + 0.5) / len(members)
    return shares


@pytest.mark.parametrize("seed", range(5))
def test_ranks_within_groups(seed: int) -> None:
    random = np.random.default_rng(seed)
    group, values = random.integers(0, 4, 30), random.integers(0, 6, 30) / 5
    values[random.integers(0, 30, 3)] = np.nan
    tie = random.integers(0, 3, 30)
    assert ordered.rank_within(group, values, tie).tolist() == ranks(values, group, tie)
    assert ordered.rank_within(group, values).tolist() == ranks(values, group, np.arange(30))


@pytest.mark.parametrize("ties", [True, False])
def test_who_competes_with_whom(graph: ChannelGraph, ties: bool) -> None:
    values = np.random.default_rng(0).random(graph.size)
    values = values.round(1) if ties else values
    problem = Problem(graph, Scores("mine", values), np.zeros(graph.size, dtype=bool), cast(Budgets, None))
    layer, block = np.zeros(graph.size, dtype=int), np.zeros(graph.size, dtype=int)
    for number, name in enumerate(("stem", "inner", "left", "right")):
        layer[channel_units(graph, name)] = number
        block[channel_units(graph, name)] = min(number, 2)  # left and right meet in one block
    within_layer = np.array(ranks(values, layer, np.arange(graph.size)))
    everything = np.zeros(graph.size, dtype=int)
    assert ordered.uniform(problem).tolist() == within_layer.tolist()
    assert ordered.per_block(problem).tolist() == ranks(values, block, within_layer)
    assert ordered.all_together(problem).tolist() == ranks(values, everything, within_layer)
    assert ordered.isomorphic(problem).tolist() == ranks(values, alike(graph), within_layer)


def alike(graph: ChannelGraph) -> np.ndarray:
    """Neurons that lie in the same dims of tensors of the same name and shape, in layers of the same class."""
    kinds: list[frozenset[tuple[str, str, tuple[int, ...], int]]] = []
    for neuron in graph.neurons:
        places = set()
        for name, dim, _ in neuron.members:
            layer, _, tensor = name.rpartition(".")
            places.add((type(graph.modules[layer]).__name__, tensor, graph.slots.shapes[name], dim))
        kinds.append(frozenset(places))
    return np.array([kinds.index(kind) for kind in kinds])


class Special(nn.Conv2d):
    """A class of its own."""


def test_layers_that_are_alike_compete() -> None:
    """Two convolutions of one size that are read alike are of one kind; one of another size or class is not."""

    def run(net: Any, x: Tensor) -> Any:
        x = net.stem(x)
        branches = (
            (net.one, net.read_one),
            (net.two, net.read_two),
            (net.wide, net.read_wide),
            (net.own, net.read_own),
        )
        return sum(read(write(x).relu()) for write, read in branches)

    layers: dict[str, nn.Module] = {"stem": nn.Conv2d(3, 4, 1), "wide": nn.Conv2d(4, 6, 3, padding=1)}
    layers |= {"one": nn.Conv2d(4, 6, 1), "two": nn.Conv2d(4, 6, 1), "own": Special(4, 6, 1)}
    for name in ("one", "two", "wide", "own"):
        layers[f"read_{name}"] = nn.Conv2d(6, 2, 1)
    graph = graph_of(net(run, **layers))
    kinds = ordered.kinds_of(graph)
    kind_of = {}
    for layer in ("stem", "one", "two", "wide", "own"):
        (kind_of[layer],) = set(kinds[channel_units(graph, layer)].tolist())
    assert kind_of["one"] == kind_of["two"]
    assert len(set(kind_of.values())) == 4


@pytest.mark.parametrize("name", ["per_block", "global", "uniform"])
@pytest.mark.parametrize("fills", [True, False])
def test_a_policy_keeps_its_order_within_the_budget(
    graph: ChannelGraph, scores: Scores, name: str, fills: bool
) -> None:
    """With filling: whoever is dropped, though one behind it in the order is kept, does not fit."""
    thresholds = {"per_block": ordered.per_block, "global": ordered.all_together, "uniform": ordered.uniform}[name]
    for share in (30, 50, 70, 90):
        budgets = budgets_of(graph, {"flops": f"{share}%", "params": f"{share + 5}%"})
        free = free_neurons(graph, scores, "all")
        problem = Problem(graph, scores, forced_neurons(graph, scores, free), budgets, fills)
        kept = find_policy(name)(problem)
        assert budgets.met(kept)
        assert kept[problem.forced].all()
        order = thresholds(problem)
        behind = [unit for unit in np.flatnonzero(~kept) if (order[kept & ~problem.forced] > order[unit]).any()]
        assert fills or not behind
        if fills:
            assert all(budgets.unmet(kept | (np.arange(graph.size) == unit)) for unit in np.flatnonzero(~kept))


@pytest.mark.parametrize("fills", [True, False])
@pytest.mark.parametrize("names", [("flops",), ("params",), ("activations", "params", "flops")], ids="+".join)
def test_priced_stays_within_every_budget(graph: ChannelGraph, fills: bool, names: tuple[str, ...]) -> None:
    """And with filling no further neuron fits; what a score is counted in makes no difference."""
    for seed, share in enumerate((25, 40, 60, 85)):
        values = np.random.default_rng(seed).lognormal(size=graph.size)
        values[[3, 20]] = np.nan
        scores = Scores("mine", values)
        budgets = budgets_of(graph, dict.fromkeys(names, f"{share}%"))
        forced = forced_neurons(graph, scores, free_neurons(graph, scores, "all"))
        kept = find_policy("priced")(Problem(graph, scores, forced, budgets, fills))
        assert budgets.met(kept)
        assert kept[forced].all()
        assert not kept.all()
        if fills:
            assert all(budgets.unmet(kept | (np.arange(graph.size) == unit)) for unit in np.flatnonzero(~kept))
        thousandfold = Problem(graph, Scores("mine", 1000 * values), forced, budgets, fills)
        assert find_policy("priced")(thousandfold).tolist() == kept.tolist()


def test_priced_prefers_what_is_cheap_among_equals(graph: ChannelGraph) -> None:
    """The left branch is of 1x1 convolutions, the right one of 3x3 ones."""
    scores = Scores("mine", np.ones(graph.size))
    free = free_neurons(graph, scores, "branches")
    forced = forced_neurons(graph, scores, free)
    for fills in (True, False):
        problem = Problem(graph, scores, forced, budgets_of(graph, {"flops": "75%"}), fills)
        kept = find_policy("priced")(problem)
        assert kept[channel_units(graph, "left")].all()
        assert kept[channel_units(graph, "right")].sum() < 8


@pytest.mark.parametrize("name", ["per_block", "global", "isomorphic", "uniform", "priced"])
@pytest.mark.parametrize("fills", [True, False])
def test_what_is_gone_is_not_kept(graph: ChannelGraph, scores: Scores, name: str, fills: bool) -> None:
    """Named by any of its slots; and others take its place. What must stay stays all the same."""
    best = int(np.nanargmax(scores.values))
    others = [unit for unit in channel_units(graph, "right") if unit != best][:3]
    gone = np.zeros(graph.slots.total, dtype=bool)
    for unit in others:
        parameter, dim, index = graph.neurons[unit].members[-1]
        gone[graph.slots.base[parameter][dim] + index] = True
    budgets = budgets_of(graph, {"flops": "70%"})
    plan = make_plan(graph, scores, budgets, policy=name, fill=fills, gone=gone)
    assert not plan.kept[others].any()
    assert budgets.met(plan.kept)
    unscored = scores.values.copy()
    unscored[others[0]] = np.nan
    forced = make_plan(graph, Scores("mine", unscored), budgets, policy=name, fill=fills, gone=gone)
    assert forced.kept[others].tolist() == [True, False, False]


def test_auto_is_the_policy_that_suits_the_criterion(graph: ChannelGraph) -> None:
    budgets = budgets_of(graph, {"flops": "60%"})
    values = np.random.default_rng(0).random(graph.size)
    usual = {"bn_scale": "per_block", "magnitude": "global", "mine": "global", "fisher": "priced"}
    for criterion, policy_name in usual.items():
        plan = make_plan(graph, Scores(criterion, values), budgets)
        assert (plan.policy, plan.criterion) == (policy_name, criterion)
        named = make_plan(graph, Scores(criterion, values), budgets, policy=policy_name)
        assert named.kept.tolist() == plan.kept.tolist()


@pytest.fixture
def scratch_policies() -> Iterator[None]:
    """What is registered in the test is forgotten after it."""
    with mock.patch.dict(POLICIES):
        yield


@pytest.mark.usefixtures("scratch_policies")
def test_a_policy_of_the_callers_own_works_by_name() -> None:
    seen: list[Problem] = []

    @policy("last_first")
    def last_first(problem: Problem) -> np.ndarray:
        seen.append(problem)
        kept = problem.forced.copy()
        for unit in range(problem.graph.size)[::-1]:
            more = kept.copy()
            more[unit] = True
            if not problem.budgets.met(more):
                break
            kept = more
        return kept

    model = trained(Nested())
    result = allocator.allocate(model, "60%", example_inputs=IMAGE, policy="last_first", scope="all", fill=False)
    (problem,) = seen
    assert not problem.fill
    assert problem.budgets.first.limit == result.flops_asked
    assert result.allocation.policy == "last_first"
    assert result.certificate.ok
    kept = result.allocation.kept["stem.weight"][0]
    assert kept is not None
    assert result.allocation.kept.keys() >= {"stem.weight", "inner.weight"}
    assert "right.bias" not in result.allocation.kept, "the last neurons, all of which stay, are the right branch's"
    graph = allocator.trace(model, IMAGE)
    assert allocator.plan(graph, None, "60%", "last_first", scope="all", fill=False).kept == result.allocation.kept
    with pytest.raises(ValueError, match="policy last_first is registered already"):
        policy("last_first")(last_first)
    assert POLICIES["last_first"] is last_first


@pytest.mark.usefixtures("scratch_policies")
def test_an_order_of_the_callers_own_works_by_name(graph: ChannelGraph, scores: Scores) -> None:
    @ordered.ordered("by_index")
    def by_index(problem: Problem) -> np.ndarray:
        return np.arange(problem.graph.size) / problem.graph.size

    plan = make_plan(graph, scores, budgets_of(graph, {"flops": "60%"}), policy="by_index", scope="all", fill=False)
    dropped = np.flatnonzero(~plan.kept)
    free = free_neurons(graph, scores, "all")
    forced = forced_neurons(graph, scores, free)
    assert np.flatnonzero(plan.kept & ~forced).max() < dropped.min()
    assert plan.kept[forced].all()


@pytest.mark.usefixtures("scratch_policies")
@pytest.mark.parametrize(
    ("choose", "said"),
    [
        (lambda problem: np.ones(36, dtype=bool), r"keeps [\d,]+ FLOPs, [\d,]+ FLOPs are allowed: add neurons while"),
        (lambda problem: np.zeros(36, dtype=bool), r"drops \d+ neurons that must stay: keep those in problem.forced"),
        (lambda problem: np.arange(5), r"gave int64 \(5,\), expected bool \(36,\): which neurons to keep"),
        (lambda problem: np.ones(36), r"gave float64 \(36,\), expected bool"),
        (lambda problem: [True] * 36, r"gave list, expected bool"),
        (lambda problem: None, r"gave NoneType, expected bool"),
    ],
)
def test_a_policy_that_does_not_do_what_it_has_to_is_named(choose: Callable[[Problem], Any], said: str) -> None:
    policy("mine")(choose)
    with pytest.raises(PolicyError, match=rf"^policy 'mine' {said}"):
        allocator.allocate(trained(Nested()), "60%", example_inputs=IMAGE, policy="mine")


@pytest.mark.usefixtures("scratch_policies")
def test_a_policy_that_keeps_what_is_gone_is_named() -> None:
    """In a sweep, what a larger budget has dropped is not kept by a smaller one."""

    @policy("mine")
    def fewest_or_last(problem: Problem) -> np.ndarray:
        kept = problem.forced.copy()
        if problem.gone is not None and problem.gone.any():
            kept[np.flatnonzero(~problem.open)[0]] = True
        return kept

    with pytest.raises(PolicyError, match=r"^policy 'mine' keeps 1 neurons that are gone: keep only what problem"):
        allocator.sweep(trained(Nested()), ["80%", "60%"], example_inputs=IMAGE, policy="mine")


# ---------------------------------------------------------------------------------------------------- the scope


def in_scope(graph: ChannelGraph, scores: Scores, budgets: Budgets, scope: str) -> Plan | None:
    try:
        return make_plan(graph, scores, budgets, policy="per_block", scope=scope)
    except BudgetError:
        return None


def expected_scope(graph: ChannelGraph, plans: dict[str, Plan | None], limits: dict[str, float]) -> str:
    """The narrowest that uses 99.5 % of a budget, else the narrowest that meets all."""
    for scope, plan in plans.items():
        if plan is not None:
            used = [graph.metric(name).value(plan.kept) / limit for name, limit in limits.items()]
            if max(used) >= 0.995:
                return scope
    return next(scope for scope, plan in plans.items() if plan is not None)


@pytest.mark.parametrize("metrics", [("flops",), ("params",), ("flops", "activations")], ids="+".join)
def test_the_narrowest_scope_is_taken_that_comes_close(
    graph: ChannelGraph, scores: Scores, metrics: tuple[str, ...]
) -> None:
    taken, coarse = set(), 0
    for share in range(15, 100, 3):
        budgets = budgets_of(graph, dict.fromkeys(metrics, f"{share}%"))
        plans = {scope: in_scope(graph, scores, budgets, scope) for scope in SCOPES}
        if not any(plans.values()):
            continue
        plan = make_plan(graph, scores, budgets, policy="per_block", scope="narrowest")
        limits = {name: graph.metric(name).whole * share / 100 for name in metrics}
        assert plan.scope == expected_scope(graph, plans, limits)
        chosen = plans[plan.scope]
        assert chosen is not None
        assert plan.kept.tolist() == chosen.kept.tolist()
        assert plan.budgets is budgets
        taken.add(plan.scope)
        coarse += budgets.used(plan.kept) < CLOSE
    assert len(taken) > 1
    assert coarse or metrics != ("params",)


def test_without_filling_the_narrowest_scope_is_taken_that_meets_the_budget(
    graph: ChannelGraph, scores: Scores
) -> None:
    reachable = least(graph, scores, "flops")
    for share in range(10, 100, 3):
        budgets = budgets_of(graph, {"flops": f"{share}%"})
        meeting = [scope for scope in SCOPES if reachable[scope] <= budgets.first.limit]
        if meeting:
            assert make_plan(graph, scores, budgets, scope="narrowest", fill=False).scope == meeting[0]


def test_a_plan_says_how_it_was_made(graph: ChannelGraph, scores: Scores) -> None:
    budgets = budgets_of(graph, {"params": "70%", "flops": "80%"})
    assert make_plan(graph, scores, budgets).scope == "all"
    plan = make_plan(graph, scores, budgets, policy="global", scope="inner")
    assert (plan.scope, plan.policy, plan.criterion) == ("inner", "global", "bn_scale")
    assert plan.kept[channel_units(graph, "stem")].all()
    for name in ("params", "flops"):
        metric = graph.metric(name)
        more = [metric.value(plan.kept | (np.arange(graph.size) == unit)) for unit in np.flatnonzero(~plan.kept)]
        assert plan.next_costs[name] == min(more) - metric.value(plan.kept)


# ---------------------------------------------------------------------------------------------- what errors say


@pytest.mark.parametrize("metric", ["flops", "params", "activations"])
@pytest.mark.parametrize("scope", ["auto", "narrowest", *SCOPES])
def test_a_budget_that_cannot_be_met_names_metric_asked_and_reachable(
    graph: ChannelGraph, scores: Scores, metric: str, scope: str
) -> None:
    unit = {"flops": "FLOPs", "params": "parameters", "activations": "activations"}[metric]
    whole = graph.metric(metric).whole
    with pytest.raises(BudgetError) as caught:
        make_plan(graph, scores, budgets_of(graph, {metric: 7}), scope=scope)
    reachable = caught.value.reachable
    assert reachable is not None
    assert str(caught.value) == (
        f"7 {unit} cannot be met with scope={scope!r}: the smallest that can be reached is {reachable:,} {unit}, "
        f"{100 * reachable / whole:.1f}% of the model's {whole:,} {unit}"
    )
    assert caught.value.asked == 7
    plan = make_plan(graph, scores, budgets_of(graph, {metric: reachable}), scope=scope)
    assert graph.metric(metric).value(plan.kept) == reachable
    with pytest.raises(BudgetError):
        make_plan(graph, scores, budgets_of(graph, {metric: reachable - 1}), scope=scope)
    by_scope = least(graph, scores, metric)
    assert reachable == by_scope.get(scope, min(by_scope.values()))


def test_of_several_budgets_the_one_that_cannot_be_met_is_named(graph: ChannelGraph, scores: Scores) -> None:
    rows: list[tuple[dict[str, Any], str]] = [
        ({"flops": "90%", "params": 7}, "7 parameters cannot be met"),
        ({"params": "90%", "activations": 9, "flops": 8}, "9 activations and 8 FLOPs cannot be met"),
    ]
    for asked, said in rows:
        with pytest.raises(BudgetError, match=said):
            make_plan(graph, scores, budgets_of(graph, asked))


def test_nothing_to_remove_says_why(graph: ChannelGraph, scores: Scores) -> None:
    budgets = budgets_of(graph, {"flops": "50%"})
    nothing = Scores("mine", np.full(graph.size, np.nan))
    with pytest.raises(
        NothingToAllocateError, match="36 neurons have no score under criterion 'mine'; an output"
    ) as caught:
        make_plan(graph, nothing, budgets)
    assert caught.value.reasons[0] == "36 neurons have no score under criterion 'mine'"
    mixed = Scores("mine", np.where(graph.scope_of == 0, np.nan, 1.0))
    with pytest.raises(NothingToAllocateError) as caught:
        make_plan(graph, mixed, budgets, scope="branches")
    assert caught.value.reasons[:2] == [
        "22 neurons can only be removed in a wider scope than 'branches'",
        "14 neurons have no score under criterion 'mine'",
    ]
    with pytest.raises(NothingToAllocateError, match="removed: 36 neurons have no score"):
        make_plan(graph, nothing, budgets, scope="narrowest")
    plain: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    inner = allocator.trace(plain, IMAGE)
    with pytest.raises(NothingToAllocateError, match="8 neurons can only be removed in a wider scope than 'branches'"):
        make_plan(inner, allocator.score(inner, "magnitude"), budgets_of(inner, {"flops": "50%"}), scope="branches")
    single = allocator.trace(nn.Linear(3, 4), torch.zeros(1, 3))
    with pytest.raises(NothingToAllocateError, match=r"no neuron of the model can be removed: an output of the model"):
        make_plan(single, Scores("none", np.zeros(0)), budgets_of(single, {"flops": "50%"}))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": "per_blok"}, rf"^no policy 'per_blok'; did you mean 'per_block'\? \({POLICY_NAMES}\)$"),
        ({"policy": "best"}, rf"^no policy 'best' \({POLICY_NAMES}\)$"),
        (
            {"scope": "branch"},
            r"^no scope 'branch'; did you mean 'branches'\? \(there are auto, branches, inner, all, narrowest\)$",
        ),
    ],
)
def test_names_that_there_are_not(graph: ChannelGraph, scores: Scores, options: dict[str, str], said: str) -> None:
    choose: Callable[..., Any]
    for choose in (
        lambda **options: make_plan(graph, scores, budgets_of(graph, {"flops": "50%"}), **options),
        lambda **options: allocator.plan(graph, scores, "50%", **options),
    ):
        with pytest.raises(UnknownNameError, match=said):
            choose(**options)
