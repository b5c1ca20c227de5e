"""Scores: what criteria give, how numbers of the caller's own are read, and how all outlast a change of the neurons."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from small_graphs import Member, by_members, graph_of
from subjects import IMAGE, Parts, trained

import allocator
from allocator import (
    ChannelGraph,
    CriterionError,
    Scores,
    UninformativeScoresWarning,
    UnknownNameError,
)
from allocator.flow.options import Place
from allocator.rewriting.kept import kept_by
from allocator.scoring.registry import CRITERIA, criterion, usual_criterion
from allocator.scoring.scores import SlotScores


def chosen(graph: ChannelGraph, flops: str, scores: Scores) -> np.ndarray:
    """(neurons,) bool that a plan keeps, after all repairs."""
    kept = kept_by(graph, allocator.plan(graph, scores, flops))
    assert kept is not None
    return kept


@pytest.fixture
def scratch_criteria() -> Iterator[None]:
    """What is registered in the test is forgotten after it."""
    with mock.patch.dict(CRITERIA):
        yield


# ------------------------------------------------------------------------------------------- by parameter index


@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_entries_of_slots_are_combined_per_neuron(combine: Any) -> None:
    """Several entries on one slot, several slots of one neuron, slots that are no neuron's, neurons without any."""
    graph = graph_of(trained())
    random = np.random.default_rng(0)
    names = ("norm.weight", "narrow.weight", "wide_norm.bias", "head.weight")
    rows = []
    entries: dict[Member, list[float]] = {}
    for name in (*names, "norm.weight"):
        for dim, label in enumerate(graph.slots.labels(name)[:2]):
            numbers = random.random(len(label))
            rows.append((label, numbers))
            for index, number in enumerate(numbers.tolist()):
                entries.setdefault((name, dim, index), []).append(number)
    found = SlotScores.of(rows, combine).on(graph)
    np.testing.assert_allclose(found, by_members(graph, lambda member: entries.get(member, []), combine))
    assert not np.isnan(found).any()
    alone = SlotScores.of(rows[:1], combine).on(graph)
    assert np.isnan(alone).sum() == graph.size - 16
    assert np.isnan(SlotScores.of([], combine).on(graph)).all()


@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize(
    "options",
    [
        {"equal_parts": frozenset({""})},
        {"frozen": frozenset({Place("left", "convolution")})},
        {"equal_parts": frozenset({""}), "frozen": frozenset({Place("", "cat")})},
    ],
    ids=["merged", "frozen", "both"],
)
def test_scores_follow_a_change_of_what_a_neuron_is(options: dict[str, Any], combine: Any) -> None:
    model = trained(Parts())
    before, after = graph_of(model), graph_of(model, **options)
    assert after.size < before.size
    rows = []
    entries: dict[Member, list[float]] = {}
    for name in ("first.weight", "norm.weight", "left.weight", "right.weight"):
        label = before.slots.labels(name)[0]
        numbers = np.random.default_rng(len(entries)).random(len(label))
        rows.append((label, numbers))
        for index, number in enumerate(numbers.tolist()):
            entries[name, 0, index] = [number]
    scores = SlotScores.of(rows, combine)
    for graph in (before, after):
        expected = by_members(graph, lambda member: entries.get(member, []), combine)
        np.testing.assert_allclose(scores.on(graph), expected)


