"""The promises on every network of the reference set: tracing, budgets, FLOPs and certificates.

The ordinary run allocates each network once, budgets and policies taking turns; `-m sweep` runs all of them.
"""

from __future__ import annotations

import copy
import tracemalloc
from typing import Any

import pytest
import torch
from reference_set import REFERENCE_SET, Count, example, fvcore_count, randomised
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import allocator
from allocator import BudgetError, ChannelGraph, Result

SHARES = (30, 40, 60, 80)
POLICIES = ("per_block", "global", "uniform")

# Per network, the layer that each auxiliary head reads the features with, and its other inner layers.
AUXILIARY = {
    "torchvision:googlenet": (("aux1.conv.conv", "aux2.conv.conv"), ("aux1.fc1", "aux2.fc1")),
    "torchvision:inception_v3": (("AuxLogits.conv0.conv",), ("AuxLogits.conv1.conv",)),
}


@pytest.fixture(scope="module", params=REFERENCE_SET)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> nn.Module:
    return randomised(name)


@pytest.fixture(scope="module")
def own(model: nn.Module, name: str) -> Count:
    return fvcore_count(model, name)


def test_outputs_depend_on_the_image(model: nn.Module, name: str) -> None:
    """Otherwise a comparison of outputs would prove nothing about the early layers."""
    with torch.no_grad():
        outputs = model(torch.randn(2, *example(name).shape[1:]))
    difference = (outputs[0] - outputs[1]).abs().max()
    assert difference > 1e-2 * outputs.abs().max()


# Tracing --------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Bytes of tensors with storage that any operator made while it was on."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                storage = leaf.untyped_storage()
                self.bytes += 0 if storage.data_ptr() in known else storage.nbytes()
        return result


def weight_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def trace_counting(model: nn.Module) -> tuple[ChannelGraph, int]:
    with Allocations() as allocations:
        graph = allocator.trace(model)
    return graph, allocations.bytes


def test_allocations_are_seen() -> None:
    """The measure itself: a copy counts, a view and a tensor without storage do not."""
    weight = torch.zeros(10, 10)
    with Allocations() as allocations:
        weight.view(100)
        weight.to("meta")
        assert allocations.bytes == 0
        weight.clone()
    assert allocations.bytes == 400


def test_tracing_copies_no_weight(model: nn.Module, name: str) -> None:
    versions = {key: (t.data_ptr(), t._version) for key, t in model.state_dict(keep_vars=True).items()}
    graph, made = trace_counting(model)
    assert made <= 3 * example(name).nbytes + 4096  # the example input, and two of it where train mode is traced too
    assert made < 0.2 * weight_bytes(model)
    assert graph.flow.trace.mode == "meta"
    for flow in (graph.flow, graph.training_flow):
        assert flow is None or all(flow.trace.modules[path] is module for path, module in model.named_modules())
    assert versions == {key: (t.data_ptr(), t._version) for key, t in model.state_dict(keep_vars=True).items()}


def test_tracing_holds_no_weights_outside_torch() -> None:
    """Labels and recorded calls take a fraction of the weights, so these are not in numpy arrays either."""
    model = randomised("torchvision:resnet50")
    tracemalloc.start()
    try:
        allocator.trace(model)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.3 * weight_bytes(model)


def test_every_operator_is_understood(model: nn.Module) -> None:
    graph = allocator.trace(model)
    assert graph.unsupported == {}
    assert graph.size > 0
    assert graph.blocks


@pytest.mark.parametrize("key", AUXILIARY)
def test_auxiliary_heads_are_reached(key: str) -> None:
    """They run in train mode only; their neurons are found, they follow the trunk, and still train with it."""
    model = randomised(key)
    first, inner = AUXILIARY[key]
    graph = allocator.trace(model)
    assert graph.training_flow is not None
    for layer in (*first, *inner):
        label = graph.slots.labels(f"{layer}.weight")[0]
        assert label is not None
        assert (graph.unit_of_slot[label] >= 0).all(), layer
    result = allocator.allocate(model, flops="60%", policy="global", scope="inner", certify=False)
    for layer in first:
        conv, read = model.get_submodule(layer), result.allocation.kept[f"{layer}.weight"][1]
        assert isinstance(conv, nn.Conv2d)
        assert read is not None
        assert 0 < len(read) < conv.in_channels
    outputs = result.model.train()(torch.randn(2, *example(key).shape[1:]))
    assert [tuple(t.shape) for t in outputs] == [(2, 1000)] * (len(first) + 1)
    sum(t.sum() for t in outputs).backward()
    assert all(p.grad is not None for p in result.model.parameters())


