"""Attention loses whole heads, with the attribute that counts them; where the forward cannot follow, heads stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from subjects import untouched
from torch import Tensor, nn

import allocator

WEAK = ((0, 1), (1, 2), (1, 3))  # (block, head) with the smallest weights
TOKENS = torch.zeros(1, 9, 24)


class Attention(nn.Module):
    """Four heads of six; `flexible` reads sizes of its own, else the width of a head is computed from the stream."""

    def __init__(self, *, flexible: bool = True, biased: bool = False, normed: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6) if normed else nn.Identity()
        self.num_heads, self.head_dim, self.scale, self.flexible = 4, 6, 6**-0.5, flexible
        self.attn_dim = 24
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)
        self.table = nn.Parameter(torch.randn(25, 4)) if biased else None
        self.register_buffer("places", torch.arange(81).reshape(9, 9) % 25)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        width = self.head_dim if self.flexible else c // self.num_heads
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * self.scale) @ self.norm(k).transpose(-2, -1)
        if self.table is not None:
            scores = scores + self.table[self.get_buffer("places").view(-1)].view(n, n, -1).permute(2, 0, 1)
        y = (scores.softmax(-1) @ v).transpose(1, 2)
        return self.proj(y.reshape(b, n, self.attn_dim if self.flexible else c))


class Mixed(nn.Module):
    """Attention whose heads are mixed with one another and normalised together, so that none can go."""

    def __init__(self, heads: int = 4, *, mixed: bool = True) -> None:
        super().__init__()
        self.heads, self.scale = heads, 6**-0.5
        self.qkv, self.proj = nn.Linear(24, 3 * 6 * heads, bias=False), nn.Linear(6 * heads, 24)
        self.mix = nn.Parameter(torch.randn(heads, heads)) if mixed else None
        self.norm = nn.LayerNorm(heads) if mixed else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        if self.mix is not None and self.norm is not None:
            mixed = torch.einsum("b h i j, h g -> b g i j", weights, self.mix)
            weights = self.norm(mixed.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y: Tensor = self.proj((weights @ v).transpose(1, 2).flatten(2))
        return y


class Block(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(24), Attention(**options)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(24), nn.Linear(24, 96), nn.Linear(96, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


def transformer(**options: bool) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(Block(**options), Block(**options), nn.LayerNorm(24), nn.Linear(24, 5)).eval()
    for block, head in WEAK:
        with torch.no_grad():
            model.get_parameter(f"{block}.attn.qkv.weight").view(3, 4, 6, 24)[:, head] *= 0.1
    return model


@pytest.mark.parametrize("normed", [False, True], ids=["", "each normalised"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "relative positions"])
def test_attention_loses_whole_heads(biased: bool, normed: bool) -> None:
    model = transformer(biased=biased, normed=normed)
    with untouched(model):
        result = allocator.allocate(model, "50%", example_inputs=TOKENS, criterion="magnitude", policy="global")
    assert result.certificate.ok
    assert result.certificate.exact
    assert result.flops_after <= result.flops_asked
    for i in range(2):
        small: Any = result.model.get_submodule(f"{i}.attn")
        rows = result.allocation.kept.get(f"{i}.attn.qkv.weight", [None])[0]
        assert small.qkv.out_features == 3 * 6 * small.num_heads
        assert small.proj.in_features == small.attn_dim == 6 * small.num_heads
        assert small.head_dim == 6
        if biased:
            assert small.table.shape == (25, small.num_heads)
        heads = {row // 6 % 4 for row in (range(72) if rows is None else rows)}
        assert len(heads) == small.num_heads, "heads are kept in part"
        assert heads == set(range(4)) - {head for block, head in WEAK if block == i}
    result.model(torch.randn(2, 9, 24)).sum().backward()


def test_without_a_head_the_outputs_are_those_of_a_zeroed_projection() -> None:
    """Independent of the certificate: by hand, the columns of the projection that read the dropped heads are zero."""
    model = transformer()
    result = allocator.allocate(
        model, "85%", example_inputs=TOKENS, criterion="magnitude", policy="global", exclude=["*.fc1", "*.fc2"]
    )
    for i in range(2):
        kept = result.allocation.kept.get(f"{i}.attn.proj.weight", [None, None])[1]
        gone = [] if kept is None else sorted(set(range(24)) - set(kept))
        with torch.no_grad():
            model[i].attn.proj.weight[:, gone] = 0
    x = torch.randn(3, 9, 24)
    torch.testing.assert_close(result.model(x), model(x))
    assert result.flops_after < 0.85 * result.flops_before


def test_heads_whose_width_is_computed_from_the_stream_stay_and_are_named() -> None:
    model = transformer(flexible=False)
    with untouched(model):
        result = allocator.allocate(model, "60%", example_inputs=TOKENS, criterion="magnitude")
    assert result.certificate.ok
    small: Any = result.model
    assert [small[i].attn.num_heads for i in range(2)] == [4, 4]
    assert [small[i].attn.qkv.out_features for i in range(2)] == [72, 72]
    assert small[0].fc1.out_features < 96
    assert any("0.attn stay" in note for note in result.notes), result.notes


def test_two_heads_stay_at_the_smallest_figure() -> None:
    model = transformer()
    with pytest.raises(allocator.BudgetError) as caught:
        allocator.allocate(model, "1%", example_inputs=TOKENS, criterion="magnitude")
    figure = float(caught.value.reachable or 0)
    result = allocator.allocate(model, figure, example_inputs=TOKENS, criterion="magnitude")
    small: Any = result.model
    assert [small[i].attn.num_heads for i in range(2)] == [2, 2]
    assert [small[i].fc1.out_features for i in range(2)] == [1, 1]
    assert not any(" stay" in note for note in result.notes), result.notes


@pytest.mark.parametrize(("heads", "mixed"), [(4, True), (2, False)], ids=["mixed", "two of them"])
def test_heads_that_cannot_go_get_narrower_all_alike(heads: int, mixed: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Mixed(heads, mixed=mixed), nn.LayerNorm(24), nn.Linear(24, 5)).eval()
    with untouched(model):
        result = allocator.allocate(model, "60%", example_inputs=TOKENS, criterion="magnitude")
    assert result.certificate.ok
    assert result.certificate.exact
    small: Any = result.model
    assert small[0].heads == heads
    rows: Any = result.allocation.kept["0.qkv.weight"][0]
    per_head = [[row % 6 for row in rows if row // 6 == head] for head in range(3 * heads)]
    for part in range(3):  # queries, keys and values each keep the same places of every head
        assert all(places == per_head[part * heads] for places in per_head[part * heads : (part + 1) * heads])
    assert per_head[0] == per_head[heads], "a query's place is multiplied with the key's"
    assert min(map(len, per_head)) < 6
    assert small(torch.randn(2, 5, 24)).shape == (2, 5, 5)


class Shared(nn.Module):
    """Queries of several heads that share keys and values, as of language models; one number is the width of all."""

    def __init__(self, heads: int, shared: int) -> None:
        super().__init__()
        self.head_dim, self.times = 6, heads // shared
        self.q_proj, self.o_proj = nn.Linear(24, 6 * heads), nn.Linear(6 * heads, 24)
        self.k_proj, self.v_proj = (nn.Linear(24, 6 * shared) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (t[:, :, None].expand(-1, -1, self.times, -1, -1).flatten(1, 2) for t in (k, v))
        scores = (q @ k.transpose(-2, -1) / 6**0.5).softmax(-1)
        y: Tensor = self.o_proj((scores @ v).transpose(1, 2).flatten(2))
        return y


@pytest.mark.parametrize(("first", "budget"), [("q_proj", "90%"), ("v_proj", "80%"), ("", "60%")])
@pytest.mark.parametrize(("heads", "shared"), [(4, 2), (8, 2), (4, 1)])
def test_heads_that_share_two_keys_and_values_get_narrower(heads: int, shared: int, first: str, budget: str) -> None:
    """Whichever of the layers loses its neurons first."""
    torch.manual_seed(0)
    model = nn.Sequential(Shared(heads, shared), nn.LayerNorm(24), nn.Linear(24, 5)).eval()
    for name, parameter in model.named_parameters():
        parameter.data[::2] *= 0.01 if first and first in name else 1
    with untouched(model):
        result = allocator.allocate(model, budget, example_inputs=TOKENS, criterion="magnitude", policy="global")
    assert result.certificate.ok
    small: Any = result.model[0]  # type: ignore[index]
    assert small.head_dim < 6
    for layer, count in ((small.q_proj, heads), (small.k_proj, shared), (small.v_proj, shared)):
        assert layer.out_features == count * small.head_dim
    assert not any(" stay" in note for note in result.notes), result.notes


def test_heads_that_share_four_keys_and_values_go_with_these() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Shared(8, 4), nn.LayerNorm(24), nn.Linear(24, 5)).eval()
    small: Any = allocator.allocate(model, "60%", example_inputs=TOKENS, criterion="magnitude").model[0]  # type: ignore[index]
    assert small.head_dim == 6
    assert small.q_proj.out_features == 2 * small.k_proj.out_features < 48


class Remembering(Attention):
    """Relative positions that are gathered once for every device, as LeViT does it in eval mode."""

    def __init__(self) -> None:
        super().__init__(biased=True)
        self.remembered: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        key = str(x.device)
        if key not in self.remembered:
            table: Any = self.table
            self.remembered[key] = table[self.get_buffer("places").view(-1)].view(n, n, -1).permute(2, 0, 1).detach()
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q @ k.transpose(-2, -1) + self.remembered[key]).softmax(-1) @ v).transpose(1, 2)
        result: Tensor = self.proj(y.reshape(b, n, self.attn_dim))
        return result


def test_what_was_remembered_of_all_heads_is_not_what_is_left() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Remembering(), nn.LayerNorm(24), nn.Linear(24, 5)).eval()
    model(torch.randn(1, 9, 24))
    result = allocator.allocate(model, "60%", example_inputs=TOKENS, criterion="magnitude")
    assert result.certificate.ok
    small: Any = result.model.get_submodule("0")
    assert small.num_heads < 4
    result.model(torch.randn(2, 9, 24))
    assert small.remembered["cpu"].shape == (small.num_heads, 9, 9)
    before: Any = model[0].remembered
    assert before["cpu"].shape == (4, 9, 9)


class Queries(nn.Module):
    """Learned queries that read tokens, as a detector's decoder does; what asks depends on no input."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.queries = 6, nn.Parameter(torch.randn(5, 24))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(24, 24) for _ in range(4))
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        asked = self.queries.expand(len(x), -1, -1)
        given = (self.q_proj(asked), self.k_proj(x), self.v_proj(x))
        q, k, v = (
            each.view(len(x), -1, each.shape[-1] // self.head_dim, self.head_dim).transpose(1, 2) for each in given
        )
        y = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        output: Tensor = self.head(self.o_proj(y))
        return output


def test_learned_queries_lose_the_heads_of_the_tokens_that_they_read() -> None:
    torch.manual_seed(0)
    model = Queries().eval()
    with torch.no_grad():
        for layer in (model.q_proj, model.k_proj, model.v_proj):
            layer.weight[6:12] *= 0.1
    include = ["q_proj", "k_proj", "v_proj"]
    result = allocator.allocate(model, "85%", example_inputs=TOKENS, criterion="magnitude", include=include)
    assert not any(" stay" in note for note in result.notes), result.notes
    rows = [*range(6), *range(12, 24)]
    assert [result.allocation.kept[f"{name}_proj.weight"][0] for name in "qkv"] == [rows] * 3
    assert result.certificate.ok
