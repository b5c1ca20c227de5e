"""What the forwards of published networks are written with: channels go, and the result is what zeros would give."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from subjects import trained, untouched
from torch import Tensor, nn
from torch.nn import functional as F

import allocator

IMAGES = torch.zeros(2, 3, 16, 16)
Run = Callable[[Any, Tensor], Tensor]


class Middle(nn.Module):
    """A stem of 16 channels, what a case does with them, and a body of 32."""

    def __init__(self, run: Run, channels: int = 16, **parts: Any) -> None:
        super().__init__()
        self.stem, self.norm, self.run = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), run
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.body, self.head = nn.Conv2d(channels, 32, 3, padding=1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) to (n, 5)."""
        x = self.run(self, self.norm(self.stem(x)).relu())
        return self.head(self.body(x).relu().mean((2, 3)))


def _blur(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, torch.full((1, 1, 3, 3), 1 / 9).expand(x.shape[1], -1, -1, -1), groups=x.shape[1])


def _warped(m: Any, x: Tensor) -> Tensor:
    matrix = m.where(x.mean((2, 3))).view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(matrix, list(x.shape), align_corners=False), align_corners=False)


def _filtered(m: Any, x: Tensor) -> Tensor:
    return torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(m.filter), s=x.shape[2:])


def _in_frequencies(m: Any, x: Tensor) -> Tensor:
    f = torch.view_as_real(torch.fft.rfftn(x, dim=(-2, -1))).permute(0, 1, 4, 2, 3).flatten(1, 2)
    real, imaginary = m.mix(f).unflatten(1, (-1, 2)).unbind(2)
    return torch.fft.irfftn(torch.complex(real, imaginary), s=x.shape[2:], dim=(-2, -1))


def _unpooled(m: Any, x: Tensor) -> Tensor:
    y, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(m.conv(y), places, [2, 2])


def _shifted(m: Any, x: Tensor) -> Tensor:
    some = x.shape[1] // 4
    y = torch.zeros_like(x)
    y[:, :some, :, 1:], y[:, some : 2 * some, :, :-1] = x[:, :some, :, :-1], x[:, some : 2 * some, :, 1:]
    y[:, 2 * some :] = x[:, 2 * some :]
    return y


