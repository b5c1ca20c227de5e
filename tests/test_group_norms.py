"""Group norms: a group stays or goes whole, which leaves the others as they were, and the count of groups follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import IMAGE, trained, untouched
from torch import Tensor, nn
from torch.nn import functional as F

import allocator
from allocator.io.files import load_model
from allocator.settings import Scope

pytestmark = [
    pytest.mark.filterwarnings("ignore::allocator.AllocatorWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
WIDTH = 4


class Block(nn.Module):
    """A residual block of 8 groups of 4 channels, on a stream of 4 groups of 4."""

    def __init__(self, *, affine: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first, self.norm1 = nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(8, 32, affine=affine)
        self.second, self.norm2 = nn.Conv2d(32, 16, 3, padding=1), nn.GroupNorm(4, 16, affine=affine)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.norm2(self.second(F.relu(self.norm1(self.first(x))))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("scope", ["inner", "all"])
def test_whole_groups_go(affine: bool, scope: Scope) -> None:
    model: Any = trained(Block(affine=affine))
    with untouched(model):
        result = allocator.allocate(model, "50%", example_inputs=IMAGE, scope=scope)
    certificate, small = result.certificate, result.model
    assert isinstance(small, Block)
    assert certificate.ok
    assert certificate.exact
    for path in ("norm1", "norm2") if scope == "all" else ("norm1",):
        norm, before = small.get_submodule(path), model.get_submodule(path)
        assert isinstance(norm, nn.GroupNorm)
        assert 1 <= norm.num_groups < before.num_groups
        assert norm.num_channels == WIDTH * norm.num_groups
        writer = "first" if path == "norm1" else "second"
        rows = torch.tensor(result.allocation.kept[f"{writer}.weight"][0]).view(-1, WIDTH)
        assert torch.equal(rows % WIDTH, torch.arange(WIDTH).expand_as(rows))
        assert torch.equal(rows // WIDTH, (rows[:, :1] // WIDTH).expand_as(rows))


def test_what_stays_gives_what_it_gave() -> None:
    """Without the certificate's help: the hidden channels of the result are those of the original."""
    model: Any = trained(Block())
    result = allocator.allocate(model, "50%", example_inputs=IMAGE, scope="inner")
    small, x = result.model, torch.randn(2, 16, 8, 8)
    assert isinstance(small, Block)
    with torch.no_grad():
        found, whole = small.norm1(small.first(x)), model.norm1(model.first(x))
    torch.testing.assert_close(found, whole[:, result.allocation.kept["first.weight"][0]])


def test_one_group_may_be_left() -> None:
    model = trained(Block())
    with pytest.raises(allocator.BudgetError) as caught:
        allocator.allocate(model, 1, example_inputs=IMAGE, scope="inner")
    result = allocator.allocate(model, float(caught.value.reachable or 0), example_inputs=IMAGE, scope="inner")
    assert result.certificate.ok
    norm = result.model.get_submodule("norm1")
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == 1
    again = allocator.trace(result.model, IMAGE)
    assert any("a norm over the channels mixes them all" in reason for reason, _ in again.reasons())


def test_a_count_of_groups_that_did_not_follow_is_noticed() -> None:
    model = trained(Block())
    result = allocator.allocate(model, "50%", example_inputs=IMAGE, scope="inner")
    assert allocator.verify(model, result.model, result.allocation, example_inputs=IMAGE, numeric=False).ok
    norm: Any = result.model.get_submodule("norm1")
    norm.num_groups *= 2
    assert not allocator.verify(model, result.model, result.allocation, example_inputs=IMAGE, numeric=False).ok


def test_loose_norms_keep_their_groups() -> None:
    result = allocator.allocate(trained(Block()), "50%", example_inputs=IMAGE, scope="inner", norms="loose")
    norm = result.model.get_submodule("norm1")
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == 8
    assert norm.num_channels < 32


class Own(nn.Module):
    """Calls the function itself, with its number of groups from an attribute, or written down."""

    def __init__(self, held: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(32) + 0.5), nn.Parameter(torch.randn(32))
        self.norm_groups, self.held = 8, held

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.norm_groups if self.held else 8, self.weight, self.bias)


@pytest.mark.parametrize("held", [True, False])
def test_a_norm_that_is_called_as_a_function(held: bool) -> None:
    model: Any = Block()
    model.norm1 = Own(held)
    result = allocator.allocate(trained(model), "50%", example_inputs=IMAGE, scope="all", policy="uniform")
    assert result.certificate.ok
    norm: Any = result.model.get_submodule("norm1")
    assert (norm.norm_groups < 8) is held
    assert len(norm.weight) == (4 * norm.norm_groups if held else 32)
    assert any("native_group_norm" in note and "norm1 stay" in note for note in result.notes) is not held


@pytest.mark.skipif(torch.__version__ < "2.8", reason="reads programs of torch 2.8 and later")
def test_a_norm_in_an_exported_program(tmp_path: Path) -> None:
    model = trained(Block())
    torch.export.save(torch.export.export(model, (IMAGE,)), tmp_path / "m.pt2")
    program = load_model(tmp_path / "m.pt2")
    result = allocator.allocate(program, "50%", example_inputs=IMAGE, scope="inner")
    assert result.certificate.ok
    assert result.flops_after == allocator.allocate(model, "50%", example_inputs=IMAGE, scope="inner").flops_after