# Budgets, FLOPs, certificates -----------------------------------------------------------------------


def allocate_within(model: nn.Module, own: Count, share: int, policy: str) -> tuple[Result, float]:
    """Allocate to a share of the model's FLOPs; where it cannot be met, to the smallest figure that can."""
    asked = own.flops * share / 100
    try:
        return allocator.allocate(model, flops=f"{share}%", policy=policy), asked
    except BudgetError as error:
        reachable, message = error.reachable, str(error)
    assert reachable is not None
    assert reachable > asked
    assert f"{reachable:,}" in message
    return allocator.allocate(model, flops=reachable, policy=policy), reachable


def check_promises(result: Result, asked: float, name: str) -> None:
    count = fvcore_count(result.model, name)
    assert count.flops == result.flops_after == result.allocation.flops_after
    assert count.uncounted == result.uncounted
    assert count.flops <= asked
    assert result.next_cost is not None
    assert count.flops + result.next_cost > asked, "a further neuron would still fit"
    if count.flops < 0.995 * asked:
        assert result.next_cost > 0.005 * asked
    assert result.certificate.structural
    assert result.certificate.exact
    assert result.certificate.relative_error is not None
    assert result.certificate.relative_error <= 1e-9
    assert result.certificate.ok


@pytest.fixture(scope="module")
def allocated(model: nn.Module, own: Count, name: str) -> tuple[Result, float]:
    """One allocation per network; budgets and policies take turns over the set."""
    turn = REFERENCE_SET.index(name)
    return allocate_within(model, own, SHARES[turn % 4], POLICIES[(turn + turn // 4) % 3])


def test_cost_model_is_fvcores(model: nn.Module, own: Count, allocated: tuple[Result, float]) -> None:
    result, _ = allocated
    assert allocator.trace(model).flops == own.flops == result.flops_before
    assert result.flops_after < own.flops
    assert own.uncounted


def test_result_keeps_the_promises(allocated: tuple[Result, float], name: str) -> None:
    check_promises(*allocated, name)


def test_turns_cover_all_budgets_and_policies() -> None:
    turns = {(SHARES[i % 4], POLICIES[(i + i // 4) % 3]) for i in range(len(REFERENCE_SET))}
    assert len(turns) == len(SHARES) * len(POLICIES)


@pytest.fixture(scope="module", params=[(share, policy) for share in SHARES for policy in POLICIES])
def case(request: pytest.FixtureRequest) -> tuple[int, str]:
    share, policy = request.param
    return share, policy


@pytest.mark.sweep
def test_every_budget_and_policy(model: nn.Module, own: Count, name: str, case: tuple[int, str]) -> None:
    share, policy = case
    result, asked = allocate_within(model, own, share, policy)
    check_promises(result, asked, name)
    assert result.flops_before == own.flops


@pytest.mark.sweep
def test_two_swapped_channels_are_noticed(model: nn.Module, allocated: tuple[Result, float]) -> None:
    """Every shape and index label is right, but the first convolution's rows are not where they should be."""
    result, _ = allocated
    wrong = copy.deepcopy(result.model)
    conv = next(module for module in wrong.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        conv.weight[[0, 1]] = conv.weight[[1, 0]]
    certificate = allocator.verify(model, wrong, result.allocation)
    assert certificate.structural
    assert certificate.relative_error is not None
    assert certificate.relative_error > 1e-6
    assert not certificate.ok
    assert allocator.verify(model, result.model, result.allocation).ok


@pytest.mark.sweep
def test_cannot_be_met_names_what_can(model: nn.Module, own: Count) -> None:
    """A ten-thousandth of the FLOPs is out of reach everywhere; the figure named instead is not."""
    with pytest.raises(BudgetError, match="smallest that can be reached") as caught:
        allocator.allocate(model, flops="0.01%")
    reachable = caught.value.reachable
    assert reachable is not None
    result = allocator.allocate(model, flops=reachable)
    assert result.flops_after <= reachable < own.flops
    assert result.certificate.ok
