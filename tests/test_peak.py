"""Peak activations: against the numbers in tensors that are really alive while a forward runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from alive import alive_at_once
from subjects import IMAGE, trained
from torch import nn

import allocator
from allocator.cost.peak import PeakMetric


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "vgg11", "squeezenet1_1"])
def test_it_is_what_is_alive_in_a_forward(name: str) -> None:
    model = allocator.build(f"torchvision:{name}").eval()
    image = torch.randn(1, 3, 64, 64)
    assert allocator.trace(model, image).metric("peak_activations").whole == alive_at_once(model, image)


def test_a_variable_that_holds_a_tensor_longer_is_not_seen() -> None:
    model = allocator.build("torchvision:mobilenet_v2").eval()
    image = torch.randn(1, 3, 64, 64)
    whole = allocator.trace(model, image).metric("peak_activations").whole
    assert whole <= alive_at_once(model, image) <= 1.1 * whole


def test_a_plan_keeps_to_it() -> None:
    model = allocator.build("torchvision:resnet18").eval()
    image = torch.randn(1, 3, 64, 64)
    result = allocator.allocate(model, peak_activations="70%", example_inputs=image)
    cost = result.allocation.costs["peak_activations"]
    assert cost["before"] == alive_at_once(model, image)
    assert cost["after"] == alive_at_once(result.model, image) <= cost["asked"] == 0.7 * cost["before"]
    assert result.flops_after < result.flops_before


def test_what_one_more_neuron_adds_is_never_less_than_said() -> None:
    graph = allocator.trace(trained(), IMAGE)
    metric = graph.metric("peak_activations")
    assert isinstance(metric, PeakMetric)
    random = np.random.default_rng(0)
    for _ in range(20):
        kept = random.random(graph.size) < random.random()
        each = metric.added_each(kept)
        for unit in np.flatnonzero(~kept).tolist():
            assert metric.added(kept, unit) >= each[unit]


def test_a_forward_without_calls_has_its_input() -> None:
    graph = allocator.trace(nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 1)).eval(), torch.zeros(1, 3, 5, 5))
    assert graph.metric("peak_activations").whole == 75 + 100
