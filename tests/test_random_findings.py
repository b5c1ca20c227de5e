"""What random networks brought to light, each with the smallest network that shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_checks import Case, check_attributes, check_model, count, example, reference, require_equal
from random_networks import Spec, Step, build
from torch import Tensor, nn

import allocator

IMAGE = (3, 8, 8)


class Net(nn.Module):
    """Layers given by name, and a forward that is given too."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def _unit(source: int, out: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    conv = nn.Conv2d(source, out, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


def _head(channels: int, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def _randomised(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.2, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
    return model.eval()


def _hold(make: Callable[[], nn.Module], share: float = 0.6, **options: Any) -> str:
    """Hold all promises against a network."""
    case = Case(Spec(IMAGE, ()), share, **options)
    return check_model(_randomised(make), _randomised(make), example(IMAGE), case)


# Dead branches -------------------------------------------------------------------------------------


def _with_a_dead_branch() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        y = net.stem(x)
        net.dead(y)
        return net.head(net.body(y))

    return Net(run, stem=_unit(3, 8), dead=_unit(8, 8, groups=2), body=_unit(8, 8), head=_head(8))


def test_a_dead_branch_costs_nothing() -> None:
    """fvcore's trace drops calls that the outputs do not depend on; they were counted."""
    model, x = _randomised(_with_a_dead_branch), example(IMAGE)
    assert allocator.trace(model, x).flops == count(model, x)
    assert _hold(_with_a_dead_branch) == "result"


def test_the_groups_of_a_dead_convolution_are_a_block_without_cost() -> None:
    """They were looked up among the counted calls."""
    graph = allocator.trace(_randomised(_with_a_dead_branch), example(IMAGE))
    (groups,) = [block for block in graph.blocks if block.kind == "groups"]
    assert [branch.flops for branch in groups.branches] == [0, 0]


# What depends on how a tensor lies in memory --------------------------------------------------------


def _linear_over_channels() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        tokens = net.stem(x).movedim(1, -1)
        return net.head(net.down(F.gelu(net.up(tokens))).movedim(-1, 1))

    return Net(run, stem=_unit(3, 2), up=nn.Linear(2, 6), down=nn.Linear(6, 4), head=_head(4))


def test_a_linear_layer_over_the_one_channel_that_is_left() -> None:
    """torch takes it apart in another way where a dim of size 1 makes its input contiguous."""
    model, x = _randomised(_linear_over_channels), example(IMAGE)
    result = allocator.allocate(model, "5%", example_inputs=x) if _reaches(model, x, 0.05) else None
    if result is None:
        with pytest.raises(allocator.BudgetError) as caught:
            allocator.allocate(model, "5%", example_inputs=x)
        assert caught.value.reachable is not None
        result = allocator.allocate(model, caught.value.reachable, example_inputs=x)
    assert result.model.get_submodule("up").weight.shape == (1, 1)  # type: ignore[union-attr]
    assert result.notes == []


def _reaches(model: nn.Module, x: Tensor, share: float) -> bool:
    try:
        allocator.allocate(model, share * count(model, x), example_inputs=x)
    except allocator.BudgetError:
        return False
    return True
