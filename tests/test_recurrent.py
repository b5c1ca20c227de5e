"""Recurrent layers lose hidden units: layers of torch's, cells in a loop, and loops that are written by hand."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_graphs import net
from torch import Tensor, nn

import allocator

X = torch.zeros(2, 5, 6)
Run = Callable[..., Any]


def reading_zeros(model: nn.Module, kept: dict[str, Any]) -> nn.Module:
    """The original, in float64, in which the columns of every dropped neuron are zero."""
    model = copy.deepcopy(model).double().eval()
    for name, parameter in model.named_parameters():
        stay = kept.get(name, [None, None])[1] if parameter.dim() > 1 else None
        if stay is not None:
            parameter.data.index_fill_(1, torch.tensor([i for i in range(parameter.shape[1]) if i not in stay]), 0)
    return model


def check(model: nn.Module, *x: Tensor, **options: Any) -> Any:
    """Allocate, and hold the result against the original; returns it."""
    before = copy.deepcopy(model.state_dict())
    given = {"params": "50%", "scope": "all", "criterion": "magnitude", **options}
    result = allocator.allocate(model, example_inputs=x, **given)
    assert result.certificate.ok
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    numbers = [torch.randn(t.shape, dtype=torch.float64) if t.is_floating_point() else t for t in x]
    with torch.no_grad():
        expected = reading_zeros(model, result.allocation.kept)(*numbers)
        found = copy.deepcopy(result.model).double().eval()(*numbers)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    return result


# ------------------------------------------------------------------------------------ layers of torch's


def layer(make: Callable[..., nn.Module], run: Run | None = None, **options: Any) -> Any:
    """A linear layer, a recurrent one from 10 to 12, and a head."""
    recurrent = make(10, 12, batch_first=True, **options)
    width = recurrent(torch.zeros(1, 1, 10))[0].shape[-1]
    run = run or (lambda m, x: m.head(m.rec(m.a(x).relu())[0]))
    return net(run, a=nn.Linear(6, 10), rec=recurrent, head=nn.Linear(width, 4))


LAYERS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "LSTM": (nn.LSTM, {}),
    "LSTM, both ways": (nn.LSTM, {"bidirectional": True}),
    "LSTM with projections": (nn.LSTM, {"proj_size": 5, "num_layers": 2}),
    "GRU, two layers without bias": (nn.GRU, {"num_layers": 2, "bias": False}),
    "GRU, two layers, dropout": (nn.GRU, {"num_layers": 2, "dropout": 0.1}),
    "RNN": (nn.RNN, {}),
    "RNN, relu, both ways": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_loses_hidden_units(kind: str) -> None:
    make, options = LAYERS[kind]
    model = layer(make, **options)
    result = check(model, X)
    small, rows = result.model.rec, result.allocation.kept["rec.weight_hh_l0"][0]
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[small.mode.split("_")[0]]
    assert small.hidden_size < 12
    assert small.weight_hh_l0.shape[0] == gates * small.hidden_size
    assert small.input_size == result.model.a.out_features
    units = [[i % 12 for i in rows[k * small.hidden_size : (k + 1) * small.hidden_size]] for k in range(gates)]
    assert all(gate == units[0] for gate in units)
    small.train()(torch.randn(3, 7, small.input_size))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_layers_and_ways_of_one_module_keep_the_same_units() -> None:
    kept = check(layer(nn.GRU, num_layers=2, bidirectional=True), X).allocation.kept
    columns = {tuple(kept[name][1]) for name in kept if name.startswith("rec.weight_hh")}
    assert len(columns) == 1


def test_what_a_wider_one_adds_is_undone() -> None:
    result = allocator.widen(layer(nn.LSTM, num_layers=2), params="150%", example_inputs=X)
    assert result.certificate.ok
    assert result.model.get_submodule("rec").hidden_size > 12  # type: ignore[operator]


# ------------------------------------------------------------------------------------- where states come from


def _cells(m: Any, x: Tensor) -> Any:
    state = None
    for step in m.a(x).relu().unbind(1):
        state = m.rec(step, state)
    return m.head(state[0] if isinstance(state, tuple) else state)


def _zeros(m: Any, x: Tensor) -> Any:
    state = torch.zeros(x.shape[0], m.rec.hidden_size, dtype=x.dtype)
    out = torch.zeros(x.shape[0], x.shape[1], m.rec.hidden_size, dtype=x.dtype)
    for t, step in enumerate(m.a(x).relu().unbind(1)):
        out[:, t] = state = m.rec(step, state)
    return m.head(out)


def _new_zeros(m: Any, x: Tensor) -> Any:
    state = x.new_zeros(x.shape[0], m.rec.hidden_size), x.new_zeros(x.shape[0], m.rec.hidden_size)
    outputs = []
    for step in m.a(x).relu().unbind(1):
        state = m.rec(step, state)
        outputs.append(state[0])
    return m.head(torch.stack(outputs, 1))


def _of_numbers(m: Any, x: Tensor) -> Any:
    """A state on the CPU, where tensors without values lie elsewhere: traced with values, where a call is fused."""
    state = torch.zeros(2, x.shape[0], m.rec.hidden_size, dtype=x.dtype)
    return m.head(m.rec(m.a(x).relu(), (state, state))[0])


def _learned(m: Any, x: Tensor) -> Any:
    first = m.first.expand(-1, x.shape[0], -1).contiguous()
    return m.head(m.rec(m.a(x).relu(), first if isinstance(m.rec, nn.GRU) else (first, 2 * first))[0])


def _learned_of_cells(m: Any, x: Tensor) -> Any:
    state = m.first.expand(x.shape[0], -1)
    for step in m.a(x).relu().unbind(1):
        state = m.rec(step, state) if isinstance(m.rec, nn.GRUCell) else (m.rec(step) + m.back(state)).tanh()
    return m.head(state)


def _by_hand(m: Any, x: Tensor) -> Any:
    h = torch.zeros(x.shape[0], m.width, *x.shape[3:], dtype=x.dtype)
    for step in x.unbind(1):
        z = m.gate(torch.cat([step, h], 1)).sigmoid()
        h = (1 - z) * h + z * m.new(torch.cat([step, h * z], 1)).tanh()
    return m.head(h)


def _handed_on(m: Any, x: Tensor) -> Any:
    return m.head(m.rec(m.b(x), m.first(m.a(x).relu())[1])[0])


def _last_of_both(m: Any, x: Tensor) -> Any:
    _, (h, _) = m.rec(m.a(x).relu())
    return m.head(torch.cat([h[-2], h[-1]], 1))


def _packed(m: Any, x: Tensor) -> Any:
    steps = nn.utils.rnn.pack_padded_sequence(m.a(x).relu(), torch.tensor([5, 3]), batch_first=True)
    return m.head(nn.utils.rnn.pad_packed_sequence(m.rec(steps)[0], batch_first=True)[0])


def _parts(recurrent: nn.Module, inputs: int = 10) -> dict[str, Any]:
    return {"a": nn.Linear(6, inputs), "rec": recurrent, "head": nn.Linear(12, 4)}


STATES: dict[str, tuple[Run, Callable[[], dict[str, Any]], str]] = {
    "GRU cells, none": (_cells, lambda: _parts(nn.GRUCell(10, 12)), "rec.weight_hh"),
    "LSTM cells, none": (_cells, lambda: _parts(nn.LSTMCell(10, 12, bias=False)), "rec.weight_hh"),
    "RNN cells, zeros and a buffer": (_zeros, lambda: _parts(nn.RNNCell(10, 12)), "rec.weight_hh"),
    "LSTM cells, new_zeros": (_new_zeros, lambda: _parts(nn.LSTMCell(10, 12)), "rec.weight_hh"),
    "LSTM, numbers": (_of_numbers, lambda: _parts(nn.LSTM(10, 12, 2, batch_first=True)), "rec.weight_hh_l1"),
    "handed on": (
        _handed_on,
        lambda: {
            **_parts(nn.LSTM(9, 12, batch_first=True)),
            "b": nn.Linear(6, 9),
            "first": nn.LSTM(10, 12, batch_first=True),
        },
        "first.weight_hh_l0",
    ),
    "last of both ways": (
        _last_of_both,
        lambda: {**_parts(nn.LSTM(10, 12, batch_first=True, bidirectional=True)), "head": nn.Linear(24, 4)},
        "rec.weight_hh_l0",
    ),
    "packed": (_packed, lambda: _parts(nn.GRU(10, 12, batch_first=True)), "rec.weight_hh_l0"),
    "GRU, learned": (
        _learned,
        lambda: {**_parts(nn.GRU(10, 12, batch_first=True)), "first": nn.Parameter(torch.randn(1, 1, 12))},
        "rec.weight_hh_l0",
    ),
    "LSTM, learned": (
        _learned,
        lambda: {**_parts(nn.LSTM(10, 12, batch_first=True)), "first": nn.Parameter(torch.randn(1, 1, 12))},
        "rec.weight_hh_l0",
    ),
    "GRU cells, learned": (
        _learned_of_cells,
        lambda: {**_parts(nn.GRUCell(10, 12)), "first": nn.Parameter(torch.randn(1, 12))},
        "rec.weight_hh",
    ),
    "a loop, a fixed one": (
        _learned_of_cells,
        lambda: {**_parts(nn.Linear(10, 12)), "back": nn.Linear(12, 12), "first": nn.Parameter(torch.randn(12), False)},
        "back.weight",
    ),
    "added to what it reads": (
        lambda m, x: m.head((y := m.a(x).relu()) + m.rec(y)[0]),
        lambda: _parts(nn.LSTM(12, 12, batch_first=True), 12),
        "rec.weight_hh_l0",
    ),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_has_the_same_units_in_every_step(kind: str) -> None:
    run, parts, recurs = STATES[kind]
    result = check(net(run, **parts()), X)
    columns = result.allocation.kept[recurs][1]
    assert columns is not None
    assert len(columns) < 12


def _smallest(model: nn.Module) -> Any:
    """What comes back at the smallest number of parameters that can be reached."""
    options: Any = {"scope": "all", "criterion": "magnitude"}
    with pytest.raises(allocator.BudgetError) as caught:
        allocator.allocate(model, params=1, example_inputs=X, **options)
    return check(model, X, params=caught.value.reachable)


@pytest.mark.parametrize("kind", ["LSTM, both ways", "GRU, two layers without bias"])
def test_a_layer_comes_down_to_one_unit(kind: str) -> None:
    """Its zeros are one number then, which does not say whose they are."""
    make, options = LAYERS[kind]
    assert _smallest(layer(make, **options)).model.rec.hidden_size == 1


@pytest.mark.parametrize("kind", ["RNN cells, zeros and a buffer", "LSTM cells, new_zeros"])
def test_a_state_comes_down_to_one_unit(kind: str) -> None:
    run, parts, recurs = STATES[kind]
    assert len(_smallest(net(run, **parts())).allocation.kept[recurs][1]) == 1


def test_a_loop_of_convolutions_by_hand() -> None:
    parts = {name: nn.Conv2d(3 + 8, 8, 3, padding=1) for name in ("gate", "new")}
    model = net(_by_hand, **parts, head=nn.Conv2d(8, 2, 1), width=8)
    result = check(model, torch.zeros(2, 3, 3, 4, 4), params=None, flops="50%")
    small: Any = result.model
    assert small.width == small.gate.out_channels == small.head.in_channels < 8
    assert result.flops_after <= 0.5 * result.flops_before


# ------------------------------------------------------------------------------------------------ what stays


def _returned(m: Any, x: Tensor) -> Any:
    y, state = m.rec(m.a(x).relu())
    return m.head(y), state


def _started(m: Any, x: Tensor, state: Tensor) -> Any:
    return m.head(m.rec(m.a(x).relu(), state)[0])


@pytest.mark.parametrize("given", [False, True])
def test_a_state_that_comes_from_outside_or_is_returned_stays(given: bool) -> None:
    model = layer(nn.GRU, run=_started if given else _returned)
    result = check(model, X, *[torch.zeros(1, 2, 12)] * given, params="70%")
    assert result.model.rec.hidden_size == 12 > 10 > result.model.rec.input_size


def test_a_first_state_that_is_no_zeros_stays() -> None:
    def run(m: Any, x: Tensor) -> Any:
        state = torch.randn(x.shape[0], 12)
        for step in m.a(x).relu().unbind(1):
            state = m.rec(step, state)
        return m.head(state)

    model = net(run, **_parts(nn.GRUCell(10, 12)))
    with pytest.raises(allocator.BudgetError, match=r"computed from all of these channels \(addmm\) in rec \(12"):
        allocator.allocate(model, params="10%", example_inputs=X, scope="all", criterion="magnitude")


# ------------------------------------------------------------------------------------------ at random, and long


@pytest.mark.parametrize("seed", range(4))
def test_random_stacks(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    widths = [draw.randint(3, 9) for _ in range(3)]
    parts, size = [], 6
    for width in widths:
        make = draw.choice([nn.LSTM, nn.GRU, nn.RNN])
        options = {"num_layers": draw.randint(1, 2), "bias": draw.random() < 0.7, "bidirectional": draw.random() < 0.5}
        parts.append(make(size, width, batch_first=True, **options))
        size = width * (1 + options["bidirectional"])
    skips = draw.random() < 0.5

    def run(m: Any, x: Tensor) -> Any:
        for each in m.stack:
            y = each(x)[0]
            x = torch.cat([y, m.side(y)], 2)[..., : y.shape[-1]] if skips else y
        return m.head(x.mean(1) if seed % 2 else x)

    side = nn.Identity()
    result = check(net(run, stack=nn.ModuleList(parts), side=side, head=nn.Linear(size, 3)), X, params="60%")
    assert sum(each.hidden_size for each in result.model.stack) < sum(widths)


def test_many_steps_take_time_in_proportion() -> None:
    def seconds(length: int) -> float:
        start = time.process_time()
        graph = allocator.trace(layer(nn.GRU), torch.zeros(1, length, 6))
        assert graph.size == 10 + 12
        return time.process_time() - start

    seconds(8)
    assert min(seconds(256), seconds(256)) < 9 * max(seconds(64), seconds(64))  # squared, it would be 16 times
