"""Layers that are shared, computed or run several times: rewritten rightly, or left whole and named; never wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from subjects import IMAGE, Branches, trained, untouched
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import allocator
from allocator import NothingToAllocateError

pytestmark = [
    pytest.mark.filterwarnings("error::allocator.AllocatorWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning"),
]

Wrap = Callable[[nn.Module], Any]


def allocate(model: nn.Module, flops: str = "60%", **options: Any) -> allocator.Result:
    return allocator.allocate(model, flops, example_inputs=IMAGE, **options)


class Positive(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return F.softplus(weight)


def positive(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Positive())


def masked(layer: nn.Module) -> nn.Module:
    return prune.random_unstructured(layer, "weight", 0.5)


# Each with the words that name it where it stays whole; None where it can be narrowed.
COMPUTED: dict[str, tuple[Wrap, str | None]] = {
    "spectral_norm": (parametrizations.spectral_norm, "a weight is computed from all of these channels"),
    "weight_norm": (parametrizations.weight_norm, None),
    "orthogonal": (parametrizations.orthogonal, "no rule for this operator"),
    "spectral_norm by hook": (nn.utils.spectral_norm, "a weight is computed from all of these channels"),
    "weight_norm by hook": (nn.utils.weight_norm, None),
    "positive": (positive, None),
    "masked": (masked, None),
}


def computed(wrap: Wrap, *layers: str) -> Any:
    model = Branches()
    for layer in layers:
        setattr(model, layer, wrap(getattr(model, layer)))
    return trained(model)


def kept_outputs(result: allocator.Result, layer: str) -> list[int]:
    dims = result.allocation.kept.get(f"{layer}.bias")
    full = getattr(result.graph.model, layer).bias.numel()
    return list(range(full)) if dims is None or dims[0] is None else dims[0]


def effective(model: nn.Module, layer: str) -> Tensor:
    """The weight that the layer's convolution reads in eval mode."""
    seen: list[Tensor] = []

    def hook(module: Any, args: Any, output: Any) -> None:
        seen.append(module.weight.detach().clone())

    handle = model.get_submodule(layer).register_forward_hook(hook)
    with torch.no_grad():
        model.eval()(IMAGE)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("layer", ["stem", "wide"])
def test_a_computed_weight_is_cut_rightly_or_left_whole_and_named(kind: str, layer: str) -> None:
    wrap, stays = COMPUTED[kind]
    model = computed(wrap, layer)
    with untouched(model):
        result = allocate(model, "96%" if stays else "45%", scope="all", criterion="magnitude")
    assert result.flops_after <= result.flops_asked
    assert result.certificate.ok
    rows, columns = kept_outputs(result, layer), list(range(3))
    if layer == "wide":
        columns = kept_outputs(result, "stem")
    expected = effective(model, layer)[rows][:, columns]
    torch.testing.assert_close(effective(result.model, layer), expected, rtol=1e-6, atol=0)
    module: Any = result.model.get_submodule(layer)
    assert (module.out_channels, module.in_channels) == tuple(expected.shape[:2])
    if stays is None:
        assert len(rows) < len(effective(model, layer))
    else:
        assert len(rows) == len(effective(model, layer))
        reasons = [reason for reason, _ in result.graph.reasons() if reason.split(" in ")[-1].startswith(layer)]
        assert any(stays in reason for reason in reasons), reasons


@pytest.mark.parametrize("kind", [kind for kind in COMPUTED if "spectral" in kind])
def test_nothing_but_computed_weights_says_why(kind: str) -> None:
    wrap, stays = COMPUTED[kind]
    model = computed(wrap, "stem", "narrow", "wide")
    with untouched(model), pytest.raises(NothingToAllocateError) as caught:
        allocate(model, scope="all", criterion="magnitude")
    assert stays is not None
    assert any(stays in reason for reason in caught.value.reasons)


@pytest.mark.parametrize("kind", ["spectral_norm", "spectral_norm by hook"])
def test_power_iteration_does_not_run_in_the_callers_model(kind: str) -> None:
    model = computed(COMPUTED[kind][0], "wide").train()
    with untouched(model):
        result = allocate(model, "96%")
    small: Any = result.model
    assert small.training
    assert small.wide.training


