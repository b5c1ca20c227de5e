"""Digits drawn at varying size and place, and the training on them."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from rich.console import Console
from torch import Tensor, nn

import allocator
from allocator.errors import InputError
from allocator.recipes import demo, digits
from allocator.recipes.configuration import Training
from allocator.recipes.digits import Split, load, place
from allocator.recipes.scalenet import ScaleNet, scalenet_small_seed
from allocator.recipes.training import NonFiniteLossError, evaluate, rate_share, train
from allocator.reporting.pictures import Panel, draw_shares


@pytest.fixture(scope="module")
def splits() -> tuple[Split, Split]:
    return load(side=24, sizes=(8, 20), copies=(2, 3), seed=1)


def test_shapes_and_classes(splits: tuple[Split, Split]) -> None:
    train_split, test_split = splits
    # 1,797 source digits: a fifth, 359, for the test, drawn three times; 1,438 for training, drawn twice.
    assert train_split.images.shape == (2 * 1438, 1, 24, 24)
    assert test_split.images.shape == (3 * 359, 1, 24, 24)
    for split in splits:
        assert split.images.dtype == torch.float32
        assert split.labels.dtype == torch.int64
        assert split.labels.unique().tolist() == list(range(10))
        assert len(split) == len(split.labels) == len(split.sources)


def test_no_source_digit_is_in_both(splits: tuple[Split, Split]) -> None:
    sources = [set(split.sources.tolist()) for split in splits]
    assert not sources[0] & sources[1]
    assert sorted(sources[0] | sources[1]) == list(range(1797))


def test_labels_belong_to_the_sources(splits: tuple[Split, Split]) -> None:
    from sklearn.datasets import load_digits

    target = torch.from_numpy(load_digits().target)
    for split in splits:
        assert torch.equal(split.labels, target[split.sources])


def test_the_seed_decides(splits: tuple[Split, Split]) -> None:
    again = load(side=24, sizes=(8, 20), copies=(2, 3), seed=1)
    other = load(side=24, sizes=(8, 20), copies=(2, 3), seed=2)
    for one, two, three in zip(splits, again, other):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.labels, two.labels)
        assert not torch.equal(one.images, three.images)


def extents(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First row with ink, last row with ink, and the share of the canvas with ink, per image."""
    ink = images[:, 0] > 1e-6
    rows = ink.any(2).float()
    last = rows.shape[1] - 1 - rows.flip(1).argmax(1)
    return rows.argmax(1), last, ink.float().mean((1, 2))


def test_sizes_and_places_vary_within_bounds() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = place(torch.ones(500, 1, 8, 8), 32, (8.0, 28.0), generator)
    first, last, _ = extents(drawn)
    height = last - first + 1
    # A digit of s pixels lights up at most the s + 1 rows it straddles, widened by half a source pixel.
    assert height.min() >= 8
    assert height.max() <= 32
    assert height.float().std() > 4
    assert first.float().std() > 4
    # The ink that is drawn is a square of s x s: its mass, in pixels, spans the sizes asked for.
    mass = drawn.sum((1, 2, 3)).sqrt()
    assert 7.0 < mass.min() < 9.5
    assert 25.0 < mass.max() < 28.5


def test_at_full_size_a_digit_fills_the_canvas() -> None:
    image = torch.rand(1, 1, 8, 8)
    same = place(image, 8, (8.0, 8.0), torch.Generator().manual_seed(0))
    assert torch.allclose(same, image, atol=1e-5)


def centroids(images: Tensor) -> Tensor:
    """Centre of mass (row, column) of (N, H, W) images, in pixels from the canvas's corner: (N, 2)."""
    axes = [torch.arange(length) + 0.5 for length in images.shape[1:]]
    mass = images.sum((1, 2))
    return torch.stack([(images.sum(2) @ axes[0]) / mass, (images.sum(1) @ axes[1]) / mass], 1)


def test_a_drawn_digit_keeps_its_form() -> None:
    """Beside each digit a full square is drawn, which tells size and place; mass and balance must follow."""
    sources, _ = digits._source_digits()
    both = torch.cat([torch.ones_like(sources), sources], 1)
    square, digit = place(both, 48, (16.0, 40.0), torch.Generator().manual_seed(0)).double().unbind(1)
    size = square.sum((1, 2)).sqrt()
    mass = sources[:, 0].mean((1, 2)) * size**2
    assert torch.allclose(digit.sum((1, 2)), mass, rtol=0.05)
    offset = (centroids(sources[:, 0]) - 4) * (size / 8)[:, None]
    moved = centroids(digit.float()) - centroids(square.float())
    assert (moved - offset).abs().max() < 0.5
    # A digit drawn upside down or on its side would be off by more than that.
    assert (moved + offset).abs().max() > 2
    assert (moved - offset.flip(1)).abs().max() > 2


