"""A result works wherever the original worked: in train mode, in other batches and sizes, on both sides of a branch."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_graphs import net
from torch import Tensor, nn
from torch.nn import functional as F

import allocator

IMAGE = torch.zeros(1, 3, 16, 16)
MODES = ((False, 1, 16), (False, 3, 16), (True, 2, 16), (False, 1, 40), (False, 2, 7), (True, 3, 24))


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    found: dict[str, nn.Module] = {"first": nn.Conv2d(3, 16, 3, padding=1), "norm": nn.BatchNorm2d(16)}
    found |= {"second": nn.Conv2d(16, 16, 3, padding=1), "other": nn.Conv2d(16, 16, 3, padding=1)}
    return found | {"aux": nn.Linear(16, 5), "head": nn.Linear(16, 5)}


def forward(m: Any, x: Tensor, middle: Callable[[Any, Tensor], Tensor]) -> Tensor:
    y = middle(m, m.norm(m.first(x)).relu())
    result: Tensor = m.head(m.second(y).relu().mean((2, 3)))
    return result


def cut(model: nn.Module, kept: dict[str, list[Any]]) -> nn.Module:
    """The original in float64 without what reads a dropped channel, by the allocation alone."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rows = kept.get(name, [None, None])
            if parameter.dim() > 1 and rows[1] is not None:
                gone = sorted(set(range(parameter.shape[1])) - set(rows[1]))
                parameter.index_fill_(1, torch.tensor(gone, dtype=torch.long), 0)
    return model


def require_same(model: nn.Module, result: Any, modes: Any = MODES, **given: Callable[[int], Tensor]) -> None:
    """The result equals the original without the dropped channels in every mode, and trains in train mode."""
    for training, batch, side in modes:
        x = torch.randn(batch, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(side))
        options = {name: make(batch) for name, make in given.items()} if training else {}
        one, other = (
            each.train(training)(x.clone(), **options)
            for each in (cut(model, result.allocation.kept), copy.deepcopy(result.model).double())
        )
        for a, b in zip(*(each if isinstance(each, tuple) else (each,) for each in (one, other)), strict=True):
            assert (a - b).abs().max() <= 1e-9 * a.abs().max().clamp_min(1)
            if training:
                b.square().mean().backward(retain_graph=True)


MIDDLE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a constant in train mode": lambda m, y: y * torch.ones(1, 16, 1, 1, dtype=y.dtype) if m.training else y,
    "numbers in train mode": lambda m, y: y + torch.arange(16.0).view(1, -1, 1, 1).to(y) if m.training else y,
    "a count in train mode": lambda m, y: y * (16 / y.shape[1]) if m.training else y,
    "a layer of large images": lambda m, y: m.other(y) if y.shape[-1] > 16 else y,
    "a layer of small images": lambda m, y: m.other(y) if y.shape[-1] < 16 else y,
    "a count in large images": lambda m, y: y * (16 / y.shape[1]) if y.shape[-1] > 16 else y,
    "a layer of batches": lambda m, y: m.other(y) if y.shape[0] > 1 else y,
    "numbers of batches": lambda m, y: y + torch.arange(16.0).view(1, -1, 1, 1).to(y) if y.shape[0] > 1 else y,
    "a fixed view of small images": lambda m, y: y.view(len(y), 16, -1).view_as(y) if y.shape[-1] < 16 else y,
    "a shortcut in train mode": lambda m, y: y + m.other(y) if m.training else y,
}


@pytest.mark.parametrize("middle", MIDDLE)
def test_a_result_works_in_every_mode_and_size(middle: str) -> None:
    model = net(lambda m, x: forward(m, x, MIDDLE[middle]), **layers())
    result = allocator.allocate(model, "60%", example_inputs=IMAGE, criterion="magnitude", scope="all")
    assert result.flops_after <= 0.6 * result.flops_before
    require_same(model, result)
    small: Any = result.model
    assert small.second.out_channels < 16, "what does not meet the misfit still goes"
    assert result.notes[-1].startswith("held against the original in eval mode with 1x3x16x16")
    assert allocator.verify(model, small, result.allocation, example_inputs=IMAGE).ok


def test_train_mode_is_tried_in_the_first_smaller_size_that_runs() -> None:
    def halving(m: Any, y: Tensor) -> Tensor:
        return y + F.interpolate(F.max_pool2d(y, 4), scale_factor=4.0)

    used = {name: layer for name, layer in layers().items() if name not in ("aux", "other")}
    model = net(lambda m, x: forward(m, x, halving), **used)
    result = allocator.allocate(model, "60%", example_inputs=IMAGE, criterion="magnitude", scope="all")
    said = "in eval mode with 1x3x16x16 and 3x3x48x48, in train mode with 2x3x8x8"
    assert result.notes[-1] == f"held against the original {said}"
    require_same(model, result, ((False, 1, 16), (True, 2, 16), (True, 3, 24), (False, 2, 8)))


class Supervised(nn.Module):
    """Needs a target in train mode, for its head and for an auxiliary one."""

    first: nn.Conv2d
    norm: nn.BatchNorm2d
    aux: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        for name, layer in layers().items():
            if name != "other":
                setattr(self, name, layer)
        self.second, self.head = nn.Conv2d(16, 24, 3, padding=1), nn.Linear(24, 5)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.first(x)).relu()
        return y.mean((2, 3)), self.head(self.second(y).relu().mean((2, 3)))


class Guessed(Supervised):
    """The argument is called as many call it, and the auxiliary head runs after it is used."""

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        y, z = self.features(x)
        if not self.training:
            return z
        assert target is not None
        return F.cross_entropy(z, target) + 0.4 * F.cross_entropy(self.aux(y), target)