def test_a_repair_looks_at_the_model_no_second_time() -> None:
    """The second part matters more, so that the parts come out unequal, and a repair ties them pair by pair."""
    sizes = []
    first = np.array([3.0, 1, 2, 0, 5, 4, 16, 17, 11, 12, 13, 14])  # means of the pairs: 9.5, 9, 6.5, 6, 9, 9

    def counting(graph: ChannelGraph, weights: Any) -> SlotScores:
        sizes.append(graph.size)
        labels = [graph.slots.labels(f"{layer}.weight")[0] for layer in ("first", "left", "right")]
        numbers = (first, np.arange(5) + 20.0, np.arange(5) + 30.0)
        return SlotScores.of(zip(labels, numbers, strict=True))

    model = trained(Parts())
    result = allocator.allocate(
        model, "60%", example_inputs=IMAGE, criterion=counting, scope="all", policy="global", fill=False
    )
    assert sizes == [22]
    assert result.graph.size == 16, "the repair made two neurons of each pair one"
    assert result.allocation.criterion == "counting"
    kept = result.allocation.kept["first.weight"][0]
    assert kept is not None
    pairs = (first[:6] + first[6:]) / 2
    best = np.argsort(-pairs, kind="stable")[: len(kept) // 2]
    assert 0 < len(best) < 6
    assert kept == [*sorted(best), *sorted(best + 6)]


# ----------------------------------------------------------------------------------------- numbers of the caller's own


def test_an_array_is_one_number_per_neuron() -> None:
    graph = graph_of(trained())
    values = np.random.default_rng(0).random(graph.size)
    for given in (values, values.tolist(), torch.tensor(values), torch.tensor(values, requires_grad=True)):
        scores = allocator.score(graph, given)
        assert scores.criterion == "own"
        assert scores.values.tolist() == values.tolist()
    np.testing.assert_array_equal(scores.by_slot(graph).on(graph), values)


def test_a_tensor_is_read_whatever_its_dtype_and_whether_it_is_trained() -> None:
    graph = graph_of(trained())
    halves = torch.arange(graph.size, dtype=torch.bfloat16) / 2
    assert allocator.score(graph, halves).values.tolist() == [i / 2 for i in range(graph.size)]

    def by_bias(graph: ChannelGraph, weights: Any) -> Any:
        return torch.cat([weights("norm.bias"), weights("wide_norm.bias"), weights("narrow_norm.bias")])

    biases = by_bias(graph, dict(graph.model.named_parameters()).__getitem__)
    assert biases.requires_grad
    np.testing.assert_array_equal(allocator.score(graph, by_bias).values, biases.detach().numpy().astype(float))


@pytest.mark.parametrize("given", [["a"], [[1], [1, 2]], "a", {}], ids=str)
def test_what_are_no_numbers_is_refused(given: Any) -> None:
    graph = graph_of(trained())
    for name, criterion_of in (
        ("'given'", lambda: _giving(given)),
        ("'mine'", lambda: Scores("mine", given)),
        ("stem.bias", lambda: {"stem.bias": given}),
    ):
        with pytest.raises(CriterionError, match=rf"^the scores of {name} are not an array of numbers: "):
            allocator.score(graph, criterion_of())


def _giving(numbers: Any) -> Any:
    def given(graph: ChannelGraph, weights: Any) -> Any:
        return numbers

    return given


def test_numbers_of_ones_own_outlast_a_merge_as_their_mean() -> None:
    model = trained(Parts())
    before, after = graph_of(model), graph_of(model, equal_parts=frozenset({""}))
    values = np.random.default_rng(0).random(before.size)
    projected = Scores("mine", values).by_slot(before).on(after)
    parts = (values[:6] + values[6:12]) / 2
    np.testing.assert_allclose(projected, [*parts, *values[12:]])


def test_numbers_of_ones_own_outlast_a_freeze() -> None:
    model = trained(Parts())
    before, after = graph_of(model), graph_of(model, frozen=frozenset({Place("left", "convolution")}))
    values = np.random.default_rng(0).random(before.size)
    gone = [0, 1, 2, 3, 4, 5, *(int(unit) for unit in before.units(before.slots.labels("left.weight")[0]))]
    projected = Scores("mine", values).by_slot(before).on(after)
    np.testing.assert_array_equal(projected, np.delete(values, gone))


@pytest.mark.parametrize("values", [np.ones(63), np.ones(65), np.ones((64, 1)), np.ones(0)], ids=np.shape)
def test_another_number_of_numbers_is_refused(values: Any) -> None:
    graph = graph_of(trained())
    said = r"the scores of '{}' have shape .*, expected \(64,\): one number per neuron, in the order of graph.neurons"
    with pytest.raises(CriterionError, match=said.format("own")):
        allocator.score(graph, values)
    with pytest.raises(CriterionError, match=said.format("mine")):
        allocator.score(graph, Scores("mine", values))
    with pytest.raises(CriterionError, match=said.format("mine")):
        allocator.plan(graph, Scores("mine", values), "60%")

    def short(graph: ChannelGraph, weights: Any) -> Any:
        return values

    with pytest.raises(CriterionError, match=said.format("short")):
        allocator.score(graph, short)


@pytest.mark.parametrize("number", [np.inf, -np.inf])
def test_infinite_scores_are_refused(number: float) -> None:
    graph = graph_of(trained())
    values = np.ones(graph.size)
    values[5] = number
    by_parameter = {"norm.bias": np.where(np.arange(16) == 3, number, 1.0)}
    for given in (values, by_parameter, lambda graph, weights: values):
        with pytest.raises(CriterionError, match=r"are infinite in 1 of"):
            allocator.score(graph, given)


def test_what_has_no_number_stays() -> None:
    graph = graph_of(trained())
    values = np.zeros(graph.size)
    stays = [0, 17, 40, 63]
    values[stays] = np.nan
    kept = chosen(graph, "20%", Scores("mine", values))
    assert kept[stays].all()
    assert kept.sum() < graph.size / 2


def test_what_has_no_number_stays_with_what_is_merged_into_it() -> None:
    model = trained(Parts())
    before, after = graph_of(model), graph_of(model, equal_parts=frozenset({""}))
    values = np.arange(float(before.size))
    values[[2, 9]] = np.nan
    projected = Scores("mine", values).by_slot(before).on(after)
    assert np.flatnonzero(np.isnan(projected)).tolist() == [2, 3]
    kept = chosen(before, "40%", Scores("mine", values))
    assert kept[[2, 3, 8, 9]].all()
    assert not kept[:6].all()


def test_scores_that_were_changed_since_outlast_a_repair_as_they_are() -> None:
    """Those of a criterion are known by parameter index too; what the caller wrote over them counts."""
    model = trained(Parts())
    graph = graph_of(model)
    changed = allocator.score(graph, "magnitude")
    changed.values[:6] += 10
    changed.values[1] = np.nan
    replaced = replace(allocator.score(graph, "magnitude"), values=changed.values.copy())
    own = Scores("magnitude", changed.values.copy())
    expected = chosen(graph, "60%", own)
    assert expected[1]
    for scores in (changed, replaced):
        np.testing.assert_array_equal(scores.by_slot(graph).on(graph), own.values)
        np.testing.assert_array_equal(chosen(graph, "60%", scores), expected)


def test_by_the_names_of_parameters_entries_are_added_up() -> None:
    graph = graph_of(trained())
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "wide.weight": random.random((32, 16, 3, 3)),
        "norm.bias": torch.tensor(random.random(16), requires_grad=True),
        "head.weight": random.random((10, 48)).tolist(),
    }
    plain = {
        name: given.detach().numpy() if isinstance(given, torch.Tensor) else np.array(given)
        for name, given in arrays.items()
    }

    def entries_of(member: Member) -> list[float]:
        name, dim, index = member
        return [float(plain[name].take(index, axis=dim).sum())] if name in plain else []

    scores = allocator.score(graph, arrays)
    assert scores.criterion == "own"
    np.testing.assert_allclose(scores.values, by_members(graph, entries_of, "sum"))
    assert not np.isnan(scores.values).any()
    only = allocator.score(graph, {"norm.bias": plain["norm.bias"]})
    np.testing.assert_array_equal(np.isnan(only.values), np.arange(graph.size) >= 16)