class SharedWeight(Branches):
    """A second 1x1 convolution reads the first one's weight; each has its own bias."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(16, 16, 1)
        self.again.weight = self.narrow.weight

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        narrow = F.relu(self.narrow_norm(self.narrow(x))) + self.again(x)
        return torch.cat([narrow, F.relu(self.wide_norm(self.wide(x)))], 1)


def test_convolutions_that_share_a_weight() -> None:
    model = trained(SharedWeight())
    with untouched(model):
        result = allocate(model, "40%", scope="all", criterion="magnitude")
    small: Any = result.model
    assert result.certificate.ok
    assert small.again.weight is small.narrow.weight
    assert small.again.out_channels == small.narrow.out_channels == len(small.again.bias) < 16
    assert small.again.in_channels == small.narrow.in_channels == small.stem.out_channels
    assert small.state_dict().keys() == model.state_dict().keys()
    assert kept_outputs(result, "again") == kept_outputs(result, "narrow")


class AutoEncoder(nn.Module):
    """The decoder is the encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.decode = nn.ConvTranspose2d(16, 3, 3, padding=1, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(F.relu(self.norm(self.encode(x))))


def test_an_encoder_and_decoder_that_share_a_weight() -> None:
    model = trained(AutoEncoder())
    with untouched(model):
        result = allocate(model, "50%")
    small: Any = result.model
    assert result.certificate.ok
    assert small.decode.weight is small.encode.weight
    assert small.encode.out_channels == small.decode.in_channels == small.norm.num_features == 8
    assert small.decode.out_channels == 3
    text = "ConvTranspose2d(8, 3, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)"
    assert str(small.decode) == text


class TiedSquare(nn.Module):
    """Two linear layers share a square weight, so that what one writes the other reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12)
        self.first, self.second, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


def test_a_square_weight_read_twice_keeps_the_same_rows_and_columns() -> None:
    model = trained(TiedSquare())
    with untouched(model):
        result = allocate(model, "50%", criterion="magnitude")
    small: Any = result.model
    rows, columns = result.allocation.kept["first.weight"]
    assert rows is not None
    assert result.certificate.ok
    assert rows == columns == result.allocation.kept["conv.weight"][0]
    assert small.first.in_features == small.first.out_features == small.second.in_features == len(rows) < 12
    assert small.second.weight is small.first.weight


class Repeated(nn.Module):
    """One convolution and norm run three times, one head on two maps; a norm has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.same_norm = self.norm
        self.hidden, self.hidden_norm = nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24)
        self.out = nn.Conv2d(24, 5, 1)

    def head(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden_norm(self.hidden(x))))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        for norm in (self.norm, self.same_norm, self.norm):
            x = F.relu(norm(self.conv(x)))
        return [self.head(x), self.head(F.avg_pool2d(x, 2))]


@pytest.mark.parametrize("flops", ["70%", "30%"])
def test_layers_that_run_several_times(flops: str) -> None:
    model = trained(Repeated())
    with untouched(model):
        result = allocate(model, flops)
    small: Any = result.model
    kept = result.allocation.kept
    assert result.certificate.ok
    assert result.certificate.outputs == 2
    assert result.flops_after <= result.flops_asked
    assert kept["conv.weight"][0] == kept["conv.weight"][1] == kept["stem.weight"][0] == kept["norm.weight"][0]
    assert small.same_norm is small.norm
    assert small.state_dict().keys() == model.state_dict().keys()
    assert [t.shape for t in small(torch.zeros(2, 3, 8, 8))] == [(2, 5, 8, 8), (2, 5, 4, 4)]


# ---------------------------------------------------------------------------------- recurrent layers


class Sequences(nn.Module):
    """Two convolutions whose pixels are a sequence for a recurrent layer."""

    def __init__(self, recurrent: nn.Module, width: int) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.body, self.bn2 = nn.Conv2d(12, 10, 1), nn.BatchNorm2d(10)
        self.recurrent, self.head = recurrent, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.body(F.relu(self.bn(self.stem(x))))))
        return self.head(self.recurrent(y.flatten(2).transpose(1, 2))[0].mean(1))


RECURRENT: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "LSTM": (lambda: nn.LSTM(10, 6, batch_first=True), 6),
    "LSTM with projections": (lambda: nn.LSTM(10, 6, proj_size=3, batch_first=True), 3),
    "GRU, two layers, both ways": (lambda: nn.GRU(10, 6, 2, batch_first=True, bidirectional=True), 12),
    "RNN": (lambda: nn.RNN(10, 6, batch_first=True), 6),
}


