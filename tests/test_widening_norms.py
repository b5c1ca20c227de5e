"""Wider streams under norms: each channel as often as any other, so that averages over them stay what they were."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from subjects import IMAGE, untouched, vision_transformer
from test_widening import INITS, added_neurons, check_widened, copies, same_bits
from torch import Tensor, nn

import allocator
from allocator import InputError, NothingToAllocateError, Result
from allocator.graph.even import EvenNeurons
from allocator.pipeline.model import trace_model
from allocator.settings import Settings

NUMBERS = torch.zeros(1, 6)


class HandMadeNorm(nn.Module):
    """A norm as its user wrote it, with or without a mean."""

    def __init__(self, width: int, *, centred: bool, dim: int = -1) -> None:
        super().__init__()
        self.scale, self.centred, self.dim = nn.Parameter(torch.rand(width) + 0.5), centred, dim

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            x = x - x.mean(self.dim, keepdim=True)
        x = x * torch.rsqrt(x.pow(2).mean(self.dim, keepdim=True) + 1e-6)
        return x * (self.scale if self.dim == -1 else self.scale[:, None, None])


class Stream(nn.Module):
    """A residual stream that a norm runs over before each block, and after it, with a part that is read directly."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.first, self.direct = nn.Linear(6, 8), nn.Linear(8, 4)
        self.before, self.up, self.down, self.after = norm(8), nn.Linear(8, 12), nn.Linear(12, 8), norm(8)
        self.place = nn.Parameter(torch.randn(1, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.place
        y = self.after(x + self.down(self.up(self.before(x)).relu()))
        return self.direct(x) + self.head(y)


class Gate(nn.Module):
    """Attention to places by the mean and largest of all channels there (CBAM), a group norm of one group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(1, 8)
        self.where = nn.Conv2d(2, 1, 3, padding=1)
        self.by_hand, self.head = HandMadeNorm(8, centred=True, dim=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        seen = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        y: Tensor = self.head(self.by_hand(x * self.where(seen).sigmoid()))
        return y


def made(model: nn.Module) -> nn.Module:
    """With norms whose scales and shifts differ from channel to channel."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.eval()


def originals(result: Result, inputs: Any) -> Result:
    """What is left without what was added, where norms may run over fewer channels."""
    graph = allocator.trace(result.model, inputs, norms="loose")
    worth = np.where(added_neurons(result, graph), 0.0, 1.0)
    how: dict[str, Any] = {"policy": "global", "norms": "loose", "example_inputs": inputs}
    return allocator.allocate(result.model, flops=result.flops_before, criterion=worth, **how)


NORMS = {
    "layer norm": nn.LayerNorm,
    "RMS norm": nn.RMSNorm,
    "without scales": lambda n: nn.LayerNorm(n, elementwise_affine=False),
    "centred by hand": lambda n: HandMadeNorm(n, centred=True),
    "by hand": lambda n: HandMadeNorm(n, centred=False),
}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("norm", NORMS)
def test_a_stream_under_norms_grows_by_whole_multiples(norm: str, init: Any) -> None:
    model = made(Stream(NORMS[norm]))
    with untouched(model):
        result = allocator.widen(model, factor=3, init=init, example_inputs=NUMBERS)
    wide: Any = result.model
    assert (wide.first.out_features, wide.up.out_features, wide.place.shape) == (24, 36, (1, 24))
    check_widened(model, result, NUMBERS)
    assert result.certificate.relative_error < 1e-9  # type: ignore[operator]
    assert allocator.verify(model, wide, result.allocation, example_inputs=NUMBERS).ok
    if init == "zero":
        again = originals(result, NUMBERS)
        assert again.flops_after == result.flops_before
        assert same_bits(again.model, model)


@pytest.mark.parametrize("init", INITS)
def test_means_and_extremes_of_channels_stay_what_they_were(init: Any) -> None:
    model = made(Gate())
    result = allocator.widen(model, factor=2, init=init, example_inputs=IMAGE)
    wide: Any = result.model
    assert (wide.stem.out_channels, wide.norm.num_channels, wide.norm.num_groups) == (16, 16, 1)
    assert wide.where.in_channels == 2
    check_widened(model, result, IMAGE)


def test_other_factors_leave_a_stream_as_it_is_and_say_so() -> None:
    model = made(Stream(nn.LayerNorm))
    result = allocator.widen(model, factor=2.5, example_inputs=NUMBERS)
    wide: Any = result.model
    assert (wide.first.out_features, wide.up.out_features) == (16, 30)
    result = allocator.widen(model, factor=1.5, example_inputs=NUMBERS)
    wide = result.model
    assert (wide.first.out_features, wide.up.out_features) == (8, 18)
    said = r"8 neurons that a norm averages over (first.weight), which grow to whole multiples only, from factor=2 on"
    assert any(said in note for note in result.notes)
    with pytest.raises(NothingToAllocateError, match="what an average is taken over has 8 neurons, and 2 adds 8 to it"):
        allocator.widen(model, factor=1.5, include=["first", "down"], example_inputs=NUMBERS)


def test_a_budget_repeats_a_stream_where_it_allows_that() -> None:
    model = made(Stream(nn.LayerNorm))
    for budget, width in (("350%", 16), ("250%", 8)):
        result = allocator.widen(model, flops=budget, example_inputs=NUMBERS)
        wide: Any = result.model
        assert wide.first.out_features == width
        check_widened(model, result, NUMBERS, at_most=float(budget[:-1]) / 100 * result.flops_before)


def test_an_allocation_whose_stream_is_no_multiple_is_refused() -> None:
    model, other = made(Stream(nn.LayerNorm)), allocator.Allocation(kept={"first.weight": [list(range(12)), None]})
    with pytest.raises(InputError, match=r"as wide as .*\(first.weight can have 16, and has 12 there\): under a norm"):
        allocator.widen(model, like=other, example_inputs=NUMBERS)
    other = allocator.Allocation(kept={"first.weight": [list(range(16)), None]})
    wide: Any = allocator.widen(model, like=other, example_inputs=NUMBERS).model
    assert (wide.first.out_features, wide.up.out_features) == (16, 12)


class TiedStream(nn.Module):
    """A language model whose embedding is its output layer too, behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.up, self.down = nn.Embedding(30, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 30, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x)
        y: Tensor = self.head(self.norm(tokens + self.down(self.up(tokens).relu())))
        return y


@pytest.mark.parametrize("init", INITS)
def test_a_weight_that_writes_and_reads_a_stream_keeps_it(init: Any) -> None:
    """It would have to be a copy where it writes, and zero or a share where it reads."""
    tokens = torch.randint(0, 30, (2, 5))
    model = made(TiedStream())
    result = allocator.widen(model, factor=2, init=init, example_inputs=tokens)
    wide: Any = result.model
    assert (wide.up.in_features, wide.up.out_features) == (8, 32)
    assert any("one weight writes and reads them, so that no copy can share it (8)" in note for note in result.notes)
    with pytest.raises(NothingToAllocateError, match=r"so that no copy can share it \(8\)$"):
        allocator.widen(model, factor=2, init=init, include=["tokens", "down"], example_inputs=tokens)


def test_copies_in_a_stream_part_after_one_training_step() -> None:
    for init in INITS:
        model = made(Stream(nn.LayerNorm))
        result = allocator.widen(model, factor=2, init=init, example_inputs=NUMBERS)  # type: ignore[arg-type]
        names = ["first.weight", "down.weight"]
        assert all(torch.equal(a, b) for a, b in copies(result, ["first.weight"])), "copies are alike before"
        wide = result.model.train()
        optimiser = torch.optim.SGD(wide.parameters(), lr=0.1)
        wide(torch.randn(32, 6)).square().mean().backward()
        optimiser.step()
        assert not any(torch.equal(a, b) for a, b in copies(result, names))


def test_a_copy_that_differs_is_noticed_without_a_forward() -> None:
    model = made(Stream(nn.LayerNorm))
    result = allocator.widen(model, factor=2, example_inputs=NUMBERS)
    changed = copy.deepcopy(result.model)
    with torch.no_grad():
        changed.first.bias[-1] += 1e-3  # type: ignore[index,union-attr,operator]
    certificate = allocator.verify(model, changed, result.allocation, example_inputs=NUMBERS)
    assert certificate.weights is False
    uneven = copy.deepcopy(result.allocation)
    for each in (uneven.kept, uneven.added["reads"], uneven.added["averaged"]):
        for dims in each.values():
            for dim, places in enumerate(dims):
                if places is not None and max(places) in (7, 15):
                    dims[dim] = [place for place in places if place < 15][: 15 if each is uneven.kept else 7]
    wide = allocator.apply(model, uneven)
    assert not allocator.verify(model, wide, uneven, example_inputs=NUMBERS).structural


def test_averages_stay_where_there_are_equally_many_of_each() -> None:
    graph = trace_model(made(Stream(nn.LayerNorm)), NUMBERS, Settings(), growing=True)
    even = EvenNeurons.of(graph)
    stream = even.number >= 0
    assert (int(stream.sum()), len(np.unique(even.number[stream]))) == (8, 1)
    times = np.ones(graph.size, dtype=np.int64)
    times[~stream] = 3
    assert even.keeps_averages(times)
    times[stream] = 2
    assert even.keeps_averages(times)
    times[np.flatnonzero(stream)[-1]] = 1
    assert not even.keeps_averages(times)


@pytest.mark.parametrize("init", INITS)
def test_a_vision_transformer_becomes_twice_as_wide(init: Any) -> None:
    model = vision_transformer(2)
    result = allocator.widen(model, factor=2, init=init, example_inputs=IMAGE)
    check_widened(model, result, IMAGE)
    block: Any = result.model.get_submodule("blocks.0")
    assert (block.norm1.normalized_shape, block.attn.num_heads, block.mlp.fc1.out_features) == ((64,), 8, 256)
    assert result.model.pos_embed.shape == (1, 5, 64)
    assert not [note for note in result.notes if "widen" in note]
    if init == "zero":
        assert same_bits(originals(result, IMAGE).model, model)


@pytest.mark.parametrize("init", INITS)
def test_a_language_model_becomes_twice_as_wide(init: Any) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model, tokens = transformers.LlamaForCausalLM(config).eval(), torch.arange(9).reshape(1, 9)
    result = allocator.widen(model, factor=2, init=init, example_inputs=tokens)
    assert result.certificate.ok
    assert result.certificate.relative_error <= 1e-9  # type: ignore[operator]
    wide: Any = result.model
    assert wide.model.embed_tokens.weight.shape == (64, 64)
    assert (wide.config.hidden_size, wide.lm_head.in_features) == (64, 64)
    with torch.no_grad():
        torch.testing.assert_close(wide(tokens).logits, model(tokens).logits, rtol=1e-3, atol=1e-5)
    if init == "zero":
        assert same_bits(originals(result, tokens).model, model)
