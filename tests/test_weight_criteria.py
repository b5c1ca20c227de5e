"""Criteria that look at weights alone, against their formulas written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_graphs import Member, by_members, graph_of
from subjects import Branches, Parts, trained
from torch import nn

import allocator
from allocator import CriterionError, UnknownNameError


def _relative_norms(model: Any, layers: tuple[str, ...]) -> Callable[[Member], list[float]]:
    """Of each layer's outputs the norm of their weights, relative to the mean of the layer."""

    def norms_of(member: Member) -> list[float]:
        name, dim, index = member
        layer = name.removesuffix(".weight")
        if dim != 0 or layer not in layers or layer == name:
            return []
        norms = [float(row.double().pow(2).sum()) ** 0.5 for row in model.get_submodule(layer).weight.detach()]
        return [norms[index] / (sum(norms) / len(norms))]

    return norms_of


def test_bn_scale_is_the_size_of_gamma() -> None:
    model = trained()
    graph = graph_of(model)
    scores = allocator.score(graph, "bn_scale")
    gammas = {
        f"{name}.weight": module.weight.detach().double()
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    with torch.no_grad():
        model.norm.weight.neg_()

    def gamma_of(member: Member) -> list[float]:
        return [float(gammas[member[0]][member[2]])] if member[0] in gammas else []

    np.testing.assert_allclose(scores.values, by_members(graph, gamma_of, "mean"))
    np.testing.assert_array_equal(allocator.score(graph, "bn_scale").values, scores.values)


def test_magnitude_is_relative_to_the_layer() -> None:
    model = trained()
    graph = graph_of(model)
    expected = by_members(graph, _relative_norms(model, ("stem", "narrow", "wide")), "mean")
    np.testing.assert_allclose(allocator.score(graph, "magnitude").values, expected)
    with torch.no_grad():
        model.wide.weight.zero_()
    wide = graph.units(graph.slots.labels("wide.weight")[0])
    assert (allocator.score(graph, "magnitude").values[wide] == 0).all()


def test_without_a_batch_norm_there_is_no_bn_scale() -> None:
    torch.manual_seed(0)
    graph = graph_of(Branches(norm=False))
    with pytest.raises(CriterionError, match=r"the model has no batch norm with a scale.*pass criterion='magnitude'"):
        allocator.score(graph, "bn_scale")
    scores = allocator.score(graph)
    assert scores.criterion == "group_norm"
    np.testing.assert_array_equal(scores.values, allocator.score(graph, "group_norm").values)
    assert allocator.score(graph, scores) is scores


def test_random_is_the_same_every_time() -> None:
    graph = graph_of(trained())
    once, again = (allocator.score(graph, "random").values for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert len(np.unique(once)) == graph.size


def test_a_model_without_values_is_ranked_at_random_alone() -> None:
    graph = graph_of(Branches().eval().to("meta"))
    for name in ("bn_scale", "magnitude"):
        with pytest.raises(CriterionError, match=rf"'{name}' reads \S+, which lies on the meta device.*'random'"):
            allocator.score(graph, name)
    assert np.isfinite(allocator.score(graph, "random").values).all()


def test_group_norm_is_of_all_that_goes_with_a_neuron() -> None:
    """Slices of every weight and scale that hold it, each relative to those of the same branch in the same tensor."""
    model = trained(Parts())
    graph = graph_of(model)
    norms = ("norm.weight",)
    slices: dict[Member, float] = {}
    for neuron in graph.neurons:
        for name, dim, index in neuron.members:
            tensor = graph.tensors[name].detach().double()
            if isinstance(graph.tensors[name], nn.Parameter) and (tensor.dim() > 1 or name in norms):
                slices[name, dim, index] = float(tensor.select(dim, index).norm())
    branch = {member: graph.branch_of[neuron.index] for neuron in graph.neurons for member in neuron.members}

    def relative(member: Member) -> list[float]:
        if member not in slices:
            return []
        name, dim, _ = member
        alike = [slices[m] for m in slices if m[:2] == (name, dim) and branch[m] == branch[member]]
        return [slices[member] / (sum(alike) / len(alike))]

    assert any(name == "head.weight" for name, _, _ in slices)
    np.testing.assert_allclose(allocator.score(graph, "group_norm").values, by_members(graph, relative, "mean"))


def test_whole_heads_are_as_far_from_their_mean_as_single_channels_are() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, -1, 2).permute(2, 0, 3, 1, 4)
            y: torch.Tensor = self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return y

    torch.manual_seed(0)
    model = Heads()
    graph = allocator.trace(model, torch.randn(1, 5, 8))
    rows = model.qkv.weight.detach().double().norm(dim=1).reshape(3, 4, 2)
    columns = model.proj.weight.detach().double().norm(dim=0).reshape(4, 2)
    written, read = (rows / rows.mean()).mean((0, 2)), (columns / columns.mean()).mean(1)

    def farther(mean: torch.Tensor) -> torch.Tensor:  # of two channels each
        return torch.where(mean < 1, 1 / (1 + 2**0.5 * (1 / mean - 1)), 1 + 2**0.5 * (mean - 1))

    expected = (6 * farther(written) + 2 * farther(read)) / 8  # seen by six rows and two columns
    np.testing.assert_allclose(allocator.score(graph, "group_norm").values, expected.numpy())


def test_fpgm_is_the_sum_of_distances_to_other_filters() -> None:
    model = trained()
    graph = graph_of(model)
    layers = {
        name: model.get_submodule(name).weight.detach().double().flatten(1) for name in ("stem", "narrow", "wide")
    }

    def distances(member: Member) -> list[float]:
        name, dim, index = member
        layer = name.removesuffix(".weight")
        if dim != 0 or layer == name or layer not in layers:
            return []
        rows = layers[layer]
        sums = [sum(float((row - other).norm()) for other in rows) for row in rows]
        return [sums[index] / (sum(sums) / len(sums))]

    found = allocator.score(graph, "fpgm").values
    np.testing.assert_allclose(found, by_members(graph, distances, "mean"), rtol=1e-3)


def test_several_criteria_are_averaged_by_rank() -> None:
    graph = graph_of(trained())
    ranks = []
    for name in ("bn_scale", "fpgm"):
        values = allocator.score(graph, name).values.tolist()
        order = sorted(values)
        ranks.append([(order.index(value) + 1) / len(values) for value in values])
    scores = allocator.score(graph, ["bn_scale", "fpgm"])
    assert scores.criterion == "bn_scale+fpgm"
    np.testing.assert_allclose(scores.values, np.mean(ranks, axis=0))
    with pytest.raises(UnknownNameError, match=r"no criterion 'bn_scal'; did you mean 'bn_scale'"):
        allocator.score(graph, ["fpgm", "bn_scal"])
    with pytest.raises(CriterionError, match=r"criterion 'fisher' looks at data: pass data=loader"):
        allocator.score(graph, ["bn_scale", "fisher"])
