"""What a library builds a model from follows where the forward still fits; forwards of other modes may be left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small_graphs import graph_of
from test_fitting import planner
from torch import Tensor, nn

from allocator import adapters
from allocator.adapters import Adapter, Configured
from allocator.fitting.fit import Fitted, fit
from allocator.graph.build import elsewhere

X = torch.zeros(2, 4)


class OfALibrary(nn.Module):
    """Holds a number beside its layers, which its forward reads or not."""

    def __init__(self, *, reads: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.width, self.also, self.reads = nn.Linear(4, 6), nn.Linear(6, 2), 6, 0.5, reads

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x) * (1 / self.width if self.reads else self.also))
        return y


Known = Callable[[Callable[[Any], Configured | None]], None]


@pytest.fixture
def known() -> Iterator[Known]:
    yield lambda configuration: adapters.register(OfALibrary, Adapter(configuration=configuration))  # type: ignore[misc]
    adapters.unregister(OfALibrary)


def fitted(model: nn.Module, *dropped: int) -> Fitted:
    return fit(graph_of(model.eval(), X), planner({"first": dropped}))


def own(found: Fitted) -> Any:
    """What changes of the model itself, beside its layers."""
    return found.allocation.attributes.get("", {})


def test_a_configuration_follows_the_rewritten_model(known: Known) -> None:
    known(lambda model: Configured({"": {"width": model.first.out_features}}))
    found = fitted(OfALibrary(), 1, 4)
    assert own(found) == {"width": 4}
    assert found.notes == []
    assert own(fitted(OfALibrary())) == {}, "nothing was dropped"


def test_what_the_caller_has_to_know_is_noted(known: Known) -> None:
    known(lambda model: Configured({"": {"width": model.first.out_features}}, "save it with its code"))
    found = fitted(OfALibrary(), 1)
    assert own(found) == {"width": 5}
    assert found.notes == ["save it with its code"]
    adapters.unregister(OfALibrary)
    known(lambda _: Configured({}, "save it with its code"))
    found = fitted(OfALibrary(), 1)
    assert own(found) == {}
    assert found.notes == ["save it with its code"]


def test_a_configuration_that_the_forward_reads_stays(known: Known) -> None:
    known(lambda model: Configured({"": {"width": model.first.out_features}}))
    found = fitted(OfALibrary(reads=True), 1)
    assert own(found) == {}
    (note,) = found.notes
    assert note.startswith(
        "the configuration stays as it was, since the forward reads it: aten.mul.Tensor in the model"
    )


class Pretrained(OfALibrary):
    """As libraries have it that build a model by its configuration."""

    def save_pretrained(self, folder: str) -> None:
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, folder: str) -> Any:
        raise NotImplementedError


class SavedOnly(OfALibrary):
    def save_pretrained(self, folder: str) -> None:
        raise NotImplementedError


def test_of_a_library_that_is_not_known_it_is_said_how_to_write_and_read_it() -> None:
    (note,) = fitted(Pretrained(), 1).notes
    assert "write the result with allocator.save, and read it with allocator.load" in note
    assert fitted(SavedOnly(), 1).notes == []
    assert fitted(OfALibrary(), 1).notes == []
    assert fitted(Pretrained()).notes == []


def test_what_an_adapter_says_it_counts_follows_though_the_forward_does_not_read_it() -> None:
    adapters.register(OfALibrary, Adapter(widths=lambda _: {"width": "first"}))
    try:
        assert own(fitted(OfALibrary(), 1, 4)) == {"width": 4}
    finally:
        adapters.unregister(OfALibrary)


class IdleInTraining(nn.Module):
    """Makes no call in train mode, as long as it has its own width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.first.out_features == 6:
            return x
        y: Tensor = self.last(self.first(x))
        return y


def test_a_forward_of_train_mode_that_cannot_be_repaired_is_left_out() -> None:
    graph = elsewhere(graph_of(IdleInTraining().eval(), X))
    assert any(flow.trace.training for flow in graph.flows)
    found = fit(graph, planner({"first": [1]}))
    assert found.allocation.attributes["first"] == {"out_features": 5}
    assert not any(flow.trace.training for flow in found.graph.flows)
    assert len(found.graph.flows) < len(graph.flows)
    (why,) = found.graph.forwards.refused
    assert "in train mode" in why
    assert "the rewritten forward does not fit: a forward without calls: 2 calls follow, expected 0" in why