class AuxiliaryFirst(Supervised):
    """The argument has a name that nobody would guess, and the auxiliary head runs before it is used."""

    def forward(self, x: Tensor, wanted: Tensor | None = None) -> Tensor:
        y, z = self.features(x)
        if not self.training:
            return z
        aux = self.aux(y)
        assert wanted is not None
        return F.cross_entropy(z, wanted) + 0.4 * F.cross_entropy(aux, wanted)


class Unseen(AuxiliaryFirst):
    """Nothing tells before the forward raises what the auxiliary head reads."""

    def forward(self, x: Tensor, wanted: Tensor | None = None) -> Tensor:
        if self.training and wanted is None:
            raise ValueError("train with what is wanted")
        return super().forward(x, wanted)


@pytest.mark.parametrize(("kind", "name"), [(Guessed, "target"), (AuxiliaryFirst, "wanted"), (Unseen, "wanted")])
def test_auxiliary_heads_that_need_a_target_follow(kind: type[nn.Module], name: str) -> None:
    model = kind().eval()
    result = allocator.allocate(model, "60%", example_inputs=IMAGE, criterion="magnitude", scope="all")
    require_same(model, result, **{name: lambda batch: torch.zeros(batch, dtype=torch.long)})
    small: Any = result.model
    assert small.first.out_channels == small.aux.in_features
    assert (small.first.out_channels < 16) is (kind is not Unseen)
    assert small.aux.out_features == 5


def test_a_mode_in_which_the_original_does_not_repeat_itself_is_left_out() -> None:
    calls = iter(range(100))
    model = net(lambda m, x: forward(m, x, lambda m, y: y * (next(calls) + 0.5) if m.training else y), **layers())
    result = allocator.allocate(model, "60%", example_inputs=IMAGE, criterion="magnitude")
    assert result.flops_after < result.flops_before
    assert "not so in train mode with 2x3x16x16 (the original itself does not repeat its calls" in result.notes[-1]


class Exits(nn.Module):
    """Gives up the whole process where it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.read = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            sys.exit("not for training")
        y: torch.Tensor = self.read(self.write(x).relu())
        return y


def test_a_forward_that_exits_in_train_mode_ends_nothing() -> None:
    result = allocator.allocate(Exits(), "50%", example_inputs=torch.zeros(1, 3, 8, 8))
    assert result.certificate.ok
    assert "the forward exits (not for training)" in result.notes[-1]
    with pytest.raises(allocator.TraceError, match=r"the forward exits \(2\)"):
        allocator.trace(Leaves(), torch.zeros(1, 3))


class Leaves(nn.Module):
    """Gives up the whole process in any mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sys.exit(2)


class MasksOfABatch(nn.Module):
    """Holds masks of its hidden units, and draws them anew for a batch of another size than the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 5)
        self.hidden, self.batch = 12, 2
        self.register_buffer("masks", torch.bernoulli(torch.full((16, 12), 0.8)))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != self.batch:
            self.batch = len(x)
            self.masks = torch.bernoulli(torch.full((16, self.hidden), 0.8))
        y = self.first(x).relu()
        out: Tensor = self.second(y * self.masks[: len(x)] if self.training else y)
        return out


def test_what_train_mode_reads_for_the_batch_at_hand_alone_follows() -> None:
    torch.manual_seed(0)
    model = MasksOfABatch().eval()
    result = allocator.allocate(model, "60%", example_inputs=torch.randn(2, 6))
    small: Any = result.model
    kept = result.allocation.kept["first.weight"][0]
    assert kept is not None
    assert torch.equal(small.masks, model.masks[:, kept])
    small.train()
    for batch in (2, 3):
        small(torch.randn(batch, 6)).sum().backward()


@pytest.mark.filterwarnings("ignore::allocator.BudgetNotBindingWarning")
def test_a_budget_of_all_there_is_counts_neurons_that_go_together_elsewhere() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y, z = m.first(x), m.other(x)
        y = y + z if x.shape[-1] > 20 else y
        result: Tensor = m.head((m.second(y) + m.third(z)).mean((2, 3)))
        return result

    convolutions = {name: nn.Conv2d(3, 16, 3) for name in ("first", "other")}
    convolutions |= {name: nn.Conv2d(16, 16, 3) for name in ("second", "third")}
    model = net(run, **convolutions, head=nn.Linear(16, 5))
    result = allocator.allocate(model, "100%", example_inputs=IMAGE)
    assert result.flops_after == result.flops_before
    assert result.graph.size < allocator.trace(model, IMAGE).size


def test_what_was_dropped_from_a_tensor_that_other_sizes_do_not_read_is_verified_there() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.first(x)
        return m.head((y * m.second.bias[:, None, None] if x.shape[-1] <= 16 else y).mean((2, 3)))

    parts = {"first": nn.Conv2d(3, 16, 3), "second": nn.Conv2d(1, 16, 1), "head": nn.Linear(16, 5)}
    model = net(run, **parts)
    result = allocator.allocate(model, "60%", example_inputs=IMAGE)
    assert "second.bias" in result.allocation.kept
    for side in (16, 40, 64):
        assert allocator.verify(model, result.model, result.allocation, example_inputs=torch.zeros(2, 3, side, side)).ok
    first: Any = list(range(len(result.allocation.kept["second.bias"][0] or ())))
    wrong = replace(result.allocation, kept={**result.allocation.kept, "second.bias": [first]})
    assert wrong.kept != result.allocation.kept
    small = allocator.rewrite(model, wrong)
    assert not allocator.verify(model, small, wrong, example_inputs=torch.zeros(1, 3, 40, 40)).ok