def test_arrays_by_parameter_name_a_parameter_and_have_its_shape() -> None:
    graph = graph_of(trained())
    with pytest.raises(UnknownNameError, match=r"'stem.wieght', which is no parameter.*; did you mean 'stem.weight'\?"):
        allocator.score(graph, {"stem.wieght": np.ones((16, 3, 3, 3))})
    with pytest.raises(
        UnknownNameError, match=r"^the criterion has scores for 'x', which is no parameter of the model$"
    ):
        allocator.score(graph, {"x": np.ones(3)})
    for wrong in (np.ones(16), np.ones((3, 16, 3, 3)), torch.ones(()), 1.0):
        with pytest.raises(CriterionError, match=r"scores of stem.weight have shape .*, expected \(16, 3, 3, 3\)"):
            allocator.score(graph, {"stem.weight": wrong})


def test_a_function_reads_weights_and_is_named() -> None:
    model = trained()
    graph = graph_of(model)

    def by_bias(given: ChannelGraph, weights: Any) -> np.ndarray:
        assert given.neurons == graph.neurons
        assert torch.equal(weights("stem.weight"), model.stem.weight)
        scores = np.full(graph.size, np.nan)
        scores[:16] = weights("norm.bias").detach().numpy()
        return scores

    scores = allocator.score(graph, by_bias)
    assert scores.criterion == "by_bias"
    np.testing.assert_array_equal(scores.values[:16], model.norm.bias.detach().numpy().astype(float))
    assert np.isnan(scores.values[16:]).all()

    class Criterion:
        def __call__(self, graph: ChannelGraph, weights: Any) -> SlotScores:
            return SlotScores.of([(graph.slots.labels("norm.bias")[0], np.arange(16.0))])

    made = allocator.score(graph, Criterion())
    assert made.criterion == "Criterion"
    assert made.values[:16].tolist() == list(range(16))


