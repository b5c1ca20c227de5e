"""What torch's layers say of themselves once they are smaller: as a layer that was built of that size says it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_graphs import Net, channel_units, graph_of, net, random_choice, shrunk
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

Make = Callable[..., nn.Module]
PLAIN = (int, float, bool, str, tuple, list, type(None))

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")


def told(layer: nn.Module) -> dict[str, Any]:
    """All plain attributes of a layer, beside those that torch keeps for itself."""
    ours = {name: value for name, value in vars(layer).items() if not name.startswith("_") and name != "training"}
    return {name: value for name, value in ours.items() if isinstance(value, PLAIN)}


def sizes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}


def in_between(m: Any, x: Tensor) -> Tensor:
    """The layer reads what one layer writes, and another reads what it gives."""
    return m.last(m.layer(m.first(x)))


# Per layer: how it is built of these many inputs and outputs, what stands before and after it, and an input.
CONV: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: Any = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def pixels(rank: int) -> Tensor:
    return torch.zeros(2, 3, *[8] * rank)


def convolutions() -> dict[str, tuple[int, Make]]:
    rows: dict[str, tuple[int, Make]] = {}
    for rank in (1, 2, 3):
        rows[f"Conv{rank}d"] = rank, lambda i, o, r=rank: CONV[r](i, o, 3, padding=1)
        rows[f"ConvTranspose{rank}d"] = rank, lambda i, o, r=rank: TRANSPOSED[r](i, o, 2, 2)
    rows["Conv2d without bias"] = 2, lambda i, o: nn.Conv2d(i, o, 3, 1, 2, 2, bias=False)
    rows["Conv2d, padding by name"] = 2, lambda i, o: nn.Conv2d(i, o, 3, padding="same", padding_mode="reflect")
    return rows


def between_convolutions(rank: int, layer: nn.Module) -> Any:
    first, last = CONV[rank](3, 6, 1), CONV[rank](8, 2, 1)
    return net(in_between, first=first, layer=layer, last=last)


def counts(graph: Any, kept: np.ndarray, layer: str) -> int:
    """How many output channels of a layer stay."""
    return sum(unit < 0 or bool(kept[unit]) for unit in channel_units(graph, layer))


@pytest.mark.parametrize("name", convolutions())
def test_convolutions(name: str) -> None:
    rank, make = convolutions()[name]
    model = between_convolutions(rank, make(6, 8))
    graph = graph_of(model, pixels(rank))
    kept = random_choice(graph, 1)
    _, small = shrunk(graph, kept)
    source = counts(graph, kept, "first")
    out = small.last.in_channels
    assert source < 6
    assert out < 8
    expected = make(source, out)
    assert told(small.layer) == told(expected)
    assert sizes(small.layer) == sizes(expected)
    assert repr(small.layer) == repr(expected)
    small(pixels(rank))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mode", ["whole", "width"])
def test_grouped_convolutions(mode: str, transposed: bool) -> None:
    kind: Any = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = between_convolutions(2, kind(6, 8, 3, padding=1, groups=2))
    graph = graph_of(model, pixels(2), groups=mode)
    for seed in range(4):
        kept = random_choice(graph, seed)
        _, small = shrunk(graph, kept)
        source, out = counts(graph, kept, "first"), small.last.in_channels
        groups = source // 3 if mode == "whole" else 2
        expected = kind(source, out, 3, padding=1, groups=groups)
        assert told(small.layer) == told(expected)
        assert sizes(small.layer) == sizes(expected)
        small(pixels(2))


@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_convolutions(multiplier: int) -> None:
    make = lambda n: nn.Conv2d(n, n * multiplier, 3, padding=1, groups=n)  # noqa: E731
    first, last = nn.Conv2d(3, 6, 1), nn.Conv2d(6 * multiplier, 2, 1)
    model = net(in_between, first=first, layer=make(6), last=last)
    graph = graph_of(model, pixels(2))
    kept = random_choice(graph, 0)
    _, small = shrunk(graph, kept)
    expected = make(counts(graph, kept, "first"))
    assert told(small.layer) == told(expected)
    assert sizes(small.layer) == sizes(expected)


NORMS: dict[str, tuple[int, Make]] = {
    "BatchNorm1d": (1, lambda n: nn.BatchNorm1d(n)),
    "BatchNorm2d": (2, lambda n: nn.BatchNorm2d(n, eps=1e-3)),
    "BatchNorm3d": (3, lambda n: nn.BatchNorm3d(n)),
    "BatchNorm2d without scale": (2, lambda n: nn.BatchNorm2d(n, affine=False)),
    "BatchNorm2d without anything": (2, lambda n: nn.BatchNorm2d(n, affine=False, track_running_stats=False)),
    "BatchNorm2d, scale alone": (2, lambda n: nn.BatchNorm2d(n, track_running_stats=False)),
    "SyncBatchNorm": (2, lambda n: nn.SyncBatchNorm(n)),
    "InstanceNorm1d": (1, lambda n: nn.InstanceNorm1d(n, affine=True)),
    "InstanceNorm2d": (2, lambda n: nn.InstanceNorm2d(n, affine=True)),
    "InstanceNorm2d without scale": (2, lambda n: nn.InstanceNorm2d(n)),
    "InstanceNorm2d, statistics": (2, lambda n: nn.InstanceNorm2d(n, track_running_stats=True)),
    "InstanceNorm3d": (3, lambda n: nn.InstanceNorm3d(n, affine=True)),
    "PReLU": (2, lambda n: nn.PReLU(n)),
    "GroupNorm, a group per channel": (2, lambda n: nn.GroupNorm(n, n)),
}


@pytest.mark.parametrize("name", NORMS)
def test_layers_that_work_channel_by_channel(name: str) -> None:
    rank, make = NORMS[name]
    model = Net(in_between, first=CONV[rank](3, 8, 1), layer=make(8), last=CONV[rank](8, 2, 1)).eval()
    graph = graph_of(model, pixels(rank))
    kept = random_choice(graph, 0)
    _, small = shrunk(graph, kept)
    assert small.first.out_channels == kept.sum() < 8
    expected = make(int(kept.sum()))
    assert told(small.layer) == told(expected)
    assert sizes(small.layer) == sizes(expected)
    if name != "SyncBatchNorm":
        small(pixels(rank))


GROUPS: dict[str, tuple[str, Make]] = {
    "whole groups": ("exact", lambda groups, width: nn.GroupNorm(groups, 2 * groups)),
    "whole groups without scale": ("exact", lambda groups, width: nn.GroupNorm(groups, 2 * groups, affine=False)),
    "all groups alike": ("loose", lambda groups, width: nn.GroupNorm(4, 4 * width)),
}


@pytest.mark.parametrize("name", GROUPS)
def test_group_norms(name: str) -> None:
    norms, make = GROUPS[name]
    model = net(in_between, first=nn.Conv2d(3, 8, 1), layer=make(4, 2), last=nn.Conv2d(8, 2, 1))
    graph = graph_of(model, pixels(2), norms=norms)
    kept = np.arange(graph.size) != 1
    _, small = shrunk(graph, kept)
    expected = make(3, 1)
    assert told(small.layer) == told(expected)
    assert sizes(small.layer) == sizes(expected)
    small(pixels(2))


LAYER_NORMS: dict[str, Make] = {
    "LayerNorm": lambda n: nn.LayerNorm(n),
    "LayerNorm without shift": lambda n: nn.LayerNorm(n, bias=False),
    "LayerNorm over one dim of a list": lambda n: nn.LayerNorm([n]),
}


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_norms_over_channels(name: str) -> None:
    make = LAYER_NORMS[name]
    model = net(in_between, first=nn.Linear(3, 8), layer=make(8), last=nn.Linear(8, 2))
    x = torch.zeros(2, 5, 3)
    assert graph_of(model, x).size == 0
    graph = graph_of(model, x, norms="loose")
    kept = random_choice(graph, 0)
    _, small = shrunk(graph, kept)
    expected = make(int(kept.sum()))
    assert told(small.layer) == told(expected)
    assert sizes(small.layer) == sizes(expected)
    small(x)


def test_linear_layers_and_tables() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(m.body(m.table(x)).relu())

    model = net(run, table=nn.Embedding(10, 6, padding_idx=2), body=nn.Linear(6, 8), last=nn.Linear(8, 3, bias=False))
    graph = graph_of(model, torch.zeros(2, 5, dtype=torch.int64))
    kept = random_choice(graph, 2)
    _, small = shrunk(graph, kept)
    features, hidden = counts(graph, kept, "body"), small.last.in_features
    embedded = int(sum(kept[unit] for unit in graph.units(graph.slots.labels("table.weight")[1])))
    assert hidden == features < 8
    assert embedded < 6
    for layer, expected in (
        (small.table, nn.Embedding(10, embedded, padding_idx=2)),
        (small.body, nn.Linear(embedded, hidden)),
        (small.last, nn.Linear(hidden, 3, bias=False)),
    ):
        assert told(layer) == told(expected)
        assert sizes(layer) == sizes(expected)


# Weights that are computed --------------------------------------------------------------------------


class Positive(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.exp()


COMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "a function of it": lambda layer: parametrize.register_parametrization(layer, "weight", Positive()),
    "a mask": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm by hook": nn.utils.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "weight norm by hook": nn.utils.weight_norm,
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_layer_whose_weight_is_computed_follows_what_it_is_computed_from(name: str) -> None:
    """Where the rules keep its outputs it still has fewer inputs, if anything goes at all."""
    layer = COMPUTED[name](nn.Conv2d(6, 8, 3, padding=1))
    model = net(in_between, first=nn.Conv2d(3, 6, 1), layer=layer, last=nn.Conv2d(8, 2, 1))
    graph = graph_of(model, pixels(2))
    if name in ("a function of it", "a mask"):
        assert graph.size == 14
    kept = random_choice(graph, 1)
    _, small = shrunk(graph, kept)
    source, out = small.first.out_channels, small.last.in_channels
    assert (small.layer.in_channels, small.layer.out_channels) == (source, out)
    held = {key: value for key, value in sizes(small.layer).items() if value[-2:] == (3, 3)}
    assert held
    assert set(held.values()) == {(out, source, 3, 3)}
    assert type(small.layer) is type(model.layer)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    small(pixels(2))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
