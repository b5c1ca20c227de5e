"""What each check of a certificate sees by itself, against numbers worked out by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_graphs import IMAGE, Net, channel_units, dropping, graph_of, net, random_choice, shrunk
from subjects import untouched
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from allocator.errors import CertificateError
from allocator.graph.channel_graph import ChannelGraph
from allocator.tracing.inputs import as_inputs
from allocator.verifying.certificate import (
    Certificate,
    certify,
    names_and_shapes_match,
    no_certificate,
    require,
    same_bits,
    weights_match,
)
from allocator.verifying.comparison import TOLERANCE, _silenced, _zeroed_rows, compare_outputs
from allocator.verifying.difference import difference
from allocator.verifying.float64 import Draw, part_of, run_float64


def chain(m: Any, x: Tensor) -> Tensor:
    return m.last(m.norm(m.first(x)).relu())


def network() -> Any:
    return net(chain, first=nn.Conv2d(3, 6, 3), norm=nn.BatchNorm2d(6), last=nn.Conv2d(6, 2, 1))


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    return graph_of(network())


# The verdict ----------------------------------------------------------------------------------------

RIGHT = Certificate(True, 1e-15, True, 0, ((1, 3, 8, 8),), 1, True, 0.5)


@pytest.mark.parametrize(
    ("changes", "ok"),
    [
        ({}, True),
        ({"structural": False}, False),
        ({"weights": False}, False),
        ({"weights": None}, True),
        ({"relative_error": None}, True),
        ({"relative_error": TOLERANCE}, True),
        ({"relative_error": 1.1 * TOLERANCE}, False),
        ({"relative_error": float("inf")}, False),
        ({"relative_error": float("nan")}, False),
        ({"relative_error": 0.3, "exact": False}, True),
        ({"relative_error": 0.3, "exact": False, "weights": False}, False),
        ({"effect": None}, True),
    ],
)
def test_the_verdict(changes: dict[str, Any], ok: bool) -> None:
    certificate = replace(RIGHT, **changes)
    assert certificate.ok is ok
    said = json.loads(json.dumps(certificate.to_dict()))
    assert said["ok"] is ok
    assert said["tolerance"] == TOLERANCE
    assert str(certificate).startswith("passed: " if ok else "FAILED: ")
    if ok:
        assert require(certificate, "it") is certificate
    else:
        with pytest.raises(CertificateError, match="it is not the original minus the dropped neurons: FAILED"):
            require(certificate, "it")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "passed: every index accounted for, weights the original's bit for bit, float64 outputs within 1.0e-15"),
        ({"weights": None, "relative_error": None}, "passed: every index accounted for, outputs not compared"),
        ({"weights": False}, "FAILED: every index accounted for, weights NOT the original's, float64 outputs within 1"),
        ({"drawn": True}, "within 1.0e-15 on drawn weights too"),
        ({"exact": False}, "within 1.0e-15 (inexact by nature: a norm runs over dropped channels)"),
        ({"structural": False}, "FAILED: an index, a call or a number of the forward is not the image of the original"),
    ],
)
def test_the_verdict_in_words(changes: dict[str, Any], said: str) -> None:
    assert said in str(replace(RIGHT, **changes))


def test_a_certificate_says_what_was_compared(graph: ChannelGraph) -> None:
    kept = dropping(graph, {"first": [1, 4]})
    maps, small = shrunk(graph, kept)
    with untouched(small), untouched(graph.model):
        whole = certify(graph, kept, maps, small, seed=3)
    assert whole.ok
    assert (whole.seed, whole.input_shapes, whole.outputs, whole.exact) == (3, ((1, 3, 8, 8),), 1, True)
    assert whole.weights is True
    alone = certify(graph, kept, maps, small, numeric=False)
    assert alone == Certificate(True, None, True, 0, ((1, 3, 8, 8),), 0)
    failed = no_certificate(graph, 7)
    assert (failed.ok, failed.structural, failed.seed, failed.input_shapes) == (False, False, 7, ((1, 3, 8, 8),))
    assert not certify(graph_of(network(), norms="loose"), kept, maps, small, numeric=False).exact


# Names and sizes ------------------------------------------------------------------------------------


def _delete(path: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        owner, _, name = path.rpartition(".")
        delattr(model.get_submodule(owner), name)

    return change


def _put(path: str, value: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, value)

    return change


SHAPES: dict[str, Callable[[Any], None]] = {
    "a tensor less": _delete("last.bias"),
    "a buffer less": _delete("norm.running_mean"),
    "a layer less": _delete("norm"),
    "a tensor more": _put("extra", nn.Parameter(torch.zeros(1))),
    "a buffer more": lambda model: model.register_buffer("extra", torch.zeros(1)),
    "another name": lambda model: setattr(model, "other", model._modules.pop("last")),
    "a row more": _put("first.weight", nn.Parameter(torch.zeros(5, 3, 3, 3))),
    "a column less": _put("last.weight", nn.Parameter(torch.zeros(2, 3, 1, 1))),
    "dims in another order": _put("first.weight", nn.Parameter(torch.zeros(3, 4, 3, 3))),
    "a dim less": _put("first.bias", nn.Parameter(torch.zeros(4, 1))),
}


@pytest.mark.parametrize("change", SHAPES)
def test_names_and_shapes(change: str, graph: ChannelGraph) -> None:
    maps, small = shrunk(graph, dropping(graph, {"first": [1, 4]}))
    assert names_and_shapes_match(graph, maps, small)
    SHAPES[change](small)
    assert not names_and_shapes_match(graph, maps, small)


def test_the_original_is_no_rewritten_model(graph: ChannelGraph) -> None:
    maps, small = shrunk(graph, dropping(graph, {"first": [1]}))
    assert not names_and_shapes_match(graph, maps, graph.model)
    assert not names_and_shapes_match(graph, {}, small)
    assert names_and_shapes_match(graph, {}, graph.model)


def test_a_layer_without_channels_may_be_gone(graph: ChannelGraph) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(torch.cat([path(x) for path in (m.left, m.right) if path is not None], 1))

    model = net(run, left=nn.Conv2d(3, 2, 1), right=nn.Conv2d(3, 3, 1), last=nn.Conv2d(5, 2, 1))
    other = graph_of(model)
    maps, small = shrunk(other, dropping(other, {"left": [0, 1]}))
    assert names_and_shapes_match(other, maps, small)
    small.left = None
    assert names_and_shapes_match(other, maps, small)
    small.right = None
    assert not names_and_shapes_match(other, maps, small)


# Weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_one_other_element_of_any_tensor_is_seen(seed: int, graph: ChannelGraph) -> None:
    maps, small = shrunk(graph, random_choice(graph, seed))
    assert weights_match(graph, maps, small)
    generator = torch.Generator().manual_seed(seed)
    for tensor in small.state_dict().values():
        flat = tensor.reshape(-1)
        place = int(torch.randint(max(len(flat), 1), (1,), generator=generator))
        before = flat[place].clone()
        flat[place] += 1
        assert not weights_match(graph, maps, small)
        flat[place] = before
    assert weights_match(graph, maps, small)


def test_other_indices_of_the_same_number_are_seen(graph: ChannelGraph) -> None:
    _, small = shrunk(graph, dropping(graph, {"first": [1]}))
    other, _ = shrunk(graph, dropping(graph, {"first": [2]}))
    assert names_and_shapes_match(graph, other, small)
    assert not weights_match(graph, other, small)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_bits_of_every_dtype(dtype: torch.dtype) -> None:
    a = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    b = a.clone()
    assert same_bits(a, b)
    assert same_bits(a.t(), b.t().contiguous())
    b[0, 0] = 1
    assert not same_bits(a, b)
    assert not same_bits(a, a.reshape(-1))
    assert not same_bits(a, a.to(torch.float16))


def test_bits_are_no_values() -> None:
    zero, nan = torch.tensor([0.0, 1.0]), torch.tensor([float("nan"), 1.0])
    assert not same_bits(zero, -zero)
    assert same_bits(nan, nan.clone())
    assert not same_bits(zero, zero.to_sparse())
    assert same_bits(zero.to_sparse(), zero.to_sparse())
    assert not same_bits(zero.to_sparse(), (2 * zero).to_sparse())


# Outputs --------------------------------------------------------------------------------------------

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("reference", "result", "expected"),
    [
        ([[1.0, -4.0]], [[1.0, -4.0]], 0.0),
        ([[1.0, -4.0]], [[1.0, -3.0]], 0.25),
        ([[1.0, -4.0], [10.0]], [[1.0, -4.0], [15.0]], 0.5),
        ([[1.0, -4.0], [10.0]], [[3.0, -4.0], [9.0]], 0.5),
        ([[0.0]], [[0.0]], 0.0),
        ([[]], [[]], 0.0),
        ([], [], 0.0),
        ([[1.0]], [[1.0, 2.0]], INF),
        ([[1.0]], [[1.0], [1.0]], INF),
        ([[1.0, 2.0]], [[1.0, NAN]], INF),
        ([[1.0, INF]], [[1.0, 2.0]], INF),
        ([[2.0, INF]], [[1.0, INF]], 0.5),
        ([[2.0, NAN]], [[2.0, NAN]], 0.0),
        ([[2.0, INF]], [[2.0, -INF]], INF),
        ([[2.0, INF]], [[2.0, NAN]], INF),
        ([[NAN]], [[NAN]], 0.0),
    ],
)
def test_differences_are_relative_to_the_largest_of_an_output(
    reference: list[list[float]], result: list[list[float]], expected: float
) -> None:
    a, b = ([torch.tensor(row, dtype=torch.float64) for row in rows] for rows in (reference, result))
    assert difference(a, b).worst == expected


def test_error_and_effect_are_those_of_the_arithmetic() -> None:
    """Two outputs of a network of two linear layers."""
    layers = {"first": nn.Linear(3, 4), "last": nn.Linear(4, 2), "other": nn.Linear(4, 1)}
    model = net(lambda m, x: (m.last(m.first(x)), m.other(m.first(x))), **layers)
    x = torch.zeros(5, 3)
    graph = graph_of(model, x)
    kept = dropping(graph, {"first": [2]})
    maps, small = shrunk(graph, kept)
    noise = as_inputs(x, model).noise(3, torch.device("cpu"), torch.float64).args[0]
    wide = copy.deepcopy(model).double()
    hidden = wide.first(noise)
    whole = [wide.last(hidden), wide.other(hidden)]
    hidden = hidden.clone()
    hidden[:, 2] = 0
    cut = [wide.last(hidden), wide.other(hidden)]
    effect = max((a - b).abs().max().item() / a.abs().max().item() for a, b in zip(whole, cut))

    found = compare_outputs(graph, kept, maps, small, seed=3)

    assert found.outputs == 2
    assert found.effect == pytest.approx(effect, rel=1e-5)
    assert found.error < 1e-14
    assert not found.drawn
    with torch.no_grad():
        small.other.bias += 0.5
    wrong = compare_outputs(graph, kept, maps, small, seed=3)
    assert wrong.error == pytest.approx(0.5 / cut[1].abs().max().item(), rel=1e-6)
    assert wrong.effect == found.effect
    everything = compare_outputs(graph, graph.everything, {}, model, seed=3)
    assert (everything.error, everything.effect) == (0.0, 0.0)


def test_a_model_that_looks_at_values_is_compared_on_its_own_inputs() -> None:
    torch.manual_seed(1)

    def run(m: Any, x: Tensor) -> Tensor:
        seen.append(x.tolist())
        y = m.first(x)
        return m.last(y.relu() if float(m.switch(x).sum()) > -1e9 else y)

    seen: list[Any] = []
    model = net(run, first=nn.Linear(3, 4), switch=nn.Linear(3, 1), last=nn.Linear(4, 2))
    x = torch.randn(2, 3)
    graph = graph_of(model, x)
    kept = dropping(graph, {"first": [0]})
    maps, small = shrunk(graph, kept)
    seen.clear()
    assert compare_outputs(graph, kept, maps, small, seed=0).error < 1e-14
    assert len(seen) == 3
    assert all(given == x.tolist() for given in seen)


def centred(m: Any, x: Tensor, scale: float = 1.0) -> Any:
    """The mean over samples is taken off: of one sample nothing is left."""
    y = m.first(x)
    return m.last(scale * (y - y.mean(0, keepdim=True)))


def test_what_one_sample_does_not_show_two_do() -> None:
    graph = graph_of(net(centred, first=nn.Linear(3, 4), last=nn.Linear(4, 2)), torch.zeros(1, 3))
    kept = dropping(graph, {"first": [2]})
    maps, small = shrunk(graph, kept)
    found = compare_outputs(graph, kept, maps, small, seed=0)
    assert found.shows
    assert not found.unread
    assert found.error < 1e-14
    with torch.no_grad():
        small.last.weight[0, 0] += 1
    assert compare_outputs(graph, kept, maps, small, seed=0).error > 1e-3


def test_what_one_sample_and_own_weights_do_not_show_two_and_drawn_ones_do() -> None:
    model = net(centred, first=nn.Linear(3, 4), last=nn.Linear(4, 2))
    model.last.weight.data.zero_()
    graph = graph_of(model, torch.zeros(1, 3))
    kept = dropping(graph, {"first": [2]})
    maps, small = shrunk(graph, kept)
    found = compare_outputs(graph, kept, maps, small, seed=0)
    assert found.shows
    assert found.drawn
    assert found.error < 1e-14
    small.run = lambda m, x: centred(m, x, scale=2.0)
    assert compare_outputs(graph, kept, maps, small, seed=0).error > 0.1


def test_where_the_original_does_not_run_on_fewer_pixels_all_of_them_are_compared() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(m.first(x).flatten(2)[:, :, torch.tensor([0, 50])].mean(2))

    model = net(run, first=nn.Conv2d(3, 4, 1), last=nn.Linear(4, 2))
    graph = graph_of(model)
    kept = dropping(graph, {"first": [2]})
    maps, small = shrunk(graph, kept)
    fewer = as_inputs(torch.zeros(1, 3, 4, 4), model)
    found = compare_outputs(graph, kept, maps, small, 0, [fewer, graph.inputs])
    assert found.like is graph.inputs
    assert found.shows
    with pytest.raises(
        CertificateError, match=r"the forward raised IndexError in float64: .* and IndexError in float32"
    ):
        compare_outputs(graph, kept, maps, small, 0, [fewer])


def test_weights_are_drawn_where_a_scale_or_weight_is_zero_throughout(graph: ChannelGraph) -> None:
    assert not _silenced(graph)
    for name, silenced in (("norm.weight", True), ("last.weight", True), ("first.bias", False), ("norm.bias", False)):
        model = network()
        model.get_parameter(name).data.zero_()
        other = graph_of(model)
        assert _silenced(other) == silenced, name
        kept = dropping(other, {"first": [1, 3]})
        found = certify(other, kept, *shrunk(other, kept))
        assert found.drawn == silenced, name
        assert found.ok


# Weights that read what was dropped -----------------------------------------------------------------


def rows_of(graph: ChannelGraph, kept: np.ndarray) -> dict[str, list[tuple[int, list[int]]]]:
    found = _zeroed_rows(graph, kept)
    return {name: [(dim, indices.tolist()) for dim, indices in rows] for name, rows in found.items()}


def test_weights_that_read_a_dropped_neuron_are_zeroed_in_its_columns(graph: ChannelGraph) -> None:
    assert rows_of(graph, dropping(graph, {"first": [1, 4]})) == {"last.weight": [(1, [1, 4])]}
    assert rows_of(graph, graph.everything) == {}


def test_every_reader_is_zeroed_and_flattened_pixels_with_their_channel() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return m.last(x.flatten(1)) + m.other(x).sum((2, 3)) + m.deep(x).sum((2, 3))

    layers = {"other": nn.Conv2d(3, 2, 1), "deep": nn.Conv2d(3, 2, 3)}
    graph = graph_of(net(run, first=nn.Conv2d(3, 3, 1), last=nn.Linear(48, 2), **layers), torch.zeros(1, 3, 4, 4))
    assert rows_of(graph, dropping(graph, {"first": [1]})) == {
        "last.weight": [(1, list(range(16, 32)))],
        "other.weight": [(1, [1])],
        "deep.weight": [(1, [1])],
    }


def test_of_a_weight_that_is_added_up_all_are_zeroed() -> None:
    """W + B @ A, as adapters of low rank have it: the columns of W and of A."""

    def run(m: Any, x: Tensor) -> Tensor:
        return F.linear(m.first(x), m.weight + m.up @ m.down)

    parts = {"weight": torch.randn(2, 4), "up": torch.randn(2, 3), "down": torch.randn(3, 4)}
    model = net(run, first=nn.Linear(3, 4), **{name: nn.Parameter(part) for name, part in parts.items()})
    graph = graph_of(model, torch.zeros(5, 3))
    assert rows_of(graph, dropping(graph, {"first": [3]})) == {"weight": [(1, [3])], "down": [(1, [3])]}
    kept = dropping(graph, {"first": [3]})
    assert certify(graph, kept, *shrunk(graph, kept)).ok


def test_where_two_activations_are_multiplied_their_writers_are_zeroed() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return (m.q(x) @ m.k(x).t()).softmax(-1)

    model = net(run, q=nn.Linear(3, 4), k=nn.Linear(3, 4))
    graph = graph_of(model, torch.zeros(5, 3))
    kept = dropping(graph, {"q": [2]})
    assert channel_units(graph, "q") == channel_units(graph, "k")
    assert rows_of(graph, kept) == {name: [(0, [2])] for name in ("q.weight", "q.bias", "k.weight", "k.bias")}
    found = certify(graph, kept, *shrunk(graph, kept))
    assert found.ok
    assert found.effect is not None
    assert found.effect > 0.01


# Forwards in float64 --------------------------------------------------------------------------------


def test_drawn_weights_are_the_same_for_a_name_whatever_is_kept(graph: ChannelGraph) -> None:
    maps, small = shrunk(graph, random_choice(graph, 0))
    whole, part = Draw(graph, 5), Draw(graph, 5, maps)
    other = Draw(graph, 6)
    for name, own in graph.tensors.items():
        drawn = whole(name, own)
        mine = dict((*small.named_parameters(), *small.named_buffers()))[name]
        assert torch.equal(part(name, mine), part_of(drawn, maps.get(name, ())))
        assert torch.equal(drawn, whole(name, own))
        if name == "norm.num_batches_tracked":
            assert drawn is own
        else:
            assert drawn.dtype == torch.float32
            assert not torch.equal(drawn, other(name, own))
    vector, matrix = (whole(name, graph.tensors[name]) for name in ("norm.running_var", "first.weight"))
    assert 0.5 <= float(vector.min()) <= float(vector.max()) <= 1.5
    assert float(matrix.abs().max()) <= (6 / 27) ** 0.5


def test_drawn_kernels_have_the_variance_of_their_fan_in() -> None:
    layer = nn.Conv2d(40, 50, 3)
    graph = graph_of(nn.Sequential(layer), torch.zeros(1, 40, 3, 3))
    drawn = Draw(graph, 0)("0.weight", layer.weight)
    assert float(drawn.var()) == pytest.approx(2 / 360, rel=0.03)
    assert abs(float(drawn.mean())) < 0.002


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_forward_runs_in_float64_whatever_its_dtype(dtype: torch.dtype) -> None:
    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.first(x).to(torch.float32) + torch.ones(4)
        return y, torch.arange(3)

    model: Any = Net(run, first=nn.Linear(3, 4)).to(dtype).eval()
    x = torch.randn(2, 3, dtype=dtype)
    with untouched(model):
        first, second = run_float64(model, as_inputs(x, model))
    weight, bias = (t.detach().double() for t in (model.first.weight, model.first.bias))
    torch.testing.assert_close(first, x.double() @ weight.t() + bias + 1, rtol=1e-14, atol=1e-14)
    assert second.dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32


def test_a_parameter_that_is_returned_is_a_number_like_others() -> None:
    model = Net(lambda m, x: (m.first(x), m.first.bias), first=nn.Linear(3, 4)).eval()
    outputs = run_float64(model, as_inputs(torch.zeros(2, 3), model))
    assert [(t.shape, t.requires_grad, t.dtype) for t in outputs] == [
        ((2, 4), False, torch.float64),
        ((4,), False, torch.float64),
    ]


def test_running_statistics_are_not_touched() -> None:
    """Also of a norm that keeps them in eval mode."""
    model = net(
        lambda m, x: nn.functional.batch_norm(x, m.norm.running_mean, m.norm.running_var, training=True),
        norm=nn.BatchNorm2d(3),
    ).double()
    with untouched(model):
        run_float64(model, as_inputs(IMAGE.double(), model))


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_run_in_float64(make: Any) -> None:
    layer = make(3, 4, 2)
    x = torch.randn(5, 1, 3)
    with untouched(layer):
        outputs = run_float64(layer, as_inputs(x, layer))
    expected = copy.deepcopy(layer).double()(x.double())[0]
    torch.testing.assert_close(outputs[0], expected, rtol=1e-12, atol=1e-12)


def test_a_computed_weight_is_zeroed_after_it_was_computed() -> None:
    """Its direction is divided by the length of all of its columns, those of dropped neurons too."""
    layer = parametrizations.weight_norm(nn.Linear(4, 3))
    x = torch.randn(2, 4)
    name = "parametrizations.weight.original1"
    with untouched(layer):
        (found,) = run_float64(layer, as_inputs(x, layer), zeroed={name: [(1, np.array([1, 2]))]})
    weight = layer.weight.detach().clone()
    weight[:, [1, 2]] = 0
    expected = x.double() @ weight.double().t() + layer.bias.detach().double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