def test_a_registered_name_with_numbers_of_ones_own_is_taken_as_given() -> None:
    graph = graph_of(trained(Parts()))
    values = np.random.default_rng(0).random(graph.size)

    def not_again(graph: ChannelGraph, weights: Any) -> np.ndarray:
        raise AssertionError("the criterion was asked, though numbers were given")

    refusing = {name: replace(CRITERIA[name], function=not_again) for name in ("bn_scale", "magnitude")}
    with mock.patch.dict(CRITERIA, refusing):
        named = allocator.plan(graph, Scores("bn_scale", values), "60%", policy="global")
    own = allocator.plan(graph, Scores("mine", values), "60%", policy="global")
    assert (named.criterion, own.criterion) == ("bn_scale", "mine")
    assert named.kept == own.kept
    assert named.kept != allocator.plan(graph, allocator.score(graph, "magnitude"), "60%", policy="global").kept


def test_equal_scores_are_warned_of() -> None:
    graph = graph_of(trained())
    values = np.full(graph.size, 0.25)
    values[3] = np.nan
    said = r"all 63 scores of criterion 'own' are 0.25, so the ranking carries no information"
    with pytest.warns(UninformativeScoresWarning, match=said):
        allocator.score(graph, values)
    values[4] = 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        allocator.score(graph, values)
        allocator.score(graph, np.where(np.arange(graph.size) == 7, 1.0, np.nan))


# ----------------------------------------------------------------------------------------- the table of criteria


@pytest.mark.usefixtures("scratch_criteria")
def test_a_criterion_is_registered_once_and_works_by_name() -> None:
    @criterion("by_place")
    def by_place(graph: ChannelGraph, weights: Any) -> np.ndarray:
        return -np.arange(graph.size, dtype=float)

    model = trained()
    result = allocator.allocate(model, "60%", example_inputs=IMAGE, criterion="by_place", policy="global", fill=False)
    assert result.allocation.criterion == "by_place"
    assert allocator.score(result.graph, "by_place").values.tolist() == [-i for i in range(64)]
    with pytest.raises(ValueError, match="criterion by_place is registered already"):
        criterion("by_place")(by_place)
    assert CRITERIA["by_place"].function is by_place


def test_a_criterion_that_there_is_not_names_a_near_one() -> None:
    graph = graph_of(trained())
    known = rf"\(there are {', '.join(sorted(('auto', *CRITERIA)))}\)"
    with pytest.raises(UnknownNameError, match=rf"no criterion 'magnitud'; did you mean 'magnitude'\? {known}"):
        allocator.score(graph, "magnitud")
    with pytest.raises(UnknownNameError, match=rf"no criterion 'hessian' {known}"):
        allocator.plan(graph, allocator.score(graph, "hessian"))


def test_auto_is_what_looks_at_data_where_there_are_any() -> None:
    graph, images = graph_of(trained()), torch.randn(4, 3, 32, 32)
    assert allocator.score(graph).criterion == "group_norm"
    assert allocator.score(graph, data=images).criterion == "fisher"
    assert usual_criterion(None) == "group_norm"
