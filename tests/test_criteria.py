"""What ranks neurons where nothing is named, and what criteria say."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from subjects import IMAGE, Branches, trained
from torch import Tensor, nn
from torch.nn import functional as F

import allocator


def test_without_data_the_norm_of_all_that_goes_with_a_neuron_ranks_it() -> None:
    model = trained()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = allocator.allocate(model, "60%", example_inputs=IMAGE)
    allocation = result.allocation
    assert (allocation.criterion, allocation.policy, allocation.scope) == ("group_norm", "global", "all")
    named = allocator.allocate(model, "60%", example_inputs=IMAGE, criterion="group_norm", policy="global")
    assert allocation.kept == named.allocation.kept


def test_batch_norms_compare_within_a_block() -> None:
    result = allocator.allocate(trained(), "60%", example_inputs=IMAGE, criterion="bn_scale")
    assert result.allocation.policy == "per_block"


def test_a_network_without_batch_norms_needs_no_other_criterion() -> None:
    torch.manual_seed(0)
    result = allocator.allocate(Branches(norm=False).eval(), "60%", example_inputs=IMAGE)
    assert result.allocation.criterion == "group_norm"
    assert result.certificate.ok


def test_a_part_is_not_emptied_while_others_stay_whole() -> None:
    """The narrowest scope that meets a budget takes all of it from the branches."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 32, 32, 3, padding=1) for i in range(5)))
            self.branches = nn.ModuleList(nn.Conv2d(32, 64, k, padding=k // 2) for k in (1, 3, 3))
            self.head = nn.Conv2d(192, 10, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.encoder(x)
            return self.head(torch.cat([branch(x) for branch in self.branches], 1))

    torch.manual_seed(0)
    model: Any = Net().eval()
    small: Any = allocator.allocate(model, "50%", example_inputs=IMAGE).model
    for old, new in zip(model.modules(), small.modules()):
        if isinstance(old, nn.Conv2d):
            assert new.out_channels >= 0.1 * old.out_channels


class Rates(nn.Module):
    """Hidden neurons that a vector writes, as the frequencies of a rotary embedding are written."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.linspace(-1.2, 1.1, 12))
        self.read = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(F.relu(x @ self.rates[None]))


def test_neurons_that_a_vector_writes_are_ranked_by_its_numbers() -> None:
    model: Any = Rates().eval()
    result = allocator.allocate(model, "60%", example_inputs=torch.randn(3, 1), criterion="magnitude")
    small: Any = result.model
    largest = model.rates.detach().abs().argsort(descending=True)[: len(small.rates)].sort().values
    assert 2 < len(small.rates) < 12
    assert torch.equal(small.rates, model.rates[largest])


def test_a_scale_counts_by_its_size_whatever_its_sign() -> None:
    model: Any = trained(Branches())
    before = allocator.allocate(model, "60%", example_inputs=IMAGE, scope="all")
    with torch.no_grad():
        for norm in (model.norm, model.narrow_norm, model.wide_norm):
            norm.weight[1::2].neg_()
    assert allocator.allocate(model, "60%", example_inputs=IMAGE, scope="all").allocation.kept == before.allocation.kept