@pytest.mark.parametrize("sizes", [(0, 8), (12, 10), (8, 40)])
def test_sizes_that_do_not_fit(sizes: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="0 < smallest <= largest <= 32"):
        load(side=32, sizes=sizes)


@pytest.mark.parametrize(("share", "copies"), [(0.0, (1, 1)), (1.0, (1, 1)), (0.2, (0, 1))])
def test_empty_splits(share: float, copies: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="both splits"):
        load(test_share=share, copies=copies)


def small_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, 2, 2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(4),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def test_training_learns_and_is_deterministic() -> None:
    splits = load(side=12, sizes=(10, 12))
    one, two, start = small_net(), small_net(), small_net()
    history = train(one, splits[0], 3, 0.05, progress=False)
    train(two, splits[0], 3, 0.05, progress=False)
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values()):
        assert torch.equal(a, b), name
    assert len(history.loss) == 3
    assert history.loss[2] < history.loss[0]
    assert history.seconds > 0
    # Ten classes: chance is 0.1.
    assert evaluate(start, splits[1]) < 0.25
    assert evaluate(one, splits[1]) > 0.8
    assert not one.training


def test_evaluate_counts_and_changes_nothing(splits: tuple[Split, Split]) -> None:
    class Always(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * nn.functional.one_hot(self.norm(x).new_full((len(x),), 7).long(), 10).float()

    model = Always().train()
    before = copy.deepcopy(model.state_dict())
    accuracy = evaluate(model, splits[1], batch_size=100)
    assert accuracy == pytest.approx((splits[1].labels == 7).float().mean().item())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nan_stops_and_keeps_the_weights(splits: tuple[Split, Split]) -> None:
    images = splits[0].images.clone()
    images[:] = float("nan")
    broken = Split(images, splits[0].labels, splits[0].sources)
    model = small_net()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(NonFiniteLossError, match=r"the loss became nan at learning rate .*not finite"):
        train(model, broken, 1, 0.1, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))


def test_bad_training_input(splits: tuple[Split, Split]) -> None:
    empty = Split(torch.zeros(0, 1, 8, 8), torch.zeros(0).long(), torch.zeros(0).long())
    with pytest.raises(InputError, match="got 0 images"):
        train(small_net(), empty, 1)
    with pytest.raises(InputError, match="none"):
        evaluate(small_net(), empty)
    with pytest.raises(InputError, match="epochs=0"):
        train(small_net(), splits[0], 0)


def test_cosine_schedule() -> None:
    rates = [rate_share(Training(10, warmup=0.5), step, 10) for step in range(100)]
    # Five steps of warm-up, the peak at the sixth, then down to nearly nothing.
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert len(set(rates[5:])) == 95
    assert rates[99] < 1e-3


def test_the_bar_shows_loss_accuracy_and_time_left(splits: tuple[Split, Split]) -> None:
    output = io.StringIO()
    console = Console(file=output, width=120, force_terminal=True)
    train(small_net(), splits[0], 1, 0.05, description="tiny net", console=console)
    line = output.getvalue()
    for part in ("tiny net", "loss", "accuracy", "left", "100%"):
        assert part in line


def test_the_picture_is_written(tmp_path: Path) -> None:
    parts = {"layer1.0": {"full size": 4, "pooled by 2": 2}, "layer2.0": {"full size": 1, "pooled by 2": 1}}
    path = tmp_path / "shares.png"
    draw_shares([Panel("learned", parts), Panel("even", parts)], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_the_demo_does_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--quick", "--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    for part in ("seed", "learned, fine-tuned", "even, fine-tuned", "6,919,428,096", "under the budget"):
        assert part in printed
    assert re.search(r"^seed network: epoch 1 of 3, loss .*, about \d+ s left$", printed, re.MULTILINE)
    assert "Training, allocating and comparing take about half a minute" in printed
    names = {"scalenet-digits.safetensors", "allocation.json", "shares.png"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names
    assert all(name in printed for name in names)

    torch.manual_seed(5)
    fresh = scalenet_small_seed(48, blocks=(2, 2, 2)).eval()
    small = allocator.apply(fresh, tmp_path / "new" / "allocation.json")
    assert isinstance(small, ScaleNet)
    example = torch.zeros(1, 1, 48, 48)
    halved = FlopCountAnalysis(small.eval(), example).unsupported_ops_warnings(False).total()
    full = FlopCountAnalysis(fresh, example).unsupported_ops_warnings(False).total()
    assert 0.495 * full <= halved <= 0.5 * full
    # Learned shares are uneven: not all scales of a block have the same number of neurons.
    assert any(len(set(row[:-1])) > 1 for row in small.rows())