@pytest.mark.parametrize("criterion", ["bn_scale", "magnitude"])
@pytest.mark.parametrize("kind", RECURRENT)
def test_a_recurrent_layer_follows_what_it_reads(kind: str, criterion: str) -> None:
    make, width = RECURRENT[kind]
    model = trained(Sequences(make(), width))
    with untouched(model):
        result = allocator.allocate(model, "60%", example_inputs=IMAGE[..., :3, :3], scope="all", criterion=criterion)
    assert result.certificate.ok
    assert result.certificate.effect is not None
    assert result.certificate.effect > 1e-6
    small = result.model.get_submodule("recurrent")
    assert isinstance(small, nn.RNNBase)
    assert small.get_parameter("weight_hh_l0").shape[0] % small.hidden_size == 0
    assert small.input_size == result.model.get_parameter("body.weight").shape[0]
    assert small.get_parameter("weight_ih_l0").shape[1] == small.input_size < 10
    result.model(IMAGE[..., :3, :3]).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize(
    "make", [nn.InstanceNorm2d, lambda n: nn.BatchNorm2d(n, affine=False, track_running_stats=False)]
)
def test_a_norm_without_tensors_says_its_size(make: Callable[[int], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 3), make(12), nn.ReLU(), nn.Conv2d(12, 4, 1))
    small: Any = allocate(model, "60%", criterion="magnitude").model
    assert small[1].num_features == small[0].out_channels < 12


