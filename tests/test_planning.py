"""Planning: the search against trying everything, what must stay, policies, scopes, and what errors say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import torch
from subjects import IMAGE, trained
from torch import Tensor, nn

import allocator
from allocator import BudgetError, ChannelGraph, NothingToAllocateError, PolicyError, Scores, UnknownNameError
from allocator.cost.budget import Budget, Budgets
from allocator.cost.metric import Metric
from allocator.cost.terms import Term
from allocator.flow.facts import AtLeast
from allocator.pipeline import budgets_of
from allocator.planning.plan import CLOSE, Plan, make_plan
from allocator.planning.policies import ordered
from allocator.planning.policies.registry import POLICIES, find_policy, policy
from allocator.planning.problem import Problem, forced_neurons, free_neurons, least
from allocator.planning.search import fill, keep_in_order, next_cost

SCOPES = ("branches", "inner", "all")
POLICY_NAMES = "there are per_block, global, isomorphic, uniform, priced"

# --------------------------------------------------------------------------------- the search, on tiny problems

NEURONS, SLOTS = 8, 24


@dataclass
class Tiny:
    """A problem of a few neurons whose costs can be counted by hand."""

    terms: list[list[Term]]
    unit_of_slot: np.ndarray
    limits: list[float]
    forced: np.ndarray
    threshold: np.ndarray

    def problem(self, *, fills: bool) -> Problem:
        budgets = []
        for i, (terms, limit) in enumerate(zip(self.terms, self.limits, strict=True)):
            budgets.append(Budget(Metric(f"cost{i}", "units", terms, self.unit_of_slot, NEURONS), limit))
        nobody = cast(ChannelGraph, None)  # a search asks for costs alone
        return Problem(nobody, Scores("none", np.zeros(NEURONS)), self.forced, Budgets(budgets), fills)

    def cost(self, terms: list[Term], kept: np.ndarray) -> int:
        total = 0
        for term in terms:
            product = term.factor
            for axis in term.axes:
                units = self.unit_of_slot[axis]
                product *= int((units < 0).sum() + kept[units[units >= 0]].sum())
            total += product
        return total

    def met(self, kept: np.ndarray) -> bool:
        return all(self.cost(terms, kept) <= limit for terms, limit in zip(self.terms, self.limits, strict=True))

    def with_neuron(self, kept: np.ndarray, unit: int) -> np.ndarray:
        more = kept.copy()
        more[unit] = True
        return more

    def order(self) -> list[int]:
        """Neurons that may go, by threshold and then by index."""
        return sorted(np.flatnonzero(~self.forced).tolist(), key=lambda unit: (self.threshold[unit], unit))

    def whole_steps(self) -> np.ndarray:
        """Of all choices that keep every neuron up to some threshold, the largest that meets the budgets."""
        best = self.forced
        for step in sorted(set(self.threshold[~self.forced].tolist())):
            kept = self.forced | (self.threshold <= step)
            if self.met(kept):
                best = kept
        return best

    def one_by_one(self) -> np.ndarray:
        """Each neuron in order that still fits."""
        kept = self.forced.copy()
        for unit in self.order():
            more = self.with_neuron(kept, unit)
            if self.met(more):
                kept = more
        return kept


def draw(seed: int, budgets: int, degree: int) -> Tiny:
    random = np.random.default_rng([seed, budgets, degree])
    unit_of_slot = random.integers(-1, NEURONS, SLOTS)
    unit_of_slot[:NEURONS] = np.arange(NEURONS)
    terms: list[list[Term]] = []
    for _ in range(budgets):
        axes = [random.integers(0, SLOTS, random.integers(1, 9)) for _ in range(4)]
        terms.append([])
        for _ in range(4):
            picked = random.integers(0, len(axes), degree)
            terms[-1].append(Term(int(random.integers(1, 30)), tuple(axes[k] for k in picked)))
    threshold = random.integers(0, 5, NEURONS) / 4 if seed % 2 else random.random(NEURONS)
    forced = random.random(NEURONS) < 0.2
    tiny = Tiny(terms, unit_of_slot, [], forced, threshold)
    for each in terms:
        low, high = tiny.cost(each, forced), tiny.cost(each, np.ones(NEURONS, dtype=bool))
        tiny.limits.append(int(low + random.random() * (high - low)))
    return tiny


def several(budgets: int, degree: int) -> list[Tiny]:
    return [draw(seed, budgets, degree) for seed in range(12)]


EVERY_SORT = [(budgets, degree) for budgets in (1, 2, 3) for degree in (1, 2, 3)]


@pytest.fixture(params=EVERY_SORT, ids=lambda sort: f"{sort[0]} budgets of {sort[1]} axes")
def tinies(request: pytest.FixtureRequest) -> list[Tiny]:
    return several(*request.param)


def test_tiny_problems_are_of_every_sort() -> None:
    """Something is forced in some and nothing in others; some have ties; filling adds something in some."""
    tinies = [tiny for sort in EVERY_SORT for tiny in several(*sort)]
    assert {bool(tiny.forced.any()) for tiny in tinies} == {True, False}
    assert {len(set(tiny.threshold)) < NEURONS for tiny in tinies} == {True, False}
    filled = [bool((tiny.whole_steps() != tiny.one_by_one()).any()) for tiny in tinies]
    assert 10 < sum(filled) < len(tinies) - 10
    assert all(tiny.met(tiny.forced) for tiny in tinies)


def test_without_filling_the_largest_step_is_kept(tinies: list[Tiny]) -> None:
    for tiny in tinies:
        kept = keep_in_order(tiny.problem(fills=False), tiny.threshold)
        assert kept.tolist() == tiny.whole_steps().tolist()


def test_with_filling_every_neuron_in_order_that_fits_is_kept(tinies: list[Tiny]) -> None:
    for tiny in tinies:
        kept = keep_in_order(tiny.problem(fills=True), tiny.threshold)
        assert kept.tolist() == tiny.one_by_one().tolist()
        assert kept[tiny.forced].all()
        assert tiny.met(kept)
        for unit in np.flatnonzero(~kept).tolist():
            assert not tiny.met(tiny.with_neuron(kept, unit)), "a further neuron would fit in all budgets"


def test_filling_starts_from_what_is_kept(tinies: list[Tiny]) -> None:
    """In the order that is given, whatever it is."""
    for tiny in tinies:
        order = np.array(tiny.order()[::-1], dtype=int)
        expected = tiny.forced.copy()
        for unit in order:
            more = tiny.with_neuron(expected, unit)
            if tiny.met(more):
                expected = more
        assert fill(tiny.problem(fills=True), order, tiny.forced.copy()).tolist() == expected.tolist()


@pytest.mark.parametrize("fills", [True, False])
def test_a_limit_at_the_largest_keeps_all_and_one_at_the_smallest_none(tinies: list[Tiny], fills: bool) -> None:
    everything = np.ones(NEURONS, dtype=bool)
    for tiny in tinies:
        wide = replace(tiny, limits=[tiny.cost(terms, everything) for terms in tiny.terms])
        assert keep_in_order(wide.problem(fills=fills), tiny.threshold).all()
        assert next_cost(wide.problem(fills=fills), everything) is None
        fixed = replace(tiny, forced=everything)
        assert keep_in_order(fixed.problem(fills=fills), tiny.threshold).all()
        dear = Term(1, (np.arange(NEURONS),))
        narrow = replace(tiny, terms=[[dear]], limits=[int(tiny.forced.sum())])
        assert keep_in_order(narrow.problem(fills=fills), tiny.threshold).tolist() == tiny.forced.tolist()


@pytest.mark.parametrize("fills", [True, False])
def test_thresholds_are_any_numbers(tinies: list[Tiny], fills: bool) -> None:
    """What counts is their order; what must stays first, however small a threshold is."""
    for tiny in tinies:
        kept = keep_in_order(tiny.problem(fills=fills), tiny.threshold)
        other = keep_in_order(tiny.problem(fills=fills), 50 * tiny.threshold - 40)
        assert other.tolist() == kept.tolist()


@pytest.mark.parametrize("degree", [1, 2])
def test_the_next_cost_is_of_the_cheapest_further_neuron(degree: int) -> None:
    for tiny in several(2, degree):
        kept = tiny.one_by_one()
        first = tiny.terms[0]
        more = [tiny.cost(first, tiny.with_neuron(kept, unit)) for unit in np.flatnonzero(~kept).tolist()]
        expected = min(more) - tiny.cost(first, kept) if more else None
        assert next_cost(tiny.problem(fills=True), kept) == expected


# ---------------------------------------------------------------------------------------------- what must stay


class Nested(nn.Module):
    """A stream that is added to, an inner layer, and two branches of it; one neuron of each is dear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.inner, self.inner_norm = nn.Conv2d(12, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.left, self.left_norm = nn.Conv2d(10, 6, 1), nn.BatchNorm2d(6)
        self.right, self.right_norm = nn.Conv2d(10, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.back, self.back_norm = nn.Conv2d(14, 12, 1), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        y = self.inner_norm(self.inner(x)).relu()
        y = torch.cat([self.left_norm(self.left(y)), self.right_norm(self.right(y))], 1).relu()
        return self.head((x + self.back_norm(self.back(y))).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    return allocator.trace(trained(Nested()), IMAGE)


@pytest.fixture
def scores(graph: ChannelGraph) -> Scores:
    return allocator.score(graph, "bn_scale")


def layer_of(graph: ChannelGraph, layer: str) -> list[int]:
    return graph.units(graph.slots.labels(f"{layer}.weight")[0]).tolist()


def test_a_scope_lets_neurons_go(graph: ChannelGraph, scores: Scores) -> None:
    branches = {*layer_of(graph, "left"), *layer_of(graph, "right")}
    inner = branches | set(layer_of(graph, "inner"))
    whole = inner | set(layer_of(graph, "stem"))
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
    expected = sorted([max(layer_of(graph, "left")), max(layer_of(graph, "right"))])
    for order in (floors, floors[::-1]):
        forced = forced_neurons(with_floors(graph, order), Scores("mine", values), free)
        assert np.flatnonzero(forced).tolist() == expected


def test_a_layer_that_the_forward_can_do_without_has_no_floor(graph: ChannelGraph, scores: Scores) -> None:
    floors = [AtLeast(graph.slots.labels(f"{layer}.weight")[0], layer) for layer in ("left", "right")]
    free = np.ones(graph.size, dtype=bool)
    forced = forced_neurons(with_floors(graph, floors, ("left",)), scores, free)
    assert not forced[layer_of(graph, "left")].any()
    best = max(layer_of(graph, "right"), key=lambda unit: scores.values[unit])
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
        layer[layer_of(graph, name)] = number
        block[layer_of(graph, name)] = min(number, 2)  # left and right meet in one block
    within_layer = np.array(ranks(values, layer, np.arange(graph.size)))
    everything = np.zeros(graph.size, dtype=int)
    assert ordered.uniform(problem).tolist() == within_layer.tolist()
    assert ordered.per_block(problem).tolist() == ranks(values, block, within_layer)
    assert ordered.all_together(problem).tolist() == ranks(values, everything, within_layer)


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
        (lambda problem: np.ones(36, dtype=bool), r"keeps [\d,]+ FLOPs, [\d,]+ are allowed: add neurons while"),
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
    assert plan.kept[layer_of(graph, "stem")].all()
    params = graph.metric("params")
    more = [params.value(plan.kept | (np.arange(graph.size) == unit)) for unit in np.flatnonzero(~plan.kept)]
    assert plan.next_cost == min(more) - params.value(plan.kept)


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
        f"{100 * reachable / whole:.1f}% of the model's {whole:,}"
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
        ({"params": "90%", "activations": 9, "flops": 8}, "9 activations cannot be met"),
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
        ({"scope": "branch"}, r"^no scope 'branch' \(there are auto, branches, inner, all, narrowest\)$"),
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
