"""Weights into which a forward writes on numbers alone, which no trace on sizes shows, stay the caller's."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_graphs import IMAGE, net
from subjects import untouched
from torch import Tensor, nn

import allocator
from allocator.errors import AllocatorError
from allocator.tracing.inputs import as_inputs
from allocator.tracing.sharing import writes_on_values


def _by_view(weight: Tensor) -> None:
    weight.data.view(-1)[:1].fill_(3)


def _by_copying(weight: Tensor) -> None:
    weight.copy_(weight * 0.5)


def _by_numpy(weight: Tensor) -> None:
    weight.detach().numpy()[0, 0] = 7


def _by_out(weight: Tensor) -> None:
    torch.mul(weight, 0.5, out=weight)


def _by_operator(weight: Tensor) -> None:
    weight *= 0.5


def _by_list(weight: Tensor) -> None:
    torch._foreach_mul_([weight], 0.5)


WRITES: list[Callable[[Tensor], None]] = [_by_view, _by_copying, _by_numpy, _by_out, _by_operator, _by_list]
DATA = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def writing(write: Callable[[Tensor], None]) -> Any:
    """A network that writes into a weight where it runs on numbers, whatever torch says of that."""

    def run(m: Any, x: Tensor) -> Tensor:
        if not x.is_meta:
            with torch.no_grad():
                write(m.two.weight)
        y: Tensor = m.head(m.two(m.one(x).relu()).relu().mean((2, 3)))
        return y

    torch.manual_seed(0)
    return net(run, one=nn.Conv2d(3, 8, 3), two=nn.Conv2d(8, 8, 3), head=nn.Linear(8, 5))


@pytest.mark.parametrize("options", [{}, {"data": DATA, "criterion": "fisher"}, {"data": DATA, "recover": True}])
@pytest.mark.parametrize("write", WRITES)
def test_what_a_forward_writes_on_numbers_alone_is_not_written_into_the_model(
    write: Callable[[Tensor], None], options: dict[str, Any]
) -> None:
    model = writing(write)
    before = model.two.weight.detach().clone()
    with untouched(model):
        try:
            result: Any = allocator.allocate(model, "60%", example_inputs=IMAGE, **options)
        except AllocatorError:
            return
    if "recover" not in options:
        rows, columns = (range(8) if kept is None else kept for kept in result.allocation.kept["two.weight"][:2])
        assert torch.equal(result.model.two.weight, before[list(rows)][:, list(columns)])


def _always(m: Any, x: Tensor) -> Tensor:
    m.two.weight.detach().numpy()[0, 0] = 7
    y: Tensor = m.two(m.one(x).relu())
    return y


def test_what_a_trace_on_numbers_finds_changed_was_written() -> None:
    model = net(_always, one=nn.Conv2d(3, 8, 3), two=nn.Conv2d(8, 8, 3))
    with pytest.warns(allocator.ValueDependentTraceWarning):
        graph = allocator.trace(model, IMAGE)
    assert graph.flow.trace.written() == {"two.weight"}
    with untouched(model), warnings.catch_warnings(), contextlib.suppress(AllocatorError):
        warnings.simplefilter("ignore")
        allocator.allocate(model, "80%", example_inputs=IMAGE, data=DATA)


def test_forwards_that_read_are_told_from_those_that_write() -> None:
    def reads(m: Any, x: Tensor) -> Tensor:
        own = x.clone().mul_(2)
        own[0] += 1
        torch.add(own, m.one.weight.sum(), out=own)
        y: Tensor = m.one(own)
        return y

    inputs = as_inputs(IMAGE, nn.Conv2d(3, 8, 3))
    assert not writes_on_values(net(reads, one=nn.Conv2d(3, 8, 3)), inputs, ())
    model = writing(_by_copying)
    with untouched(model):
        assert writes_on_values(model, inputs, ())
        assert not writes_on_values(model, inputs, {"two.weight"})