class Adapted(nn.Module):
    """A linear layer whose weight is W + B @ A, made anew in every forward (Hu et al., ICLR 2022)."""

    def __init__(self, channels: int, rank: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, channels))
        self.down, self.up = nn.Parameter(torch.randn(rank, channels)), nn.Parameter(torch.randn(24, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.up @ self.down)


def test_a_weight_that_is_added_up_in_the_forward() -> None:
    stem = [nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = trained(nn.Sequential(*stem, Adapted(16), nn.ReLU(), nn.Linear(24, 5)))
    with untouched(model):
        result = allocate(model, "50%", scope="all")
    assert result.certificate.ok
    adapted, stem_conv = result.model.get_submodule("5"), result.model.get_submodule("0")
    assert adapted.weight.shape[1] == adapted.down.shape[1] == stem_conv.out_channels < 16  # type: ignore[operator,index]


class Sender(nn.Module):
    def __init__(self, shared: list[Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.shared = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), shared

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        self.shared.append(y)
        return y


class Receiver(nn.Module):
    def __init__(self, shared: list[Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.shared = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), shared

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + self.shared.pop())


def test_a_list_that_two_modules_share_is_shared_in_the_result() -> None:
    shared: list[Tensor] = []
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = trained(nn.Sequential(Sender(shared), Receiver(shared), *pool, nn.Linear(16, 5)))
    result = allocate(model, "60%", scope="all")
    assert result.certificate.ok
    first, second = (id(result.model.get_submodule(path).shared) for path in "01")
    assert first == second != id(shared)


class OwnGroups(nn.Module):
    """A grouped convolution called as a function, by a number of groups beside a tensor of a like name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 2, 3, 3))
        self.groups = 8
        self.groups_order = np.arange(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight, padding=1, groups=self.groups)


def test_the_number_of_groups_follows_in_a_module_of_ones_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), OwnGroups(), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    result = allocator.allocate(model, "60%", example_inputs=torch.zeros(1, 3, 8, 8), criterion="magnitude")
    assert result.certificate.ok
    own = result.model.get_submodule("1")
    assert isinstance(own, OwnGroups)
    assert own.groups < 8
    assert own.weight.shape == (2 * own.groups, 2, 3, 3)


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": F.softplus,
    "exp": torch.exp,
    "cos of the transposed": lambda w: w.mT.cos().mT,
    "several": lambda w: 1 + (w.sigmoid() - 3).abs().sqrt(),
}


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_a_weight_that_the_forward_makes_number_by_number_reads_as_zero_where_it_was_dropped(kind: str) -> None:
    """What it was made of was zeroed, of which such a function makes another number: right results were refused."""

    class Made(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, ELEMENTWISE[kind](self.weight), self.bias)

    torch.manual_seed(0)
    model = nn.Sequential(Made(6, 16), nn.ReLU(), Made(16, 16), nn.ReLU(), Made(16, 4))
    x = torch.randn(2, 6)
    result = allocator.allocate(model, "60%", example_inputs=x, criterion="magnitude")
    assert result.certificate.effect is not None
    assert result.certificate.effect > 1e-3
    kept = [result.allocation.kept[f"{i}.weight"][0] for i in (0, 2)]
    h = x.double()
    for i, (rows, columns) in zip((0, 2, 4), [(kept[0], None), (kept[1], kept[0]), (None, kept[1])], strict=True):
        weight, bias = (getattr(model[i], name).detach().double() for name in ("weight", "bias"))
        weight = ELEMENTWISE[kind](weight)
        weight, bias = (t if rows is None else t[rows] for t in (weight, bias))
        h = h @ (weight if columns is None else weight[:, columns]).T + bias
        h = h if i == 4 else h.relu()
    assert torch.allclose(result.model.double()(x.double()), h, rtol=1e-12)


def _by_place(name: str) -> Callable[[Tensor], Tensor]:
    def run(y: Tensor) -> Tensor:
        index = torch.arange(y.shape[2]) % 5
        fresh = torch.zeros(*y.shape[:2], 5).to(y)
        return getattr(fresh, name)(2, index.view(1, 1, -1).expand_as(y) if name == "scatter_add" else index, y)

    return run


@pytest.mark.parametrize("name", ["scatter_add", "index_add", "index_add_"])
def test_places_are_added_up_for_every_channel_alone(name: str) -> None:
    """Into zeros that the forward makes on the CPU and brings over: these follow the channels too."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(_by_place(name)(self.stem(x).relu().flatten(2)).sqrt().mean(2))

    model = Pooled()
    result = allocate(model, criterion="magnitude")
    kept = result.allocation.kept["head.weight"][1] or []
    assert 4 < len(kept) < 12
    weight, bias = (model.get_parameter(f"stem.{name}").double()[kept] for name in ("weight", "bias"))
    stem = F.conv2d(IMAGE.double(), weight, bias, padding=1)
    features = _by_place(name)(stem.relu().flatten(2)).sqrt().mean(2)
    expected = F.linear(features, model.head.weight[:, kept].double(), model.head.bias.double())
    assert torch.allclose(result.model.double()(IMAGE.double()), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["weight_norm", "weight_norm by hook"])
def test_outputs_of_a_layer_whose_weight_has_a_length_go_with_their_lengths(kind: str) -> None:
    """Its inputs stay, since the length is of all of them; with norms="loose" they go too."""
    wrap = COMPUTED[kind][0]
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), wrap(nn.Conv2d(16, 16, 3)), nn.ReLU(), nn.Conv2d(16, 4, 3))
    result = allocate(model, "70%", criterion="magnitude")
    sizes = {name: tuple(p.shape) for name, p in result.model.named_parameters()}
    kept = result.allocation.kept["2.bias"][0] or []
    direction = next(name for name, size in sizes.items() if name.startswith("2.") and len(size) == 4 and size[-1] == 3)
    assert sizes[direction] == (len(kept), 16, 3, 3)
    assert (len(kept), 1, 1, 1) in sizes.values()
    torch.testing.assert_close(effective(result.model, "2"), effective(model, "2")[kept])
    loose = allocate(model, "70%", criterion="magnitude", norms="loose")
    assert loose.model.get_parameter("0.weight").shape[0] < 16
    assert not loose.certificate.exact


@pytest.mark.parametrize("offset_groups", [1, 2])
def test_what_a_deformed_convolution_reads_and_writes_goes(offset_groups: int) -> None:
    ops = pytest.importorskip("torchvision.ops")

    class Deformed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.where = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 18 * offset_groups, 3, padding=1)
            self.deformed, self.head = ops.DeformConv2d(16, 12, 3, padding=1), nn.Conv2d(12, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x).relu()
            return self.head(self.deformed(y, self.where(y)).relu())

    model = Deformed()
    result = allocate(model, criterion="magnitude")
    small: Any = result.model.get_submodule("deformed")
    assert (small.out_channels, small.in_channels) == tuple(small.weight.shape[:2])
    assert small.in_channels < 16
    masked = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, dims in result.allocation.kept.items():
            p = masked.get_parameter(name)
            if p.dim() == 4 and dims[1] is not None:
                p.index_fill_(1, torch.tensor(sorted(set(range(p.shape[1])) - set(dims[1]))), 0)
    x = IMAGE.double()
    assert torch.allclose(result.model.double()(x), masked(x), rtol=1e-12)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_columns_of_bags_of_rows_go(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(20, 16, mode=mode), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    bags = torch.randint(0, 20, (2, 5))
    result = allocator.allocate(model, "50%", example_inputs=bags, criterion="magnitude", scope="all")
    small: Any = result.model
    assert small[0].embedding_dim == small[2].in_features < 16
    columns, rows = (result.allocation.kept[name][1] for name in ("0.weight", "2.weight"))
    assert columns == rows
    assert torch.equal(small[0].weight, model[0].weight[:, columns])  # type: ignore[index]
    assert result.certificate.ok


class Chosen(nn.Module):
    """What its class makes depends on what it is told: one layer, or two."""

    def __new__(cls, wide: int, rank: int = 0) -> Any:
        return super().__new__(cls) if rank else nn.Conv2d(wide, wide, 1)

    def __init__(self, wide: int, rank: int = 0) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(wide, rank, 1), nn.Conv2d(rank, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.down(x).relu())
        return y


@pytest.mark.filterwarnings("ignore::allocator.AllocatorWarning")
def test_a_class_whose_new_wants_arguments_is_copied() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Chosen(8), nn.ReLU(), Chosen(8, 16), nn.Conv2d(8, 4, 1)).eval()
    with untouched(model):
        result = allocate(model, criterion="magnitude")
    small: Any = result.model
    assert result.certificate.ok
    assert type(small[3]) is Chosen
    assert small[3].down.out_channels < 16