def _of_its_shape(m: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y = x.reshape(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(n, -1, 16 * c)
    return m.back(m.into(y).relu()).reshape(n, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


def _linear_attention(m: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    q, k, v = m.qkv(x).reshape(n, -1, 3 * 4, h * w).transpose(-1, -2).chunk(3, -1)
    out = q.relu() @ (k.relu().transpose(-1, -2) @ F.pad(v, (0, 1), value=1.0))
    return x + m.out((out[..., :-1] / (out[..., -1:] + 1e-5)).transpose(-1, -2).reshape(n, c, h, w))


def _modulated(m: Any, x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    weight = m.weight * m.gate(x.mean((2, 3))).view(n, 1, 1, 1, 1)
    weight = weight * weight.amax((3, 4), keepdim=True).sigmoid()
    y = F.conv2d(x.reshape(1, -1, h, w), weight.reshape(-1, *m.weight.shape[2:]), padding=1, groups=n)
    return y.view(n, -1, h, w)


def _by_latents(m: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    found = m.attend(m.latents.expand(len(x), -1, -1), tokens, tokens, need_weights=False)[0]
    return x + found.mean(1)[..., None, None]


def _turned(m: Any, x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    q, k, v = m.qkv(x.flatten(2).transpose(1, 2)).view(n, h * w, 3, m.heads, m.width).unbind(2)
    steps = torch.outer(torch.arange(h * w), torch.arange(m.width // 2) + 1.0)
    by = torch.polar(torch.ones_like(steps), steps)[:, None]
    q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * by).flatten(3) for t in (q, k))
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return x + m.out(y.transpose(1, 2).reshape(n, h * w, -1)).transpose(1, 2).reshape(n, -1, h, w)


def _most_likely(m: Any, x: Tensor) -> Tensor:
    return x * torch.zeros_like(x).scatter_(3, x.argmax(3, keepdim=True), 1.0)


def _by_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated since torch 2.1, and what vocoders are written with
        return nn.utils.weight_norm(nn.ConvTranspose2d(16, 12, 2, 2))


def _attention_parts() -> dict[str, Any]:
    return {"qkv": nn.Linear(16, 48), "out": nn.Linear(16, 16), "heads": 4, "width": 4}


CASES: dict[str, Callable[[], Middle]] = {
    "a mask for all channels": lambda: Middle(
        lambda m, x: x * m.mask(x).sigmoid().expand_as(x), mask=nn.Conv2d(16, 1, 1)
    ),
    "a mask that is copied": lambda: Middle(
        lambda m, x: x * m.mask(x).expand_as(x).clone().mul_(2), mask=nn.Conv2d(16, 1, 1)
    ),
    "one kernel for all channels": lambda: Middle(_blur),
    "a spatial transformer": lambda: Middle(_warped, where=nn.Linear(16, 6)),
    "a filter of frequencies": lambda: Middle(_filtered, filter=torch.randn(16, 16, 9, 2) / 4),
    "channels of frequencies": lambda: Middle(_in_frequencies, mix=nn.Conv2d(32, 32, 1)),
    "unpooling": lambda: Middle(_unpooled, conv=nn.Conv2d(16, 16, 1)),
    "turned images": lambda: Middle(
        lambda m, x: torch.rot90(m.conv(torch.rot90(x, 1, (2, 3))), -1, (2, 3)), conv=nn.Conv2d(16, 16, 3, padding=1)
    ),
    "running maxima": lambda: Middle(lambda m, x: x.cummax(2).values),
    "a shortcut that is padded": lambda: Middle(
        lambda m, x: m.conv(x) + F.pad(x, (0, 0, 0, 0, 8, 8)), 32, conv=nn.Conv2d(16, 32, 1)
    ),
    "shifted shares": lambda: Middle(_shifted),
    "the shape of another tensor": lambda: Middle(_of_its_shape, into=nn.Linear(256, 24), back=nn.Linear(24, 256)),
    "attention that is linear": lambda: Middle(
        _linear_attention, qkv=nn.Conv2d(16, 48, 1, bias=False), out=nn.Conv2d(16, 16, 1)
    ),
    "a kernel for each sample": lambda: Middle(
        _modulated, 12, weight=torch.randn(1, 12, 16, 3, 3) / 8, gate=nn.Linear(16, 1)
    ),
    "learned queries": lambda: Middle(
        _by_latents, latents=torch.randn(6, 16), attend=nn.MultiheadAttention(16, 4, batch_first=True)
    ),
    "rotary embeddings of complex numbers": lambda: Middle(_turned, **_attention_parts()),
    "one of all places": lambda: Middle(_most_likely),
    "vmap": lambda: Middle(
        lambda m, x: torch.vmap(lambda t: m.mix(t.flatten(1).T).T.unflatten(1, t.shape[1:]))(x), mix=nn.Linear(16, 16)
    ),
    "weight norm of a transposed convolution": lambda: Middle(lambda m, x: m.up(x), 12, up=_by_weight_norm()),
}


@pytest.mark.parametrize("case", CASES)
def test_channels_go(case: str) -> None:
    torch.manual_seed(0)
    model: Any = trained(CASES[case]())
    with untouched(model):
        options: dict[str, Any] = {"scope": "all", "criterion": "random", "policy": "uniform"}
        result: Any = allocator.allocate(model, "60%", example_inputs=IMAGES, **options)
    assert result.model.stem.out_channels < 16
    assert result.certificate.ok
    assert result.certificate.relative_error <= 1e-9
    if case != "weight norm of a transposed convolution":  # zeros have no length to divide by
        _same_as_zeroed(model, result)


def _same_as_zeroed(model: nn.Module, result: allocator.Result) -> None:
    """By hand: what is dropped is zero in every tensor; the outputs are the same."""
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for name in result.allocation.kept.keys() & tensors.keys():
            for dim, stays in enumerate(result.allocation.kept[name]):
                gone = [] if stays is None else sorted({*range(tensors[name].shape[dim])} - {*stays})
                tensors[name].index_fill_(dim, torch.tensor(gone, dtype=torch.long), 0)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-4)


def test_what_a_norm_keeps_is_said_to_go_loosely() -> None:
    model = nn.Sequential(nn.Conv1d(1, 16, 3), nn.GroupNorm(1, 16), nn.Conv1d(16, 1, 3)).eval()
    with pytest.raises(allocator.NothingToAllocateError, match=r"16 channels; norms='loose' lets them go\)"):
        allocator.allocate(model, "60%", example_inputs=torch.zeros(1, 1, 32))
    assert allocator.allocate(model, "60%", example_inputs=torch.zeros(1, 1, 32), norms="loose").certificate.ok


def test_a_channel_that_is_read_by_number_stays_and_those_after_it_go() -> None:
    torch.manual_seed(0)
    model = trained(Middle(lambda m, x: x * x[:, 2:3].sigmoid() + x[:, 1].unsqueeze(1) / math.pi))
    result: Any = allocator.allocate(model, "60%", example_inputs=IMAGES, scope="all", criterion="random")
    assert result.model.stem.out_channels < 16
    assert result.allocation.kept["stem.weight"][0][:2] == [0, 1]


def _by_features(m: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    q, k = m.q(tokens).sigmoid(), m.k(tokens).exp()
    return x + (q @ (k.transpose(1, 2) @ m.v(tokens)) / 64).transpose(1, 2).reshape_as(x)


def test_features_that_are_not_zero_without_their_channels_stay_and_all_else_goes() -> None:
    """Of a sum of products of two activations no weight reads what is dropped, and a sigmoid of nothing is a half."""
    torch.manual_seed(0)
    parts: dict[str, Any] = {"q": nn.Linear(16, 8), "k": nn.Linear(16, 8), "v": nn.Linear(16, 16)}
    model = trained(Middle(_by_features, **parts))
    result: Any = allocator.allocate(model, "60%", example_inputs=IMAGES, scope="all", criterion="random")
    assert result.model.stem.out_channels < 16
    assert (result.model.q.out_features, result.model.k.out_features) == (8, 8)
    said = "products are summed that are not zero where these channels are (bmm) in middle"
    assert any(reason == said.removesuffix(" in middle") for reason, _ in result.graph.reasons())
    _same_as_zeroed(model, result)


def _numbered(m: Any, x: Tensor) -> Tensor:
    scale = x.new_ones(x.shape)
    scale[:, 3] = 2.0
    return x * scale


def _after_a_write(m: Any, x: Tensor) -> Tensor:
    mask = m.mask(x).expand_as(x).clone()
    mask[:, 3] = 2.0
    return x * mask


@pytest.mark.parametrize("run", [_numbered, _after_a_write])
def test_a_constant_of_which_a_part_is_written_by_number_fits_no_other_channels(run: Run) -> None:
    torch.manual_seed(0)
    model = trained(Middle(run, mask=nn.Conv2d(16, 1, 1)))
    result: Any = allocator.allocate(model, "60%", example_inputs=IMAGES, scope="all", criterion="random")
    assert (result.model.stem.out_channels, result.certificate.ok) == (16, True)
    assert result.model.body.out_channels < 32


def _written_later(m: Any, x: Tensor) -> Tensor:
    mask = m.mask(x).expand_as(x).clone()
    return x * mask.mul_(m.scale)


def _written_behind(m: Any, x: Tensor) -> Tensor:
    mask = m.mask(x).expand_as(x).clone()
    same = mask.view_as(mask)
    mask.mul_(torch.arange(x.shape[1], dtype=x.dtype).view(1, -1, 1, 1))
    return x * same


@pytest.mark.parametrize("run", [_written_later, _written_behind])
def test_what_was_expanded_and_written_goes_with_what_was_written(run: Run) -> None:
    torch.manual_seed(0)
    model = trained(Middle(run, mask=nn.Conv2d(16, 1, 1), scale=torch.rand(1, 16, 1, 1)))
    result: Any = allocator.allocate(model, "60%", example_inputs=IMAGES, scope="all", criterion="random")
    kept = result.allocation.kept
    assert (result.model.stem.out_channels == 16) is (run is _written_behind)
    assert run is _written_behind or kept["scale"][1] == kept["stem.weight"][0]
    _same_as_zeroed(model, result)