def test_a_layer_without_channels_is_passed_over() -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
            self.few, self.back = nn.Linear(8, 0), nn.Linear(0, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.last(y * self.back(self.few(y.mean((2, 3)))).sigmoid()[:, :, None, None])

    result = allocate(Squeezed().eval())
    assert result.certificate.ok
    assert len(result.allocation.kept["first.weight"][0] or ()) in range(1, 8)


def test_channels_of_a_layer_whose_weight_is_shortened_may_go() -> None:
    class Shortened(nn.Module):
        """Each output's weights are shortened where they are longer than one."""

        def forward(self, weight: Tensor) -> Tensor:
            return weight.renorm(2, 0, 1.0)

    model = trained(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1)))
    parametrize.register_parametrization(model[0], "weight", Shortened())
    result = allocate(model)
    assert result.certificate.ok
    assert not result.graph.unsupported
    parametrize.register_parametrization(model[3], "weight", Shortened())
    with pytest.raises(NothingToAllocateError, match="a norm over the channels mixes them all"):
        allocate(model)


class Spiking(nn.Module):
    """A membrane that leaks, fires and is kept in a buffer, which each forward replaces."""

    mem: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.register_buffer("mem", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.mem = torch.zeros_like(self.mem)
        spikes = []
        for _ in range(3):
            if self.mem.shape[:1] != x.shape[:1]:
                self.mem = torch.zeros_like(self.first(x))
            self.mem = 0.9 * self.mem + self.first(x)
            spikes.append((self.mem > 0.1).to(x.dtype))
            self.mem = self.mem - spikes[-1]
        return self.last(torch.stack(spikes).sum(0))


@pytest.mark.parametrize("runs_before", [0, 1])
def test_a_buffer_that_the_forward_replaces_is_computed_from_then_on(runs_before: int) -> None:
    torch.manual_seed(0)
    model, x = Spiking().eval(), torch.randn(4, 6)
    for _ in range(runs_before):
        model(x)
    result = allocator.allocate(model, "60%", example_inputs=x)
    assert result.certificate.ok
    assert result.graph.share() > 0.8
    gone = sorted(set(range(16)) - set(result.allocation.kept["last.weight"][1] or ()))
    with torch.no_grad():
        model.last.weight[:, gone] = 0
    assert torch.allclose(result.model(x), model(x), atol=1e-6)


class Shortened(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.renorm(2, 0, 1.0)


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize(
    "compute",
    [
        positive,
        parametrizations.weight_norm,
        torch.nn.utils.weight_norm,
        lambda layer: parametrize.register_parametrization(layer, "weight", Shortened()),
    ],
)
def test_groups_of_a_convolution_whose_weight_is_computed_may_go(compute: Wrap, multiplier: int) -> None:
    def built() -> nn.Module:
        wide = 8 * multiplier
        layers = [
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, wide, 3, groups=8),
            nn.ReLU(),
            nn.Conv2d(wide, 4, 1),
        ]
        compute(layers[2])
        return trained(nn.Sequential(*layers))

    result = allocate(built(), "50%")
    assert result.certificate.ok
    assert not any("stay" in note for note in result.notes)
    thin: Any = result.model.get_submodule("2")
    assert thin.groups == thin.in_channels < 8
    assert thin.out_channels == multiplier * thin.groups
    fresh = allocator.apply(built(), result.allocation)
    assert fresh(IMAGE).shape == result.model(IMAGE).shape
